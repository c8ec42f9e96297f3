"""FIGURES drawn from attention.json alone: lines over the blocks, heat maps of the heads, spectra; and t-SNE's maps."""

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attention.metrics import METRICS, metric_names
from util.plotting import COLOURS, DASHES, GREY, MARKERS, STYLE, WIDTH, save_figure

LINES = {  # of reference values, by the field of attention.json
    "uniform": {"color": "0.4", "linewidth": 0.8, "linestyle": (0, (5, 3)), "zorder": 1},
    "upper": {"color": "0.4", "linewidth": 0.8, "linestyle": (0, (1, 1.5)), "zorder": 1},
    "decoder": {"color": "0.4", "linewidth": 0.8, "linestyle": "-.", "zorder": 1},
}
LEGEND = {"uniform": "uniform attention", "upper": "largest possible value", "decoder": "decoder begins"}
DEPTHS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # without the yellow, which white paper hides


# ---------------------------------------------------------------------------------------------------------------------
# reading attention.json
# ---------------------------------------------------------------------------------------------------------------------


def load_attention(path: Path) -> dict:
    """The attention.json of main_analyze_attention.py; ValueError where the file is something else."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not {"label", "encoder", "metrics", "patches"} <= result.keys():
        raise ValueError(f"{path} is not an attention.json of main_analyze_attention.py")
    return result


def choose_metrics(names: Sequence[str], results: Sequence[dict], axes: Collection[str | None]) -> list[str]:
    """Metrics by name or group, in the given order; of a group, the measured ones.

    axes: the values of Metric.axis that a figure can draw. The list may be empty. ValueError for an unknown name and
    for a metric that no result has.
    """
    expanded = metric_names(names)
    measured = {name for result in results for name in result["metrics"]}
    if missing := [name for name in names if name in METRICS and name not in measured]:
        raise ValueError(f"metrics {' '.join(missing)} were not measured; available: {', '.join(sorted(measured))}")
    return [name for name in expanded if name in measured and METRICS[name].axis in axes]


def model_name(result: dict) -> str:
    """ "vit_base_patch16" as papers write it: ViT-B/16."""
    model = result["encoder"]["model"]
    size, _, patch = model.removeprefix("vit_").partition("_patch")
    letter = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "2b": "2B"}.get(size, size)
    return f"ViT-{letter}/{patch}" if patch else model


def title(name: str) -> str:
    """Title of a metric's panel, by default from its name."""
    given = METRICS[name].title if name in METRICS else ""
    return given or name.replace("cls", "[cls]").replace("self_", "self-").replace("_", " ")


def entries(metric: dict) -> tuple[list[int], list[dict]]:
    """Depths and their measurements: blocks from 0, preceded by the embedding (-1) if it was measured."""
    measured = ([metric["embedding"]] if "embedding" in metric else []) + metric["blocks"]
    first = -1 if "embedding" in metric else 0
    return list(range(first, first + len(measured))), measured


def column(entries: Sequence[dict], key: str) -> np.ndarray:
    """A number or a list of numbers per entry, padded to the longest; null becomes NaN."""
    values = [np.array(entry[key], dtype=float) for entry in entries]
    longest = max(value.size for value in values)
    return np.array([np.pad(v, (0, longest - v.size), constant_values=np.nan) if v.ndim else v for v in values])


def counted(first: int, last: int, parts: int = 4) -> list[int]:
    """Integer ticks: all if they are few, else the first and about `parts` more in equal steps."""
    step = 1 if last <= 2 * parts else math.ceil(last / parts)
    return [first, *(number for number in range(step, last + 1, step) if number > first)]


BLOCKS = "block (from 0)"


def block_ticks(axis: Axes, depths: Sequence[int]) -> None:
    """Label blocks; the embedding, at -1, is E."""
    ticks = counted(0, max(depths))
    if min(depths) < 0:
        axis.set_xticks([-1, *ticks], ["E", *map(str, ticks)])
    else:
        axis.set_xticks(ticks)
    axis.set_xlabel(f"{BLOCKS}; E: embedding" if min(depths) < 0 else BLOCKS)


def name_row(axis: Axes, text: str, distance: float) -> None:
    """Write a row's name to the left of its first panel; distance in points."""
    style = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 7.5, "fontweight": "bold"}
    axis.annotate(text, (0, 0.5), (-distance, 0), "axes fraction", "offset points", **style)


def head_panel(axis: Axes, text: str, subtitle: str = "") -> None:
    """A title, and a line or two under it, centred over the panel and its labels.

    Not Axes.set_title: the layout makes no room for a title that is wider than its panel.
    """
    for line, above, style in ((subtitle, 3, GREY), (text, 11 + 7 * subtitle.count("\n"), {"fontsize": 7.5})):
        axis.annotate(line, (0.4, 1), (0, above), "axes fraction", "offset points", ha="center", **style)


def mark_empty(axis: Axes) -> None:
    """A panel without data: the encoder lacks the tokens of the metric."""
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", **GREY)
    axis.set_axis_off()


# ---------------------------------------------------------------------------------------------------------------------
# lines over the blocks
# ---------------------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_attention(results: Sequence[dict], metrics: Sequence[str], target: Path) -> None:
    """Means over images (and heads) against the block, with bands of +-1 standard deviation over the images.

    A column per metric, a row per architecture, a colour and marker per label. Dashed: the value where every key gets
    the same attention; dotted: an upper bound. The subtitle gives these values; an arrow marks one
    that is too far from the data to be drawn. ValueError for two results with the same label and architecture.
    """
    keys = [(result["label"], model_name(result)) for result in results]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"two results are called {twice[0][0]!r} ({twice[0][1]}): rename one or draw them apart")
    labels, models = (list(dict.fromkeys(names)) for names in zip(*keys, strict=True))
    columns = math.ceil(len(metrics) / math.ceil(len(metrics) / 4))  # of five, three and two
    chunks = [metrics[start : start + columns] for start in range(0, len(metrics), columns)]
    rows = [(model, chunk) for chunk in chunks for model in models]
    width = WIDTH if columns > 2 else WIDTH * (columns + 1) / 4
    figure = Figure(figsize=(width, 1.7 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    handles = {}  # legend entries by label
    for line, (model, chunk) in zip(axes, rows, strict=True):
        of_model = [result for result in results if model_name(result) == model]
        for axis, name in zip(line, chunk, strict=False):
            handles |= draw_panel(axis, name, of_model, labels)
        if len(models) > 1:
            name_row(line[0], model, 45)
        for axis in line[len(chunk) :]:
            axis.remove()
    named = [label for label in (*labels, *LEGEND.values()) if label in handles]
    entry = 0.45 + 0.055 * max(map(len, named), default=0)  # inches
    count = max(1, min(len(named), int(width / entry)))
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(named) / count))
    figure.legend([handles[label] for label in named], named, loc="outside upper center", frameon=False, ncols=count)
    save_figure(figure, target)


def draw_panel(axis: Axes, name: str, results: Sequence[dict], labels: Sequence[str]) -> dict[str, Line2D]:
    """One metric of encoders of one architecture; returns its legend entries."""
    handles, ranges = {}, []
    having = [result for result in results if name in result["metrics"]]
    for result in having:
        depths, measured = entries(result["metrics"][name])
        mean, std = column(measured, "mean"), column(measured, "std")
        depths, mean, std = (np.array(values)[np.isfinite(mean)] for values in (depths, mean, std))
        if not len(mean):
            continue
        number = labels.index(result["label"])
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        style = {"color": colour, "marker": marker, "markersize": 3, "markeredgewidth": 0, "linewidth": 1.1}
        every = math.ceil(len(depths) / 13)
        (handles[result["label"]],) = axis.plot(depths, mean, dash, markevery=every, zorder=3, **style)
        spread = np.nan_to_num(std)
        if spread.any():
            axis.fill_between(depths, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0, zorder=2)
        ranges += [np.nanmin(mean - spread), np.nanmax(mean + spread)]
    for first in {result["encoder"]["decoder"]["first_block"] for result in having if "decoder" in result["encoder"]}:
        axis.axvline(first - 0.5, **LINES["decoder"])
        handles[LEGEND["decoder"]] = Line2D([], [], **LINES["decoder"])
    if not handles:
        head_panel(axis, title(name))
        mark_empty(axis)
        return {}
    drawn, subtitles = draw_references(axis, [result["metrics"][name] for result in having], min(ranges), max(ranges))
    head_panel(axis, title(name), ("; " if len("; ".join(subtitles)) <= 36 else "\n").join(subtitles))
    metric = having[0]["metrics"][name]
    definition = re.sub(r"_(\w+)", r"$_{\1}$", metric["definition"])
    pure = metric["unit"] in ("probability", "ratio")
    axis.set_ylabel(
        metric["unit"] if len(metric["definition"]) > 20 else definition if pure else f"{definition} ({metric['unit']})"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    block_ticks(axis, depths)
    return handles | drawn


def draw_references(
    axis: Axes, metrics: Sequence[dict], low: float, high: float
) -> tuple[dict[str, Line2D], list[str]]:
    """The uniform value and the bounds of one metric of several encoders, whose data lie in [low, high].

    Sets the limits of the axis. Returns legend entries and subtitles.
    """
    room = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
    limits, handles, subtitles, seen = [low, high], {}, [], set()
    for kind, word, reach in (("uniform", "uniform", room), ("upper", "largest", room / 2)):
        named = {metric[kind]["value"]: metric[kind]["name"] for metric in metrics if metric.get(kind)}
        texts = []
        for value, name in named.items():
            if value in seen:  # entropies are bounded by their uniform value
                continue
            seen.add(value)
            number = f"{value:.3g}"
            text = number if name == number or len(name) > 5 else f"{name} = {number}"  # a long name says the kind
            if low - reach <= value <= high + reach:
                axis.axhline(value, **LINES[kind])
                handles[LEGEND[kind]] = Line2D([], [], **LINES[kind])
                limits.append(value)
            else:
                text += " ↑" if value > high else " ↓"
            texts.append(text)
        subtitles += [f"{word} {', '.join(texts)}"] if texts else []
    margin = 0.05 * (max(limits) - min(limits)) or room
    lowest = max((metric["lower"]["value"] for metric in metrics if metric.get("lower")), default=-math.inf)
    # where the axis reaches the smallest possible value, it ends there, and bands with it
    axis.set_ylim(lowest if min(limits) - room / 2 <= lowest else min(limits) - margin, max(limits) + margin)
    return handles, subtitles


# ---------------------------------------------------------------------------------------------------------------------
# a panel per encoder
# ---------------------------------------------------------------------------------------------------------------------


def encoder_panels(
    results: Sequence[dict], metrics: Sequence[str], height: float, labels: float
) -> tuple[Figure, dict[str, list[tuple[Axes, dict]]]]:
    """A figure, and {metric: [(axis, result)]}: a row of panels per metric, more where encoders are many.

    height: of a row, in inches; labels: what the labels of its vertical axis take, in points.
    """
    columns = min(len(results), 8)
    chunks = [results[start : start + columns] for start in range(0, len(results), columns)]
    rows = [(name, chunk) for name in metrics for chunk in chunks]
    figure = Figure(figsize=(min(WIDTH, 1.7 * columns + 1), height * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    letters = int((figure.get_figwidth() - 1) / columns / 0.062)
    several = len({model_name(result) for result in results}) > 1
    panels = {name: [] for name in metrics}
    for number, (line, (name, chunk)) in enumerate(zip(axes, rows, strict=True)):
        for axis, result in zip(line, chunk, strict=False):
            if number == 0 or len(chunks) > 1:
                lines = [*wrap(result["label"], letters), *([model_name(result)] if several else [])]
                axis.set_title("\n".join(lines))
            panels[name].append((axis, result))
            if name not in result["metrics"]:
                mark_empty(axis)
        for axis in line[len(chunk) :]:
            axis.remove()
        name_row(line[0], "\n".join(wrap(title(name), 18)), labels)
    return figure, panels


@rc_context(STYLE)
def draw_heads(results: Sequence[dict], metrics: Sequence[str], target: Path) -> None:
    """Heat maps, block x head: means over the images; a row per metric with a scale of its own, a panel per encoder."""
    figure, panels = encoder_panels(results, metrics, height=1.3, labels=27)
    for name, row in panels.items():
        cells = [(axis, result) for axis, result in row if name in result["metrics"]]
        maps = [column(entries(result["metrics"][name])[1], "mean_per_head") for _, result in cells]
        scale = Normalize(min(map(np.nanmin, maps)), max(map(np.nanmax, maps)))
        for (axis, _), values in zip(cells, maps, strict=True):
            L, H = values.shape
            axis.imshow(
                values.T, norm=scale, aspect="auto", interpolation="nearest", extent=(-0.5, L - 0.5, H - 0.5, -0.5)
            )
            axis.set(xticks=counted(0, L - 1, 2 if len(results) > 4 else 4), yticks=counted(0, H - 1))
        cells[0][0].set_ylabel("head (from 0)")
        unit = cells[0][1]["metrics"][name]["unit"]
        figure.colorbar(ScalarMappable(scale), ax=[axis for axis, _ in row], label=unit, aspect=12)
    figure.supxlabel(BLOCKS, fontsize=7)
    save_figure(figure, target)


@rc_context(STYLE)
def draw_spectra(results: Sequence[dict], metrics: Sequence[str], target: Path) -> None:
    """Profiles over frequency or rank, a line per depth: a row per metric with one axis, a panel per encoder.

    The embedding is dashed; colours run from it to the last block. Frequencies are those of the grid's diagonal, as a
    fraction of pi (of half a cycle per patch).
    """
    figure, panels = encoder_panels(results, metrics, height=1.6, labels=38)
    for name, row in panels.items():
        cells = [(axis, result) for axis, result in row if name in result["metrics"]]
        drawn = []
        for axis, result in cells:
            metric = result["metrics"][name]
            depths, measured = entries(metric)
            profiles = column(measured, f"mean_per_{metric['axis']}")
            x = np.arange(1, profiles.shape[1] + 1)
            if metric["axis"] == "frequency":
                x = np.arange(profiles.shape[1]) * 2 / math.isqrt(result["patches"])
            for depth, profile in zip(depths, profiles, strict=True):
                dash = "--" if depth < 0 else "-"
                axis.plot(x, profile, dash, color=DEPTHS((depth + 1) / (depths[-1] + 1)), linewidth=0.9)
            drawn.append(profiles)
            axis.set_xlabel({"frequency": "frequency / π", "rank": "rank"}[metric["axis"]])
            if metric["axis"] == "frequency":
                axis.set(xlim=(-0.03, 1.03), xticks=(0, 0.5, 1), xticklabels=("0", "½", "1"))
            else:
                axis.xaxis.set_major_locator(MaxNLocator(2, integer=True))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", linewidth=0.3, alpha=0.6)
        low, high = min(map(np.nanmin, drawn)), max(map(np.nanmax, drawn))
        for axis, _ in cells:
            axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        for axis, _ in cells[1:]:
            axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
        cells[0][0].set_ylabel(cells[0][1]["metrics"][name]["unit"])
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), DEPTHS), ax=figure.axes, aspect=30, shrink=0.7)
    bar.set_ticks([0, 1], labels=["embedding", "last block"])
    save_figure(figure, target)


class Kind(NamedTuple):
    """A kind of figure and the metrics that it shows by default."""

    draw: Callable[[Sequence[dict], Sequence[str], Path], None]
    metrics: str  # a group of attention.metrics.GROUPS
    axes: tuple[str | None, ...]  # the values of Metric.axis that it can draw
    suffixes: tuple[str, ...]  # as main_analyze_attention.py writes it


FIGURES = {
    "attention": Kind(draw_attention, "paper", (None, "head", "frequency", "rank"), (".png", ".pdf")),
    "park": Kind(draw_attention, "park", (None, "head", "frequency", "rank"), (".png", ".pdf")),
    "heads": Kind(draw_heads, "paper", ("head",), (".png",)),
    "spectra": Kind(draw_spectra, "park", ("frequency", "rank"), (".png",)),
}


def draw_figures(results: Sequence[dict], folder: Path) -> None:
    """All of FIGURES for which something was measured."""
    for name, kind in FIGURES.items():
        if metrics := choose_metrics([kind.metrics], results, kind.axes):
            for suffix in kind.suffixes:
                kind.draw(results, metrics, Path(folder) / f"{name}{suffix}")


# ---------------------------------------------------------------------------------------------------------------------
# t-SNE
# ---------------------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_token_maps(tsne: dict, label: str, target: Path) -> None:
    """The t-SNE of tsne.json: a panel per block, a point per patch token; a colour per class, a shade per image."""
    maps, classes = tsne["maps"], list(dict.fromkeys(tsne["classes"]))
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    side = WIDTH / max(columns, 3)
    figure = Figure(figsize=(side * columns, side * rows + 0.45), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    marks = [image_mark(tsne["classes"], classes, image) for image in range(len(tsne["classes"]))]
    for axis, block in zip(axes, maps, strict=False):
        for points, (colour, marker) in zip(block["points"], marks, strict=True):
            axis.scatter(*np.array(points).T, s=4, color=colour, marker=marker, linewidth=0)
        axis.set_title(f"block {block['block']} (from 0)")
        everything = np.concatenate(block["points"])
        low, high = everything.min(0), everything.max(0)
        half, centre = 0.53 * (high - low).max(), (low + high) / 2  # equal scales: distances are meaningful
        axis.set(xticks=[], yticks=[], box_aspect=1)
        axis.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    for axis in axes[len(maps) :]:
        axis.remove()
    figure.suptitle(f"{label}: t-SNE of the patch tokens of {len(marks)} images", fontsize=8)
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(classes))]
    handles = [Line2D([], [], color=colour, marker="o", markersize=4, linestyle="") for colour in colours]
    figure.legend(
        handles,
        classes,
        loc="outside lower center",
        ncols=min(len(classes), 6),
        frameon=False,
        title="colour: class; shade and shape: image",
        title_fontsize=6.5,
    )
    save_figure(figure, target)


def image_mark(names: Sequence[str], classes: Sequence[str], image: int) -> tuple[np.ndarray, str]:
    """Colour and marker of one of the images whose classes are `names`: its class's colour, darker to lighter."""
    of_class = [index for index, name in enumerate(names) if name == names[image]]
    index_in_class = of_class.index(image)
    colour = np.array(to_rgb(COLOURS[classes.index(names[image]) % len(COLOURS)]))
    shade = 1.0 if len(of_class) == 1 else 0.55 + 0.9 * index_in_class / (len(of_class) - 1)  # below 1 towards black
    mixed = colour * shade if shade <= 1 else 1 - (1 - colour) * (2 - shade)
    return mixed, MARKERS[index_in_class % len(MARKERS)]
