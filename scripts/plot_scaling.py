"""Accuracy by trainable parameters: python scripts/plot_scaling.py [LABEL=]RUN ... [--output FILE]

RUN is the --output_dir of main_linprobe.py, or its results.json. A head scales horizontally (branches, queries or
attention heads) or vertically (depth). A line joins heads that differ in one of these alone, solid for width and dashed
for depth; its axis is the number of parameters of pooling and classifier. One panel per encoder; a table has the
numbers.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from cli.console import Parser, run_main
from paper.cells import probes_by_head
from paper.runs import read_runs
from probing.heads import AGGREGATIONS, head_name, parts_of
from util.plotting import COLOURS, MARKERS, STYLE, WIDTH, save_figure

WIDER, DEEPER = ("branches", "queries", "heads"), ("depth",)


class Point(NamedTuple):
    head: str
    block: int
    parameters: int  # of pooling and classifier
    mean: float  # score over seeds, %
    std: float


def points_of(run: dict) -> list[Point]:
    points = []
    for head, block, probes in probes_by_head(run):
        scores = [probe["last"][run["headline"]] for probe in probes]
        std = statistics.stdev(scores) if len(scores) > 1 else 0.0
        points.append(Point(head, block, probes[0]["parameters"], statistics.mean(scores), std))
    return points


def lines_of(points: list[Point]) -> dict[str, list[Point]]:
    """{what the heads share: the option that scales}: heads that differ in that option alone, in ascending order."""
    lines: dict[str, dict[int, Point]] = {}
    several = len({point.block for point in points}) > 1
    for point in points:
        parts = parts_of(point.head, {})
        options = AGGREGATIONS[parts[0].aggregation].options
        values = {key: option.default for key, option in options.items()} | dict(parts[0].options)
        for key in [key for key in values if key in (*WIDER, *DEEPER) and len(parts) == 1]:
            rest = [f"{k} {v}" for k, v in values.items() if k != key and v != options[k].default]
            shared = ", ".join(
                [head_name(parts[0].aggregation, (), parts[0].blocks), *rest, *[f"block {point.block}"] * several]
            )
            lines.setdefault(f"{shared}: {key}", {})[values[key]] = point
    return {name: [line[value] for value in sorted(line)] for name, line in lines.items() if len(line) > 1}


@rc_context(STYLE)
def draw(panels: dict[str, list[Point]], target: Path) -> None:
    names = list(dict.fromkeys(name for points in panels.values() for name in lines_of(points)))
    figure = Figure(figsize=(max(WIDTH * len(panels) / 3, WIDTH / 2), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles = {}
    for axis, (label, points) in zip(axes, panels.items(), strict=True):
        for name, line in lines_of(points).items():
            number, dash = names.index(name), "--" if name.endswith(DEEPER) else "-"
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 3}
            x, mean, std = zip(*(point[2:] for point in line), strict=True)
            handles[name] = axis.errorbar(x, mean, std, linestyle=dash, linewidth=1.1, capsize=2, **style)
        axis.set(xscale="log", title=label, xlabel="trainable parameters")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())  # whose labels would overlap
        axis.grid(linewidth=0.3, alpha=0.6)
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, target)


def main(args: argparse.Namespace) -> None:
    panels = {label: points_of(run) for label, run in read_runs(args.runs).items()}
    print("| encoder | head | block | parameters | accuracy |\n|---|---|---|---|---|")
    for label, points in panels.items():
        for head, block, parameters, mean, std in sorted(points, key=lambda point: point.parameters):
            print(f"| {label} | {head} | {block} | {parameters:,} | {mean:.2f} ± {std:.2f} |")
    draw(panels, args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="runs of main_linprobe.py")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="png, pdf or svg")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
