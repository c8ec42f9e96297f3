"""Pack a data set for --loader packed: python scripts/pack_images.py --data_path DATA --output PACK

Programs then take --data_path PACK, with the same --dataset. docs/datasets.md states which pixels change.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.arguments import add_groups, data_options
from cli.console import FLAGS, Parser, named_path, positive_int, run_main
from data_sets.shards import KINDS, read_packed, verify, write_packed
from data_sets.table import build_dataset
from util.progress import log


def main(args: argparse.Namespace) -> None:
    if not args.check:
        splits = {name: build_dataset(args.dataset, args.data_path, name, **data_options(args)) for name in args.splits}
        write_packed(args.output, args.dataset, splits, args.kind, args.side, args.workers)
    for split in args.splits:
        images = read_packed(args.output, args.dataset, split)
        verify(images)
        log.info("%s: %d %s images, %.2f GB", args.output, len(images), split, images.stats[:, 0].sum() / 1e9)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    others = [name for name in FLAGS["data"] if name not in ("data_path", "dataset", "allow_subset", "label_column")]
    add_groups(parser, {"data": {"include": "data", "omit": others}})
    parser.add_argument("--output", required=True, type=named_path, help="new folder")
    parser.add_argument("--kind", choices=KINDS, default="pixels", help="how images are stored")
    parser.add_argument("--side", type=positive_int, default=256, help="largest shorter side of pixels and jpeg")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="what to pack")
    parser.add_argument("--workers", type=positive_int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--check", action="store_true", help="only compare the images of --output with their digests")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
