"""Figure 1: baseline and AbMILP of each encoder as bars: python scripts/plot_bars.py [--dataset demo] --output FILE

Numbers are the ledger's; lines over the bars are standard deviations over seeds, diamonds the paper's values. What
cannot be compared with the paper's is hatched; make_tables.py --table fig1 says why.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
from matplotlib.figure import Figure

from cli.console import Parser, run_main
from paper.ledger import read_ledger
from paper.tables import PAPER_DATASET, Row, rows_of, table_of
from util.plotting import COLOURS, STYLE, WIDTH, save_figure

ROOT = Path(__file__).resolve().parent.parent


def draw(rows: list[Row], columns: tuple[str, ...]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axis, hatched = figure.add_subplot(), False
        for number, column in enumerate(columns):
            entries = [(place, row.entries[number]) for place, row in enumerate(rows)]
            offset = 0.36 * (number - (len(columns) - 1) / 2)
            shown = [(place + offset, entry) for place, entry in entries if entry.ours]
            heights, spreads = [entry.ours[0] for _, entry in shown], [entry.std or 0 for _, entry in shown]
            axis.bar([x for x, _ in shown], heights, 0.34, yerr=spreads, color=COLOURS[number], label=column,
                     error_kw={"linewidth": 0.8})  # fmt: skip
            odd = [(x, entry) for x, entry in shown if entry.paper is not None and not entry.differences]
            if odd:
                axis.bar([x for x, _ in odd], [entry.ours[0] for _, entry in odd], 0.34, color="none", hatch="///",
                         edgecolor="white", linewidth=0)  # fmt: skip
                hatched = True
            for x, entry in shown:
                axis.annotate(f"{entry.ours[0]:.1f}", (x, 3), ha="center", color="white", fontsize=6,
                              bbox={"facecolor": COLOURS[number], "edgecolor": "none", "pad": 1})  # fmt: skip
            paper = [(place + offset, entry.paper) for place, entry in entries if entry.paper is not None]
            if paper:
                axis.plot(*zip(*paper, strict=True), "D", color="black", markersize=3, markerfacecolor="none",
                          label=None if number else "the paper")  # fmt: skip
        axis.set_xticks(range(len(rows)), [f"{row.encoder}\n{row.vit}" for row in rows])
        axis.set_ylabel("top-1 (%)")
        axis.set_ylim(0, 100)
        if hatched:
            axis.bar([0], [0], color="white", hatch="///", edgecolor="grey", label="not comparable with the paper")
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        return figure


def main(args: argparse.Namespace) -> None:
    paper = json.loads((ROOT / "results" / "paper_numbers.json").read_text())
    rows = rows_of("fig1", args.dataset, read_ledger(args.results, [args.dataset]), paper)
    if not any(entry.ours for row in rows for entry in row.entries):
        raise ValueError(f"{args.results / args.dataset} has no record of Figure 1: scripts/figure1.sh makes them")
    save_figure(draw(rows, table_of("fig1", args.dataset).columns), args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default=PAPER_DATASET)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--output", type=Path, required=True, help="png, pdf or svg, by its suffix")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
