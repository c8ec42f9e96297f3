"""Figures of a report: curves and matrices as SVG without a background, PNG files of runs."""

import base64
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from report.page import Figure, Text
from util.plotting import COLOURS, STYLE, save_figure

LEGEND = 8  # groups of lines with a colour of their own
SVG = {**STYLE, "savefig.transparent": True, "text.parse_math": False}  # names are not formulas


class Line(NamedTuple):
    """A curve; curves of one group share a colour and a legend entry."""

    group: str
    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap


def drawing(draw: Callable[[Path], None], alt: str, caption: object = None, wide: bool = False) -> Figure | Text:
    """What `draw` writes to the SVG file that it is given; a line of text where the records cannot be drawn."""
    with tempfile.TemporaryDirectory() as folder, rc_context({"savefig.transparent": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # tables show the names in all scripts
        path = Path(folder) / "figure.svg"
        try:
            draw(path)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            return Text(f"{alt}: cannot be drawn ({type(error).__name__}: {' '.join(str(error).split())})")
        return Figure(data_uri(path.read_bytes(), "svg+xml"), alt, caption, "drawing", wide=wide)


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def photo(path: Path, caption: str) -> Figure:
    """A PNG file. ValueError if it is damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"{path} cannot be shown: {' '.join(str(error).split())}") from error
    wide = image.width > 800
    return Figure(data_uri(path.read_bytes(), "png"), path.name, caption, size=image.size, wide=wide)


def shorten(name: str, length: int = 34) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


@rc_context(SVG)
def draw_curves(lines: Sequence[Line], ylabel: str, target: Path) -> None:
    """Curves over epochs, counted from 1; groups beyond LEGEND are grey."""
    groups = list(dict.fromkeys(line.group for line in lines))
    rows = math.ceil(min(len(groups), LEGEND) / 2) if len(groups) > 1 else 0
    figure = Canvas(figsize=(3.5, 2.1 + 0.15 * rows), layout="constrained")
    axis = figure.add_subplot()
    for line in lines:
        i = groups.index(line.group)
        colour, zorder = (COLOURS[i], 3) if i < LEGEND else ("0.75", 2)
        marker = "o" if len(line.x) <= 12 else ""
        axis.plot(line.x, line.y, color=colour, zorder=zorder, marker=marker, markersize=2.5, linewidth=1, alpha=0.85)
    axis.set(xlabel="epoch (from 1)", ylabel=ylabel)
    ticks = sorted({x for line in lines for x in line.x})
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(ticks) == 1:
        axis.set_xticks(ticks)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.3, alpha=0.6)
    if len(groups) > 1:
        handles = [Line2D([], [], color=colour) for colour in COLOURS[: min(len(groups), LEGEND)]]
        labels = [shorten(name) for name in groups[:LEGEND]]
        if len(groups) > LEGEND:
            handles.append(Line2D([], [], color="0.75"))
            labels.append(f"{len(groups) - LEGEND} others")
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=6.5)
    save_figure(figure, target)
