"""What a weight file is and whether it can be used: python scripts/inspect_checkpoint.py FILE [--family F] [--model M]

FILE is anything that --finetune takes. Exit code 0 where the file covers an encoder exactly, 1 where it does not.
"""

import re
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from models_vit import VisionTransformer, architecture
from util.arguments import Parser, run_main
from util.catalogue import CATALOGUE, fetch_weights
from util.checkpoints import (
    architectures_of,
    converted,
    detect_family,
    load_plain_or_safetensors,
    load_timm,
    mismatches,
    native_size,
)
from util.choices import instead_of
from util.families import FAMILIES, State, drop_rule, weights_of
from util.files import sha256


class Fit(NamedTuple):
    """A file read as one of a family: what became of its tensors."""

    family: str
    models: list[str]  # the architectures whose sizes it has
    weights: State  # as in the file
    state: State  # as in the model
    backbone: VisionTransformer | None  # on the meta device: names and shapes only
    problems: list[str]


def fit(content: dict, name: str, model: str | None, checkpoint_key: str | None) -> Fit:
    family = FAMILIES[name]
    weights = weights_of(content, family, checkpoint_key) or {}
    state, problems = converted(content, family, checkpoint_key)
    models = [model] if model else architectures_of(state)
    if problems or not models:
        problems = problems or ["its sizes are of no architecture that has a name here: see --model"]
        return Fit(name, models, weights, state, None, problems)
    options = {**architecture(models[0]), **family.vit, **family.read(state)}
    options["img_size"] = native_size(state, options)
    with torch.device("meta"):
        backbone = VisionTransformer(**options)
    return Fit(name, models, weights, state, backbone, mismatches(state, backbone))


def coverage(found: Fit) -> list[tuple[str, str, str, str]]:
    """(what becomes of it, key, shape, how many): the file's tensors, then what the model lacks; blocks together."""
    family = FAMILIES[found.family]
    wanted = found.backbone.state_dict() if found.backbone is not None else {}
    extra = found.state.keys() - wanted.keys()
    rows = []
    for key, value in found.weights.items():
        rule = drop_rule(family, key)
        if rule is not None:
            fate = f"dropped: {rule}"
        elif not found.state or any(key == name or key.endswith(f".{name}") for name in extra):
            fate = "left over"
        else:
            fate = "used"
        rows.append((fate, key, tuple(value.shape)))
    rows += [("missing", key, tuple(wanted[key].shape)) for key in wanted if key not in found.state]
    grouped = Counter((fate, re.sub(r"\.\d+(?=\.)", ".N", key), shape) for fate, key, shape in rows)
    table = [(fate, key, "x".join(map(str, shape)) or "1", f"{count}") for (fate, key, shape), count in grouped.items()]
    return sorted(table, key=lambda row: row[0] == "used", reverse=True)


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {'x'.join(map(str, value.shape)) or '1'}"
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value) if isinstance(value, int | float | str | None) else getattr(value, "name", type(value).__name__)


def families_of(path: Path | None, content: dict, args: Namespace) -> tuple[list[str], str]:
    """The family that is asked for or fits; else all that can be tried, and why it is none or several."""
    if args.family:
        if args.family not in FAMILIES:
            raise ValueError(f"unknown family {args.family!r}: {instead_of(args.family, FAMILIES)}")
        return [args.family], ""
    if path is None:
        return ["timm"], ""
    if args.file in CATALOGUE and CATALOGUE[args.file].family in FAMILIES:
        return [CATALOGUE[args.file].family], ""
    try:
        return [detect_family(path, content, args.checkpoint_key)], ""
    except ValueError as error:
        return list(FAMILIES), str(error)


def main(args: Namespace) -> None:
    if args.model:
        architecture(args.model)
    path = fetch_weights(args.file, args.offline)
    mean = std = None
    if path is None:
        content, mean, std = load_timm(args.file, args.offline)
    else:
        content = load_plain_or_safetensors(path)
        print(f"file          {path}\nsize          {path.stat().st_size:,} bytes\nsha256        {sha256(path)}")

    families, reason = families_of(path, content, args)
    tried = [fit(content, name, args.model, args.checkpoint_key) for name in families]
    if reason:
        print(f"family        {reason}\n\nread as each of them:")
        readable = [found for found in tried if found.weights]
        rows = [
            (found.family, f"{len(found.problems)} problems" * bool(found.problems) or "loads") for found in readable
        ]
        print(aligned(rows) if rows else "  no family finds weights in it")
        entries = {} if all(isinstance(value, Tensor) for value in content.values()) else content
        print("\n".join(f"  holds {name}: {kind(value)}" for name, value in list(entries.items())[:20]))
        sys.exit(1)

    (found,) = tried
    family = FAMILIES[found.family]
    print(f"family        {found.family}: {family.description}")
    print(f"architecture  {' or '.join(found.models) or 'unknown'}")
    print(f"tensors       {len(found.weights)}, {sum(value.numel() for value in found.weights.values()):,} numbers")
    if found.backbone is not None:
        model = found.backbone
        count = sum(value.numel() for value in model.parameters())
        print(f"parameters    {count:,} of the encoder, {model.num_heads} heads")
        size = model.grid_size[0] * model.patch_size
        means = tuple(round(value, 3) for value in mean or family.mean)
        stds = tuple(round(value, 3) for value in std or family.std)
        print(f"preprocessing {size} pixels, mean {means}, std {stds}")
    beside = {name: value for name, value in content.items() if not isinstance(value, Tensor)}
    for name, value in beside.items():
        if not (isinstance(value, dict) and set(map(id, value.values())) & set(map(id, found.weights.values()))):
            print(f"left behind   {name}: {kind(value)}")
    print("\n" + aligned([("fate", "key", "shape", "count"), *coverage(found)]) + "\n")
    if found.problems:
        print("cannot be used:\n" + "\n".join(f"  {problem}" for problem in found.problems))
        sys.exit(1)
    options = f"--model {found.models[0]} --finetune {args.file}"
    if path is not None and args.file not in CATALOGUE:
        options += f" --family {found.family}"
    if args.checkpoint_key:
        options += f" --checkpoint_key {args.checkpoint_key}"
    print(f"use it with\n  python main_linprobe.py {options} --data_path $IMAGENET")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a file, a catalogue name, a URL or a timm model's name")
    parser.add_argument("--family", help=f"format of the file: {', '.join(FAMILIES)} (default: detected)")
    parser.add_argument("--model", help="architecture (default: by the sizes of the tensors)")
    parser.add_argument("--checkpoint_key", help="entry of the file that holds the weights")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    run_main(main, parser.parse_args())
