"""Describe an encoder: python scripts/inspect_checkpoint.py WEIGHTS [--family F] [--model M]

WEIGHTS is anything that --finetune takes. Exit code 0 if it can be used, 1 if a file does not cover an encoder.
"""

import re
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.arguments import add_groups
from cli.console import FLAGS, Parser, run_main
from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture
from encoders.catalogue import CATALOGUE, fetch_weights, known_family
from encoders.contents import not_a_tensor
from encoders.families import FAMILIES
from encoders.libraries import library_of
from encoders.load import load_encoder
from encoders.reading import UNSURE, Reading, open_weights, other_encoders, problems_of, resampling, undecided
from util.files import sha256


def coverage(reading: Reading) -> list[tuple[str, str, str, str]]:
    """(fate, key, shape, count) of the file's tensors and of those that the model lacks; equal blocks in one row."""
    extra = tuple(f".{name}" for name in reading.state.keys() - reading.shapes.keys())
    rows = []
    for key, value in reading.weights.items():
        rule = FAMILIES[reading.family].drop_rule(key)
        used = "left over" if f".{key}".endswith(extra) else "used"
        rows.append((used if rule is None else f"dropped: {rule}", key, tuple(value.shape)))
    rows += [("missing", key, tuple(shape.shape)) for key, shape in reading.shapes.items() if key not in reading.state]
    grouped = Counter((fate, re.sub(r"\.\d+(?=\.)", ".N", key), shape) for fate, key, shape in rows)
    table = [(fate, key, "x".join(map(str, shape)) or "1", f"{count}") for (fate, key, shape), count in grouped.items()]
    return sorted(table, key=lambda row: row[0] == "used", reverse=True)


def traced_facts(weights: str, offline: bool) -> dict[str, object]:
    """Facts of a model that its own library runs. ValueError, with the reason, if it cannot be traced."""
    encoder = load_encoder(weights, offline=offline)
    backbone, record = encoder.backbone, encoder.record
    facts = {"run by": f"{record['family']} {record['version']}, {record['model']}"}
    facts |= {name: record.get(name) for name in ("revision", "sha256", "traced", "tokens", "preprocessing", "assumed")}
    facts["sizes"] = f"{backbone.depth} blocks, {backbone.num_heads} heads, width {backbone.embed_dim}"
    return facts | {"own outputs": ", ".join(backbone.pooled) or None}


def file_facts(reading: Reading) -> dict[str, object]:
    options = reading.options
    reason = reading.reason or "by assumption: the file does not show its family"
    numbers = sum(value.numel() for value in reading.weights.values())
    facts = {
        "family": f"{reading.family}, {reason}: {FAMILIES[reading.family].description}",
        "architecture": reading.model or "unknown",
        "tensors": f"{len(reading.weights)}, {numbers:,} numbers",
    }
    if reading.shapes:
        (height, width), patch = options["img_size"], options["patch_size"]
        count = sum(value.numel() for value in reading.shapes.values())
        facts["parameters"] = f"{count:,} of the encoder, {options['num_heads']} heads"
        facts["input"] = f"{height} x {width} pixels ({height // patch} x {width // patch} patches)"
        if reading.reason in UNSURE:
            facts["assumed"] = "heads (--num_heads), activation and norms (--timm_name), --mean, --std, --grid"
        if reading.others:
            facts["undecided"] = undecided(reading)
    content, used = reading.content, set(map(id, reading.weights.values()))
    names = [name for name, value in content.leaves.items() if not_a_tensor(value)] + content.entries[1:]
    unused = [name for name in names if "." not in name and not used & content.identities(name)]
    return facts | ({"not used": ", ".join(unused)} if unused else {})


def show(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name:13} {value}")


def main(args: Namespace) -> None:
    model = args.model or FROM_FILE
    family = known_family(args.file, model, args.family)  # mistakes are reported before anything is read
    path = None if library_of(args.file) else fetch_weights(args.file, args.offline)
    if path is None:
        show(traced_facts(args.file if library_of(args.file) else f"timm:{args.file}", args.offline))
        print(f"use it with\n  python main_linprobe.py --finetune {args.file} --data_path $IMAGENET")
        return
    if model != FROM_FILE:
        architecture(model)
    show({"file": path, "size": f"{path.stat().st_size:,} bytes", "sha256": sha256(path)})
    stated = {"grid": args.grid} | ({"num_heads": args.num_heads} if args.num_heads else {})
    reading = open_weights(path, model, family, args.checkpoint_key, **stated)
    show(file_facts(reading))
    for argument in other_encoders(reading):
        print(f"also holds    an encoder: {argument}")
    rows = [("fate", "key", "shape", "count"), *coverage(reading)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n" + "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) + "\n")
    if problems := problems_of(reading):
        print("cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        sys.exit(1)
    flags = f"--model {reading.model if reading.model in ARCHITECTURES else FROM_FILE} --finetune {args.file}"
    flags += "".join(f" --{name} {vars(args)[name]}" for name in ("checkpoint_key", "num_heads") if vars(args)[name])
    flags += f" --grid {args.grid[0]} {args.grid[1]}" if args.grid else ""
    families = [""] if args.file in CATALOGUE else [reading.family, *reading.others]
    print("use it with" if len(families) == 1 else "use it with its family")
    for name in families:
        rule = f"  # {FAMILIES[name].description}; positions: {resampling(name)}" if len(families) > 1 else ""
        print(f"  python main_linprobe.py {flags}{f' --family {name}' * bool(name)} --data_path $IMAGENET{rule}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="WEIGHTS", help="what --finetune takes")
    others = FLAGS["encoder"].keys() - {"family", "model", "checkpoint_key", "num_heads", "grid", "offline"}
    add_groups(parser, {"encoder": {"include": "encoder", "omit": others, "model": {"default": FROM_FILE}}})
    run_main(main, parser.parse_args())
