"""Read a weight file as one of a family: its tensors under models_vit's names, the sizes, and all problems."""

import inspect
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch

from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture
from encoders.catalogue import families_called
from encoders.contents import Content, fits, not_a_tensor, read_content, weights_of
from encoders.families import FAMILIES, TABLE, Family, Grid, State
from models_vit import VisionTransformer
from util.progress import log
from util.tensor_files import safetensors_metadata

DEEPSPEED = "convert its folder with: python FOLDER/zero_to_fp32.py FOLDER OUT"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RELATIVE = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"
HEAD_WIDTH = 64  # of nearly all published ViTs
DEFAULTS = {name: option.default for name, option in inspect.signature(VisionTransformer).parameters.items()}
FILE_NAME = "by its file name"
UNSURE = ("", TABLE, FILE_NAME)  # reasons that leave heads, activation and preprocessing open


@dataclass
class Reading:
    """A file read as one of a family."""

    content: Content
    family: str
    weights: State  # as in the file
    state: State = field(default_factory=dict)  # as in the model
    model: str = ""  # name of the architecture, or its sizes
    published: dict = field(default_factory=dict)  # options of models_vit.VisionTransformer, as the family has them
    options: dict = field(default_factory=dict)  # these, with what the caller states
    shapes: State = field(default_factory=dict)  # of the model
    problems: list[str] = field(default_factory=list)  # why the state does not cover the model
    heads_open: bool = False  # neither the file nor its sizes show the number of heads
    reason: str = ""  # see Detected
    others: tuple[str, ...] = ()


def open_weights(
    path: Path, model: str, family: str | None = None, checkpoint_key: str | None = None, **stated
) -> Reading:
    """A file read as its family (None: see detect_family); problems_of says what prevents its use.

    Other arguments: see encoders.load.load_encoder.
    """
    content, checkpoint_key = read_content(path), checkpoint_key or None
    if family is None:
        family, reason, others = detect_family(path, content, checkpoint_key, **stated)
    else:
        reason, others = "" if family == "timm" else "as stated", ()
        written = safetensors_metadata(path).get("family") if path.suffix == ".safetensors" else None
        if written not in (None, family):
            log.warning("%s states family %s; it is read as %s because of --family", path, written, family)
    return replace(read_as(content, family, model, checkpoint_key, **stated), reason=reason, others=others)


def read_as(
    content: Content, name: str, model: str = FROM_FILE, checkpoint_key: str | None = None, **stated
) -> Reading:
    """A file's content as one of a family, of the architecture `model` or of the sizes that its tensors have.

    stated: grid, and options of VisionTransformer. Values are not checked: see problems_of.
    """
    reading = Reading(content, name, weights_of(content, FAMILIES[name], checkpoint_key) or {})
    try:
        fill(reading, model, checkpoint_key, **stated)
    except ValueError as error:  # such as heads of this family that do not divide the width
        reading.problems = [str(error)]
    return reading


def fill(reading: Reading, model: str, checkpoint_key: str | None, grid: Grid | None = None, **options) -> None:
    """Fill a reading's other fields. ValueError if there is no encoder in the file, or another one than `model`."""
    family = FAMILIES[reading.family]
    state = reading.state = converted(reading.content, family, checkpoint_key)
    sizes = sizes_of(state)
    names = [name for name, arch in ARCHITECTURES.items() if sizes.items() <= arch.items()]
    if model == FROM_FILE:
        reading.model = names[0] if names else "vit_width{embed_dim}_depth{depth}_patch{patch_size}".format(**sizes)
        arch, hidden = architecture(names[0]) if names else dict(sizes), state.get("blocks.0.mlp.fc1.weight")
        if not names and hidden is not None and hidden.ndim == 2:
            arch["mlp_ratio"] = (len(hidden) + 0.5) / sizes["embed_dim"]  # the model rounds down
    else:
        reading.model, arch = model, architecture(model)
        if model not in names and (names or any(arch[size] != sizes[size] for size in ("embed_dim", "patch_size"))):
            raise ValueError(
                "it has width {embed_dim}, {depth} blocks and patches of {patch_size} pixels: ".format(**sizes)
                + f"write --model {' or '.join(names) or FROM_FILE}"
            )
    reading.published = {**arch, **family.vit, **family.read(state, grid)}
    heads = heads_of(state, sizes["embed_dim"])
    reading.heads_open = heads is None and "num_heads" not in {**reading.published, **options}
    reading.options = {"num_heads": heads or 1, **reading.published, **options}
    reading.options["img_size"], problem = native_size(state, reading.options, grid)
    with torch.device("meta"):
        reading.shapes = VisionTransformer(**reading.options).state_dict()
    reading.problems = mismatches(state, reading.shapes) + [problem] * bool(problem)


def converted(content: Content, family: Family, checkpoint_key: str | None) -> State:
    """Our state dict from the file's content. ValueError if the file does not have the family's layout."""
    weights = weights_of(content, family, checkpoint_key)
    if weights is None:
        key = checkpoint_key or family.key
        names = list(dict.fromkeys(name.partition(".")[0] for name in (*content.entries[1:], *content.leaves)))
        raise ValueError(
            f"{f'no weights under {key!r}' if key else 'not a flat file of weights'} "
            f"(the file holds {', '.join(names[:5])}{', ...' * (len(names) > 5)})"
        )
    kept = {key: value for key, value in weights.items() if family.drop_rule(key) is None}
    if stray := sorted(key for key in kept if not key.startswith(family.prefix)):
        raise ValueError(f"not used, because it is not under {family.prefix}: {', '.join(stray[:5])}")
    return family.convert({key.removeprefix(family.prefix): value for key, value in kept.items()})


def sizes_of(state: State) -> dict:
    """Width, depth and patch size of our state dict. ValueError unless it embeds square patches of RGB images."""
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
    # a missing block in between does not make another architecture
    depth = 1 + max((int(block[1]) for key in state if (block := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    return {"embed_dim": stem.shape[0], "depth": depth, "patch_size": stem.shape[-1]}


def heads_of(state: State, width: int) -> int | None:
    """Heads of a size without a name: as the file's position tables show, or of the usual 64 channels each."""
    relative, rotary = state.get(RELATIVE), state.get("blocks.0.attn.rope.freqs")
    if relative is not None and relative.ndim == 2:
        return relative.shape[1]
    if rotary is not None and rotary.ndim == 2 and rotary.shape[1]:
        return width // rotary.shape[1]
    return None if width % HEAD_WIDTH else width // HEAD_WIDTH


def native_size(state: State, options: dict, grid: Grid | None) -> tuple[tuple[int, int], str]:
    """Height and width in pixels of the positions' grid, stated or square; and the problem with it, or ""."""
    table, patch = state.get("pos_embed", state.get(RELATIVE)), options["patch_size"]
    default = (options.get("img_size", 224) // patch * patch or patch,) * 2
    if table is None:
        return default, "--grid: the file has no table of positions" if grid else ""
    if table.ndim == 2:  # (2 rows - 1)(2 columns - 1) offsets, and three rows of [cls]
        count, rows_of = len(table), lambda rows, columns: (2 * rows - 1) * (2 * columns - 1) + 3
        side = (isqrt(max(count - 3, 0)) + 1) // 2
    elif table.ndim == 3:
        prefix = int(options.get("class_token", True)) + options.get("reg_tokens", 0)
        count = max(table.shape[1] - (0 if options.get("no_embed_class") else prefix), 0)
        side, rows_of = isqrt(count), lambda rows, columns: rows * columns
    else:
        return default, ""
    rows, columns = grid or (side, side)
    if side and rows_of(rows, columns) == count:
        return (rows * patch, columns * patch), ""
    advice = f"--grid {rows} {columns} does not fit" if grid else "state rows and columns with --grid"
    return default, f"its table of {count} positions is not that of a square grid: {advice}" if count else ""


def mismatches(state: State, shapes: State) -> list[str]:
    """All reasons why `state` does not cover a model with tensors of these shapes exactly."""
    problems = []
    if missing := sorted(shapes.keys() - state.keys()):
        problems.append(f"missing {', '.join(by_block(missing, shapes))}")
    if extra := sorted(state.keys() - shapes.keys()):
        problems.append(f"not used {', '.join(by_block(extra, state))}")
    for name in sorted(shapes.keys() & state.keys()):
        value = state[name]
        if value.shape != shapes[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, wanted {tuple(shapes[name].shape)}")
        elif value.is_meta:
            problems.append(f"{name} is a tensor without values (device meta)")
        elif value.layout != torch.strided:
            problems.append(f"{name} is a sparse tensor ({value.layout}): save it dense")
        elif value.dtype not in FLOATS:
            problems.append(f"{name} holds {value.dtype} values, not float16, bfloat16, float32 or float64")
    return problems


def problems_of(reading: Reading) -> list[str]:
    """All reasons why a reading cannot be used, including NaN and infinity."""
    problems = list(reading.problems)
    broken = sorted(
        name
        for name, value in reading.state.items()
        if value.dtype in FLOATS and not value.is_meta and value.layout == torch.strided
        if not value.float().isfinite().all()
    )
    if broken:
        verb = "holds" if len(broken) == 1 else "hold"
        problems.append(f"{', '.join(by_block(broken, reading.shapes))} {verb} NaN or infinity")
    if reading.heads_open and not problems:
        width = reading.options["embed_dim"]
        divisors = ", ".join(str(heads) for heads in range(1, width // 4 + 1) if width % heads == 0)
        problems.append(f"the heads of a width of {width} are not known: state them with --num_heads ({divisors})")
    if problems and "patch_embed.proj.weight" not in reading.state:
        problems += filter(None, [obstacle(reading.content) or where_encoders_are(reading.content)])
    return problems


def by_block(names: list[str], among: dict) -> list[str]:
    """Names of tensors; "blocks.7.*" stands for all tensors of a block."""
    blocks = {key.split(".")[1] for key in names if key.startswith("blocks.")}
    blocks -= {key.split(".")[1] for key in among.keys() - set(names) if key.startswith("blocks.")}
    whole = [f"blocks.{block}." for block in sorted(blocks, key=lambda block: (len(block), block))]  # 10 after 9
    return [f"{block}*" for block in whole] + [name for name in names if not name.startswith(tuple(whole))]


# ---- the family of a file


class Detected(NamedTuple):
    family: str
    reason: str = ""  # what shows the family; "" if nothing does
    others: tuple[str, ...] = ()  # families that give the same encoder, but resample its positions by other rules


def detect_family(path: Path, content: Content, checkpoint_key: str | None = None, **stated) -> Detected:
    """The family of a file: as its safetensors metadata states, or by its structure.

    The tensors of plain ViTs have the same names in many methods. Such a file is of a method if it contains evidence
    (Family.evidence), or if it contains only weights and has the file name that the authors use. Otherwise it is read
    as "timm", and the other possible families are returned, too. ValueError if several families remain, or none.
    """
    flat = path.suffix == ".safetensors"  # such files have no entries
    if flat and (written := safetensors_metadata(path).get("family")) in FAMILIES:
        return Detected(written, "by its metadata")
    fitting = [name for name, family in FAMILIES.items() if fits(content, family, checkpoint_key, flat)]
    readings = {name: read_as(content, name, FROM_FILE, checkpoint_key, **stated) for name in fitting}
    complete = [name for name, reading in readings.items() if not reading.problems]
    entries = [*content.entries, *content.leaves]
    reasons = {name: FAMILIES[name].shown_by(readings[name].weights, entries) for name in complete or readings}
    shown = [name for name, reason in reasons.items() if reason not in UNSURE] or [*filter(reasons.get, reasons)]
    if not shown and complete:
        named = [name for name in complete if name in families_called(path)]
        flat = bool(content.entry(""))
        shown = [name for name in named if flat or all(k.startswith(f"{FAMILIES[name].key}.") for k in content.leaves)]
        reasons |= dict.fromkeys(shown, FILE_NAME)  # of nothing but weights
    if len(shown) == 1:
        return Detected(shown[0], reasons[shown[0]])
    if readings and not complete:
        return Detected("timm" if "timm" in readings else next(iter(readings)))  # the loader lists its problems
    if not shown and complete and (len(complete) == 1 or "timm" in complete):
        first = "timm" if "timm" in complete else complete[0]
        alikes = (name for name in complete if name != first and alike(readings[first], readings[name]))
        return Detected(first, others=tuple(alikes))
    where = f" under --checkpoint_key {checkpoint_key}" if checkpoint_key else ""
    if names := shown or complete:
        raise ValueError(f"{path} does not show its family{where}: write --family {' or --family '.join(names)}")
    advice = obstacle(content) or ("" if checkpoint_key else where_encoders_are(content)) or what_it_holds(content)
    raise ValueError(f"{path} holds no weights of a known family{where}: {advice}")


def alike(first: Reading, second: Reading) -> bool:
    """Whether two families give the same encoder at the size of the file's positions."""
    options = [{**DEFAULTS, **reading.options, "pos_resampling": None} for reading in (first, second)]
    for option in options:
        option["pos_embed"] = option["pos_embed"] != "none"  # a fixed table is in the file, too
    same = options[0] == options[1] and first.state.keys() == second.state.keys()
    return same and all(v is second.state[key] or v.equal(second.state[key]) for key, v in first.state.items())


# ---- the encoders of a file


def what_it_holds(content: Content) -> str:
    if any(key.endswith("flat_param") for key in content.leaves):
        return (
            "FSDP has flattened its tensors: name a file of whole tensors, such as the teacher_checkpoint.pth that "
            "DINOv2's trainer writes when it evaluates"
        )
    names = [key for entry in content.entries for key in content.entry(entry) or ()]
    beginning = f"its tensors are called {', '.join(names[:3])}{', ...' * (len(names) > 3)}; " if names else ""
    return f"{beginning}there are {', '.join(FAMILIES)}"


def obstacle(content: Content) -> str:
    """Entries of an encoder that are not tensors, with what to do about them."""
    obstacles = []
    for name in content.encoders():
        odd = [(key, kind) for key, value in content.below(name).items() if (kind := not_a_tensor(value))]
        label = f"{name}: " if name else ""
        obstacles += [f"{label}{key} is {kind}" for key, kind in odd[:3]]
        obstacles += [f"{label}{len(odd) - 3} more"] * (len(odd) > 3)
    return f"not all entries are tensors ({', '.join(obstacles[:4])}): save tensors only" if obstacles else ""


def where_encoders_are(content: Content) -> str:
    """The arguments that load an encoder from below the top of a file; each is tried."""
    names = [name for name in content.encoders() if name and content.state(name)]
    if arguments := list(filter(None, (arguments_for(content, name) for name in names))):
        several = "there are encoders" if len(arguments) > 1 else "there is an encoder"
        return f"{several} under {', '.join(names)}: write {' or '.join(arguments)}"
    if not names:
        return ""
    problems = "; ".join(read_as(content, "timm", FROM_FILE, names[0]).problems)
    return f"there is an encoder under {names[0]}, which no family loads: {problems[:300]}"


def other_encoders(reading: Reading) -> list[str]:
    """The arguments that load the other encoders of a file; the names of those that nothing loads."""
    content, used = reading.content, set(map(id, reading.weights.values()))
    names = [name for name in content.encoders() if name and not used & content.identities(name)]
    families = [reading.family, *FAMILIES]
    return [arguments_for(content, name, families) or f"{name} (which no family loads)" for name in names]


def arguments_for(content: Content, name: str, families: Iterable[str] = FAMILIES) -> str:
    """The arguments that load the encoder of this name from a file; "" if nothing does."""
    own, parts = content.identities(name), name.split(".")
    for family, key in itertools.product(families, dict.fromkeys([name, parts[-1], parts[0]])):
        reading = read_as(content, family, FROM_FILE, key)
        if not reading.problems and own & set(map(id, reading.weights.values())):
            try:
                detect_family(Path(), content, key)
            except ValueError:
                return f"--checkpoint_key {key} --family {family}"
            return f"--checkpoint_key {key}"
    return ""


def undecided(reading: Reading) -> str:
    names = [reading.family, *reading.others]
    rules = ", ".join(f"{name}: {resampling(name)}" for name in names)
    return (
        f"can be of the families {', '.join(names)}, the same encoder at the size of its positions: other input sizes "
        f"need --family, because these families resample positions differently ({rules})"
    )


def resampling(family: str) -> str:
    return FAMILIES[family].vit.get("pos_resampling", "antialias")
