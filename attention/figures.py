"""FIGURES drawn from attention.json alone: lines over the blocks, heat maps of the heads, spectra; and t-SNE's maps."""

import itertools
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
from util.files import reading, require
from util.plotting import COLOURS, DASHES, GREY, MARKERS, STYLE, WIDTH, frame, save_figure

LINES = {  # of reference values, by the field of attention.json
    "uniform": {"color": "0.4", "linewidth": 0.8, "linestyle": (0, (5, 3)), "zorder": 1},
    "upper": {"color": "0.4", "linewidth": 0.8, "linestyle": (0, (1, 1.5)), "zorder": 1},
    "decoder": {"color": "0.4", "linewidth": 0.8, "linestyle": "-.", "zorder": 1},
}
NUMBER, REFERENCE = (int, float), {"name": str, "value": (int, float)}
DEPTH = {"mean": (*NUMBER, type(None)), "std": (*NUMBER, type(None))}
METRIC = {
    "unit": str, "definition": str, "axis?": str, "lower?": REFERENCE, "upper?": REFERENCE, "uniform?": REFERENCE,
    "embedding?": dict, "blocks": [dict],
}  # fmt: skip
RESULT = {  # what the figures need of attention.json
    "label": str, "encoder": {"model": str, "decoder?": {"first_block": range(1000)}}, "patches": range(1, 2**31),
    "metrics": {str: METRIC},
}  # fmt: skip
LEGEND = {"uniform": "uniform attention", "upper": "largest possible value", "decoder": "decoder begins"}
BLOCKS = "block (from 0)"
ANY_AXIS = (None, "head", "frequency", "rank")  # of Metric.axis
DEPTHS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # without the yellow, which white paper hides


# ---- reading attention.json


def load_attention(path: Path) -> dict:
    """The attention.json of main_analyze_attention.py; ValueError where the file is something else."""
    with reading(path, "an attention.json of main_analyze_attention.py"):
        result = json.loads(Path(path).read_text("utf-8"))
        require(result, RESULT)
        for name, metric in result["metrics"].items():
            profile = {f"mean_per_{metric['axis']}": [DEPTH["mean"]]} if metric.get("axis") else {}
            for depth in entries(metric)[1] if metric["blocks"] else [{}]:
                require(depth, DEPTH | profile, name)
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


def model_name(model: str) -> str:
    """ "vit_base_patch16" as papers write it: ViT-B/16."""
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


def counted(last: int, parts: int = 4) -> list[int]:
    """Integer ticks from 0: all if they are few, else about `parts` in equal steps after the first."""
    return list(range(0, last + 1, 1 if last <= 2 * parts else math.ceil(last / parts)))


def block_ticks(axis: Axes, depths: Sequence[int]) -> None:
    """Label blocks; the embedding, at -1, is E."""
    ticks, embedding = counted(max(depths)), ["E"] if min(depths) < 0 else []
    axis.set_xticks([*(-1 for _ in embedding), *ticks], [*embedding, *map(str, ticks)])
    axis.set_xlabel(BLOCKS + "; E: embedding" * len(embedding))


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


def panels(counts: Sequence[int], width: float, height: float) -> tuple[Figure, list[np.ndarray]]:
    """A figure (sizes in inches) and the axes of each of its rows, which may be shorter than the longest."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(counts), max(counts), squeeze=False)
    for line, count in zip(axes, counts, strict=True):
        for axis in line[count:]:
            axis.remove()
    return figure, [line[:count] for line, count in zip(axes, counts, strict=True)]


# ---- lines over the blocks


@rc_context(STYLE)
def draw_attention(results: Sequence[dict], metrics: Sequence[str], *targets: Path) -> None:
    """Means over images (and heads) against the block, with bands of +-1 standard deviation over the images.

    A column per metric, a row per architecture, a colour and marker per label. Dashed: the value where every key gets
    the same attention; dotted: an upper bound. The subtitle gives these values; an arrow marks a value too far from
    the data to be drawn. ValueError for two results with the same label and architecture.
    """
    keys = [(result["label"], model_name(result["encoder"]["model"])) for result in results]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"two results are called {twice[0][0]!r} ({twice[0][1]}): rename one or draw them apart")
    labels, models = (list(dict.fromkeys(names)) for names in zip(*keys, strict=True))
    columns = math.ceil(len(metrics) / math.ceil(len(metrics) / 4))  # of five, three and two
    chunks = [metrics[start : start + columns] for start in range(0, len(metrics), columns)]
    rows = [(model, chunk) for chunk in chunks for model in models]
    width = WIDTH if columns > 2 else WIDTH * (columns + 1) / 4
    figure, axes = panels([len(chunk) for _, chunk in rows], width, 1.7 * len(rows) + 0.1)
    handles = {}  # legend entries by label
    for line, (model, chunk) in zip(axes, rows, strict=True):
        of_model = [result for result, (_, name) in zip(results, keys, strict=True) if name == model]
        for axis, metric in zip(line, chunk, strict=True):
            handles |= draw_panel(axis, metric, of_model, labels)
        if len(models) > 1:
            name_row(line[0], model, 45)
    named = [label for label in (*labels, *LEGEND.values()) if label in handles]
    entry = 0.45 + 0.055 * max(map(len, named), default=0)  # inches
    count = max(1, min(len(named), int(width / entry)))
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(named) / count))
    figure.legend([handles[label] for label in named], named, loc="outside upper center", frameon=False, ncols=count)
    save_figure(figure, *targets)


def draw_panel(axis: Axes, name: str, results: Sequence[dict], labels: Sequence[str]) -> dict[str, Line2D]:
    """One metric of encoders of one architecture; returns its legend entries."""
    handles, ranges = {}, []
    measured = {result["label"]: result["metrics"][name] for result in results if name in result["metrics"]}
    for label, metric in measured.items():
        depths, per_depth = entries(metric)
        mean, std = column(per_depth, "mean"), np.nan_to_num(column(per_depth, "std"))
        depths, mean, std = (np.array(values)[np.isfinite(mean)] for values in (depths, mean, std))
        if not len(mean):
            continue
        number = labels.index(label)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        style = {"color": colour, "marker": marker, "markersize": 3, "markeredgewidth": 0, "linewidth": 1.1}
        (handles[label],) = axis.plot(depths, mean, dash, markevery=math.ceil(len(depths) / 13), zorder=3, **style)
        if std.any():
            axis.fill_between(depths, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0, zorder=2)
        ranges += [min(mean - std), max(mean + std)]
    decoders = [r["encoder"]["decoder"] for r in results if name in r["metrics"] and "decoder" in r["encoder"]]
    for first in {decoder["first_block"] for decoder in decoders}:
        axis.axvline(first - 0.5, **LINES["decoder"])
        handles[LEGEND["decoder"]] = Line2D([], [], **LINES["decoder"])
    if not handles:
        head_panel(axis, title(name))
        mark_empty(axis)
        return {}
    drawn, subtitles = draw_references(axis, list(measured.values()), min(ranges), max(ranges))
    head_panel(axis, title(name), ("; " if len("; ".join(subtitles)) <= 36 else "\n").join(subtitles))
    metric = next(iter(measured.values()))
    label = re.sub(r"_(\w+)", r"$_{\1}$", metric["definition"])
    if metric["unit"] not in ("probability", "ratio"):
        label += f" ({metric['unit']})"
    axis.set_ylabel(metric["unit"] if len(metric["definition"]) > 20 else label)
    frame(axis)
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
        for value in [value for value in named if value not in seen]:  # entropies are bounded by their uniform value
            number, name = f"{value:.3g}", named[value]
            text = number if name == number or len(name) > 5 else f"{name} = {number}"  # a long name says the kind
            if low - reach <= value <= high + reach:
                axis.axhline(value, **LINES[kind])
                handles[LEGEND[kind]] = Line2D([], [], **LINES[kind])
                limits.append(value)
            else:
                text += " ↑" if value > high else " ↓"
            texts.append(text)
        seen |= named.keys()
        subtitles += [f"{word} {', '.join(texts)}"] if texts else []
    margin = 0.05 * (max(limits) - min(limits)) or room
    lowest = max((metric["lower"]["value"] for metric in metrics if metric.get("lower")), default=-math.inf)
    # where the axis reaches the smallest possible value, it ends there, and bands with it
    axis.set_ylim(lowest if min(limits) - room / 2 <= lowest else min(limits) - margin, max(limits) + margin)
    return handles, subtitles


# ---- a panel per encoder


Row = tuple[np.ndarray, list[tuple[Axes, dict, int]]]  # panels; those with data, their metric and number of patches


def encoder_panels(
    results: Sequence[dict], metrics: Sequence[str], height: float, labels: float
) -> tuple[Figure, list[Row]]:
    """A figure with a row of panels per metric, a panel per encoder.

    height: of a row, in inches; labels: what the labels of its vertical axis take, in points.
    """
    count, rows = len(results), []
    width = max(min(WIDTH, 1.7 * count + 1), 0.85 * count)
    figure, axes = panels([count] * len(metrics), width, height * len(metrics) + 0.3)
    models = [model_name(result["encoder"]["model"]) for result in results]
    for axis, result, model in zip(axes[0], results, models, strict=True):
        lines = wrap(result["label"], int((width - 1) / count / 0.062))
        axis.set_title("\n".join([*lines, *([model] if len(set(models)) > 1 else [])]))
    for line, name in zip(axes, metrics, strict=True):
        name_row(line[0], "\n".join(wrap(title(name), 18)), labels)
        rows.append((line, []))
        for axis, result in zip(line, results, strict=True):
            if name in result["metrics"]:
                rows[-1][1].append((axis, result["metrics"][name], result["patches"]))
            else:
                mark_empty(axis)
    return figure, rows


@rc_context(STYLE)
def draw_heads(results: Sequence[dict], metrics: Sequence[str], *targets: Path) -> None:
    """Heat maps, block x head: means over the images; a row per metric with a scale of its own, a panel per encoder."""
    figure, rows = encoder_panels(results, metrics, height=1.3, labels=27)
    for line, cells in rows:
        maps = [column(entries(metric)[1], "mean_per_head") for _, metric, _ in cells]
        scale = Normalize(min(map(np.nanmin, maps)), max(map(np.nanmax, maps)))
        for (axis, *_), values in zip(cells, maps, strict=True):
            L, H = values.shape
            style = {"aspect": "auto", "interpolation": "nearest", "extent": (-0.5, L - 0.5, H - 0.5, -0.5)}
            axis.imshow(values.T, norm=scale, **style)
            axis.set(xticks=counted(L - 1, 2 if len(results) > 4 else 4), yticks=counted(H - 1))
        cells[0][0].set_ylabel("head (from 0)")
        figure.colorbar(ScalarMappable(scale), ax=list(line), label=cells[0][1]["unit"], aspect=12)
    figure.supxlabel(BLOCKS, fontsize=7)
    save_figure(figure, *targets)


@rc_context(STYLE)
def draw_spectra(results: Sequence[dict], metrics: Sequence[str], *targets: Path) -> None:
    """Profiles over frequency or rank, a line per depth: a row per metric with one axis, a panel per encoder.

    The embedding is dashed; colours run from it to the last block. Frequencies are those of the grid's diagonal, as a
    fraction of pi (of half a cycle per patch).
    """
    figure, rows = encoder_panels(results, metrics, height=1.6, labels=38)
    for _, cells in rows:
        limits = []
        for axis, metric, patches in cells:
            depths, per_depth = entries(metric)
            profiles = column(per_depth, f"mean_per_{metric['axis']}")
            limits += [np.nanmin(profiles), np.nanmax(profiles)]
            x = np.arange(1, profiles.shape[1] + 1)
            axis.set_xlabel(metric["axis"])
            axis.xaxis.set_major_locator(MaxNLocator(2, integer=True))
            if metric["axis"] == "frequency":
                x = np.arange(profiles.shape[1]) * 2 / math.isqrt(patches)
                axis.set(xlabel="frequency / π", xlim=(-0.03, 1.03), xticks=(0, 0.5, 1), xticklabels=("0", "½", "1"))
            for depth, profile in zip(depths, profiles, strict=True):
                dash = "--" if depth < 0 else "-"
                axis.plot(x, profile, dash, color=DEPTHS((depth + 1) / (depths[-1] + 1)), linewidth=0.9)
            frame(axis)
        margin = 0.05 * (max(limits) - min(limits))
        for axis, *_ in cells:
            axis.set_ylim(min(limits) - margin, max(limits) + margin)
            axis.tick_params(labelleft=axis is cells[0][0])
        cells[0][0].set_ylabel(cells[0][1]["unit"])
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), DEPTHS), ax=figure.axes, aspect=30, shrink=0.7)
    bar.set_ticks([0, 1], labels=["embedding", "last block"])
    save_figure(figure, *targets)


class Kind(NamedTuple):
    """A kind of figure and the metrics that it shows by default."""

    draw: Callable[..., None]  # of results, metrics and files to write
    metrics: str  # a group of attention.metrics.GROUPS
    axes: tuple[str | None, ...]  # the values of Metric.axis that it can draw
    suffixes: tuple[str, ...]  # as main_analyze_attention.py writes it


FIGURES = {
    "attention": Kind(draw_attention, "paper", ANY_AXIS, (".png", ".pdf")),
    "park": Kind(draw_attention, "park", ANY_AXIS, (".png", ".pdf")),
    "heads": Kind(draw_heads, "paper", ("head",), (".png",)),
    "spectra": Kind(draw_spectra, "park", ("frequency", "rank"), (".png",)),
}


def draw_figures(results: Sequence[dict], folder: Path) -> None:
    """All of FIGURES for which something was measured."""
    for name, kind in FIGURES.items():
        if metrics := choose_metrics([kind.metrics], results, kind.axes):
            kind.draw(results, metrics, *(Path(folder) / f"{name}{suffix}" for suffix in kind.suffixes))


# ---- t-SNE


@rc_context(STYLE)
def draw_token_maps(tsne: dict, label: str, target: Path) -> None:
    """The t-SNE of tsne.json: a panel per block, a point per patch token; a colour per class, a shade per image."""
    maps, names = tsne["maps"], tsne["classes"]
    classes, columns = list(dict.fromkeys(names)), min(len(maps), 4)
    rows, side = math.ceil(len(maps) / columns), WIDTH / max(columns, 3)
    counts = [min(columns, len(maps) - columns * row) for row in range(rows)]
    figure, axes = panels(counts, side * columns, side * rows + 0.45)
    marks = {}  # colour and marker by image
    for name, colour in zip(classes, itertools.cycle(COLOURS)):
        images = [image for image, other in enumerate(names) if other == name]
        for image, strength, marker in zip(images, np.linspace(1, 0.4, len(images)), itertools.cycle(MARKERS)):
            marks[image] = 1 - (1 - np.array(to_rgb(colour))) * strength, marker  # lighter and lighter
    for axis, block in zip(np.concatenate(axes), maps, strict=True):
        for image, points in enumerate(block["points"]):
            colour, marker = marks[image]
            axis.scatter(*np.array(points).T, s=4, color=colour, marker=marker, linewidth=0)
        axis.set_title(f"block {block['block']} (from 0)")
        everything = np.concatenate(block["points"])
        low, high = everything.min(0), everything.max(0)
        half, centre = 0.53 * (high - low).max(), (low + high) / 2  # equal scales: distances are meaningful
        axis.set(xticks=[], yticks=[], box_aspect=1)
        axis.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half))
    figure.suptitle(f"{label}: t-SNE of the patch tokens of {len(marks)} images", fontsize=8)
    style = {"marker": "o", "markersize": 4, "linestyle": ""}
    handles = [Line2D([], [], color=colour, **style) for _, colour in zip(classes, itertools.cycle(COLOURS))]
    where = {"loc": "outside lower center", "ncols": min(len(classes), 6), "frameon": False}
    figure.legend(handles, classes, title="colour: class; shade and shape: image", title_fontsize=6.5, **where)
    save_figure(figure, target)
