"""FAMILIES: what the published encoders' files look like, and how their tensors become those of models_vit.

A converter renames and reshapes; it never guesses. What it cannot complete it passes on under the file's own name, so
that the loader, which wants every tensor used and every parameter set, refuses the file and lists it.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_sets.loader import IMAGENET_MEAN, IMAGENET_STD

State = dict[str, Tensor]


class Family(NamedTuple):
    """A published checkpoint format. Keys of tensors are meant without the `module.` of DistributedDataParallel.

    Where the file holds several encoders, `--checkpoint_key` chooses another one: an entry of the file ("model_ema"),
    or what stands in the place of `prefix` ("momentum_encoder").
    """

    description: str
    key: str | None  # entry of the file that holds the weights; None where the file is flat
    needs: tuple[str, ...]  # keys that every file of the family has
    lacks: tuple[str, ...]  # key patterns that none of them has
    drop: tuple[str, ...]  # key patterns left behind on purpose
    vit: dict  # architecture options that differ from models_vit's defaults
    convert: Callable[[State], State] = lambda state: state  # their names and shapes -> ours; pure
    prefix: str = ""  # of all keys that are used
    beside: tuple[str, ...] = ()  # other entries of the file that tell it from its likes
    read: Callable[[State], dict] = lambda state: {}  # more options, where the family's files differ in structure
    # (weights, file) -> whether a file that fits shows that it is of this family, and not just one of the plain ViTs,
    # whose tensors everybody calls alike
    marked: Callable[[State, dict], bool] = lambda weights, content: True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


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
    """Queries, keys and values that the file keeps apart, as one tensor; for every block that has all of them.

    A part named "0" is all zeros: BEiT's attention has no bias on its keys.
    """
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


def read_timm(state: State) -> dict:
    """What timm's plain ViTs differ in and their keys tell: tokens, positions, last norm, layer scale, biases."""
    prefix = {name: state[name] for name in ("cls_token", "reg_token") if name in state and state[name].ndim > 1}
    prefix = {name: token.shape[1] for name, token in prefix.items()}
    options = {
        "class_token": "cls_token" in state,
        "reg_tokens": prefix.get("reg_token", 0),
        "pos_embed": "learned" if "pos_embed" in state else "none",
        "final_norm": "affine" if "norm.weight" in state else "none",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
    }
    if "pos_embed" in state and state["pos_embed"].ndim > 1 and prefix:
        rows = state["pos_embed"].shape[1]
        options["no_embed_class"] = isqrt(rows) ** 2 == rows
    return options


def unlike_plain_vit(model: nn.Module) -> list[str]:
    """What a timm model computes otherwise than models_vit and its keys do not tell."""
    import timm  # a second to import: --help and mistakes in the arguments do not wait for it

    found = [] if type(model) is timm.models.VisionTransformer else [f"it is a {type(model).__name__}"]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.eps != 1e-6:
            found.append(f"its norms have eps {module.eps}, not 1e-6")
    for block in getattr(model, "blocks", []):
        if type(block) is not timm.models.vision_transformer.Block:
            found.append(f"its blocks are {type(block).__name__}")
        elif type(block.mlp) is not timm.layers.Mlp or not isinstance(block.mlp.act, nn.GELU):
            found.append("its MLPs are not two layers with GELU between")
    return sorted(set(found))


def mae_marked(weights: State, content: dict) -> bool:
    """MAE's decoder, or the zero position of [cls] in its fixed table, which its files have under "model"."""
    table, home = weights["pos_embed"], content.get("model")
    at_home = is_state(home) and unwrapped(home).get("pos_embed") is table
    of_mae = at_home and table.ndim == 3 and not table[:, :1].any()
    return of_mae or any(key == "mask_token" or key.startswith("decoder_") for key in weights)


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
        key="model", needs=("cls_token", "pos_embed", "norm.weight"), lacks=HEADS, drop=("decoder_*", "mask_token"),
        vit={"pos_resampling": "plain"}, marked=mae_marked,
    ),
    "mae_ft": Family(
        "MAE fine-tuned on [cls]: the checkpoints of main_finetune.py",
        key="model", needs=("pos_embed", "norm.weight", "head.weight"), lacks=("decoder_*", "fc_norm.*"),
        drop=("head.*",), vit={"pos_resampling": "plain"}, marked=lambda weights, content: "history" in content,
    ),
    "mae_ft_mean": Family(
        "MAE fine-tuned on the mean patch: its authors' fine-tuned files",
        key="model", needs=("pos_embed", "fc_norm.weight", "head.weight"), lacks=("norm.*",),
        drop=("fc_norm.*", "head.*"), vit={"final_norm": "none", "pos_resampling": "plain"},
        marked=lambda weights, content: "model" in content,
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
        marked=lambda weights, content: "target_encoder" in content,
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
        lacks=("*.gamma", "mask_token", "reg*_token*", "backbone.*", *HEADS), marked=lambda weights, content: False,
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
        marked=lambda weights, content: "masked_embed" in weights,
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
        vit={"num_heads": 12},  # ViT-S too
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
        vit={"no_embed_class": True, "pos_resampling": "plain", "pre_norm": True, "post_norm": True,
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
        lacks=("decoder_*", "mask_token", "*.gamma_1", "*.relative_position_bias_table", "register_tokens"),
        drop=("head.*", "fc_norm.*", "attn_pool.*"), vit={}, read=read_timm,
        marked=lambda weights, content: False,
    ),
}  # fmt: skip


def drop_rule(family: Family, key: str) -> str | None:
    """The pattern of the family's `drop` that leaves this key behind, if one does."""
    return next((rule for rule in family.drop if fnmatchcase(key, rule)), None)


def unwrapped(weights: State) -> State:
    """Without the `module.` that DistributedDataParallel puts before every key."""
    if weights and all(key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def is_state(value: object) -> bool:
    """Whether it is tensors by name, and at least one."""
    pairs = value.items() if isinstance(value, dict) else ()
    return bool(pairs) and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in pairs)


def part_of(content: dict, name: str) -> State | None:
    """The tensors that a name stands for: an entry, what keys begin with, or both ("state_dict.encoder_q")."""
    if is_state(content.get(name)):
        return unwrapped(content[name])
    entry, _, rest = name.partition(".")
    if rest and is_state(content.get(entry)):
        return part_of(unwrapped(content[entry]), rest)
    chosen = {key.removeprefix(f"{name}."): value for key, value in content.items() if str(key).startswith(f"{name}.")}
    return chosen if is_state(chosen) else None


def encoders_in(content: dict) -> list[str]:
    """The names, for part_of, of all that looks like a ViT below the top of a file."""
    states = {"": content} if is_state(content) else content
    found = []
    for entry, state in states.items():
        for key in unwrapped(state) if is_state(state) else ():
            stem, is_vit, _ = key.partition("patch_embed.proj.weight")
            name = ".".join(filter(None, [str(entry), *stem.split(".")]))
            found += [name] if is_vit and name and part_of(content, name) else []
    return found


def weights_of(content: dict, family: Family, checkpoint_key: str | None = None, flat: bool = True) -> State | None:
    """The tensors of a file of this family, or None where the file is built differently.

    A family of flat files may be in one of the entries that trainers put weights in. flat: accept a file of nothing
    but tensors for any family (safetensors have no entries).
    """
    if checkpoint_key is None:
        places = [content.get(family.key, content if flat else None)]
        if family.key is None:
            places = [content, *map(content.get, ENTRIES)]
        return next((unwrapped(place) for place in places if is_state(place)), None)
    if checkpoint_key in content:
        return unwrapped(content[checkpoint_key]) if is_state(content[checkpoint_key]) else None
    weights = weights_of(content, family, flat=flat) if family.prefix else None
    other = f"{checkpoint_key.removeprefix('module.').removesuffix('.')}."
    chosen = {key: value for key, value in (weights or {}).items() if key.startswith(other)}
    if chosen:
        return {family.prefix + key.removeprefix(other): value for key, value in chosen.items()}
    return part_of(unwrapped(content) if is_state(content) else content, other.removesuffix("."))


def fits(content: dict, family: Family, checkpoint_key: str | None, flat: bool) -> bool:
    """Whether the structure of a file is that of a family: what its tensors are called and what is kept beside them."""
    weights = weights_of(content, family, checkpoint_key, flat)
    if weights is None or any(key not in weights for key in family.needs):
        return False
    if not is_state(content) and any(entry not in content for entry in family.beside):
        return False
    return not any(fnmatchcase(key, pattern) for key in weights for pattern in family.lacks)
