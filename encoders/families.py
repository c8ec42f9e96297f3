"""FAMILIES: the formats of published weight files and the conversion of their tensors to those of models_vit.

A converter renames and reshapes; it never guesses. What it cannot convert keeps the file's name, so that the strict
loader lists it. Importable without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

from data_sets.views import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Grid = tuple[int, int]  # rows and columns of patches

TABLE = "by its fixed table of positions"  # evidence that leaves the number of heads open


class Family(NamedTuple):
    """A published checkpoint format. Keys are those of encoders.contents.without_wrappers.

    Where the file holds several encoders, `--checkpoint_key` chooses another one: an entry of the file ("model_ema"),
    or a replacement of `prefix` ("momentum_encoder").
    """

    description: str
    key: str | None  # entry of the file that holds the weights; None where the file is flat
    needs: tuple[str, ...]  # keys that every file of the family has
    lacks: tuple[str, ...]  # key patterns that none of them has
    drop: tuple[str, ...]  # patterns of keys that the encoder does not need
    vit: dict  # architecture options that differ from models_vit's defaults
    convert: Callable[[State], State] = lambda state: state  # published names and shapes -> models_vit's; pure
    prefix: str = ""  # of all keys that are used
    beside: tuple[str, ...] = ()  # other entries of the file that distinguish it
    # (converted weights, --grid) -> options in which files of the family differ
    read: Callable[[State, Grid | None], dict] = lambda state, grid: {}
    # (weights, file) -> what shows that a file which fits is of this family and not of another one whose tensors have
    # the same names; "" where nothing does
    evidence: Callable[[State, dict], str] = lambda weights, content: STRUCTURE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


STRUCTURE = "by its structure"


# ---------------------------------------------------------------------------------------------------------------------
# converters
# ---------------------------------------------------------------------------------------------------------------------


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every key with the regular expressions of `rules` replaced, in their order."""
    names = {}
    for key in state:
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return {names[key]: value for key, value in state.items()}


def fused(state: State, parts: tuple[str, str, str], whole: str) -> State:
    """Separate queries, keys and values joined into one tensor, for every block that has all of them.

    A part named "0" is all zeros: BEiT's attention has no bias on its keys.
    """
    import torch

    state = dict(state)
    present = [part for part in parts if part != "0"]
    for first in [key for key in state if key.endswith(f".{present[0]}")]:
        stem = first.removesuffix(present[0])
        tensors = [state.get(stem + part) for part in present]
        if all(tensor is not None and tensor.shape == state[first].shape for tensor in tensors):
            zeros = torch.zeros_like(state[first])
            state[stem + whole] = torch.cat([zeros if part == "0" else state[stem + part] for part in parts])
            for part in present:
                del state[stem + part]
    return state


def convert_beit(state: State) -> State:
    """BEiT's block: biases on q and v only, gamma_1 and gamma_2, one relative-position table for all blocks or each."""
    state = fused(state, ("q_bias", "0", "v_bias"), "qkv.bias")
    state = renamed(
        state,
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos_bias.relative_position_bias_table"),
    )
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:  # every block gets a copy, as in the authors' own fine-tuning
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        state |= {f"blocks.{block}.attn.rel_pos_bias.relative_position_bias_table": shared for block in blocks}
    return state


def convert_capi(state: State) -> State:
    state = fused(state, ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "qkv.weight")
    return renamed(
        state,
        (r"^registers$", "reg_token"),
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^encoder\.blocks\.(\d+)\.residual([12])\.norm\.", r"blocks.\1.norm\2."),
        (r"^encoder\.blocks\.(\d+)\.residual1\.fn\.", r"blocks.\1.attn."),
        (r"^encoder\.blocks\.(\d+)\.residual2\.fn\.", r"blocks.\1.mlp."),
    )


def convert_mim_refiner(state: State) -> State:
    """Positions (1,rows,columns,D) of the patches alone; the norm that post-norm models start with."""
    state = renamed(
        state,
        (r"^cls_tokens\.tokens$", "cls_token"),
        (r"^pos_embed\.embed$", "pos_embed"),
        (r"^embed_norm", "norm_pre"),
    )
    if "pos_embed" in state and state["pos_embed"].ndim == 4:
        state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    return state


def convert_dinov2(state: State) -> State:
    """The position of [cls] goes into the token, because the registers that follow it have none."""
    state = renamed(state, (r"^register_tokens$", "reg_token"))
    token, table = state.get("cls_token"), state.get("pos_embed")
    if token is not None and table is not None and table.ndim == 3 and token.shape == table[:, :1].shape:
        state |= {"cls_token": token + table[:, :1], "pos_embed": table[:, 1:]}
    return state


def convert_timm(state: State) -> State:
    """Zero biases for the patch embedding where a norm follows it (timm's CLIP models have none)."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or "norm_pre.weight" not in state or "patch_embed.proj.bias" in state:
        return state
    return {**state, "patch_embed.proj.bias": kernel.new_zeros(len(kernel))}


def read_timm(state: State, grid: Grid | None) -> dict:
    """The options in which timm's plain ViTs differ and which their keys show."""
    prefix = {name: state[name] for name in ("cls_token", "reg_token") if name in state and state[name].ndim > 1}
    prefix = {name: token.shape[1] for name, token in prefix.items()}
    options = {
        "class_token": "cls_token" in state,
        "reg_tokens": prefix.get("reg_token", 0),
        "pos_embed": "learned" if "pos_embed" in state else "none",
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "affine" if "norm.weight" in state else "none",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
    }
    if "pos_embed" in state and state["pos_embed"].ndim > 1 and prefix:
        rows = state["pos_embed"].shape[1]
        options["no_embed_class"] = rows == grid[0] * grid[1] if grid else isqrt(rows) ** 2 == rows
    return options


def read_mocov3(state: State, grid: Grid | None) -> dict:
    """12 heads in ViT-S and ViT-B, 16 in larger ones (vits.py of its authors)."""
    kernel = state.get("patch_embed.proj.weight")
    return {"num_heads": 12 if kernel is None or len(kernel) <= 768 else 16}


def fixed_table(weights: State, columns_first: bool) -> bool:
    """Whether the positions are the fixed sine-cosine table of a square grid behind a zero row for [cls].

    MAE's table encodes the column in its first channels, MoCo-v3's the row.
    """
    import torch

    from util.pos_embed import sincos_pos_embed

    table = weights.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[2] % 4 or isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        return False
    side, width = isqrt(table.shape[1] - 1), table.shape[2]
    expected = sincos_pos_embed(width, (side, side), 1)
    expected = expected if columns_first else expected.roll(width // 2, dims=-1)
    return torch.allclose(table.float(), expected, atol=1e-2)  # bfloat16, too


def mae_evidence(weights: State, content: dict) -> str:
    if any(key.startswith("decoder_") for key in weights):
        return "by its decoder"
    return TABLE if fixed_table(weights, columns_first=True) else ""


# ---------------------------------------------------------------------------------------------------------------------
# the table
# ---------------------------------------------------------------------------------------------------------------------

ENTRIES = ("state_dict", "model")  # where trainers put a model's state dict
LEARNED = {"pos_embed": "learned"}
HEADS = ("head.*", "fc_norm.*", "lm_head.*", "cls_pt_layers.*", "rel_pos_bias.*")
BEIT = {"pos_embed": "none", "rel_pos_bias": True, "init_values": 0.1}
SHARED, OWN = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
INDEX = "*relative_position_index"  # made anew from the grid

FAMILIES = {
    "mae": Family(
        "MAE: encoder files, files with decoder, and the checkpoints of main_pretrain.py",
        key="model", needs=("cls_token", "pos_embed", "norm.weight"),
        drop=("decoder_*", "mask_token", "projector.*", "predictor.*", "momentum_*", "epoch_sums"),
        lacks=("*.gamma", "reg*_token*", "norm_pre.*", *HEADS), vit={"pos_resampling": "plain"}, evidence=mae_evidence,
    ),
    "mae_ft": Family(
        "MAE fine-tuned on [cls]: the checkpoints of main_finetune.py",
        key="model", needs=("pos_embed", "norm.weight", "head.weight"), lacks=("decoder_*", "fc_norm.*"),
        drop=("head.*",), vit={"pos_resampling": "plain"},
        evidence=lambda weights, content: "by its history" * ("history" in content),
    ),
    "mae_ft_mean": Family(
        "MAE fine-tuned on the mean patch: its authors' fine-tuned files",
        key="model", needs=("pos_embed", "fc_norm.weight", "head.weight"), lacks=("norm.*",),
        drop=("fc_norm.*", "head.*"), vit={"final_norm": "none", "pos_resampling": "plain"},
        evidence=lambda weights, content: "by its history" * ("history" in content),
    ),
    "simmim": Family(
        "SimMIM pretraining files",
        key="model", prefix="encoder.", needs=("encoder.mask_token", f"encoder.{SHARED}"), lacks=(),
        drop=("decoder.*", "encoder.mask_token", INDEX), vit=BEIT, convert=convert_beit,
    ),
    "simmim_ft": Family(
        "SimMIM fine-tuned files: a position table per block, mean pooling",
        key="model", needs=(OWN, "fc_norm.weight"), lacks=("norm.*",), drop=("fc_norm.*", "head.*", INDEX),
        vit={**BEIT, "final_norm": "none"}, convert=convert_beit,
        evidence=lambda weights, content: STRUCTURE * ("max_accuracy" in content),  # BEiT's fine-tuned files are alike
    ),
    "beitv2": Family(
        "BEiT-v2 pretraining files",
        key="model", needs=(SHARED, "cls_pt_layers.0.norm1.weight", "lm_head.weight"), lacks=("encoder.*",),
        drop=("lm_head.*", "mask_token", "cls_pt_layers.*", INDEX), vit=BEIT, convert=convert_beit,
    ),
    "data2vec": Family(
        "data2vec 1 for images, pretraining files; --checkpoint_key model_ema for the teacher",
        key="model", beside=("model_ema",), needs=(SHARED, "lm_head.weight"), lacks=("cls_pt_layers.*",),
        drop=("lm_head.*", "mask_token", INDEX), vit=BEIT, convert=convert_beit,
    ),
    "maskfeat": Family(
        "MaskFeat's image models, PySlowFast pretraining files",
        key="model_state", needs=("pos_embed", "mask_token", "pred_head.projections.0.weight"),
        lacks=("norm.*",), drop=("mask_token", "pred_head.*", "hogs.*"), vit={**LEARNED, "final_norm": "none"},
    ),
    "ijepa": Family(
        "I-JEPA; --checkpoint_key encoder for the context encoder",
        key="target_encoder", needs=("pos_embed", "norm.weight"), lacks=("cls_token", "fc.*"), drop=(),
        vit={"class_token": False, "pos_resampling": "plain"},
        evidence=lambda weights, content: STRUCTURE * ("target_encoder" in content),
    ),
    "capi": Family(
        "CAPI: the backbone without its predictor",
        key=None, prefix="backbone.", needs=("backbone.registers", "backbone.encoder.blocks.0.residual1.norm.weight"),
        lacks=(), drop=("backbone.decoder.*", "backbone.mask_token", "head.*"), convert=convert_capi,
        vit={"class_token": False, "reg_tokens": 16, "pos_embed": "none", "rope": True, "norm_layer": "rmsnorm",
             "qkv_bias": False, "proj_bias": False, "final_norm": "plain"},
    ),
    "dino": Family(
        "DINO backbone files",
        key=None, needs=("cls_token", "pos_embed", "norm.weight"), drop=(), vit={**LEARNED, "pos_resampling": "offset"},
        lacks=("*.gamma", "mask_token", "reg*_token*", "backbone.*", *HEADS), evidence=lambda weights, content: "",
    ),
    "dino_full": Family(
        "DINO with student, teacher and heads; --checkpoint_key student for the student",
        key="teacher", beside=("dino_loss",), prefix="backbone.", needs=("backbone.cls_token",), lacks=(),
        drop=("head.*",), vit={**LEARNED, "pos_resampling": "offset"},
    ),
    "ibot": Family(
        "iBOT backbone files (checkpoint_teacher.pth, checkpoint_student.pth)",
        key="state_dict", needs=("cls_token", "pos_embed", "norm.weight"), lacks=("head.*", "fc.*", "*.gamma"),
        drop=("masked_embed",), vit={**LEARNED, "pos_resampling": "offset"},
        evidence=lambda weights, content: "by its masked_embed" * ("masked_embed" in weights),
    ),
    "ibot_full": Family(
        "iBOT with student, teacher and heads; --checkpoint_key student for the student",
        key="teacher", beside=("ibot_loss",), prefix="backbone.", needs=("backbone.cls_token",), lacks=(),
        drop=("head.*", "backbone.masked_embed"), vit={**LEARNED, "pos_resampling": "offset"},
    ),
    "mocov3": Family(
        "MoCo-v3; --checkpoint_key momentum_encoder for the other encoder",
        key="state_dict", prefix="base_encoder.", needs=("base_encoder.cls_token", "momentum_encoder.cls_token"),
        lacks=(), drop=("base_encoder.head.*", "momentum_encoder.*", "predictor.*"),
        vit={}, read=read_mocov3,
    ),
    "mocov3_deit": Family(
        "MoCo-v3 in DeiT's layout, as its authors' converter writes it",
        key="model", needs=("cls_token", "pos_embed", "norm.weight"), lacks=("*.gamma", "mask_token", *HEADS), drop=(),
        vit={}, read=read_mocov3, evidence=lambda weights, content: TABLE * fixed_table(weights, columns_first=False),
    ),
    "msn": Family(
        "MSN; --checkpoint_key encoder for the anchor encoder",
        key="target_encoder", beside=("prototypes",), needs=("cls_token", "fc.fc1.weight"), lacks=(),
        drop=("fc.*", "pred.*"), vit={**LEARNED, "pos_resampling": "plain"},
    ),
    "mim_refiner": Family(
        "MIM-Refiner of MAE, dBOT and CrossMAE",
        key="state_dict", needs=("cls_tokens.tokens", "norm.weight"), lacks=("embed_norm.*",), drop=(),
        vit={"no_embed_class": True, "pos_resampling": "plain"}, convert=convert_mim_refiner,
    ),
    "mim_refiner_d2v2": Family(
        "MIM-Refiner of data2vec 2: blocks that normalise after each sum",
        key="state_dict", needs=("cls_tokens.tokens", "embed_norm.weight"), lacks=("norm.*",), drop=(),
        vit={"no_embed_class": True, "pos_resampling": "plain", "pre_norm": True, "norm_order": "post",
             "final_norm": "none"},
        convert=convert_mim_refiner,
    ),
    "dinov2": Family(
        "DINOv2 without registers",
        key=None, needs=("mask_token", "blocks.0.ls1.gamma"), lacks=("register_tokens", "cls_pt_layers.*"),
        drop=("mask_token",), convert=convert_dinov2,
        vit={**LEARNED, "no_embed_class": True, "init_values": 1.0, "pos_resampling": "offset"},
    ),
    "dinov2_reg": Family(
        "DINOv2 with four registers",
        key=None, needs=("mask_token", "blocks.0.ls1.gamma", "register_tokens"), lacks=(), drop=("mask_token",),
        vit={**LEARNED, "no_embed_class": True, "init_values": 1.0, "reg_tokens": 4}, convert=convert_dinov2,
    ),
    "timm": Family(
        "state dicts of timm's plain ViTs",
        key=None, needs=("blocks.0.norm1.weight", "patch_embed.proj.weight"),
        lacks=("decoder_*", "*.gamma_1", "*.relative_position_bias_table", "register_tokens"),
        drop=("head.*", "fc_norm.*", "attn_pool.*", "mask_token"), vit={}, convert=convert_timm, read=read_timm,
        evidence=lambda weights, content: "",
    ),
}  # fmt: skip


def drop_rule(family: Family, key: str) -> str | None:
    """The pattern of the family's `drop` that leaves this key behind, if one does."""
    return next((rule for rule in family.drop if fnmatchcase(key, rule)), None)
