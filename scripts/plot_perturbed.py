"""Accuracy on perturbed images by radius: python scripts/plot_perturbed.py [LABEL=]SCORES.json ... [--output FILE]

SCORES.json is the --output of evaluate_probe.py --perturb. One panel per kind of perturbation, one line per encoder and
head: the mean over seeds, with a band of +-1 standard deviation. Dashed: images without perturbation.
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
from util.plotting import COLOURS, MARKERS, STYLE, WIDTH, save_figure

Curves = dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]  # line: top-1 (seeds,) unperturbed, and by perturbation


def curves_of(arguments: list[str]) -> Curves:
    """ValueError for a file without perturbed images, and where two files have the same line."""
    curves: Curves = {}
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        try:
            scores = json.loads(Path(path).read_text())
            parts = {"": scores["probes"], **scores["perturbed"]}
            lines: dict[str, list[str]] = {}
            for probe in scores["probes"]:
                lines.setdefault(f"{label}: " * bool(label) + probe.rpartition("/seed")[0], []).append(probe)
            if twice := lines.keys() & curves.keys():
                raise ValueError(f"{min(twice)} is in two files: give them labels, as in LABEL={path}")
            for line, probes in lines.items():
                accuracies = {
                    name: np.array([part[probe]["top-1"] for probe in probes]) for name, part in parts.items()
                }
                curves[line] = accuracies.pop(""), accuracies
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not of evaluate_probe.py --perturb: {error!r}") from error
    return curves


@rc_context(STYLE)
def draw(curves: Curves, target: Path) -> None:
    names = dict.fromkeys(name for _, accuracies in curves.values() for name in accuracies)
    panels: dict[tuple, dict[float, str]] = {}
    for step, name in sorted((read_perturbation(name), name) for name in names):
        panels.setdefault((step.kind, *step.numbers[1:]), {})[step.numbers[0]] = name
    figure = Figure(figsize=(max(WIDTH * len(panels) / 4, WIDTH / 2), 2.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((kind, *rest), points) in zip(axes, panels.items(), strict=True):
        for number, (line, (plain, accuracies)) in enumerate(curves.items()):
            shown = {x: accuracies[name] for x, name in points.items() if name in accuracies}
            if not shown:
                continue
            x, mean = list(shown), np.array([seeds.mean() for seeds in shown.values()])
            std = np.array([seeds.std(ddof=len(seeds) > 1) for seeds in shown.values()])
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.1}
            axis.plot(x, mean, marker=MARKERS[number % len(MARKERS)], markersize=3, label=line, **style)
            axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            axis.axhline(plain.mean(), linestyle="--", **style | {"linewidth": 0.7})
        axis.set_title(", ".join([kind, *(f"{value:g}" for value in rest)]))
        axis.set_xlabel(PERTURBATIONS[kind].axis)
        axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    axes[0].set_ylabel("top-1 (%)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
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
