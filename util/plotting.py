"""Style and output of all figures, and maps over pictures.

Figures are as wide as a paper's page, with letters of their final size. The same input gives the same bytes.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from util.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 6.9  # inches: both columns of a CVPR page
STYLE = tomllib.loads(Path(__file__).with_name("figures.toml").read_text())
METADATA = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # no dates: equal bytes
# Okabe and Ito 2008, without their yellow, and a wine red of Tol 2021
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS, DASHES = "os^DvPX*", ("-", "--", "-.", ":")  # dashes change after all colours were used once
GREY = {"color": "0.35", "fontsize": 6}


def save_figure(figure: Figure, *targets: Path) -> None:
    """Write a figure whole, in the formats of the suffixes. ValueError for another suffix or a disk error."""
    for target in map(Path, targets):
        if target.suffix not in METADATA:
            raise ValueError(f"{target}: a figure's name must end in {', '.join(METADATA)}")
        try:
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=target.suffix[1:], dpi=200, metadata=METADATA[target.suffix])
        except OSError as error:
            raise ValueError(f"{target} cannot be written: {error.strerror}") from error


def frame(axis: Axes) -> None:
    """Lines: a frame to the left and below, and a horizontal grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.3, alpha=0.6)


def bare(axis: Axes) -> None:
    """Pictures: neither ticks nor a frame."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def outline(axis: Axes, pixel: tuple[float, float], width: float, height: float, colour: str, around: str) -> None:
    """A rectangle of whole pixels of a picture, from `pixel`, its upper left, in a colour that another surrounds."""
    corner = pixel[0] - 0.5, pixel[1] - 0.5
    for edge, line in ((around, 1.7), (colour, 1.0)):  # visible on any ground
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=edge, linewidth=line)).set_clip_on(False)


def visible(images: Tensor, view: Any) -> np.ndarray:
    """Images (...,3,h,w) normalised with view.mean and view.std -> (...,h,w,3) in [0,1]."""
    pixels = images.movedim(-3, -1).numpy() * np.array(view.std) + np.array(view.mean)
    return pixels.clip(0, 1)


def draw_map(axis: Axes, picture: np.ndarray, weights: np.ndarray, top: float) -> None:
    """Weights (rows,columns) of the patches, from 0 to `top`, over a picture (h,w,3); small weights are transparent."""
    h, w = picture.shape[:2]
    axis.imshow(picture.mean(2), cmap="gray", vmin=-0.2, vmax=1.4)
    options = {"cmap": "inferno", "vmin": 0, "vmax": top, "interpolation": "nearest"}
    alpha, extent = (weights / top).clip(0, 1) ** 0.5, (-0.5, w - 0.5, h - 0.5, -0.5)
    axis.imshow(weights, alpha=alpha, extent=extent, **options)


def add_scale(figure: Figure, top: float, more: bool) -> None:
    """The colours of draw_map; more: there are weights above `top`."""
    colours, extend = ScalarMappable(Normalize(0, top), "inferno"), "max" if more else "neither"
    label = "weight / uniform weight 1/M"
    figure.colorbar(colours, ax=figure.axes, shrink=0.6, aspect=25, extend=extend, label=label)
