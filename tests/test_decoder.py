"""MAE's decoder as further blocks: its tokens, how a file keeps it, and every program that reads it."""

import itertools
import json

import pytest
import torch

import main_analyze_attention
import main_linprobe
import main_pretrain
from api import encoder
from cli.console import parse
from data_sets import demo
from encoders.load import load_encoder
from models_mae import DECODERS, MaskedAutoencoder, WithDecoder, patchify, with_decoder
from models_vit import build_vit
from probing.bank import ProbeBank, ProbeSpec
from scripts import plot_depth
from util.tensor_files import load_plain_or_safetensors


def autoencoder(**decoder):
    torch.manual_seed(0)
    return MaskedAutoencoder(build_vit("vit_demo_patch8"), **{**DECODERS["vit_demo_patch8"], **decoder}).double().eval()


def test_blocks_are_those_of_the_autoencoder_without_masked_patches():
    model = autoencoder()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    steps = list(WithDecoder(model).trace(images))
    assert [step.index for step in steps] == list(range(8))
    kept, masked = torch.arange(64).expand(3, -1), torch.empty(3, 0, dtype=torch.long)
    visible = model.encode(patchify(images, 8), kept)
    torch.testing.assert_close(model.encoder.norm(steps[5].out), visible)
    torch.testing.assert_close(steps[7].out, model.decode(visible, kept, masked))
    for before, after in itertools.pairwise(steps[6:]):
        assert torch.equal(before.out, after.x)
    attention = (steps[7].q @ steps[7].k.mT * steps[7].scale).softmax(-1)
    block = model.decoder_blocks[1].attn
    torch.testing.assert_close(block.proj((attention @ steps[7].v).transpose(1, 2).flatten(2)), steps[7].update)


def test_positions_follow_the_grid_of_the_images():
    model = WithDecoder(autoencoder())
    for size in (64, 96):
        images = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert model(images, [7])[7].patches.shape == (1, (size // 8) ** 2, 96)


def test_a_bank_reads_blocks_of_both_widths():
    model = WithDecoder(autoencoder(decoder_num_heads=8)).float().requires_grad_(False)
    heads = ("cls", "abmilp", "ap4", "both", "pos@4-7", "fused@6-7", "earlier@6-7", "cls@0+abmilp@7")
    specs = [ProbeSpec(head, block, 0.1, 0) for head in heads[:4] for block in (5, 7)]
    specs += [ProbeSpec(head, 7, 0.1, 0) for head in heads[4:]]
    bank = ProbeBank(specs, model, (8, 8), 10).eval()
    features = model(torch.randn(4, 3, 64, 64), bank.blocks)
    logits = bank(features)
    for number, (spec, probe) in enumerate(zip(specs, bank.probes, strict=True)):
        blocks = {block: features[block] for block in spec.blocks}
        alone = ProbeBank([spec], model, (8, 8), 10)
        alone.load_probe_states({spec.name: probe.state_dict()})
        torch.testing.assert_close(logits[number], alone.eval()(blocks)[0])
    assert bank.probes[0].aggregation.width == 128 and bank.probes[1].aggregation.width == 96
    assert next(p for s, p in zip(specs, bank.probes, strict=True) if s.head == "pos@4-7").aggregation.width == 448
    for head in ("alf@5-6", "fused@5-6", "earlier@5-6"):
        with pytest.raises(ValueError, match=r"needs blocks of one width, got \(128, 96\)"):
            ProbeBank([ProbeSpec(head, 6, 0.1, 0)], model, (8, 8), 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    demo.generate(folder / "data", 40, 20, workers=1)
    flags = "--model vit_demo_patch8 --epochs 1 --warmup_epochs 0 --batch_size 16 --amp float32 --num_workers 0"
    argv = [*flags.split(), "--keep_decoder", "--data_path", str(folder / "data"), "--output_dir", str(folder / "mae")]
    main_pretrain.main(parse(main_pretrain.get_args_parser(), argv))
    return folder


def test_the_encoder_file_keeps_the_decoder_and_stays_an_encoder_file(trained):
    path = str(trained / "mae" / "encoder.safetensors")
    state = load_plain_or_safetensors(trained / "mae" / "encoder.safetensors")
    plain, both = load_encoder(path), load_encoder(path, decoder=True)
    assert (plain.backbone.depth, both.backbone.depth, both.backbone.widths) == (6, 8, (128,) * 6 + (96,) * 2)
    assert both.record["decoder"] == {"first_block": 6, "depth": 2, "width": 96, "heads": 4}
    for name, tensor in both.backbone.autoencoder.published_state_dict().items():
        assert torch.equal(tensor, state[name])
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.backbone(images, [5])[5].patches, both.backbone(images, [5, 7])[5].patches)
    (checkpoint,) = (trained / "mae").glob("checkpoint-*.pth")
    again = load_encoder(str(checkpoint), "vit_demo_patch8", decoder=True).backbone
    assert torch.equal(again(images, [7])[7].cls, both.backbone(images, [7])[7].cls)


def test_programs_read_the_decoders_blocks(trained, capsys, request):
    common = f"--model vit_demo_patch8 --finetune {trained}/mae/encoder.safetensors --decoder --amp float32".split()
    common += ["--num_workers", "0", "--data_path", str(trained / "data")]
    argv = [*common, "--preset", "small", "--l2", "1", "--output_dir", str(trained / "probes")]
    argv += ["--cls_features", "cls", "pos", "--return_block", "0", "5", "6", "7"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))
    results = json.loads((trained / "probes" / "results.json").read_text())
    assert results["encoder"]["decoder"]["first_block"] == 6
    parameters = {probe["block"]: probe["parameters"] for probe in results["probes"].values()}
    assert parameters == {0: 1290, 5: 1290, 6: 970, 7: 970}

    argv = [*common, "--metrics", "all", "--label", "MAE", "--output_dir", str(trained / "attention")]
    main_analyze_attention.main(parse(main_analyze_attention.get_args_parser(), argv))
    attention = json.loads((trained / "attention" / "MAE" / "attention.json").read_text())
    assert all(len(metric["blocks"]) == 8 for metric in attention["metrics"].values())

    pair = f"MAE={trained}/probes,{trained}/attention/MAE/attention.json"
    capsys.readouterr()
    request.getfixturevalue("rendered")
    plot_depth.main(parse(plot_depth.get_args_parser(), [pair, "--output", str(trained / "depth.png")]))
    assert (trained / "depth.png").stat().st_size > 10_000
    plot_depth.main(parse(plot_depth.get_args_parser(), [f"MAE={trained}/probes", "--output", str(trained / "d.svg")]))
    assert "decoder begins" in (trained / "d.svg").read_text()
    run = json.loads((trained / "probes" / "args.json").read_text())
    assert run["args"]["decoder"] is True


def test_attention_of_blocks_with_fewer_heads_ends_in_nan(trained):
    state = autoencoder().float()
    backbone = with_decoder(state.encoder, state.published_state_dict(), 2)
    frozen = encoder(str(trained / "mae" / "encoder.safetensors"), decoder=True)
    frozen.backbone = backbone
    values = frozen.attention(torch.randn(2, 3, 64, 64), ["cls_patch_entropy"])["cls_patch_entropy"]
    assert values.shape == (8, 2, 4) and values[6:, :, 2:].isnan().all() and values[:6].isfinite().all()


def test_mistakes_are_one_line(trained, tmp_path):
    with pytest.raises(ValueError, match=r"--decoder: demo/mae\.safetensors: it holds no decoder.*--keep_decoder"):
        load_encoder("demo/mae.safetensors", decoder=True)
    with pytest.raises(ValueError, match="--decoder needs weights"):
        load_encoder("", "vit_demo_patch8", decoder=True)
    state = autoencoder().float()
    damaged = {key: value for key, value in state.published_state_dict().items() if "decoder_blocks.1.norm1" not in key}
    with pytest.raises(ValueError, match=r"cannot be read.*norm1"):
        with_decoder(state.encoder, damaged, 4)
    parser = main_pretrain.get_args_parser()
    argv = ["--data_path", str(tmp_path), "--contrastive_weight", "1", "--keep_decoder", "--model", "vit_demo_patch8"]
    with pytest.raises(ValueError, match="--keep_decoder has no effect at --contrastive_weight 1"):
        main_pretrain.main(parse(parser, argv))
