"""FAMILIES: the formats of published weight files, and the conversion of their tensors to those of models_vit.

The table is families.toml. A converter renames and reshapes; it never guesses. What it cannot convert keeps the file's
name, so that the strict loader lists it. Importable without torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
Grid = tuple[int, int]  # rows and columns of patches

STRUCTURE = "by its structure"
TABLE = "by its fixed table of positions"  # evidence that leaves the number of heads open
ENTRIES = ("state_dict", "model")  # where trainers put a model's state dict


class Family(NamedTuple):
    """A published checkpoint format. Keys are those of encoders.contents.without_wrappers.

    Where the file holds several encoders, `--checkpoint_key` chooses another one: an entry of the file ("model_ema"),
    or a replacement of `prefix` ("momentum_encoder").
    """

    description: str
    vit: dict  # architecture options that differ from models_vit's defaults
    fuse: dict[str, list[str]]  # joint tensor of a block -> its parts in the file
    rename: dict[str, str]  # regular expressions, applied in this order
    key: str | None = None  # entry of the file that holds the weights; None where the file is flat
    prefix: str = ""  # of all keys that are used
    beside: tuple[str, ...] = ()  # other entries of the file that distinguish it
    needs: tuple[str, ...] = ()  # keys that every file of the family has
    lacks: tuple[str, ...] = ()  # key patterns that none of them has
    drop: tuple[str, ...] = ()  # patterns of keys that the encoder does not need
    # what shows that a file which fits is not of another family whose tensors have the same names, each sufficient:
    # an entry of the file, a tensor, a prefix of tensors, the layout of the fixed position table; None: the structure
    evidence: tuple[dict[str, str], ...] | None = None
    finish: Callable[[State], State] = lambda state: state
    # (converted weights, --grid) -> options in which files of the family differ
    read: Callable[[State, Grid | None], dict] = lambda state, grid: {}

    def convert(self, state: State) -> State:
        """Published names and shapes -> those of models_vit."""
        for whole, parts in self.fuse.items():
            state = fused(state, parts, whole)
        names = {key: key for key in state}
        for pattern, replacement in self.rename.items():
            names = {key: re.sub(pattern, replacement, name) for key, name in names.items()}
        return self.finish({names[key]: value for key, value in state.items()})

    def shown_by(self, weights: State, content: dict) -> str:
        """The evidence in a file that fits; "" for none."""
        kinds = {
            "entry": lambda name: f"by its {name}" * (name in content),
            "tensor": lambda name: f"by its {name}" * (name in weights),
            "prefix": lambda name: f"by its {name.rstrip('_')}" * any(key.startswith(name) for key in weights),
            "table": lambda first: TABLE * fixed_table(weights, columns_first=first == "columns"),
        }
        rules = [rule for rules in self.evidence or () for rule in rules.items()]
        shown = (kinds[kind](value) for kind, value in rules)
        return STRUCTURE if self.evidence is None else next(filter(None, shown), "")


# ---------------------------------------------------------------------------------------------------------------------
# converters
# ---------------------------------------------------------------------------------------------------------------------


def fused(state: State, parts: list[str], whole: str) -> State:
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
    """DINOv2: the position of [cls] goes into the token, because the registers that follow it have none."""
    token, table = state.get("cls_token"), state.get("pos_embed")
    if token is None or table is None or table.ndim != 3 or token.shape != table[:, :1].shape:
        return state
    return {**state, "cls_token": token + table[:, :1], "pos_embed": table[:, 1:]}


def add_patch_bias(state: State) -> State:
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


# ---------------------------------------------------------------------------------------------------------------------
# the table
# ---------------------------------------------------------------------------------------------------------------------


def read_families() -> dict[str, Family]:
    table = tomllib.loads((Path(__file__).parent / "families.toml").read_text())
    for entry in table.values():
        entry |= {field: globals()[entry[field]] for field in ("finish", "read") if field in entry}
        entry |= {field: tuple(value) for field, value in entry.items() if isinstance(value, list)}
    return {name: Family(**{"vit": {}, "fuse": {}, "rename": {}, **entry}) for name, entry in table.items()}


FAMILIES = read_families()


def drop_rule(family: Family, key: str) -> str | None:
    """The pattern of the family's `drop` that leaves this key behind, if one does."""
    return next((rule for rule in family.drop if fnmatchcase(key, rule)), None)
