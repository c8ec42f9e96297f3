"""Facts that a weight file does not show are stated by a flag or logged; no encoder is silently computed wrongly."""

import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from test_families import Size, randomised, run_timm, state_of, timm_vit
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import ResPostBlock

import main_analyze_attention
import main_linprobe
from cli.arguments import add_groups
from cli.console import Parser, parse
from cli.encoder_arguments import build_encoder
from encoders.families import FAMILIES
from encoders.load import input_size, load_encoder
from util.pos_embed import sincos_pos_embed

SMALL = Size(64, 4, 8, 8, 4)  # an architecture without a name, whose heads are not of 64 channels


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, "beyond_cls")


@pytest.fixture
def write(tmp_path):
    def file(content, name="file.pth") -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return file


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm_vit(SMALL)


@pytest.fixture(scope="module")
def state(vit):
    return state_of(vit)


def difference(backbone, model, rows=4, columns=4) -> float:
    """Largest error of any block's tokens, relative to the largest token."""
    images = torch.randn(2, 3, rows * 8, columns * 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        steps = list(backbone.trace(images))
        tokens, _ = run_timm(model, images)
    return max(((s.out - t).abs().max() / t.abs().max()).item() for s, t in zip(steps, tokens, strict=True))


def load(path, model="file", **stated):
    return load_encoder(path, model, **{"num_heads": 8, **stated})


# ---- facts that tensors do not show


def test_every_assumption_about_a_plain_file_is_in_one_line_with_its_flag(write, state, caplog):
    encoder = load_encoder(write(state), "file")
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for fact in ("1 heads (--num_heads)", "pre-norm blocks, gelu, eps 1e-06 (--timm_name)", "(--mean)", "(--std)",
                 "positions for 4 x 4 patches (--grid)"):  # fmt: skip
        assert fact in line and any(fact in assumed for assumed in encoder.record["assumed"])


def test_stated_facts_are_used_and_no_longer_assumed(write, state, vit, caplog):
    encoder = load(write(state), mean=[0.5, 0.5, 0.5], std=[0.4, 0.4, 0.4], grid=(4, 4), family="timm")
    assert encoder.record["assumed"] == ["pre-norm blocks, gelu, eps 1e-06 (--timm_name)"]
    assert (encoder.mean, encoder.std) == ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
    assert difference(encoder.backbone, vit) < 1e-5


def test_a_named_family_assumes_nothing(write, state, caplog):
    assert "assumed" not in load(write(state), family="dino").record
    assert "WARNING" not in {record.levelname for record in caplog.records}


TIMM = {
    "residual post-norm": ("vit_base_patch16_rpn_224", {"block_fn": ResPostBlock}),
    "tanh GELU": ("vit_base_patch32_siglip_256", {"act_layer": "gelu_tanh"}),
    "0.5/0.5": ("vit_base_patch16_224", {}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {"act_layer": "quick_gelu"}),
}  # fmt: skip


@pytest.fixture
def small_timm(monkeypatch):
    """timm's registry with small models of the same configurations: registers one, and gives it with random weights."""

    def register(name):
        torch.manual_seed(0)
        theirs = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 8}
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **theirs | more).eval())
        return randomised(timm.create_model(name, num_classes=0, img_size=32))

    return register


@pytest.mark.parametrize(("name", "options"), TIMM.values(), ids=TIMM)
def test_timm_name_gives_timms_computation_and_preprocessing(name, options, write, small_timm):
    model = small_timm(name)
    path = write({**state_of(model), "head.weight": torch.ones(3, 64)})
    encoder = load_encoder(path, timm_name=name)
    assert difference(encoder.backbone, model) < 1e-5 and encoder.backbone.num_heads == 8
    config = timm.get_pretrained_cfg(name)
    assert (encoder.mean, encoder.std) == (tuple(config.mean), tuple(config.std)) and "assumed" not in encoder.record
    assert encoder.record["family"] == "timm" and encoder.record["source"] == Path(path).name
    if options:  # without the flag, the tokens are others, and that is said
        assumed = load_encoder(path, num_heads=8)
        assert difference(assumed.backbone, model) > 1e-4 and "--timm_name" in "".join(assumed.record["assumed"])


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("vit_base_patch16_224x", {}, "has no model 'vit_base_patch16_224x'"),
        ("resnet50", {}, "not timm's resnet50: .*img_size"),
        ("deit_small_distilled_patch16_224", {}, "the file is not timm's deit_small"),
        ("vit_base_patch16_224", {}, "not timm's vit_base_patch16_224: size mismatch"),
        ("vit_base_patch16_224", {"num_heads": 8}, "timm sets num_heads"),
        ("vit_base_patch16_224", {"family": "mae"}, "timm sets family"),
    ],
)
def test_a_timm_name_that_does_not_fit_is_refused_with_the_reason(name, stated, message, write, state):
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(write(state), timm_name=name, **stated)
    assert "\n" not in str(error.value)


def test_a_file_that_lacks_a_tensor_of_timms_model_is_refused(write, small_timm):
    state = state_of(small_timm("vit_base_patch16_224"))
    del state["blocks.2.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"Missing key.*blocks.2.mlp.fc1.bias"):
        load_encoder(write(state), timm_name="vit_base_patch16_224")


# ---- methods whose tensors look alike


def with_table(state, columns_first):
    table = sincos_pos_embed(64, (4, 4), 1)
    return {**state, "pos_embed": table if columns_first else table.roll(32, dims=-1)}


def test_mocov3_in_deits_layout_is_not_read_as_mae(write, caplog):
    torch.manual_seed(0)
    model = timm_vit(Size(384, 2, 12, 16, 2))
    table = sincos_pos_embed(384, (2, 2), 1).roll(192, dims=-1)  # the row in the first channels
    model.pos_embed.data = table
    encoder = load_encoder(write({"model": state_of(model)}), "file")
    assert encoder.record["family"] == "mocov3_deit" and encoder.backbone.num_heads == 12
    assert "12 heads (--num_heads)" in caplog.text


def test_maes_table_makes_mae_of_a_file_and_its_heads_an_assumption(write, state):
    encoder = load_encoder(write({"model": with_table(state, True)}), "file")
    assert encoder.record["family"] == "mae" and "1 heads (--num_heads)" in encoder.record["assumed"]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_zero_row_of_positions_is_no_evidence(key, write, state):
    zero = {**state, "pos_embed": torch.cat([torch.zeros(1, 1, 64), state["pos_embed"][:, 1:]], dim=1)}
    assert load_encoder(write({key: zero}), "file").record["family"] == "timm"


def test_mean_pooled_files_of_other_methods_are_not_called_mae(write, state):
    mean_pooled = {key: value for key, value in state.items() if not key.startswith("norm.")}
    mean_pooled |= {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64), "head.weight": torch.ones(3, 64)}
    encoder = load_encoder(write({"model": mean_pooled}), "file")
    assert encoder.record["family"] == "timm" and encoder.record["assumed"]


# ---- several encoders in a file


EXTRA = {"counter of an average": {"num_updates": torch.tensor(3)}, "a number": {"step": 5},
         "another head": {"contrast.0.weight": torch.zeros(3, 3)}}  # fmt: skip


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_an_encoder_that_nothing_loads_is_named_too(extra, write, state, caplog):
    load(write({"model": state, "ema": {**{key: -value for key, value in state.items()}, **extra}}))
    assert "holds other encoders, too: ema (which no family loads)" in caplog.text


def test_a_file_of_one_encoder_names_no_other(write, state, caplog):
    load(write({"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}))
    assert "other encoders" not in caplog.text


# ---- positions


@pytest.mark.parametrize("prefix", [1, 0])
def test_a_stated_grid_is_resampled_as_timm_resamples_it(prefix, write, state, caplog):
    """2 x 8 positions are as many as 4 x 4."""
    table = torch.randn(1, prefix + 16, 64)
    encoder = load(write({**state, "pos_embed": table}), grid=(2, 8), family="timm")
    assert encoder.backbone.grid_size == (2, 8) and "2 x 8 patches" in caplog.text
    expected = resample_abs_pos_embed(table, (6, 6), (2, 8), num_prefix_tokens=prefix)[:, prefix:]
    assert encoder.backbone.prefix_and_positions((6, 6))[1].equal(expected)


def test_positions_that_fill_no_square_need_a_grid(write, state):
    path = write({**state, "pos_embed": torch.randn(1, 1 + 32, 64)})
    with pytest.raises(ValueError, match=r"32 positions .*--grid"):
        load(path)
    with pytest.raises(ValueError, match="--grid 5 7 does not fit"):
        load(path, grid=(5, 7))
    encoder = load(path, grid=(4, 8))
    assert encoder.backbone.grid_size == (4, 8)
    with pytest.raises(ValueError, match="--input_size"):
        input_size(encoder, None)


# ---- sizes


def test_a_plain_vit_of_any_size_is_built_from_its_file(write, vit, state):
    encoder = load(write(state), family="timm")
    assert difference(encoder.backbone, vit) < 1e-5 and input_size(encoder, None) == 32
    wide = timm_vit(Size(48, 3, 4, 4, 6), mlp_ratio=2.7, init_values=1.0, reg_tokens=2)
    encoder = load_encoder(write(state_of(wide)), "file", num_heads=4)
    assert len(encoder.backbone.blocks[0].mlp.fc1.weight) == int(48 * 2.7) and encoder.backbone.num_registers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": torch.ones(64, 3, 16, 8)}, r"\(64, 3, 16, 8\): .*square patches"),
        ({"patch_embed.proj.weight": torch.ones(64, 192)}, r"\(64, 192\): .*by a convolution"),
        ({"patch_embed.proj.weight": torch.ones(64, 1, 8, 8)}, r"\(64, 1, 8, 8\): .*RGB"),
        ({"blocks.0.attn.qkv.weight": torch.ones(192, 64, dtype=torch.int8)}, "torch.int8"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "not used blocks.0.attn.q_norm.weight"),
        ({"blocks.3.norm1.weight": torch.full((64,), 1e300, dtype=torch.float64)}, "blocks.3.norm1.weight holds NaN"),
        ({"blocks.3.norm1.weight": torch.full((64,), torch.nan).bfloat16()}, "blocks.3.norm1.weight holds NaN"),
        ({"blocks": {"0.norm1.bias": torch.ones(64)}}, "pth: two tensors are called blocks.0.norm1.bias; save"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message, write, state):
    with pytest.raises(ValueError, match=message):
        load(write({**state, **change}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_read(dtype, write, state):
    backbone = load(write({key: value.to(dtype) for key, value in state.items()})).backbone
    assert backbone.norm.weight.equal(state["norm.weight"].to(dtype).float())


# ---- names of wrappers, and advice


WRAPPED = {
    "compiled blocks": lambda k: k.replace(".attn.", "._orig_mod.attn."),
    "checkpointed": lambda k: k.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "FSDP": lambda k: "_fsdp_wrapped_module." + k.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "DDP of a compiled model": lambda k: f"module._orig_mod.{k}",
    "chunks numbered through": lambda k: chunked(k, restart=False),
    "chunks numbered anew": lambda k: chunked(k, restart=True),
}


def chunked(key: str, restart: bool) -> str:
    parts = key.split(".")
    if parts[0] != "blocks":
        return key
    block = int(parts[1])
    return ".".join(["blocks", str(block // 2), str(block % 2 if restart else block), *parts[2:]])


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrappers_are_removed(rename, write, state):
    backbone = load(write({rename(key): value for key, value in state.items()})).backbone
    assert all(value.equal(state[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("teacher.backbone.", "teacher.backbone"),
        ("module.backbone.", "backbone"),
        ("model.module.backbone.", "model.backbone"),
    ],
)
@pytest.mark.parametrize("entry", [None, "model", "ema"])
def test_advice_about_a_part_of_a_file_works(prefix, key, entry, write, state):
    content = {prefix + WRAPPED["chunks numbered through"](name): value for name, value in state.items()}
    path = write(content if entry is None else {entry: content})
    with pytest.raises(ValueError) as error:
        load(path)
    advice = str(error.value).split("write --checkpoint_key ")[1]
    assert advice == (key if entry is None else f"{entry}.{key}")
    backbone = load(path, checkpoint_key=advice).backbone
    assert backbone.norm.weight.equal(state["norm.weight"])


def behind(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


# what training frameworks write, of encoders A and B -> the file, and the key of each encoder in it; "" for the default
FRAMEWORKS = {
    "Lightning": (
        lambda a, b: {
            "state_dict": behind("model.", a),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
            "hyper_parameters": {"arch": "vit"},
            "pytorch-lightning_version": "2.5.0",
        },
        {"state_dict.model": "a"},
    ),
    "solo-learn": (
        lambda a, b: {
            "state_dict": behind("backbone.", a) | behind("momentum_backbone.", b) | {"classifier.bias": torch.ones(2)},
            "pytorch-lightning_version": "2.0.0",
        },
        {"state_dict.backbone": "a", "state_dict.momentum_backbone": "b"},
    ),
    "lightly": (
        lambda a, b: {"state_dict": behind("backbone.vit.", a) | {"decoder.mask_token": torch.ones(1, 1, 8)}},
        {"state_dict.backbone.vit": "a"},
    ),
    "DeepSpeed, ZeRO 0 to 2": (lambda a, b: {"module": a, "ds_version": "0.16.0", "dp_world_size": 2}, {"module": "a"}),
    "timm's training script": (
        lambda a, b: {"epoch": 3, "arch": "vit", "state_dict": a, "optimizer": {}, "state_dict_ema": b, "version": 2},
        {"": "a", "state_dict_ema": "b"},
    ),
    "DINOv2's trainer": (
        lambda a, b: {
            "teacher": behind("backbone.", {chunked(key, restart=False): value for key, value in a.items()})
            | {"dino_head.last_layer.weight": torch.ones(2, 2)}
        },
        {"teacher.backbone": "a"},
    ),
    "torch_ema": (
        lambda a, b: {"model": a, "ema": {"decay": 0.99, "shadow_params": list(b.values()), "collected_params": None}},
        {"": "a", "ema.shadow_params": "b"},
    ),
    "nested averages": (
        lambda a, b: {"model": a, "model_ema": b, "nested": {"ema": {"module": b}}},
        {"": "a", "model_ema": "b", "nested.ema.module": "b"},
    ),
    "torchvision's training script": (
        lambda a, b: {"model": a, "model_ema": {"n_averaged": torch.tensor(3), **behind("module.", b)}},
        {"": "a", "model_ema": "b"},
    ),
    "one dictionary": (lambda a, b: {**a, **behind("ema.", b)}, {"": "a", "ema": "b"}),
    "a list": (lambda a, b: {"models": [a, b]}, {"models.0": "a", "models.1": "b"}),
}


@pytest.mark.parametrize(("make", "keys"), FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_files_of_training_frameworks_load_or_name_the_key_that_loads_them(make, keys, write, state, caplog):
    encoders = {"a": state, "b": {key: -value for key, value in state.items()}}
    path = write(make(*encoders.values()))
    if "" in keys:
        load(path)
        message = caplog.text
        assert ("holds other encoders, too: " in message) == (len(keys) > 1)
    else:
        with pytest.raises(ValueError) as error:
            load(path)
        message = str(error.value)
        assert "\n" not in message
    for key, name in keys.items():
        assert not key or f"--checkpoint_key {key}" in message
        assert load(path, checkpoint_key=key).backbone.norm.weight.equal(encoders[name]["norm.weight"])


def test_checkpoints_that_need_their_framework_are_answered_with_its_command(write, state, tmp_path):
    with pytest.raises(ValueError, match=r"shard of DeepSpeed's ZeRO-3: .*python FOLDER/zero_to_fp32.py FOLDER OUT"):
        load(write({"module": {key: torch.empty(0) for key in state}}), checkpoint_key="module")
    with pytest.raises(ValueError, match=r"FSDP has flattened its tensors: .*teacher_checkpoint.pth"):
        load(write({"model": {"teacher.backbone._flat_param": torch.ones(9)}}))
    (tmp_path / "zero_to_fp32.py").touch()
    with pytest.raises(ValueError, match=rf"of DeepSpeed: .*python {tmp_path}/zero_to_fp32.py {tmp_path} OUT"):
        load(str(tmp_path))


@pytest.mark.parametrize("entry", ["", "model", "teacher.backbone", "safetensors"])
def test_dinov2_files_are_never_called_mae(entry, write, state, tmp_path):
    dinov2 = state_of(timm_vit(SMALL, init_values=1.0)) | {"mask_token": torch.zeros(1, 64)}
    path, options = str(tmp_path / "dinov2.safetensors"), {}
    if entry == "safetensors":
        safetensors.torch.save_file(dinov2, path)
    else:
        path = write({"": dinov2, "model": {"model": dinov2}}.get(entry, {"teacher": behind("backbone.", dinov2)}))
    if entry == "teacher.backbone":
        with pytest.raises(ValueError, match=r"write --checkpoint_key teacher\.backbone$") as error:
            load(path)
        assert "mae" not in str(error.value)
        options["checkpoint_key"] = entry
    assert load(path, **options).record["family"] == "dinov2"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(3), "blocks.0.norm1.weight is a NumPy array"),
        (None, "blocks.0.norm1.weight is None"),
        (3, "blocks.0.norm1.weight is a int"),
        (torch.empty(64, device="meta"), "without values"),
        (torch.ones(64).to_sparse(), "is a sparse tensor"),
    ],
)
@pytest.mark.parametrize("entry", [None, "model", "net"])
def test_entries_that_are_no_tensors_are_named_with_their_type(value, message, entry, write, state):
    changed = {**state, "blocks.0.norm1.weight": value}
    path = write(changed if entry is None else {entry: changed})
    for family in (None, "timm", "mae"):
        with pytest.raises(ValueError, match=message):
            load(path, family=family)


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
state = torch.load(sys.argv[1])
state = {k: distribute_tensor(v, init_device_mesh("cpu", (1,)), [Shard(0)]) for k, v in state.items()}
torch.save(state, sys.argv[2])
dcp.save({"model": state}, checkpoint_id=sys.argv[3])
"""


def test_sharded_files_and_folders_are_answered_with_what_converts_them(write, state, tmp_path, monkeypatch):
    path, sharded, folder = write(state), tmp_path / "sharded.pth", tmp_path / "dcp"
    subprocess.run([sys.executable, "-c", SHARDED, path, sharded, folder], check=True, capture_output=True)
    with pytest.raises(ValueError, match="is a DTensor"):
        load(str(sharded))
    for part in (folder, next(folder.glob("*.distcp"))):
        with pytest.raises(ValueError, match=r"torch.distributed.checkpoint.format_utils dcp_to_torch") as error:
            load(str(part))
    command = str(error.value).split(": ")[-1].replace("weights.pth", str(tmp_path / "w.pth")).split()
    assert command[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", command[2:])
    runpy.run_module(command[2], run_name="__main__")
    assert load(str(tmp_path / "w.pth")).backbone.norm.weight.equal(state["norm.weight"])


# ---- a trained encoder


SHARED = Path(os.environ.get("BEYOND_CLS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
REAL = SHARED / "data/real_encoders/dinov2_vits14_fp16.safetensors"


@pytest.mark.skipif(not REAL.exists(), reason=f"no trained encoder at {REAL}")
def test_the_trained_encoder_is_read_without_stating_anything(caplog):
    encoder = load_encoder(str(REAL), "vit_small_patch14")
    assert encoder.record["family"] == "dinov2" and encoder.backbone.grid_size == (37, 37)
    assert "6 heads" in caplog.text and "WARNING" not in {record.levelname for record in caplog.records}
    assert FAMILIES["dinov2"].vit["pos_resampling"] == encoder.backbone.pos_resampling == "offset"


# ---- the programs


def test_both_programs_take_a_stated_encoder_of_any_size(write, state, image_folder, tmp_path):
    stated = ["--model", "file", "--finetune", write(state), "--num_heads", "8", "--grid", "2", "8", "--mean", "0.5",
              "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--input_size", "32", "--data_path", str(image_folder),
              "--device", "cpu", "--amp", "float32", "--num_workers", "0", "--batch_size", "7"]  # fmt: skip
    probing = ["--cls_features", "cls", "--return_block", "3", "--epochs", "1", "--warmup_epochs", "0"]
    for main, flags, name in ((main_linprobe, probing, "results.json"), (main_analyze_attention, [], "attention.json")):
        argv = [*stated, *flags, "--output_dir", str(tmp_path / name), "--family", "timm"]
        main.main(parse(main.get_args_parser(), argv))
        (path,) = (tmp_path / name).rglob(name)
        encoder = json.loads(path.read_text())["encoder"]
        assert encoder["model"] == "vit_width64_depth4_patch8" and len(encoder["assumed"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "file"], "--model file needs weights"),
        (["--grid", "4", "4"], r"--grid .* needs weights"),
        (["--std", "0.5", "0", "0.5"], "--std 0.5 0.0 0.5: must be above 0"),
        (["--mean", "123", "116", "103"], "--mean 123.0 116.0 103.0: .* from 0 to 1"),
        (["--mean", "nan", "0", "0"], "--mean nan"),
        (["--timm_name", "vit_base_patch16_224"], "--timm_name vit_base_patch16_224 needs weights"),
        (["--family", "mae"], "--family mae needs weights"),
    ],
)
def test_flags_that_describe_nothing_are_refused(flags, message):
    parser = Parser("")
    add_groups(parser, {"encoder": {"include": "encoder"}})
    with pytest.raises(ValueError, match=message):
        build_encoder(parser.parse_args(flags))
