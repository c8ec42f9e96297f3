"""Figure 1, the baseline and AbMILP of each encoder as bars: python scripts/plot_bars.py [--dataset demo] --output FILE

Numbers come from the records in results/<dataset>/. Error bars are standard deviations over seeds, diamonds the
paper's values. Hatched bars cannot be compared with the paper; make_tables.py --table fig1 says why.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cli.console import Parser, run_main
from paper.cells import recorded
from paper.shown import ROOT
from paper.tables import PAPER_DATASET, Row, rows_of, table_of
from util.plotting import COLOURS, STYLE, WIDTH, save_figure


@rc_context(STYLE)
def draw(rows: list[Row], columns: list[str]) -> Figure:
    figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
    axis = figure.add_subplot()
    hatching = {"color": "none", "hatch": "///", "edgecolor": "white", "linewidth": 0}
    for number, (column, colour) in enumerate(zip(columns, COLOURS, strict=False)):
        offset = 0.36 * (number - (len(columns) - 1) / 2)
        bars = [(x + offset, row.entries[number]) for x, row in enumerate(rows)]
        measured = [(x, entry.ours[0], entry.std or 0) for x, entry in bars if entry.ours]
        at, heights, errors = zip(*measured, strict=True) if measured else ((), (), ())
        axis.bar(at, heights, 0.34, yerr=errors, color=colour, label=column, error_kw={"linewidth": 0.8})
        for x, height in zip(at, heights, strict=True):
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
            axis.annotate(f"{height:.1f}", (x, 3), ha="center", color="white", fontsize=6, bbox=box)
        for x, entry in bars:
            if entry.paper is not None:
                axis.plot(x, entry.paper, "D", color="black", markersize=3, markerfacecolor="none", label="the paper")
                if entry.ours and not entry.differences:
                    label = "not comparable with the paper"
                    axis.bar(x, entry.ours[0], 0.34, label=label, **hatching)
    axis.set_xticks(range(len(rows)), [f"{row.encoder}\n{row.vit}" for row in rows])
    axis.set(ylabel="top-1 (%)", ylim=(0, 100))
    handles = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if "not comparable with the paper" in handles:
        handles["not comparable with the paper"] = Patch(facecolor="white", hatch="///", edgecolor="grey")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def main(args: argparse.Namespace) -> None:
    paper = json.loads((ROOT / "results" / "paper_numbers.json").read_text())
    rows = rows_of("fig1", args.dataset, recorded(args.results, [args.dataset]), paper)
    if not any(entry.ours for row in rows for entry in row.entries):
        raise ValueError(f"{args.results / args.dataset} has no record of Figure 1: make them with scripts/figure1.sh")
    save_figure(draw(rows, table_of("fig1", args.dataset).columns), args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default=PAPER_DATASET)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--output", type=Path, required=True, help="png, pdf or svg, by its suffix")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
