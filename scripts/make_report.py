"""One page about any runs: python scripts/make_report.py [LABEL=]RUN ... --output report.html

A RUN is the --output_dir of a main, finished or not; a folder of such folders; one record of a run; or a folder of PNG
figures. The page is a single HTML file that loads nothing from elsewhere. It shows what the records hold and measures
nothing; the same records give the same bytes. With scripts allowed, its tables sort, filter, fold and download, and its
plots show values.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from report.page import make_report
from report.runs import find_runs
from util.files import save


def main(args: argparse.Namespace) -> None:
    runs, figures, trouble = find_runs(args.runs)
    if not (runs or figures):
        raise ValueError(f"nothing to report: {'; '.join(trouble)}")
    page, left_out = make_report(runs, figures, trouble, args.title)
    save(args.output, page)
    print(f"{args.output}: {len(page) / 1e6:.1f} MB", *(f"left out: {line}" for line in left_out), sep="\n")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of runs, of figures, or records")
    parser.add_argument("--output", default=Path("report.html"), type=Path, metavar="FILE", help="HTML file to write")
    parser.add_argument("--title", default="Report of runs", help="heading of the page")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
