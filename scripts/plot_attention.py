"""Redraw the attention figure from result files: python scripts/plot_attention.py A/attention.json B/attention.json."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_stats import METRICS, PAPER_METRICS
from util.arguments import Parser, run_main
from util.figures import draw_attention, load_attention


def main(args: argparse.Namespace) -> None:
    draw_attention([load_attention(path) for path in args.results], args.metrics, args.output)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="attention.json of an encoder; one line each")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="png, pdf or svg, by its suffix")
    parser.add_argument("--metrics", nargs="+", default=PAPER_METRICS, choices=METRICS, metavar="METRIC",
                        help=f"panels: {', '.join(METRICS)} (default: the paper's four)")  # fmt: skip
    run_main(main, parser.parse_args())
