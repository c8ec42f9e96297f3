"""Figures of a report, as SVG without a ground of their own: curves, matrices, and those of attention.figures."""

import io
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from report.html import Html, element, picture
from util.plotting import COLOURS, STYLE, save_figure

PANEL = (3.5, 2.1)  # inches, of which a page shows two or three beside each other
LEGEND = 8  # groups of lines that have a colour
OURS = {**STYLE, "savefig.transparent": True, "text.parse_math": False}  # names are not formulas
EDGE = 1600  # pixels; larger pictures are made smaller


class Line(NamedTuple):
    """A curve; those of one group share their colour and their entry in the legend."""

    group: str
    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap


def as_svg(draw: Callable[[Path], None]) -> bytes:
    """What `draw` writes to the path that it gets. ValueError where nothing can be drawn of the records."""
    with tempfile.TemporaryDirectory() as folder, rc_context({"savefig.transparent": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the tables have the names in all their letters
        path = Path(folder) / "figure.svg"
        try:
            draw(path)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        return path.read_bytes()


def drawing(draw: Callable[[Path], None], alt: str, caption: object = None, broad: bool = False) -> Html:
    """A figure of the page, broad: not to be made small on a phone; where it cannot be drawn, a line that says so."""
    try:
        return picture(as_svg(draw), "svg", alt, caption, broad=broad)
    except ValueError as error:
        return element("p", f"{alt}: cannot be drawn ({error})", class_="soft")


@rc_context(OURS)
def draw_curves(lines: Sequence[Line], ylabel: str, target: Path, log_scale: bool = False) -> None:
    """Curves over epochs, counted from 1. Groups beyond LEGEND are grey."""
    groups = list(dict.fromkeys(line.group for line in lines))
    entries = groups[:LEGEND]
    rows = math.ceil(len(entries) / 2) if len(groups) > 1 else 0
    figure = Figure(figsize=(PANEL[0], PANEL[1] + 0.15 * rows), layout="constrained")
    axis = figure.add_subplot()
    for line in lines:
        place = groups.index(line.group)
        colour = COLOURS[place] if place < LEGEND else "0.75"
        few = len(line.x) <= 12
        axis.plot(line.x, line.y, color=colour, linewidth=1, marker="o" if few else "", markersize=2.5, alpha=0.85,
                  zorder=3 if place < LEGEND else 2)  # fmt: skip
    if log_scale:
        axis.set_yscale("log")
    axis.set(xlabel="epoch (from 1)", ylabel=ylabel)
    ticks = sorted({x for line in lines for x in line.x})
    if len(ticks) > 1:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        axis.set_xticks(ticks)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    if len(groups) > 1:
        handles = [Line2D([], [], color=COLOURS[place]) for place in range(len(entries))]
        words = [short(name) for name in entries]
        if len(groups) > LEGEND:
            handles.append(Line2D([], [], color="0.75"))
            words.append(f"{len(groups) - LEGEND} others")
        figure.legend(handles, words, loc="outside upper left", ncols=2, frameon=False, fontsize=6.5)
    save_figure(figure, target)


def short(name: str, length: int = 34) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


@rc_context(OURS)
def draw_matrix(names: Sequence[str], values: np.ndarray, starred: np.ndarray, label: str, target: Path) -> None:
    """A heat map, row x column, with its numbers; starred cells have an asterisk, those that are NaN a dash."""
    R = len(names)
    cell = min(0.5, max(0.3, 5.2 / R))  # inches
    words = [short(name, 28) for name in names]
    room = 0.06 * max(map(len, words)) + 0.2
    figure = Figure(figsize=(cell * R + room + 0.9, 0.72 * cell * R + 0.7 * room + 0.3), layout="constrained")
    axis = figure.add_subplot()
    top = max(float(np.nanmax(values)), 1e-9) if np.isfinite(values).any() else 1.0
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for row, column in np.ndindex(R, R):
        value = values[row, column]
        text = "–" if not np.isfinite(value) else f"{value:.2f}" if value >= 0.005 or value == 0 else "<.01"
        axis.text(column, row, text + "*" * bool(starred[row, column]), ha="center", va="center",
                  fontsize=6.5 if cell > 0.35 else 5.5, color="white" if value > 0.6 * top else "black")  # fmt: skip
    axis.set_xticks(range(R), words, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(R), words)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, aspect=25, pad=0.02, label=label)
    save_figure(figure, target)


def photo(path: Path, caption: object = None) -> Html:
    """A PNG file, inside of the page: its bytes, or a smaller copy where it is larger than a screen shows. ValueError
    where the file is damaged."""
    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            if image.format != "PNG":
                raise ValueError(f"it is {image.format}, not PNG")
            image.load()
            if max(image.size) > EDGE:
                image.thumbnail((EDGE, EDGE))
                smaller = io.BytesIO()
                image.save(smaller, "PNG", optimize=True)
                data = min(data, smaller.getvalue(), key=len)
            size = image.size
    except Exception as error:  # decoders raise anything
        raise ValueError(f"{path} cannot be shown: {' '.join(str(error).split())}") from error
    return picture(data, "png", path.name, caption or path.name, size, broad=size[0] > 800)
