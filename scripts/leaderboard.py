"""Encoders x heads x data sets on one page: python scripts/leaderboard.py RESULTS --output leaderboard.html

RESULTS is a folder of records: those of scripts/record.py, and results.json of main_linprobe.py. A row has its score
over the seeds, 95 % intervals over test images and over seeds, and its differences to [cls] of the same encoder and to
the best row: "real" where both intervals of the difference exclude 0. scripts/evaluate.sh makes a row from nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from report import leaderboard
from report.page import render
from util.files import save


def main(args: argparse.Namespace) -> None:
    if not args.results.is_dir():
        raise ValueError(f"{args.results}: no such folder; give the folder of the records, such as results")
    ranked = leaderboard.boards(args.results)
    if not ranked:
        raise ValueError(f"{args.results} has no record of a probe: bash scripts/evaluate.sh WEIGHTS makes one")

    def link(record: Path) -> str:
        return quote(os.path.relpath(record, args.output.parent))

    save(args.output, render(args.title, boards=ranked, lb=leaderboard, link=link))
    print(f"{args.output}: {sum(map(len, ranked))} rows on {len(ranked)} sets of images")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder of the records")
    parser.add_argument(
        "--output", default=Path("leaderboard.html"), type=Path, metavar="FILE", help="HTML file to write"
    )
    parser.add_argument("--title", default="Leaderboard of frozen encoders", help="heading of the page")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
