"""Figures of aggregation vectors: divergences between rules (Fig. 7), maps (Fig. 9) and boxes (Fig. 8) over images."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from aggregation.localization import enlarge
from util.plotting import COLOURS, GREY, STYLE, WIDTH, add_scale, bare, draw_map, outline, save_figure

TITLES = tomllib.loads(Path(__file__).with_name("titles.toml").read_text("utf-8"))
TRUE, BOXES = "#1F77FF", ("#FF3B30", "#2ECC40")  # as in Fig. 8: truth blue, [cls] red, aggregation green


def display_name(rule: str) -> str:
    """A rule's name for figures: abmilp:depth=2/seed0 -> AbMILP, depth=2, seed 0."""
    head, *parts = rule.split("/")
    name, _, options = head.partition(":")
    number = re.search(r"\d*$", name)[0]
    title = TITLES.get(name) or TITLES.get(f"{name.removesuffix(number)}#", name).replace("#", number)
    title = re.sub("^attn-head", "[cls], head ", title).replace(" × ", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}")
    parts = [re.sub(r"^(seed|block)", "\\1\N{NO-BREAK SPACE}", part) for part in parts]
    return ", ".join(filter(None, [title, *options.split(","), *parts]))


# ---- divergences


@rc_context(STYLE)
def draw_divergences(result: dict, *targets: Path) -> None:
    """aggregation.json as a figure in each of the targets: mean divergences of pairs of rules, the rules' entropies."""
    rules, matrix = result["rules"], result["matrices"]["kl"]
    names, values = [display_name(rule["name"]) for rule in rules], np.array(matrix["mean"], dtype=float)
    infinite = np.array(result["matrices"]["kl_exact"]["infinite"]) * (1 - np.eye(len(rules)))
    side, label = min(3.9, 0.5 * len(rules)), 0.055 * max(map(len, names))  # of the matrix and names, in inches
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

    # entropies of the rules with their deviation over the images, and that of uniform weights
    mean, std = (np.array([rule["entropy"][key] for rule in rules], dtype=float) for key in ("mean", "std"))
    error, uniform = {"linewidth": 0.7, "ecolor": "0.25"}, result["uniform_entropy"]
    bars.barh(range(len(rules)), mean, xerr=std, color=COLOURS[0], alpha=0.75, height=0.6, error_kw=error)
    bars.axvline(uniform, color="0.4", linewidth=0.8, linestyle=(0, (5, 3)))
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
    bars.annotate(f"ln M = {uniform:.2f}", (uniform, 1), ha="right", **above, **GREY)
    bars.set(yticks=[], xlim=(0, uniform * 1.06), ylim=heat.get_ylim(), xlabel="entropy, nats")
    bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bars.spines[["top", "right", "left"]].set_visible(False)
    if infinite.any():
        figure.text(0.995, 0.004, "* infinite in some images without the floor on the weights", ha="right", **GREY)
    save_figure(figure, *targets)


# ---- maps and boxes over images


def picture_grid(rows: int, columns: int, size: tuple[float, float], pad: float) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches with axes (rows,columns) that have neither ticks nor frames."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=pad, h_pad=pad)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        bare(axis)
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


@rc_context(STYLE)
def draw_boxes(
    pictures: Sequence[np.ndarray], truths: Sequence[np.ndarray], predictions: dict[str, list[np.ndarray]], target: Path
) -> None:
    """The pictures (h,w,3) in a row, each with its true boxes and the box that each rule predicts.

    predictions: {legend: a box (4,) per picture}.
    """
    side = min(1.35, (WIDTH - 0.3) / len(pictures))
    figure, axes = picture_grid(1, len(pictures), (side * len(pictures) + 0.3, side + 0.45), 0.015)
    colours = dict(zip(["true box", *predictions], [TRUE, *BOXES], strict=False))
    for number, (axis, picture, truth) in enumerate(zip(axes[0], pictures, truths, strict=True)):
        axis.imshow(picture)
        named = [("true box", box) for box in truth] + [(rule, boxes[number]) for rule, boxes in predictions.items()]
        for name, (x0, y0, x1, y1) in named:
            outline(axis, (x0, y0), x1 - x0 + 1, y1 - y0 + 1, colours[name], "white")  # boxes are inclusive
    handles = [Line2D([], [], color=colour, linewidth=1.5) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside upper center", ncols=len(colours), frameon=False)
    save_figure(figure, target)
