"""Figures of aggregation vectors: divergences between rules (Fig. 7), maps (Fig. 9) and boxes (Fig. 8) over images."""

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from aggregation.localization import enlarge
from util.plotting import COLOURS, GREY, STYLE, WIDTH, add_scale, draw_map, save_figure

SQUARE = "\\1\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}\\1"
TITLES = {
    r"^attn-mn$": "[cls], mean of heads",
    r"^attn-lcte$": "[cls], lowest-entropy head",
    r"^attn-head": "[cls], head ",
    r"^dino$": "oracle's [cls]",
    r"^pos$": "uniform",
    r"^abmilp$": "AbMILP",
    r"^ap1$": "AP, 1 head",
    r"^ap(\d+)$": r"AP, \1 heads",
    r"^ep1$": "EP, 1 query",
    r"^ep(\d+)$": r"EP, \1 queries",
    r"^ca1$": "central patch",
    r"^ca(\d+)$": f"central {SQUARE}",
    r"^cp1$": "central patch alone",
    r"^cp(\d+)$": f"mean of central {SQUARE}",
}
TRUE, BOXES = "#1F77FF", ("#FF3B30", "#2ECC40")  # as in Fig. 8: truth blue, [cls] red, aggregation green


def display_name(rule: str) -> str:
    """A rule's name for figures: abmilp:depth=2/seed0 -> AbMILP, depth=2, seed 0."""
    head, *parts = rule.split("/")
    title, _, options = head.partition(":")
    for pattern, replacement in TITLES.items():
        title = re.sub(pattern, replacement, title)
    parts = [re.sub(r"^(seed|block)", "\\1\N{NO-BREAK SPACE}", part) for part in parts]
    return ", ".join(filter(None, [title, *options.split(","), *parts]))


# ---------------------------------------------------------------------------------------------------------------------
# divergences
# ---------------------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_divergences(result: dict, targets: Sequence[Path]) -> None:
    """aggregation.json as a figure in each of the targets: mean divergences of pairs of rules, the rules' entropies."""
    rules, matrix = result["rules"], result["matrices"]["kl"]
    names, values = [display_name(rule["name"]) for rule in rules], np.array(matrix["mean"], dtype=float)
    infinite = np.array(result["matrices"]["kl_exact"]["infinite"]) * (1 - np.eye(len(rules)))
    side = min(3.9, 0.5 * len(rules))  # of the matrix, in inches
    label = 0.055 * max(map(len, names))
    room = max(1.1, min(2.2, WIDTH - side - label - 0.9))  # for the entropies
    size = side + label + room + 0.9, 0.72 * side + 0.65 * label + 0.75
    figure = Figure(figsize=size, layout="constrained")
    heat, bars = figure.subplots(1, 2, width_ratios=(side, room))
    top = max(float(np.nanmax(values)), 1e-9) if np.isfinite(values).any() else 1.0
    image = heat.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    style = {"ha": "center", "va": "center", "fontsize": 6.5 if side / len(rules) > 0.35 else 5}
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}" if value >= 0.005 or value == 0 else "<.01"
        text += "*" * bool(infinite[row, column])
        heat.text(column, row, text, color="white" if value > 0.6 * top else "black", **style)
    heat.set_xticks(range(len(rules)), names, rotation=40, ha="right", rotation_mode="anchor")
    heat.set_yticks(range(len(rules)), names)
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    heat.set_title(f"{matrix['definition'].split(',')[0].replace('||', '‖')}, nats", pad=6)
    figure.colorbar(image, ax=heat, aspect=25, pad=0.02)
    draw_entropies(bars, rules, result["uniform_entropy"])
    bars.set_ylim(*heat.get_ylim())
    if infinite.any():
        figure.text(0.995, 0.004, "* infinite in some images without the floor on the weights", ha="right", **GREY)
    for target in targets:
        save_figure(figure, target)


def draw_entropies(axis: Axes, rules: Sequence[dict], uniform: float) -> None:
    """One bar per rule with its deviation over the images, and the entropy of uniform weights."""
    mean, std = (np.array([rule["entropy"][key] for rule in rules], dtype=float) for key in ("mean", "std"))
    error = {"linewidth": 0.7, "ecolor": "0.25"}
    axis.barh(range(len(rules)), mean, xerr=std, color=COLOURS[0], alpha=0.75, height=0.6, error_kw=error)
    axis.axvline(uniform, color="0.4", linewidth=0.8, linestyle=(0, (5, 3)))
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
    axis.annotate(f"ln M = {uniform:.2f}", (uniform, 1), ha="right", **above, **GREY)
    axis.set(yticks=[], xlim=(0, uniform * 1.06), xlabel="entropy, nats")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.spines[["top", "right", "left"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# maps and boxes over images
# ---------------------------------------------------------------------------------------------------------------------


def picture_grid(rows: int, columns: int, size: tuple[float, float], pad: float) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches with axes (rows,columns) that have neither ticks nor frames."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=pad, h_pad=pad)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


@rc_context(STYLE)
def draw_maps(pictures: Sequence[np.ndarray], columns: dict[str, np.ndarray], target: Path) -> None:
    """One row per image: the picture (h,w,3), and a map of each column.

    columns: {title: (images,rows,columns) in multiples of uniform weights}, drawn on one colour scale.
    """
    large = {title: [smooth(weights) for weights in maps] for title, maps in columns.items()}
    values = np.concatenate([weights.ravel() for maps in large.values() for weights in maps])
    top = max(2.0, float(np.nanquantile(values, 0.995)))  # so that a single patch does not darken all others
    count = 1 + len(columns)
    side = min(1.25, (WIDTH - 0.6) / count)
    figure, axes = picture_grid(len(pictures), count, (side * count + 0.6, side * len(pictures) + 0.35), 0.01)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        for axis, maps in zip(axes[row, 1:], large.values(), strict=True):
            draw_map(axis, picture, np.nan_to_num(maps[row]), top)
    letters = side / 0.065  # that fit on a line at 7 points
    titles = [wrap(title, int(letters), break_long_words=False) for title in ["image", *columns]]
    size = 7 * min(1, letters / max(len(line) for lines in titles for line in lines))
    for axis, lines in zip(axes[0], titles, strict=True):
        axis.set_title("\n".join(lines), fontsize=size)
    add_scale(figure, top, more=bool(np.nanmax(values) > top))
    save_figure(figure, target)


def smooth(weights: np.ndarray) -> np.ndarray:
    """Weights (rows,columns) at print resolution: the evaluation's interpolation, clipped below at the minimum."""
    size = tuple(side * max(1, 224 // max(weights.shape)) for side in weights.shape)
    return enlarge(weights, size).clip(weights.min())


class Localized(NamedTuple):
    """A rule's prediction for one image."""

    weights: np.ndarray  # (rows,columns) in multiples of uniform
    box: np.ndarray  # (4,)
    overlap: float | None  # with the best true box; None for an image without one


@rc_context(STYLE)
def draw_boxes(
    pictures: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: dict[str, list[Localized]],
    thresholds: dict[str, float],
    target: Path,
) -> None:
    """One column per image: the picture with all boxes, and below it the map and box of each rule."""
    count, rows = len(pictures), 1 + len(predictions)
    side = min(1.35, (WIDTH - 0.3) / count)
    figure, axes = picture_grid(rows, count, (side * count + 0.3, (side + 0.1) * rows + 0.35), 0.015)
    for axis, picture in zip(axes[0], pictures, strict=True):
        axis.imshow(picture)
    legend = {"true box": TRUE}
    for line, (rule, colour) in enumerate(zip(predictions, BOXES, strict=False), 1):
        name = display_name(rule)
        axes[line, 0].set_ylabel(name.replace(", ", ",\n"))
        legend[f"{name}: threshold {thresholds[rule]:.2f}"] = colour
        for axis, first, picture, one in zip(axes[line], axes[0], pictures, predictions[rule], strict=True):
            large = np.nan_to_num(smooth(one.weights))
            draw_map(axis, picture, large, max(float(large.max()), 1e-9))
            outline(first, one.box, colour)
            outline(axis, one.box, colour)
            if one.overlap is not None:
                axis.set_xlabel(f"IoU {one.overlap:.2f}", fontsize=6, labelpad=1)
    for column, truth in zip(axes.T, truths, strict=True):
        for axis in column:
            for box in truth:
                outline(axis, box, TRUE)
    handles = [Line2D([], [], color=colour, linewidth=1.5) for colour in legend.values()]
    figure.legend(handles, legend, loc="outside upper center", ncols=len(legend), frameon=False)
    save_figure(figure, target)


def outline(axis: Axes, box: np.ndarray, colour: str) -> None:
    """Draw an inclusive box around its pixels."""
    x0, y0, x1, y1 = box
    for edge, width in (("white", 1.7), (colour, 1.0)):  # visible on any ground
        patch = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=edge, linewidth=width)
        axis.add_patch(patch).set_clip_on(False)
