"""Figures drawn from result files alone."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from util.files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
DASHES = ("-", "--", "-.", ":")  # after all colours were used once
REFERENCE = {"color": "0.45", "linewidth": 0.9, "linestyle": (0, (5, 4))}


def load_attention(path: Path) -> dict:
    """The attention.json of main_analyze_attention.py; ValueError where the file is something else."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not {"label", "metrics"} <= result.keys():
        raise ValueError(f"{path} is no attention.json of main_analyze_attention.py")
    return result


def draw_attention(results: Sequence[dict], metrics: Sequence[str], target: Path) -> None:
    """A panel per metric over the blocks, a line per encoder: means over images (and heads), +-1 standard deviation.

    Dashed lines are the value of uniform attention, which bounds entropies from above. Blocks count from 1, as in the
    paper. An encoder without a metric (those of [cls] need a [cls]) has no line in its panel. The format follows the
    target's suffix. ValueError for a metric that no encoder has.
    """
    known = {name for result in results for name in result["metrics"]}
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"no measurement of {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    columns = math.ceil(math.sqrt(len(metrics)))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    handles = {}  # of the legend, by label
    for axis, name in zip(axes, metrics, strict=False):
        draw_panel(axis, name, results, handles)
    for axis in axes[len(metrics) :]:
        axis.remove()
    handles["uniform attention"] = Line2D([], [], **REFERENCE)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False)
    save_figure(figure, target)


def save_figure(figure: Figure, target: Path) -> None:
    """Write a figure whole; the format follows the target's suffix."""
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=Path(target).suffix.removeprefix(".") or "png", dpi=160)


def draw_panel(axis: Axes, name: str, results: Sequence[dict], handles: dict[str, Line2D]) -> None:
    """One metric of all encoders; adds each encoder's line to `handles`."""
    references = {}
    for number, result in enumerate(results):
        if name not in result["metrics"]:
            continue
        metric = result["metrics"][name]
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        mean, std = ([block[key] or 0 for block in metric["blocks"]] for key in ("mean", "std"))
        blocks = range(1, len(mean) + 1)
        (line,) = axis.plot(blocks, mean, dash, color=colour, marker="o", markersize=3, linewidth=1.6)
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axis.fill_between(blocks, low, high, color=colour, alpha=0.16, linewidth=0)
        handles[result["label"]] = line
        if metric["uniform"]:
            references[metric["uniform"]["value"]] = metric["uniform"]["name"]
    for value, text in references.items():
        axis.axhline(value, zorder=0, **REFERENCE)
        axis.annotate(
            f"{text} = {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color="0.35",
        )  # fmt: skip
    definition = re.sub(r"_(\w+)", r"$_{\1}$", metric["definition"])
    axis.set_title(name.replace("cls", "[cls]").replace("self_", "self-").replace("_", " "), fontsize=11)
    axis.set_xlabel("block (the first is 1)")
    axis.set_ylabel(f"{definition}  ({metric['unit']})")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    if metric["unit"] != "nats":
        axis.set_ylim(bottom=0)


def draw_token_maps(tsne: dict, label: str, target: Path) -> None:
    """The t-SNE of tsne.json: a panel per block, a point per patch token, a colour per class."""
    maps, classes = tsne["maps"], list(dict.fromkeys(tsne["classes"]))
    figure = Figure(figsize=(3.6 * len(maps), 3.9), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, one in zip(axes, maps, strict=True):
        for points, name in zip(one["points"], tsne["classes"], strict=True):
            axis.scatter(*zip(*points, strict=True), s=2, color=COLOURS[classes.index(name) % len(COLOURS)])
        axis.set_title(f"block {one['block'] + 1}", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"{label}: patch tokens of {len(tsne['classes'])} images, t-SNE", fontsize=11)
    save_figure(figure, target)
