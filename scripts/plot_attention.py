"""Figures from result files alone: python scripts/plot_attention.py RESULT.json ... [--kind heads] [--output FILE]

Results are the attention.json of main_analyze_attention.py, of any runs. Kinds: "attention" (the paper's four metrics)
and "park" (Park et al.'s) are lines over the blocks, a row per architecture, a colour per label; "heads" are heat maps,
block x head; "spectra" are profiles over frequency and rank, a line per depth. --metrics shows others in the same way.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention.figures import FIGURES, choose_metrics, load_attention
from attention.metrics import GROUPS, METRICS
from cli.console import Parser, run_main


def main(args: argparse.Namespace) -> None:
    results = [load_attention(path) for path in args.results]
    kind = FIGURES[args.kind]
    names = args.metrics or [kind.metrics]
    metrics = choose_metrics(names, results, kind.axes)
    if not metrics:
        measured = ", ".join(sorted({name for result in results for name in result["metrics"]}))
        asked = f"--metrics {' '.join(args.metrics)}" if args.metrics else f"what this figure shows ({names[0]})"
        raise ValueError(f"--kind {args.kind}: nothing of {asked} was measured; there are {measured}")
    for path, result in zip(args.results, results, strict=True):
        if not set(metrics) & set(result["metrics"]):
            raise ValueError(f"{path} measures none of {', '.join(metrics)}: leave it out, or choose other --metrics")
    kind.draw(results, metrics, args.output or Path(f"{args.kind}.png"))


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="attention.json of an encoder")
    parser.add_argument("--kind", default="attention", choices=FIGURES, help="of figure, as above")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=[*GROUPS, *METRICS],
        metavar="METRIC",
        help=f"groups ({', '.join(GROUPS)}) or {', '.join(METRICS)} (default: the kind's)",
    )
    parser.add_argument("--output", type=Path, default=None, help="png, pdf or svg, by its suffix (default: KIND.png)")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
