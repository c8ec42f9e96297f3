"""Recognise probes that learned nothing: their training loss or their test score is what guessing reaches."""

import numpy as np
from scipy.special import entr

from probing.results import metric_label
from util.intervals import best_guess
from util.progress import log

MARGIN = 0.05  # of the loss of a classifier that knows the class frequencies only


def prior_loss(labels: np.ndarray) -> float:
    """Loss in nats of the class frequencies as predictions: ln K for balanced labels (n,); of labels (n,K), the mean
    binary cross-entropy."""
    if labels.ndim == 1:
        return float(entr(np.bincount(labels) / len(labels)).sum())
    return float((entr(labels.mean(0)) + entr(1 - labels.mean(0))).mean())


def guessing(score: float, labels: np.ndarray, headline: str) -> str | None:
    """The reason if a test score in percent is that of guessing; None if it is not, or if several labels exist."""
    if headline not in ("top1", "per_class"):
        return None
    chance, high = best_guess(labels, headline == "per_class")
    if score > high:
        return None
    interval = f"the 95 % interval of guessing, {chance:.2f} to {high:.2f}"
    return f"test {metric_label(headline)} {score:.2f} is not above {interval}"


def mark_untrained(
    results: dict[str, dict], losses: dict[str, float], train: np.ndarray, test: np.ndarray, headline: str
) -> None:  # fmt: skip
    """Give each probe of `results` the entry learned_nothing, None or the reason, and log the reasons.

    losses: of training in the last epoch. train, test: labels.
    """
    prior = prior_loss(train)
    for name, result in results.items():
        reason = guessing(result["last"][headline], test, headline)
        if losses.get(name, 0) >= (1 - MARGIN) * prior:
            reason = f"training loss {losses[name]:.3f} is not 5 % below {prior:.3f}, that of the class frequencies"
        result["learned_nothing"] = reason
        if reason:
            log.warning("%s learned nothing: %s", name, reason)
