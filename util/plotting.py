"""What all figures share: the look, how they are written, and how they read attention.json.

Figures have the width of a paper's page, and letters the size they are to have there. Blocks are counted from 0, as
everywhere else; what enters the first block stands before it. The same input gives the same bytes.
"""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from attention.metrics import METRICS, metric_names
from data_sets.views import View
from util.files import atomic_path

WIDTH = 6.9  # inches: both columns of a CVPR page
STYLE = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 7, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.formatter.useoffset": False, "svg.hashsalt": "figures",
    "pdf.fonttype": 42,
}  # fmt: skip
METADATA = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # no dates: equal bytes
# Okabe and Ito 2008, without their yellow, and a wine red of Tol 2021
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS, DASHES = "os^DvPX*", ("-", "--", "-.", ":")  # dashes change after all colours were used once
GREY = {"color": "0.35", "fontsize": 6}


def load_attention(path: Path) -> dict:
    """The attention.json of main_analyze_attention.py; ValueError where the file is something else."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not {"label", "encoder", "metrics", "patches"} <= result.keys():
        raise ValueError(f"{path} is no attention.json of main_analyze_attention.py")
    return result


def choose_metrics(words: Sequence[str], results: Sequence[dict], axes: Collection[str | None]) -> list[str]:
    """Metrics by name or group, in the order of the words; of a group, those that were measured.

    axes: what a figure can draw, of Metric.axis. Empty where nothing is left. ValueError for an unknown word, and for a
    metric that no result has.
    """
    named = metric_names(words)
    measured = {name for result in results for name in result["metrics"]}
    if missing := [word for word in words if word in METRICS and word not in measured]:
        raise ValueError(f"--metrics {' '.join(missing)}: not measured: there are {', '.join(sorted(measured))}")
    return [name for name in named if name in measured and METRICS[name].axis in axes]


def save_figure(figure: Figure, target: Path) -> None:
    """Write a figure whole; the format follows the suffix. ValueError for another suffix or where it cannot be."""
    target = Path(target)
    if target.suffix not in METADATA:
        raise ValueError(f"{target}: a figure is written as {', '.join(METADATA)}, by the suffix of its name")
    try:
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=target.suffix[1:], dpi=200, metadata=METADATA[target.suffix])
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from error


def model_name(result: dict) -> str:
    """ "vit_base_patch16" as papers write it: ViT-B/16."""
    model = result["encoder"]["model"]
    size, _, patch = model.removeprefix("vit_").partition("_patch")
    letter = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "2b": "2B"}.get(size, size)
    return f"ViT-{letter}/{patch}" if patch else model


def title(name: str) -> str:
    """Of a panel; a metric that has no title is called what it is."""
    given = METRICS[name].title if name in METRICS else ""
    return given or name.replace("cls", "[cls]").replace("self_", "self-").replace("_", " ")


def entries(metric: dict) -> tuple[list[int], list[dict]]:
    """Depths, and what was measured there: the blocks from 0, after the embedding (-1) where there is one."""
    found = ([metric["embedding"]] if "embedding" in metric else []) + metric["blocks"]
    first = -1 if "embedding" in metric else 0
    return list(range(first, first + len(found))), found


def column(found: Sequence[dict], key: str) -> np.ndarray:
    """One number, or a list of them, per entry; NaN where it is null."""
    return np.array([entry[key] for entry in found], dtype=float)


def counted(first: int, last: int, parts: int = 4) -> list[int]:
    """Ticks for things that are counted: all of a few, else the first and about `parts` in equal steps."""
    step = 1 if last <= 2 * parts else math.ceil(last / parts)
    return [first, *(number for number in range(step, last + 1, step) if number > first)]


BLOCKS = "block (from 0)"


def block_ticks(axis: Axes, depths: Sequence[int]) -> None:
    """E: the embedding, where the depths have it."""
    ticks = counted(0, max(depths))
    if min(depths) < 0:
        axis.set_xticks([-1, *ticks], ["E", *map(str, ticks)])
    else:
        axis.set_xticks(ticks)
    axis.set_xlabel(BLOCKS + "; E: embedding" * (min(depths) < 0))


def name_row(axis: Axes, text: str, distance: float) -> None:
    """Write a row's name to the left of its first panel; distance in points."""
    axis.annotate(text, (0, 0.5), xytext=(-distance, 0), xycoords="axes fraction", textcoords="offset points",
                  rotation=90, ha="right", va="center", fontsize=7.5, fontweight="bold")  # fmt: skip


def head_panel(axis: Axes, text: str, small: str = "") -> None:
    """A title, and a line or two under it, centred over the panel and its labels.

    Not Axes.set_title: the layout makes no room for a title that is wider than its panel.
    """
    for words, above, style in ((small, 3, GREY), (text, 11 + 7 * small.count("\n"), {"fontsize": 7.5})):
        axis.annotate(words, (0.4, 1), xycoords="axes fraction", xytext=(0, above), textcoords="offset points",
                      ha="center", **style)  # fmt: skip


def mark_empty(axis: Axes) -> None:
    """A panel of what an encoder lacks."""
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", **GREY)
    axis.set_axis_off()


# ---------------------------------------------------------------------------------------------------------------------
# maps over pictures
# ---------------------------------------------------------------------------------------------------------------------


def visible(images: Tensor, view: View) -> np.ndarray:
    """Images (...,3,h,w) that a View has made -> (...,h,w,3) in [0,1]."""
    pixels = images.movedim(-3, -1).numpy() * np.array(view.std) + np.array(view.mean)
    return pixels.clip(0, 1)


def draw_map(axis: Axes, picture: np.ndarray, weights: np.ndarray, top: float) -> None:
    """Weights (rows,columns) of the patches, from 0 to `top`, over a picture (h,w,3), seen where they are small."""
    h, w = picture.shape[:2]
    axis.imshow(picture.mean(2), cmap="gray", vmin=-0.2, vmax=1.4)
    axis.imshow(weights, cmap="inferno", alpha=(weights / top).clip(0, 1) ** 0.5, vmin=0, vmax=top,
                interpolation="nearest", extent=(-0.5, w - 0.5, h - 0.5, -0.5))  # fmt: skip


def add_scale(figure: Figure, top: float, more: bool) -> None:
    """The colours of draw_map; more: there are weights above `top`."""
    figure.colorbar(ScalarMappable(Normalize(0, top), "inferno"), ax=figure.axes, shrink=0.6, aspect=25,
                    extend="max" if more else "neither", label="weight / uniform weight 1/M")  # fmt: skip
