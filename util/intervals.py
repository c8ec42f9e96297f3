"""Confidence intervals of means, and the scores that guessing reaches."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if np.isnan(self.low) else f"{self.low:.2f} to {self.high:.2f}"


UNKNOWN = Interval(np.nan, np.nan)


def student(values: np.ndarray, confidence: float = 0.95, fewest: int = 2) -> Interval:
    """Student's interval of the mean of values (k,); UNKNOWN for fewer than `fewest`."""
    if len(values) < fewest:
        return UNKNOWN
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean() - half), float(values.mean() + half))


def best_guess(labels: np.ndarray, per_class: bool = False, confidence: float = 0.95) -> tuple[float, float]:
    """Top-1 in percent of a classifier that ignores the images, and the upper end of its binomial interval.

    It answers with the most frequent class of labels (n,), or, for the mean over classes, with any.
    """
    counts = np.unique(labels, return_counts=True)[1]
    chance = 1 / len(counts) if per_class else counts.max() / len(labels)
    return 100 * chance, 100 * stats.binom.ppf((1 + confidence) / 2, len(labels), chance) / len(labels)
