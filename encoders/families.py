"""FAMILIES: the formats of published weight files, and the conversion of their tensors to those of models_vit.

The table is families.toml. Converters rename and reshape, without guessing: what they cannot convert keeps its name, so
that the strict loader lists it. Importable without torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from util.lazy import lazy

torch = lazy("torch")
if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Grid = tuple[int, int]  # rows and columns of patches

STRUCTURE = "by its structure"
TABLE = "by its fixed table of positions"  # evidence that leaves the number of heads open
ENTRIES = ("state_dict", "model")  # where trainers put a model's state dict


class Family(NamedTuple):
    """A published checkpoint format; key names as in encoders.contents.Content. Patterns are fnmatch's.

    `--checkpoint_key` chooses another encoder of a file: an entry ("model_ema"), or a replacement of `prefix`
    ("momentum_encoder").
    """

    description: str
    vit: dict  # options that differ from models_vit's defaults
    fuse: dict[str, list[str]]  # joint tensor of a block -> its parts in the file; "0" is a part of zeros
    rename: dict[str, str]  # regular expression -> replacement, in this order
    key: str | None = None  # entry that holds the weights; None: the file is flat
    prefix: str = ""  # of all keys in use
    beside: Iterable[str] = ()  # other entries that distinguish the family
    needs: Iterable[str] = ()  # keys that every file has
    lacks: Iterable[str] = ()  # patterns of keys that no file has
    drop: Iterable[str] = ()  # patterns of keys that the encoder does not need
    # what distinguishes the family from others with the same tensor names, each item sufficient: ("entry", pattern),
    # ("tensor", pattern) or ("table", axis of the first channels of the fixed position table); None: the structure does
    evidence: Iterable[tuple[str, str]] | None = None
    finish: Callable[[State], State] = lambda state: state
    # (converted weights, --grid) -> options that differ among files of the family
    read: Callable[[State, Grid | None], dict] = lambda state, grid: {}

    def convert(self, state: State) -> State:
        """Published names and shapes -> those of models_vit."""
        for whole, parts in self.fuse.items():
            state = fused(state, parts, whole)
        names = {key: key for key in state}
        for pattern, replacement in self.rename.items():
            names = {key: re.sub(pattern, replacement, name) for key, name in names.items()}
        return self.finish({names[key]: value for key, value in state.items()})

    def shown_by(self, weights: State, entries: Iterable[str]) -> str:
        """The evidence in a file that fits the family; "" for none."""
        if self.evidence is None:
            return STRUCTURE
        for kind, value in self.evidence:
            if kind == "table" and is_fixed_table(weights.get("pos_embed"), value):
                return TABLE
            if any(fnmatchcase(name, value) for name in {"entry": entries, "tensor": weights}.get(kind, ())):
                return f"by its {value.rstrip('_*')}"
        return ""

    def drop_rule(self, key: str) -> str | None:
        """The pattern of `drop` that matches a key."""
        return next((rule for rule in self.drop if fnmatchcase(key, rule)), None)


# ---- converters


def fused(state: State, parts: list[str], whole: str) -> State:
    """Concatenate separate queries, keys and values in every block that has all of them."""
    state = dict(state)
    first, *others = [part for part in parts if part != "0"]
    for key in [key for key in state if key.endswith(f".{first}")]:
        stem = key.removesuffix(first)
        if all(f"{stem}{part}" in state and state[stem + part].shape == state[key].shape for part in others):
            tensors = {part: state.pop(stem + part) for part in (first, *others)}
            zeros = tensors[first].new_zeros(tensors[first].shape)  # BEiT's attention has no bias on its keys
            state[stem + whole] = torch.cat([tensors.get(part, zeros) for part in parts])
    return state


def share_table(state: State) -> State:
    """BEiT: every block gets a copy of a shared table of relative positions, as in the authors' own fine-tuning."""
    name = "rel_pos_bias.relative_position_bias_table"
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")} if name in state else ()
    copies = {f"blocks.{block}.attn.{name}": state[name] for block in blocks}
    return {key: value for key, value in state.items() if key != name} | copies


def flatten_positions(state: State) -> State:
    """MIM-Refiner: positions (1,rows,columns,D) of the patches alone."""
    table = state.get("pos_embed")
    return state if table is None or table.ndim != 4 else {**state, "pos_embed": table.flatten(1, 2)}


def move_cls_position(state: State) -> State:
    """DINOv2: add the position of [cls] to the token, because the registers that follow it have none."""
    token, table = state.get("cls_token"), state.get("pos_embed")
    if token is None or table is None or table.ndim != 3 or token.shape != table[:, :1].shape:
        return state
    return {**state, "cls_token": token + table[:, :1], "pos_embed": table[:, 1:]}


def add_patch_bias(state: State) -> State:
    """Zero biases for a patch embedding that precedes a norm (timm's CLIP models have none)."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or "norm_pre.weight" not in state:
        return state
    return {"patch_embed.proj.bias": kernel.new_zeros(len(kernel)), **state}


def read_timm(state: State, grid: Grid | None) -> dict:
    """The options of timm's plain ViTs that the keys show."""
    counts = {
        name: state[name].shape[1] for name in ("cls_token", "reg_token") if getattr(state.get(name), "ndim", 0) > 1
    }
    options = {
        "class_token": "cls_token" in state,
        "reg_tokens": counts.get("reg_token", 0),
        "pos_embed": "learned" if "pos_embed" in state else "none",
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "affine" if "norm.weight" in state else "none",
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
    }
    if counts and "pos_embed" in state and state["pos_embed"].ndim > 1:
        rows = state["pos_embed"].shape[1]
        options["no_embed_class"] = rows == grid[0] * grid[1] if grid else isqrt(rows) ** 2 == rows
    return options


def read_mocov3(state: State, grid: Grid | None) -> dict:
    """12 heads in ViT-S and ViT-B, 16 in larger ones (vits.py of its authors)."""
    kernel = state.get("patch_embed.proj.weight")
    return {"num_heads": 12 if kernel is None or len(kernel) <= 768 else 16}


def is_fixed_table(table: Tensor | None, first: str) -> bool:
    """Whether positions are the sine-cosine table of a square grid with a zero row for [cls].

    first: the axis in its first channels, "columns" (MAE) or "rows" (MoCo-v3).
    """
    from util.pos_embed import sincos_pos_embed

    if table is None or table.ndim != 3 or table.shape[2] % 4 or isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        return False
    side, width = isqrt(table.shape[1] - 1), table.shape[2]
    expected = sincos_pos_embed(width, (side, side), 1)
    expected = expected if first == "columns" else expected.roll(width // 2, dims=-1)
    return table.float().allclose(expected, atol=1e-2)  # bfloat16, too


# ---- the table


FAMILIES = {}
for name, entry in tomllib.loads((Path(__file__).parent / "families.toml").read_text()).items():
    functions = {field: globals()[entry[field]] for field in ("finish", "read") if field in entry}
    FAMILIES[name] = Family(**{"vit": {}, "fuse": {}, "rename": {}, **entry, **functions})
