"""What a weight file is and whether it can be used: python scripts/inspect_checkpoint.py FILE [--family F] [--model M]

FILE is anything that --finetune takes. Exit code 0 where the file covers an encoder exactly, 1 where it does not.
"""

import re
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor

from cli.console import Parser, run_main
from encoders.catalogue import CATALOGUE, fetch_weights
from encoders.families import FAMILIES, drop_rule
from encoders.load import (
    Detected,
    Reading,
    detect_family,
    load_plain_or_safetensors,
    load_timm,
    named_family,
    read_as,
    resampling,
    undecided,
)
from models_vit import architecture
from util.files import sha256


def coverage(found: Reading) -> list[tuple[str, str, str, str]]:
    """(what becomes of it, key, shape, how many): the file's tensors, then what the model lacks; blocks together."""
    family = FAMILIES[found.family]
    wanted = found.backbone.state_dict() if found.backbone is not None else {}
    extra = found.state.keys() - wanted.keys()
    rows = []
    for key, value in found.weights.items():
        rule = drop_rule(family, key)
        if rule is not None:
            fate = f"dropped: {rule}"
        elif found.backbone is None:
            fate = "not known"
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


def family_of(path: Path | None, content: dict, args: Namespace) -> Detected:
    """The family that is asked for or fits; ValueError says why it is none or several."""
    if family := named_family(args.family):
        return Detected(family)
    if path is None:
        return Detected("timm")
    if args.file in CATALOGUE and CATALOGUE[args.file].family in FAMILIES:
        return Detected(CATALOGUE[args.file].family)
    return detect_family(path, content, args.checkpoint_key)


def main(args: Namespace) -> None:
    if args.model:
        architecture(args.model)
    named_family(args.family)  # a mistake is said before anything is read
    path = fetch_weights(args.file, args.offline)
    mean = std = None
    if path is None:
        content, mean, std = load_timm(args.file, args.offline)
    else:
        content = load_plain_or_safetensors(path)
        print(f"file          {path}\nsize          {path.stat().st_size:,} bytes\nsha256        {sha256(path)}")

    try:
        detected = family_of(path, content, args)
    except ValueError as error:
        print(f"family        {error}")
        readings = [read_as(content, name, args.model, args.checkpoint_key) for name in FAMILIES]
        rows = [(found.family, "; ".join(found.problems)[:160] or "loads") for found in readings if found.backbone]
        if rows:
            print(f"\nread as each of the families that find an encoder in it:\n{aligned(rows)}\n")
        entries = {} if all(isinstance(value, Tensor) for value in content.values()) else content
        for name, value in list(entries.items())[:20]:
            print(f"  holds {name}: {kind(value)}")
        sys.exit(1)

    found = read_as(content, detected.family, args.model, args.checkpoint_key)
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
        untold = " (ImageNet's: the file tells none)" * (path is not None and found.family == "timm")
        print(f"preprocessing {size} pixels, mean {means}, std {stds}{untold}")
        if detected.others:
            print(f"undecided     {undecided(detected, size)}")
    beside = {name: value for name, value in content.items() if not isinstance(value, Tensor)}
    for name, value in beside.items():
        if not (isinstance(value, dict) and set(map(id, value.values())) & set(map(id, found.weights.values()))):
            print(f"left behind   {name}: {kind(value)}")
    if args.checkpoint_key and not beside and len(content) > len(found.weights):
        print(f"left behind   {len(content) - len(found.weights)} tensors that are not under {args.checkpoint_key}")
    print("\n" + aligned([("fate", "key", "shape", "count"), *coverage(found)]) + "\n")
    if found.problems:
        print("cannot be used:\n" + "\n".join(f"  {problem}" for problem in found.problems))
        sys.exit(1)
    options = f"--model {found.models[0]} --finetune {args.file}"
    if args.checkpoint_key:
        options += f" --checkpoint_key {args.checkpoint_key}"
    named = [found.family, *detected.others] if path is not None and args.file not in CATALOGUE else [""]
    print("use it with" if len(named) == 1 else "use it with the one that it is of")
    for name in named:
        words = options + f" --family {name}" * bool(name)
        told = f"  # {FAMILIES[name].description}; positions: {resampling(name)}" if len(named) > 1 else ""
        print(f"  python main_linprobe.py {words} --data_path $IMAGENET{told}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a file, a catalogue name, a URL or a timm model's name")
    parser.add_argument("--family", help=f"format of the file: {', '.join(FAMILIES)}, or auto (the default): detected")
    parser.add_argument("--model", help="architecture (default: by the sizes of the tensors)")
    parser.add_argument("--checkpoint_key", help="entry of the file that holds the weights")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    run_main(main, parser.parse_args())
