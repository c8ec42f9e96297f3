"""--preset: flags for a kind of data, and the command with them that a run proposes."""

import argparse
import shlex
from pathlib import Path

from cli.console import Parser

PRESETS = {"small": "--optimizer logreg --val_fraction 0.2 --batch_size 64 --save_predictions"}
FEW_STEPS = 300  # optimizer steps of a run; the paper's recipe takes 7,020 on ImageNet, 1,080 on its 1 %
REPEATED = ("encoder", "data", "probes", "oracle of the head dino")  # groups of flags in a proposed command


def add_preset(parser: Parser) -> None:
    parser.presets = PRESETS
    parser.add_argument_group("preset").add_argument(
        "--preset", choices=list(PRESETS), help=f"small, for up to some thousand images: {PRESETS['small']}"
    )


def small_command(args: argparse.Namespace, parser: Parser, program: str) -> str:
    """The command with --preset small for the encoder, images and heads of `args`."""
    command = ["python", program, "--preset", "small"]
    for group in parser._action_groups:
        for action in group._group_actions if group.title in REPEATED else ():
            value = getattr(args, action.dest)
            if value != action.default and value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                command += [action.option_strings[0], *map(str, values)]
    folder = Path(args.output_dir or "output_dir")
    return shlex.join([*command, "--output_dir", str(folder.with_name(f"{folder.name}_small"))])
