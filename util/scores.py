"""Counting correct predictions exactly: per-sample numbers, summed in double precision, divided once.

Letters: B images, K classes.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from util.distributed import world_size


class Scores(NamedTuple):
    """Evaluation of one classifier over `n` images."""

    top1: float  # percent
    top5: float  # percent; 100 where there are five classes or fewer
    loss: float  # mean cross-entropy, nats
    n: int


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,K), (B,) -> (4,) float64: images right at the first guess and within five, summed loss, number of images."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits.float(), labels, reduction="none").double().sum()
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(labels))]).double()


def total(counts: Tensor) -> list[Scores]:
    """(S,4) counts of S classifiers on this rank -> their Scores over all ranks."""
    if world_size() > 1:
        dist.all_reduce(counts)
    return [Scores(100 * top1 / n, 100 * top5 / n, loss / n, int(n)) for top1, top5, loss, n in counts.tolist()]
