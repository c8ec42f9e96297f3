"""What things cost, as bars: python scripts/plot_benchmark.py [results/benchmark.csv] --output benchmark.png

A panel for each benchmark at each size and precision, of its newest run. Bars are times relative to the first
contestant's, in the same run on the same machine; beside them, images per second.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("benchmark", "model", "input_size", "batch_size", "amp", "device", "threads")
Row = dict[str, str]


def newest(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """{settings: the rows of the last run with them}; rows of a run follow each other and have one command."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for before, row in zip([None, *rows], rows, strict=False):
        key = tuple(row[name] for name in SETTINGS)
        together = before is not None and (row["command"], row["commit"]) == (before["command"], before["commit"])
        if key not in found or not together or row["contestant"] in [other["contestant"] for other in found[key]]:
            found[key] = []
        found[key].append(row)
    return found


def draw(runs: dict[tuple[str, ...], list[Row]]):
    import matplotlib
    from matplotlib.figure import Figure

    from util.plotting import COLOURS, STYLE, WIDTH

    runs = dict(sorted(runs.items(), key=lambda item: (item[0][0], item[0][4], int(item[0][3]))))
    with matplotlib.rc_context(STYLE):
        heights = [len(rows) for rows in runs.values()]
        figure = Figure(figsize=(WIDTH, 0.17 * sum(heights) + 0.42 * len(heights)), layout="constrained")
        axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
        for axis, (key, rows) in zip(axes, runs.items(), strict=True):
            benchmark, model, size, batch, amp, device, threads = key
            times = [1 / float(row["speed_of_first"]) for row in rows]
            axis.barh([row["contestant"] for row in rows], times, color=[COLOURS[0]] + [COLOURS[1]] * (len(rows) - 1))
            for place, (time, row) in enumerate(zip(times, rows, strict=True)):
                words = f"{time:.2f}   {float(row['images_per_second']):,.1f} images/s"
                axis.annotate(words, (time, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            axis.set_xlim(0, 1.3 * max(times))
            axis.invert_yaxis()
            axis.axvline(1, color="black", linewidth=0.5)
            encoder = "" if benchmark == "loader" else f"{model}, {amp}, "
            cores = "1 thread" if benchmark == "loader" else f"{threads} threads"
            axis.set_title(
                f"{benchmark}: {encoder}{size} pixels, {batch} images a step; {device}, {cores}", fontsize=7, loc="left"
            )
        axes[-1].set_xlabel("time relative to the first")
        return figure


def main(args: argparse.Namespace) -> None:
    from util.plotting import save_figure

    try:
        with open(args.csv, newline="") as file:
            runs = newest(list(csv.DictReader(file)))
    except (OSError, KeyError) as error:
        raise ValueError(f"{args.csv} is not what scripts/benchmark.py writes: {error}") from error
    runs = {key: rows for key, rows in runs.items() if key[0] in (args.benchmarks or [key[0]])}
    if not runs:
        raise ValueError(f"{args.csv} has no run of {', '.join(args.benchmarks or ['anything'])}")
    save_figure(draw(runs), args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("csv", nargs="?", type=Path, default=ROOT / "results" / "benchmark.csv", help="of benchmark.py")
    parser.add_argument("--benchmarks", nargs="+", default=None, metavar="NAME", help="of these only")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="png, pdf or svg, by its suffix")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
