"""Describe a weight file: python scripts/inspect_checkpoint.py FILE [--family F] [--model M]

FILE is anything that --finetune takes. Exit code 0 if the file covers an encoder exactly, 1 if it does not.
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
from encoders import timm_models
from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture
from encoders.catalogue import CATALOGUE, fetch_weights, known_family, named_family
from encoders.contents import is_state, without_wrappers
from encoders.detect import UNSURE, Detected, detect_family, other_encoders
from encoders.families import FAMILIES, drop_rule
from encoders.libraries import library_of, load_from_library
from encoders.load import load_encoder, resampling, undecided_family
from encoders.reading import Reading, problems_of, read_as
from util.files import sha256
from util.tensor_files import load_plain_or_safetensors


def coverage(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(fate, key, shape, count) of the file's tensors and of those that the model lacks; equal blocks in one row."""
    family = FAMILIES[reading.family]
    extra = reading.state.keys() - reading.shapes.keys()
    rows = []
    for key, value in reading.weights.items():
        rule = drop_rule(family, key)
        if rule is not None:
            fate = f"dropped: {rule}"
        elif not reading.shapes:
            fate = "unknown"
        elif any(key == name or key.endswith(f".{name}") for name in extra):
            fate = "left over"
        else:
            fate = "used"
        rows.append((fate, key, tuple(value.shape)))
    rows += [("missing", key, tuple(shape.shape)) for key, shape in reading.shapes.items() if key not in reading.state]
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


def describe_traced(file: str, offline: bool) -> None:
    """What is traced of a model that its own library runs. ValueError, with the reason, if it cannot be."""
    encoder = load_encoder(file, FROM_FILE, offline=offline)
    backbone = encoder.backbone
    print(f"run by        {encoder.record['family']} {encoder.record['version']}, {encoder.record['model']}")
    for name in ("revision", "sha256", "traced", "tokens", "preprocessing", "assumed"):
        print(f"{name:13} {encoder.record.get(name)}")
    print(f"{'sizes':13} {backbone.depth} blocks, {backbone.num_heads} heads, width {backbone.embed_dim}")
    print(f"{'own outputs':13} {', '.join(backbone.pooled) or None}")
    print(f"use it with\n  python main_linprobe.py --finetune {file} --data_path $IMAGENET")


def main(args: Namespace) -> None:
    if library_of(args.file):
        describe_traced(args.file, args.offline)
        return
    if args.model not in (None, FROM_FILE):
        architecture(args.model)
    family = named_family(args.family)  # mistakes are reported before anything is read
    path = fetch_weights(args.file, args.offline)
    timm_model = None
    if path is None:
        timm_model = load_from_library(f"timm:{args.file}", offline=args.offline).model
        content, family = timm_model.state_dict(), "timm"
    else:
        content = without_wrappers(load_plain_or_safetensors(path))
        print(f"file          {path}\nsize          {path.stat().st_size:,} bytes\nsha256        {sha256(path)}")
        family = known_family(args.file, FROM_FILE, family)
    try:
        stated = Detected(family, reason="as stated") if family else None
        detected = stated or detect_family(path, content, args.checkpoint_key, args.grid)
    except ValueError as error:
        print(f"family        {error}")
        for name, value in list(content.items())[:20] if not is_state(content) else ():
            print(f"  holds {name}: {kind(value)}")
        sys.exit(1)

    options = timm_models.options_of(timm_model, args.file) if timm_model else {}
    options |= {"num_heads": args.num_heads} if args.num_heads else {}
    reading = read_as(content, detected.family, args.model or FROM_FILE, args.checkpoint_key, args.grid, **options)
    problems = problems_of(reading)
    print_facts(reading, detected, timm_model.pretrained_cfg if timm_model else FAMILIES[detected.family]._asdict())
    used = set(map(id, reading.weights.values()))
    beside = {name: value for name, value in content.items() if not isinstance(value, Tensor)}
    for name, value in beside.items():
        if not (isinstance(value, dict) and set(map(id, value.values())) & used):
            print(f"left behind   {name}: {kind(value)}")
    if args.checkpoint_key and not beside and len(content) > len(reading.weights):
        print(f"left behind   {len(content) - len(reading.weights)} tensors that are not under {args.checkpoint_key}")
    for argument in other_encoders(content, reading):
        print(f"also holds    an encoder: {argument}")
    print("\n" + aligned([("fate", "key", "shape", "count"), *coverage(reading)]) + "\n")
    if problems:
        print("cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        sys.exit(1)
    flags = f"--model {reading.model if reading.model in ARCHITECTURES else FROM_FILE} --finetune {args.file}"
    flags += "".join(f" --{name} {vars(args)[name]}" for name in ("checkpoint_key", "num_heads") if vars(args)[name])
    flags += f" --grid {args.grid[0]} {args.grid[1]}" if args.grid else ""
    families = [""] if path is None or args.file in CATALOGUE else [detected.family, *detected.others]
    print("use it with" if len(families) == 1 else "use it with the family that it is of")
    for name in families:
        rule = f"  # {FAMILIES[name].description}; positions: {resampling(name)}" if len(families) > 1 else ""
        print(f"  python main_linprobe.py {flags}{f' --family {name}' * bool(name)} --data_path $IMAGENET{rule}")


def print_facts(reading: Reading, detected: Detected, pixels: dict) -> None:
    reason = detected.reason or "by assumption: the file does not show its family"
    print(f"family        {detected.family}, {reason}: {FAMILIES[detected.family].description}")
    print(f"architecture  {reading.model or 'unknown'}")
    print(f"tensors       {len(reading.weights)}, {sum(value.numel() for value in reading.weights.values()):,} numbers")
    if not reading.shapes:
        return
    (height, width), patch = reading.options["img_size"], reading.options["patch_size"]
    mean, std = (tuple(round(value, 3) for value in pixels[name]) for name in ("mean", "std"))
    count = sum(value.numel() for value in reading.shapes.values())
    print(f"parameters    {count:,} of the encoder, {reading.options['num_heads']} heads")
    print(f"preprocessing {height} x {width} pixels ({height // patch} x {width // patch} patches), "
          f"mean {mean}, std {std}")  # fmt: skip
    if detected.reason in UNSURE:
        print("assumed       heads (--num_heads), activation and norms (--timm_name), --mean, --std, --grid: "
              "tensors do not show them")  # fmt: skip
    if detected.others:
        print(f"undecided     {undecided_family(detected)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="what --finetune takes")
    parser.add_argument("--family", help=f"format of the file: {', '.join(FAMILIES)}, or auto (the default): detected")
    parser.add_argument("--model", help="architecture (default: by the sizes of the tensors)")
    parser.add_argument("--checkpoint_key", help="entry of the file that holds the weights")
    parser.add_argument("--num_heads", type=int, help="attention heads (default: the architecture's)")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="patches of its positions")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    run_main(main, parser.parse_args())
