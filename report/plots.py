"""Plots in the units of their data, which SVG scales to the page."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from report.tables import Mean


class Axes(NamedTuple):
    title: str
    x: str
    y: str


class Line(NamedTuple):
    """A curve, without the values that are not finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()  # half the width of a band around it
    reference: bool = False  # thin and grey

    @classmethod
    def of_means(cls, name: str, x: Sequence[float], means: Sequence[Mean]) -> "Line":
        spread = [mean.std or 0.0 for mean in means] if max(mean.n for mean in means) > 1 else []
        return cls(name, x, [mean.mean for mean in means], spread)

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """(x, y, spread) of the finite values."""
        spread = self.spread or [0.0] * len(self.y)
        return [(x, y, s) for x, y, s in zip(self.x, self.y, spread, strict=True) if math.isfinite(y + s)]


class Plot(NamedTuple):
    axes: Axes
    lines: Sequence[Line]
    x: tuple[float, float]  # least value, and width of the range
    y: tuple[float, float]
    ticks: tuple[list[float], list[float]]


def plot(axes: Axes, lines: Sequence[Line]) -> Plot | None:
    """None without any finite value."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    x, y = span([x for x, _, _ in points], 0.0), span([y + side * s for _, y, s in points for side in (-1, 1)], 0.05)
    whole = all(float(x).is_integer() for x, _, _ in points)
    shown = sorted((line for line in lines if line.points), key=lambda line: line.reference)
    return Plot(axes, shown, x, y, (ticks(*x, whole), ticks(*y)))


def span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, width = min(values), max(values) - min(values)
    return (low - margin * width, width * (1 + 2 * margin)) if width else (low - (abs(low) or 1), 2 * (abs(low) or 1))


def ticks(low: float, width: float, whole: bool = False) -> list[float]:
    """Round numbers in the range."""
    values = MaxNLocator(5, integer=whole).tick_values(low, low + width).tolist()
    return [round(value, 12) for value in values if -1e-9 <= (value - low) / width <= 1 + 1e-9]
