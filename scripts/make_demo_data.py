"""Write the demo data set: python scripts/make_demo_data.py FOLDER [--train 8000] [--val 2000]."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from data_sets.demo import CUES, generate


def main(args: argparse.Namespace) -> None:
    generate(args.folder, args.train, args.val, args.seed, cues=args.cues)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--train", type=int, default=8000, help="number of training images")
    parser.add_argument("--val", type=int, default=2000, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the images")
    cues = "what shows the class: the texture; texture and outline; the outline, against the texture of another class"
    parser.add_argument("--cues", choices=CUES, default=CUES[0], help=cues)
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
