"""Scores of classifiers over every image of all ranks, exactly: one label an image, or several.

Letters: B images of a batch, n images of all, K classes, S classifiers.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from util.distributed import gather_rows, world_size

# ---------------------------------------------------------------------------------------------------------------------
# one label an image: per-sample numbers, summed in double precision, divided once
# ---------------------------------------------------------------------------------------------------------------------


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
    """(S,4) counts of S classifiers on this rank -> their Scores over all ranks. ValueError where there is no image."""
    if world_size() > 1:
        dist.all_reduce(counts)
    if not counts[:, 3].all():
        raise ValueError("there is no image to evaluate on: none could be read")
    return [Scores(100 * top1 / n, 100 * top5 / n, loss / n, int(n)) for top1, top5, loss, n in counts.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# several labels an image
# ---------------------------------------------------------------------------------------------------------------------


class MultiLabelScores(NamedTuple):
    """Evaluation of one classifier of several labels over `n` images (paper: unstated; usual practice)."""

    map: float  # percent: mean of average_precision over the classes that have a positive image
    any_match: float  # percent of images whose highest logit is one of their labels; an image without labels has none
    label_accuracy: float  # percent of the n x K decisions that are right, deciding for a label where its logit is > 0
    loss: float  # mean binary cross-entropy of the n x K decisions, nats
    n: int
    classes: int  # with a positive image: those that `map` is the mean of


MULTILABEL_METRICS = ("map", "any_match", "label_accuracy")


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """(n,K) scores, (n,K) zeros and ones -> (K,) float64 average precision of each class, in [0, 1].

    sum over thresholds t of (R_t - R_(t-1)) P_t, over the distinct scores of the class from the highest down, without
    interpolation, as sklearn.metrics.average_precision_score: images of equal score enter together, so their order does
    not matter. NaN for a class without a positive image, of which it is undefined (sklearn and torchmetrics say 0), and
    for a class with a score that is NaN.
    """
    order = scores.argsort(dim=0, descending=True)
    ranked, hits = scores.gather(0, order), targets.gather(0, order).double()
    n = len(scores)
    place = torch.arange(n, device=scores.device)[:, None].expand_as(order)
    is_last = torch.ones_like(ranked, dtype=torch.bool)  # of the images with its score
    is_last[:-1] = ranked[1:] != ranked[:-1]
    last = torch.where(is_last, place, n).flip(0).cummin(0).values.flip(0)
    precision = hits.cumsum(0).gather(0, last) / (last + 1)
    result = (hits * precision).sum(0) / hits.sum(0)
    return torch.where(scores.isnan().any(0), torch.nan, result)


class MultiLabelTally:
    """Logits of S classifiers and the labels they are about, kept in memory on the CPU until all are there.

    The memory is 4 n K S bytes over all ranks, and 4 n K beside it while scores are computed.
    """

    def __init__(self, classifiers: int, classes: int):
        self.logits = [[torch.empty(0, classes)] for _ in range(classifiers)]
        self.labels = [torch.empty(0, classes, dtype=torch.uint8)]

    def update(self, logits: list[Tensor], labels: Tensor) -> None:
        """S of (B,K), and (B,K) zeros and ones."""
        for kept, one in zip(self.logits, logits, strict=True):
            kept.append(one.float().cpu())
        self.labels.append(labels.to("cpu", torch.uint8))

    def compute(self, device: torch.device | str = "cpu") -> list[MultiLabelScores]:
        """Scores of each classifier over the images of all ranks, the same bits on any number; each rank must call it.

        device: where ranks exchange tensors (a GPU under NCCL). ValueError where there is no image.
        """
        labels = gather_rows(torch.cat(self.labels).to(device)).cpu()
        if not len(labels):
            raise ValueError("there is no image to evaluate on: none could be read")
        gathered = (gather_rows(torch.cat(kept).to(device)).cpu() for kept in self.logits)  # one at a time
        return [multilabel_scores(logits, labels) for logits in gathered]


def multilabel_scores(logits: Tensor, labels: Tensor) -> MultiLabelScores:
    """(n,K) logits and (n,K) zeros and ones of all images -> their scores, NaN where a logit is."""
    present = (labels > 0).any(0)
    precisions = average_precision(logits, labels)[present]
    matches = labels.gather(1, logits.argmax(1, keepdim=True)).double().mean()
    right = ((logits > 0) == (labels > 0)).double().mean()
    # averaged over the values in their order, so that it does not depend on which rank saw which image
    losses = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    loss = losses.flatten().sort().values.mean()
    values = torch.stack([precisions.mean(), matches, right])
    if logits.isnan().any():
        values = torch.full_like(values, torch.nan)
    return MultiLabelScores(*(100 * values).tolist(), loss.item(), len(labels), int(present.sum()))
