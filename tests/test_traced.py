"""Encoders that their own library runs: the library's own tokens, statistics of its own attention, in every program."""

import contextlib
import copy
import json
import os
import re
import shutil
import sys
import weakref
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_models_mae import hugging_face_names
from torch import nn
from traced_models import MODELS, TRACED, difference, keep, options_of, randomised, save_model

import api
import main_analyze_attention
import main_linprobe
from cli.console import parse
from data_sets.views import eval_transform
from encoders.libraries import Loaded, Pixels
from encoders.load import load_encoder, save_encoder
from encoders.traced import TracedEncoder
from models_vit import Backbone, VisionTransformer
from scripts import inspect_checkpoint

transformers, open_clip = pytest.importorskip("transformers"), pytest.importorskip("open_clip")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BEYOND_CLS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
REAL = SHARED / "data/real_encoders/dinov2_vits14_fp16.safetensors"
REFUSED = {"Hiera": "blocks.0.attn computes attention in windows", "Swin": "no attention call was seen"}
TRACEABLE = [name for name in MODELS if name not in REFUSED]
RUN = ["--amp", "float32", "--device", "cpu", "--num_workers", "0", "--input_size", "32"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: what --finetune takes}; saved once."""
    models: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in models:
            models[name] = save_model(name, tmp_path_factory.mktemp("model"))
        return models[name]

    return of


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def explicit_attention(backbone: TracedEncoder, finetune: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """(B,H,N,N) of each block, as the library computes it without fused attention."""
    model, probabilities = backbone.model, []
    if finetune.startswith("hf:"):
        config = copy.deepcopy(model.config)
        model = transformers.AutoModel.from_pretrained(finetune[3:], config=config, attn_implementation="eager")
        model.config.output_attentions = True
        return list(backbone.run(model.eval(), pixels).attentions)

    def weights(module: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
        return args, {**options, "need_weights": True, "average_attn_weights": False}

    blocks = model.transformer.resblocks if finetune.startswith("open_clip:") else model.blocks
    with contextlib.ExitStack() as hooks:
        for attention in (block.attn for block in blocks):
            if isinstance(attention, nn.MultiheadAttention):
                hooks.callback(attention.register_forward_pre_hook(weights, with_kwargs=True).remove)
                hooks.callback(
                    attention.register_forward_hook(lambda m, args, out: probabilities.append(out[1])).remove
                )
            else:
                attention.fused_attn = False
                hooks.callback(setattr, attention, "fused_attn", True)
                keep = attention.attn_drop.register_forward_pre_hook(lambda m, args: probabilities.append(args[0]))
                hooks.callback(keep.remove)
        model(pixels)
    return probabilities


def flow_of(attention: torch.Tensor, prefix: int, has_cls: bool) -> dict[str, torch.Tensor]:
    """Some of METRICS, of explicit attention (B,H,N,N): as the paper defines them."""
    own = attention.diagonal(dim1=-2, dim2=-1)
    rows = attention[..., prefix:] / attention[..., prefix:].sum(-1, keepdim=True)
    entropy = torch.special.entr(rows).sum(-1)
    flow = {"patch_self_attention": own[..., prefix:].mean(-1), "patch_patch_entropy": entropy[..., prefix:].mean(-1)}
    if has_cls:
        flow |= {"cls_self_attention": own[..., 0], "cls_patch_entropy": entropy[..., 0]}
        flow |= {"patch_cls_attention": attention[..., prefix:, 0].mean(-1)}
        if prefix > 1:
            flow |= {"cls_register_attention": attention[..., 0, 1:prefix].sum(-1)}
    return flow


@pytest.mark.parametrize("name", TRACEABLE)
def test_tokens_and_attention_are_those_of_the_library(name, saved):
    encoder, pixels = api.encoder(saved(name)), images()
    backbone = encoder.backbone
    assert isinstance(backbone, Backbone) and backbone.depth == 2 and backbone.num_heads == 2
    assert difference(backbone, pixels) <= (1e-5 if name == "CLIP, open_clip" else 0)
    metrics, expected = encoder.attention(pixels), explicit_attention(backbone, saved(name), pixels)
    for block, attention in enumerate(expected):
        for metric, values in flow_of(attention.double(), backbone.num_prefix_tokens, backbone.has_cls).items():
            torch.testing.assert_close(metrics[metric][block].double(), values, rtol=1e-5, atol=1e-5, msg=metric)
    with torch.no_grad():
        features = backbone(pixels, [0, 1], pooled=bool(backbone.pooled))
        output = backbone.run(backbone.model, pixels)
    assert not features[0].pooled
    own = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    for kind, width in backbone.pooled.items():
        assert features[1].pooled[kind].shape == (3, width)
        torch.testing.assert_close(features[1].pooled[kind], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TRACEABLE)
def test_programs_take_it(name, saved, image_folder, tmp_path):
    argv = ["--data_path", str(image_folder), "--finetune", saved(name), *RUN, "--output_dir"]
    main_analyze_attention.main(parse(main_analyze_attention.get_args_parser(), [*argv, ""]))
    flags = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "12", "--cls_features", "pos", "abmilp"]
    own = list(load_encoder(saved(name), "file").backbone.pooled)
    argv += [str(tmp_path), *flags, *own, "--cache_views", "1"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["probes"]) == 2 + len(own) and results["args"]["model"] == "file"
    for head in own:
        probe = api.probe(tmp_path, head=head)
        assert probe(torch.zeros(1, 3, probe.encoder.size, probe.encoder.size)).logits.shape == (1, 3)
    assert results["encoder"].keys() >= {"model", "source", "family", "version", "revision", "sha256", "preprocessing"}


def test_several_are_analysed_in_one_run(saved, image_folder, pretrained, tmp_path, monkeypatch):
    weights = [str(pretrained), saved("DINOv2 with registers"), saved("EVA-02"), saved("CLIP, open_clip")]
    argv = ["--data_path", str(image_folder), "--finetune", *weights, "--label", "A", "B", "C", "D", *RUN]
    argv += ["--model", "vit_demo_patch8", "--num_images", "4", "--output_dir", str(tmp_path)]
    main_analyze_attention.main(parse(main_analyze_attention.get_args_parser(), argv))
    results = [json.loads((tmp_path / label / "attention.json").read_text()) for label in "ABCD"]
    assert [result["encoder"]["family"] for result in results] == ["mae", "transformers", "timm", "open_clip"]
    assert results[0]["args"]["model"] == ["vit_demo_patch8", "file", "file", "file"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(name, saved):
    with pytest.raises(ValueError, match=rf"cannot be traced: {REFUSED[name]}"):
        load_encoder(saved(name), "file", size=options_of(name)["img_size"])


def test_the_table_of_the_page_is_that_of_the_code():
    keep(ROOT / "docs" / "encoders.md", write=False)


# ---- the three routes of one MAE


def of_hugging_face(state: dict[str, torch.Tensor], dinov2: bool) -> dict[str, torch.Tensor]:
    """A state dict under timm's names -> the names of transformers' ViTMAEModel or Dinov2Model."""
    renamed = {key.removeprefix("vit."): value for key, value in hugging_face_names(state).items()}
    patterns = {
        r"^layers\.": "encoder.layer.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        r"ls([12])\.gamma": r"layer_scale\1.lambda1",
        r"^decoder\.mask_token": "embeddings.mask_token",
    }
    for pattern, name in patterns.items() if dinov2 else ():
        renamed = {re.sub(pattern, name, key): value for key, value in renamed.items()}
    return renamed


def three_routes(ours, state: dict, config, name: str, options: dict, folder: Path) -> list[api.FrozenEncoder]:
    """An encoder of this project, and the same weights through transformers and timm."""
    theirs = transformers.AutoModel.from_config(config)
    theirs.load_state_dict(of_hugging_face(state, "dinov2" in name))
    theirs.save_pretrained(folder / "hf")
    timms = timm.create_model(name, num_classes=0, **options)
    timms.load_state_dict({key: value for key, value in state.items() if key != "mask_token"})
    timm.models.save_for_hf(timms, folder / "timm", model_args=options, safe_serialization=True)
    return [ours, *(api.encoder(f"{prefix}:{folder / prefix}") for prefix in ("hf", "timm"))]


@torch.no_grad()
def assert_same_traces(encoders: list[api.FrozenEncoder], pixels: torch.Tensor) -> None:
    for ours, *others in zip(*(encoder.backbone.trace(pixels) for encoder in encoders), strict=True):
        for other in others:
            assert other.index == ours.index and other.scale == ours.scale
            for part in ("x", "q", "k", "v", "update", "out"):
                torch.testing.assert_close(getattr(other, part), getattr(ours, part), rtol=1e-5, atol=1e-5)


def test_one_mae_by_three_routes_is_one_encoder(tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    state = randomised(VisionTransformer(**options)).state_dict()
    save_encoder(tmp_path / "mae.safetensors", state, {"family": "mae"})
    config = transformers.ViTMAEConfig(**TRACED["hf"] | {"intermediate_size": 128, "layer_norm_eps": 1e-6})
    ours = api.encoder(str(tmp_path / "mae.safetensors"), num_heads=2)
    ours, *others = encoders = three_routes(ours, state, config, "vit_base_patch16_224", options, tmp_path)
    assert_same_traces(encoders, images())
    for other in others:
        for metric, values in other.attention(images()).items():
            torch.testing.assert_close(values, ours.attention(images())[metric], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not REAL.exists(), reason=f"no trained encoder at {REAL}")
def test_a_trained_dinov2_by_three_routes_is_one_encoder(tmp_path):
    """With the positions of 16 x 16 patches: to resample them, each library has its own rule."""
    state = {key: value.float() for key, value in safetensors.torch.load_file(REAL).items()}
    prefix, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
    part = grid.unflatten(1, (37, 37))[:, 10:26, 10:26].flatten(1, 2)
    state["pos_embed"] = torch.cat([prefix, part], dim=1)
    save_encoder(tmp_path / "dinov2.safetensors", state, {"family": "dinov2"})
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14)
    ours = api.encoder(str(tmp_path / "dinov2.safetensors"), "vit_small_patch14")
    assert_same_traces(
        three_routes(ours, state, config, "vit_small_patch14_dinov2", {"img_size": 224}, tmp_path), images(1, 224)
    )


# ---- how a trace behaves


@pytest.fixture
def backbone(saved):
    return load_encoder(saved("DINOv2"), "file").backbone


@torch.no_grad()
def test_an_abandoned_trace_ends_and_frees_its_tensors(backbone):
    trace = backbone.trace(images())
    step = next(trace)
    kept = weakref.ref(step.q)
    del step, trace
    assert kept() is None
    whole, nested = [], []
    for step in backbone.trace(images()):  # traces of one model do not disturb each other
        whole.append(step.out)
        nested.append(next(backbone.trace(images(1))).out)
    assert len(whole) == 2 and whole[0][:1].allclose(nested[0], atol=1e-6) and nested[0].equal(nested[1])
    assert nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@torch.no_grad()
def test_statistics_under_autocast_are_those_of_what_is_multiplied(backbone):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {step.q.dtype for step in backbone.trace(images())} == {torch.bfloat16}


class Attention(nn.Module):
    def __init__(self, causal: bool = False, windows: bool = False):
        super().__init__()
        self.causal, self.windows = causal, windows

    def forward(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        q = q.reshape(2 * len(q), 2, -1, q.shape[-1]) if self.windows else q
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=self.causal)
        return out.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = Attention(**options)

    def forward(self, x):
        return x + self.attn(x)


class Model(nn.Module):
    """Patches of 8 pixels through blocks."""

    def __init__(self, *blocks: nn.Module, order: slice | list[int] = slice(None)):
        super().__init__()
        self.stem, self.blocks, self.order = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(blocks), order

    def forward(self, pixels):
        x = self.stem(pixels).flatten(2).transpose(1, 2)[:, self.order]
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(nn.Identity()), "no attention call was seen"),
        (Model(Block(), nn.Sequential(Block(), Block())), "blocks.1 makes 2 attention calls"),
        (Model(Block(), Block(), nn.Identity()), "blocks.2 makes 0 attention calls"),
        (Model(Block(windows=True), Block()), "blocks.0.attn computes attention in windows"),
        (Model(Block(causal=True), Block()), "blocks.0.attn is not self-attention among all tokens: it is causal"),
        (Model(Attention(), Attention()), "blocks.0 computes attention in no module of its own"),
        (Model(Block(), Block(), order=list(range(15, -1, -1))), "its 16 tokens are not one for each patch"),
        (Model(Block(), Block(), order=list(range(15))), "its 15 tokens are not one for each patch"),
    ],
)
def test_a_model_is_traced_or_refused_with_the_reason(model, reason):
    def run(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels)

    assert TracedEncoder(Loaded(Model(Block(), Block()), "", run, 32, Pixels(), None)).num_prefix_tokens == 0
    with pytest.raises(ValueError, match=reason):
        TracedEncoder(Loaded(model, "", run, 32, Pixels(), None))


# ---- loading


def test_inspection_describes_it(saved, capsys):
    argv = {"file": saved("SigLIP"), "offline": True, "family": None, "model": None}
    inspect_checkpoint.main(inspect_checkpoint.Namespace(**argv))
    printed = capsys.readouterr().out
    for fact in ("run by        transformers", "SiglipVisionModel", "encoder.layers.0.self_attn", "2 heads", "map\n"):
        assert fact in printed


def test_preprocessing_is_the_models_own_and_part_of_what_a_run_is(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("DINOv2").partition(":")[2], folder)
    assert load_encoder(f"hf:{folder}", "file").record["assumed"]
    processor = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = load_encoder(f"hf:{folder}", "file")
    stated = {"size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.8}
    assert encoder.record["preprocessing"] == stated and "assumed" not in encoder.record
    image = Image.effect_noise((60, 50), 80).convert("RGB")
    expected = transformers.BitImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(eval_transform(32, **encoder.pixels)(image), expected, rtol=0, atol=1e-5)
    larger = load_encoder(f"hf:{folder}", "file", size=48)
    assert larger.backbone.grid_of(48, 48) == (6, 6) and larger.facts(48) != encoder.facts(32)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 32}, "do_center_crop": False})
    )
    assert load_encoder(f"hf:{folder}", "file").crop_pct is None


@pytest.mark.parametrize(
    ("finetune", "options", "message"),
    [
        ("hf:", {}, "hf: names no model: write hf:ORG/NAME"),
        ("hf:facebook/dinov2-base", {"offline": True}, "--offline, and facebook/dinov2-base is neither a folder nor"),
        ("hf:/no/such/folder", {}, "hf:/no/such/folder: this is not a folder"),
        ("timm:vit_base_patch17", {"offline": True}, "has no model .* did you mean"),
        ("open_clip:ViT-B-32/no_tag", {"offline": True}, "the tags of ViT-B-32 are openai, "),
        ("hf:facebook/dinov2-base", {"family": "dinov2"}, "transformers sets family"),
        ("facebook/dinov2-base", {}, "a model of the Hugging Face hub is written hf:facebook/dinov2-base"),
    ],
)
def test_mistakes_end_in_one_line(finetune, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(finetune, "file", **options)
    assert "\n" not in str(error.value)


def test_models_of_other_inputs_and_kinds_are_refused_with_the_reason(saved, tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = transformers.ViTConfig(**small, image_size=(32, 48))
    models = {
        "it takes no images: a model of type bert takes input_ids": transformers.BertConfig(**small, vocab_size=9),
        r"its images are resized to \[32, 48\]; a square": vit,
        "does not use torch's scaled_dot_product_attention": transformers.ResNetConfig(hidden_sizes=[8], depths=[1]),
    }
    for number, (message, config) in enumerate(models.items()):
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            load_encoder(f"hf:{tmp_path / str(number)}", "file")
    with pytest.raises(ValueError, match=r"names no architecture of timm: is it a model of transformers \(hf:\)"):
        load_encoder(f"timm:{tmp_path}/0", "file")


def test_offline_models_come_from_the_cache_and_record_their_commit(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, folder = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--org--name"
    shutil.copytree(saved("EVA-02").partition(":")[2], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name in ("timm:hf-hub:org/name", f"timm:hf-hub:org/name@{commit}"):
        record = load_encoder(name, "file", offline=True, size=32).record
        assert (record["revision"], record["source"], record["family"]) == (commit, name, "timm")
    with pytest.raises(ValueError, match=r"--offline, and org/name@main2 is neither .*: hf download org/name$"):
        load_encoder("hf:org/name@main2", "file", offline=True)


def test_open_clip_takes_a_file_of_one_of_its_models(saved, tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(TRACED["open_clip"]))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(tmp_path)
    folder = saved("CLIP, open_clip").partition(":")[2]
    ours = load_encoder(f"open_clip:{folder}", "file").backbone
    file = load_encoder(f"open_clip:tiny/{folder}/open_clip_model.safetensors", "file").backbone
    assert all(value.equal(file.state_dict()[key]) for key, value in ours.state_dict().items())
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_encoder(f"open_clip:tiny/{tmp_path}/weights.pt", "file")


def test_only_complete_safetensors_of_an_installed_library_are_loaded(saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(saved("DINOv2").partition(":")[2], folder)
    with pytest.raises(ValueError, match=f"is the folder of a model: write --finetune hf:{folder}"):
        load_encoder(str(folder), "file")
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    kept = {key: value for key, value in state.items() if "layer.1.mlp" not in key}
    safetensors.torch.save_file(kept, file)
    with pytest.raises(ValueError, match=r"the file lacks .*encoder.layer.1.mlp.fc1.bias"):
        load_encoder(f"hf:{folder}", "file")
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"there are no \*.safetensors in"):
        load_encoder(f"hf:{folder}", "file")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers, .*: pip install -r requirements-encoders.txt"):
        load_encoder(saved("DINOv2"), "file")
