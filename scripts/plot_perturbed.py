"""Accuracy on perturbed images by radius: python scripts/plot_perturbed.py [LABEL=]SCORES.json ... [--output FILE]

SCORES.json is the --output of evaluate_probe.py --perturb. One panel per kind of perturbation, one line per encoder and
head: mean and standard deviation over seeds; files with the same label pool theirs. Dashed: images as they are.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cli.console import Parser, run_main
from data_sets.perturb import PERTURBATIONS, read_perturbation
from util.files import reading
from util.plotting import COLOURS, MARKERS, STYLE, WIDTH, save_figure

Curves = dict[str, dict[str, list[float]]]  # {encoder and head: {perturbation, "" for none: top-1 of each seed}}


def curves_of(arguments: list[str]) -> Curves:
    """ValueError for a file without perturbed images."""
    curves: Curves = {}
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        with reading(Path(path), "of evaluate_probe.py --perturb"):
            scores = json.loads(Path(path).read_text("utf-8"))
            for name, part in {"": scores["probes"], **scores["perturbed"]}.items():
                if name:
                    read_perturbation(name)  # ValueError
                for probe, values in part.items():
                    line = f"{label}: " * bool(label) + probe.rpartition("/seed")[0]
                    curves.setdefault(line, {}).setdefault(name, []).append(float(values["top-1"]))
    return curves


@rc_context(STYLE)
def draw(curves: Curves, target: Path) -> None:
    steps = sorted({read_perturbation(name) for accuracies in curves.values() for name in accuracies if name})
    panels = list(dict.fromkeys((step.kind, *step.numbers[1:]) for step in steps))
    figure = Figure(figsize=(max(WIDTH * len(panels) / 4, WIDTH / 2), 2.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (kind, *rest) in zip(axes, panels, strict=True):
        own = [step for step in steps if (step.kind, *step.numbers[1:]) == (kind, *rest)]
        for number, (line, accuracies) in enumerate(curves.items()):
            shown = {step.numbers[0]: np.array(accuracies[str(step)]) for step in own if str(step) in accuracies}
            mean = [seeds.mean() for seeds in shown.values()]
            std = [seeds.std(ddof=len(seeds) > 1) for seeds in shown.values()]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 3}
            axis.errorbar(list(shown), mean, std, linewidth=1.1, capsize=2, label=line, **style)
            axis.axhline(np.mean(accuracies[""]), linestyle="--", linewidth=0.7, color=style["color"])
        axis.set(title=", ".join([kind, *(f"std {value:g}" for value in rest)]), xlabel=PERTURBATIONS[kind].axis)
        axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    axes[0].set_ylabel("top-1 (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    short = [label.partition("/")[0] for label in labels]  # without block and rate, where each head has one
    labels = short if len(set(short)) == len(short) else labels
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, target)


def main(args: argparse.Namespace) -> None:
    draw(curves_of(args.scores), args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("scores", nargs="+", metavar="[LABEL=]SCORES.json", help="scores of one encoder")
    parser.add_argument("--output", type=Path, default=Path("perturbed.png"), help="png, pdf or svg")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
