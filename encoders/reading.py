"""Read the content of a weight file as one of a family: its tensors under models_vit's names, sizes and problems."""

import inspect
import re
from dataclasses import dataclass, field
from math import isqrt

import torch

from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture
from encoders.contents import weights_of
from encoders.families import FAMILIES, Family, Grid, State, drop_rule
from models_vit import VisionTransformer

DEEPSPEED = "convert its folder with: python FOLDER/zero_to_fp32.py FOLDER OUT"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RELATIVE = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"
HEAD_WIDTH = 64  # of nearly all published ViTs
DEFAULTS = {name: option.default for name, option in inspect.signature(VisionTransformer).parameters.items()}


@dataclass
class Reading:
    """A file read as one of a family."""

    family: str
    weights: State  # as in the file
    state: State = field(default_factory=dict)  # as in the model
    model: str = ""  # name of the architecture, or its sizes
    published: dict = field(default_factory=dict)  # options of models_vit.VisionTransformer, as the family has them
    options: dict = field(default_factory=dict)  # these, with what the caller states
    shapes: State = field(default_factory=dict)  # of the model
    problems: list[str] = field(default_factory=list)  # reasons why the state does not cover the model
    heads_open: bool = False  # neither the file nor its sizes show the number of heads


def read_as(
    content: dict,
    name: str,
    model: str = FROM_FILE,
    checkpoint_key: str | None = None,
    grid: Grid | None = None,
    **options,
) -> Reading:
    """A file's content as one of a family, of the architecture `model` or of the sizes that its tensors have.

    Values are not looked at: see problems_of.
    """
    family = FAMILIES[name]
    reading = Reading(name, weights_of(content, family, checkpoint_key) or {})
    reading.state, reading.problems = converted(content, family, checkpoint_key)
    if reading.problems:
        return reading
    state = reading.state
    try:
        sizes = sizes_of(state)
    except ValueError as error:
        reading.problems = [str(error)]
        return reading
    named = architectures_of(sizes)
    own = {**family.vit, **family.read(state, grid)}
    if model == FROM_FILE:
        reading.model = named[0] if named else "vit_width{embed_dim}_depth{depth}_patch{patch_size}".format(**sizes)
        arch = architecture(named[0]) if named else {**sizes, **mlp_ratio_of(state, sizes["embed_dim"])}
    else:
        reading.model, arch = model, architecture(model)
        if problem := another_architecture(sizes, named, model):
            reading.problems = [problem]
            return reading
    reading.published = {**arch, **own}
    reading.options = {**reading.published, **options}
    heads = heads_of(state, sizes["embed_dim"])
    reading.heads_open = heads is None and "num_heads" not in reading.options
    reading.options.setdefault("num_heads", heads or 1)
    reading.options["img_size"], problems = native_size(state, reading.options, grid)
    try:
        with torch.device("meta"):
            reading.shapes = VisionTransformer(**reading.options).state_dict()
    except ValueError as error:  # such as heads of this family that do not divide the width
        reading.problems = [str(error)]
        return reading
    reading.problems = mismatches(state, reading.shapes) + problems
    another_depth = model != FROM_FILE and sizes["depth"] != arch["depth"]
    if another_depth and not read_as(content, name, FROM_FILE, checkpoint_key, grid, **options).problems:
        reading.problems.append(f"--model {FROM_FILE} reads it with its own {sizes['depth']} blocks")
    return reading


def converted(content: dict, family: Family, checkpoint_key: str | None) -> tuple[State, list[str]]:
    """Our state dict from the file's content, and what is wrong with the file."""
    weights = weights_of(content, family, checkpoint_key)
    if weights is None:
        key = checkpoint_key or family.key
        where = f"no weights under {key!r}" if key else "not a flat file of weights"
        held = f"the file holds {', '.join(map(str, list(content)[:5]))}{', ...' * (len(content) > 5)}"
        return {}, [f"{where} ({held})"]
    kept = {key: value for key, value in weights.items() if drop_rule(family, key) is None}
    if stray := sorted(key for key in kept if not key.startswith(family.prefix)):
        return {}, [f"not used, because it is not under {family.prefix}: {', '.join(stray[:5])}"]
    return family.convert({key.removeprefix(family.prefix): value for key, value in kept.items()}), []


def sizes_of(state: State) -> dict:
    """Width, depth and patch size of our state dict. ValueError where its patch embedding is not one of RGB squares."""
    stem = state.get("patch_embed.proj.weight")
    if stem is None:
        raise ValueError("it has no patch_embed.proj.weight, as every encoder has")
    if not stem.numel():
        raise ValueError(f"its tensors are empty, as in a shard of DeepSpeed's ZeRO-3: {DEEPSPEED}")
    if stem.ndim != 4 or stem.shape[1] != 3 or stem.shape[2] != stem.shape[3]:
        raise ValueError(
            f"patch_embed.proj.weight is {tuple(stem.shape)}: models_vit embeds square patches of RGB images by a "
            "convolution (width, 3, patch, patch)"
        )
    # a block that is missing in between does not make another architecture
    depth = 1 + max((int(block[1]) for key in state if (block := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    return {"embed_dim": stem.shape[0], "depth": depth, "patch_size": stem.shape[-1]}


def mlp_ratio_of(state: State, width: int) -> dict:
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if hidden is None or hidden.ndim != 2:
        return {}
    return {"mlp_ratio": (len(hidden) + 0.5) / width}  # the model rounds down


def heads_of(state: State, width: int) -> int | None:
    """Heads of a size without a name: as the file's position tables show, or of the usual 64 channels each."""
    relative, rotary = state.get(RELATIVE), state.get("blocks.0.attn.rope.freqs")
    if relative is not None and relative.ndim == 2:
        return relative.shape[1]
    if rotary is not None and rotary.ndim == 2 and rotary.shape[1]:
        return width // rotary.shape[1]
    return None if width % HEAD_WIDTH else width // HEAD_WIDTH


def architectures_of(sizes: dict) -> list[str]:
    """The names of the architectures that have these sizes."""
    return [name for name, arch in ARCHITECTURES.items() if sizes.items() <= arch.items()]


def another_architecture(sizes: dict, named: list[str], model: str) -> str:
    """What to write instead of `model` for a file of these sizes; "" where it may be the model."""
    arch = architecture(model)
    if model in named or (not named and all(arch[name] == sizes[name] for name in ("embed_dim", "patch_size"))):
        return ""
    return (
        "it has width {embed_dim}, {depth} blocks and patches of {patch_size} pixels: ".format(**sizes)
        + f"write --model {' or '.join(named) or FROM_FILE}"
    )


def native_size(state: State, options: dict, grid: Grid | None) -> tuple[tuple[int, int], list[str]]:
    """Height and width in pixels for which the positions were made, and what is wrong with the grid.

    The grid is the stated one, or a square.
    """
    table, patch = state.get("pos_embed", state.get(RELATIVE)), options["patch_size"]
    default = (options.get("img_size", 224) // patch * patch or patch,) * 2
    if table is None:
        return default, ["--grid: the file has no table of positions"] if grid else []
    if table.ndim == 2:  # (2 rows - 1)(2 columns - 1) offsets, and three rows of [cls]
        count, rows_of = len(table), lambda rows, columns: (2 * rows - 1) * (2 * columns - 1) + 3
        side = (isqrt(max(count - 3, 0)) + 1) // 2
    elif table.ndim == 3:
        prefix = int(options.get("class_token", True)) + options.get("reg_tokens", 0)
        count = max(table.shape[1] - (0 if options.get("no_embed_class") else prefix), 0)
        side, rows_of = isqrt(count), lambda rows, columns: rows * columns
    else:
        return default, []
    rows, columns = grid or (side, side)
    if side and rows_of(rows, columns) == count:
        return (rows * patch, columns * patch), []
    stated = f"--grid {rows} {columns} does not fit" if grid else "state rows and columns with --grid"
    return default, [f"its table of {count} positions is not that of a square grid: {stated}"] if count else []


def mismatches(state: State, shapes: State) -> list[str]:
    """All reasons why `state` does not cover a model with tensors of these shapes exactly."""
    problems = []
    if missing := sorted(shapes.keys() - state.keys()):
        problems.append(f"missing {', '.join(by_block(missing, shapes))}")
    if extra := sorted(state.keys() - shapes.keys()):
        problems.append(f"not used {', '.join(by_block(extra, state))}")
    for name in sorted(shapes.keys() & state.keys()):
        if state[name].shape != shapes[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, wanted {tuple(shapes[name].shape)}")
        elif state[name].is_meta:
            problems.append(f"{name} is a tensor without values (device meta)")
        elif state[name].layout != torch.strided:
            problems.append(f"{name} is a sparse tensor ({state[name].layout}): save it dense")
        elif state[name].dtype not in FLOATS:
            problems.append(f"{name} holds {state[name].dtype} values, not float16, bfloat16, float32 or float64")
    return problems


def problems_of(reading: Reading) -> list[str]:
    """All reasons why a reading cannot be used, those in the values of the tensors among them."""
    values = {
        name: value
        for name, value in reading.state.items()
        if value.dtype in FLOATS and not value.is_meta and value.layout == torch.strided
    }
    broken = sorted(name for name, value in values.items() if not value.float().isfinite().all())
    problems = list(reading.problems)
    if broken:
        verb = "holds" if len(broken) == 1 else "hold"
        problems.append(f"{', '.join(by_block(broken, reading.shapes))} {verb} NaN or infinity")
    if reading.heads_open and not problems:
        width = reading.options["embed_dim"]
        divisors = ", ".join(str(heads) for heads in range(1, width // 4 + 1) if width % heads == 0)
        problems.append(f"the heads of a width of {width} are not known: state them with --num_heads ({divisors})")
    return problems


def by_block(names: list[str], among: dict) -> list[str]:
    """Names of tensors; "blocks.7.*" stands for all tensors of a block."""
    whole = {key.split(".")[1] for key in names if key.startswith("blocks.")}
    whole -= {key.split(".")[1] for key in among.keys() - set(names) if key.startswith("blocks.")}
    parts = [key.split(".") for key in names]
    blocks = [part[1] for part in parts if part[0] == "blocks" and part[1] in whole]
    blocks.sort(key=lambda block: (len(block), block))  # 10 after 9
    rest = [".".join(part) for part in parts if not (part[0] == "blocks" and part[1] in whole)]
    return [f"blocks.{block}.*" for block in dict.fromkeys(blocks)] + rest
