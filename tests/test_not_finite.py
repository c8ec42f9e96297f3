"""Values that are not finite are blamed on their cause: weights, precision, attention, and the rate only last."""

import pytest
import torch

import main_linprobe
from cli.console import parse, run_main
from encoders.load import save_encoder
from models_vit import build_vit


@pytest.fixture
def command(image_folder, tiny, tmp_path):
    return [
        "--model", tiny, "--data_path", str(image_folder), "--amp", "float32", "--device", "cpu", "--num_workers", "0",
        "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "6", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip


def saved(tiny, path, change):
    """An encoder's file whose weights `change` has changed."""
    torch.manual_seed(0)
    state = build_vit(tiny).state_dict()
    change(state)
    save_encoder(path, state, {"family": "mae"})
    return ["--finetune", str(path)]


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(main_linprobe.main, parse(main_linprobe.get_args_parser(), argv))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and stopped.value.code in (1, 2)
    return error


def overflow(state):
    state["blocks.1.mlp.fc2.weight"] *= 1e5
    state["blocks.1.mlp.fc2.bias"] += 1e5


def nan(state):
    state["blocks.1.attn.proj.weight"][0, 0] = torch.nan


def huge(state):
    state["blocks.1.mlp.fc2.bias"] += 1e38
    state["blocks.2.mlp.fc2.bias"] += 3e38


WAYS = {
    "train": [],
    "cache": ["--cache_views", "1"],
    "learned cache": ["--cls_features", "abmilp", "--cache_views", "1"],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("change", "amp", "message"),
    [
        (nan, "float32", "blocks.1.attn.proj.weight"),
        (overflow, "float16", "--amp bfloat16"),
        (huge, "float32", "overflow in float32"),
    ],
)
def test_tokens_that_are_not_finite_are_blamed_on_the_encoder(
    command, tiny, tmp_path, capsys, way, change, amp, message
):
    encoder = saved(tiny, tmp_path / "encoder.safetensors", change)
    error = error_of([*command, *way, *encoder, "--amp", amp], capsys)
    assert message in error and "blr" not in error and "rate" not in error
    if change is overflow:  # the advice works
        main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, *way, *encoder, "--amp", "bfloat16"]))


def test_only_probes_that_diverge_by_themselves_are_told_to_lower_the_rate(command, tiny, tmp_path, capsys):
    encoder = saved(tiny, tmp_path / "encoder.safetensors", lambda state: None)
    error = error_of([*command, *encoder, "--optimizer", "sgd", "--blr", "3e39"], capsys)
    assert "lower the learning rate" in error
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, *encoder, "--optimizer", "sgd"]))


@pytest.mark.parametrize("head", ["attn-mn", "attn-lcte"])
def test_attention_that_reaches_no_patch_is_named(command, tiny, tmp_path, capsys, head):
    def attend_to_cls(state):
        """[cls] tokens of norm 1e4 attend to themselves: the weights of all patches underflow to 0."""
        state["cls_token"] += 1e4 * torch.randn(state["cls_token"].shape)
        for block in range(3):
            state[f"blocks.{block}.attn.qkv.weight"][32:64] = state[f"blocks.{block}.attn.qkv.weight"][:32] * 100

    encoder = saved(tiny, tmp_path / "encoder.safetensors", attend_to_cls)
    error = error_of([*command, *encoder, "--cls_features", head], capsys)
    assert "attention to its patches is 0" in error and head in error


def test_damage_after_the_training_images_is_seen_in_the_test_images_and_neighbours(command, tiny, tmp_path):
    """Evaluation and k-NN check what they read themselves."""
    from engine_linprobe import evaluate, pooled
    from probing.bank import ProbeBank, ProbeSpec
    from probing.frozen import FrozenTokens
    from util.scores import Tally

    backbone = build_vit(tiny)
    bank = ProbeBank([ProbeSpec("cls", 2, 0.1, 0)], backbone, (4, 4), 3)
    backbone.cls_token.data.fill_(torch.inf)

    class Batch:
        image, label, index = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1])

    tokens, device = FrozenTokens(backbone, (2,), torch.float32), torch.device("cpu")
    with pytest.raises(ValueError, match="cls_token holds NaN or infinity"):
        evaluate(bank, tokens, [Batch], device, Tally(1, 3))
    with pytest.raises(ValueError, match="cls_token holds NaN or infinity"):
        pooled(bank, tokens, [Batch], device)
