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

TITLES = {  # of heads; others are called what they are
    "attn-mn": "[cls], mean of heads",
    "attn-lcte": "[cls], lowest-entropy head",
    "dino": "oracle's [cls]",
    "pos": "uniform",
}
SQUARE = "\\1\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}\\1"
PATTERNS = (
    (r"^abmilp$", "AbMILP"), (r"^ap1$", "AP, 1 head"), (r"^ap(\d+)$", r"AP, \1 heads"),
    (r"^ep1$", "EP, 1 query"), (r"^ep(\d+)$", r"EP, \1 queries"), (r"^attn-head", "[cls], head "),
    (r"^ca1$", "central patch"), (r"^ca(\d+)$", "central " + SQUARE),
    (r"^cp1$", "central patch alone"), (r"^cp(\d+)$", "mean of central " + SQUARE),
)  # fmt: skip
TRUE, BOXES = "#1F77FF", ("#FF3B30", "#2ECC40")  # Fig. 8: truth blue, [cls] red, aggregation green


def spoken(name: str) -> str:
    """A rule's name as figures have it: abmilp:depth=2/seed0 is AbMILP, depth=2, seed 0."""
    head, *parts = name.split("/")
    word, _, options = head.partition(":")
    word = TITLES.get(word, word)
    for pattern, words in PATTERNS:
        word = re.sub(pattern, words, word)
    places = (re.sub(r"^(seed|block)", "\\1\N{NO-BREAK SPACE}", part) for part in parts)
    return ", ".join(filter(None, [word, *options.split(","), *places]))


# ---------------------------------------------------------------------------------------------------------------------
# divergences
# ---------------------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_divergences(result: dict, folder: Path) -> None:
    """kl.png and kl.pdf from aggregation.json: the mean divergence of each pair of rules, and each rule's entropy."""
    rules = result["rules"]
    names, matrix = [spoken(rule["name"]) for rule in rules], result["matrices"]["kl"]
    values = np.array(matrix["mean"], dtype=float)
    R = len(rules)
    cell = min(0.5, 3.9 / R)  # inches
    letters = 0.055 * max(map(len, names))  # of the names, in inches
    room = max(1.1, min(2.2, WIDTH - cell * R - letters - 0.9))  # for the entropies
    figure = Figure(figsize=(cell * R + letters + room + 0.9, 0.72 * cell * R + 0.65 * letters + 0.75),
                    layout="constrained")  # fmt: skip
    heat, bars = figure.subplots(1, 2, width_ratios=(cell * R, room))
    top = max(float(np.nanmax(values)), 1e-9) if np.isfinite(values).any() else 1.0
    image = heat.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    starred = False
    for row, column in np.ndindex(R, R):
        value = values[row, column]
        star = row != column and result["matrices"]["kl_exact"]["infinite"][row][column] > 0
        starred |= star
        text = "–" if np.isnan(value) else f"{value:.2f}" if value >= 0.005 or value == 0 else "<.01"
        heat.text(column, row, text + "*" * star, ha="center", va="center", fontsize=6.5 if cell > 0.35 else 5,
                  color="white" if value > 0.6 * top else "black")  # fmt: skip
    heat.set_xticks(range(R), names, rotation=40, ha="right", rotation_mode="anchor")
    heat.set_yticks(range(R), names)
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    pair = matrix["definition"].split(",")[0].replace("||", "‖")
    heat.set_title(f"{pair}, nats", pad=6)
    figure.colorbar(image, ax=heat, aspect=25, pad=0.02)
    draw_entropies(bars, rules, result["uniform_entropy"])
    bars.set_ylim(*heat.get_ylim())
    if starred:
        figure.text(
            0.995, 0.004, "* infinite in some images, where weights are not raised to a floor", ha="right", **GREY
        )
    for suffix in (".png", ".pdf"):
        save_figure(figure, folder / f"kl{suffix}")


def draw_entropies(axis: Axes, rules: Sequence[dict], uniform: float) -> None:
    """A bar for each rule, its deviation over the images, and the entropy of uniform weights."""
    mean, std = (np.array([rule["entropy"][key] for rule in rules], dtype=float) for key in ("mean", "std"))
    axis.barh(range(len(rules)), mean, xerr=std, color=COLOURS[0], alpha=0.75, height=0.6,
              error_kw={"linewidth": 0.7, "ecolor": "0.25"})  # fmt: skip
    axis.axvline(uniform, color="0.4", linewidth=0.8, linestyle=(0, (5, 3)))
    axis.annotate(f"ln M = {uniform:.2f}", (uniform, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                  textcoords="offset points", ha="right", **GREY)  # fmt: skip
    axis.set(yticks=[], xlim=(0, uniform * 1.06))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_xlabel("entropy, nats")
    axis.spines[["top", "right", "left"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# maps and boxes over images
# ---------------------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_maps(pictures: Sequence[np.ndarray], columns: dict[str, np.ndarray], target: Path) -> None:
    """pictures (h,w,3); columns {rule: (images,rows,columns) maps in multiples of uniform}; a row for each image."""
    large = {name: [smooth(one) for one in maps] for name, maps in columns.items()}
    values = np.concatenate([one.ravel() for maps in large.values() for one in maps])
    # what is brighter than nearly everything has the brightest colour, lest one patch darken all others
    top = max(2.0, float(np.nanquantile(values, 0.995)))
    count = 1 + len(columns)
    side = min(1.25, (WIDTH - 0.6) / count)
    figure = Figure(figsize=(side * count + 0.6, side * len(pictures) + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    axes = figure.subplots(len(pictures), count, squeeze=False)
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture)
        for axis, maps in zip(axes[row, 1:], large.values(), strict=True):
            draw_map(axis, picture, np.nan_to_num(maps[row]), top)
    letters = side / 0.065  # that a line has room for at 7 points
    titles = [wrap(name, int(letters), break_long_words=False) for name in ["image", *map(spoken, columns)]]
    size = 7 * min(1, letters / max(len(line) for lines in titles for line in lines))
    for axis, lines in zip(axes[0], titles, strict=True):
        axis.set_title("\n".join(lines), fontsize=size)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    add_scale(figure, top, more=bool(np.nanmax(values) > top))
    save_figure(figure, target)


def smooth(weights: np.ndarray) -> np.ndarray:
    """Weights (rows,columns) at the resolution of a print, by the interpolation of the evaluation, without its
    overshooting below the smallest of them."""
    size = tuple(side * max(1, 224 // max(weights.shape)) for side in weights.shape)
    return enlarge(weights, size).clip(weights.min())


class Found(NamedTuple):
    """What a rule makes of one image."""

    weights: np.ndarray  # (rows,columns) in multiples of uniform
    box: np.ndarray  # (4,)
    overlap: float | None  # with the best true box; None where the image has none


@rc_context(STYLE)
def draw_boxes(
    pictures: Sequence[np.ndarray], truths: Sequence[np.ndarray], found: dict[str, list[Found]],
    thresholds: dict[str, float], target: Path,
) -> None:  # fmt: skip
    """A column for each image: its boxes together, and below of each rule its map and box. thresholds: of each."""
    count, rows = len(pictures), 1 + len(found)
    side = min(1.35, (WIDTH - 0.3) / count)
    figure = Figure(figsize=(side * count + 0.3, (side + 0.1) * rows + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015)
    axes = figure.subplots(rows, count, squeeze=False)
    for column, (picture, truth) in enumerate(zip(pictures, truths, strict=True)):
        first = axes[0, column]
        first.imshow(picture)
        for line, (name, colour) in enumerate(zip(found, BOXES, strict=False), 1):
            axis, one = axes[line, column], found[name][column]
            large = np.nan_to_num(smooth(one.weights))
            draw_map(axis, picture, large, max(float(large.max()), 1e-9))
            for place in (first, axis):
                outline(place, one.box, colour)
            if one.overlap is not None:
                axis.set_xlabel(f"IoU {one.overlap:.2f}", fontsize=6, labelpad=1)
        for axis in axes[:, column]:
            for box in truth:
                outline(axis, box, TRUE)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    entries = {"true box": TRUE}
    for name, colour in zip(found, BOXES, strict=False):
        axes[1 + list(found).index(name), 0].set_ylabel(spoken(name).replace(", ", ",\n"))
        entries[f"{spoken(name)}: threshold {thresholds[name]:.2f}"] = colour
    handles = [Line2D([], [], color=colour, linewidth=1.5) for colour in entries.values()]
    figure.legend(handles, entries, loc="outside upper center", ncols=len(entries), frameon=False)
    save_figure(figure, target)


def outline(axis: Axes, box: np.ndarray, colour: str) -> None:
    """An inclusive box, its border around its pixels."""
    x0, y0, x1, y1 = box
    for shade, width in (("white", 1.7), (colour, 1.0)):  # seen on any ground
        axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=shade,
                                 linewidth=width, clip_on=False))  # fmt: skip
