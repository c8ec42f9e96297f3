"""Exact scores of classifiers over the images of all ranks, with one label per image or several.

Letters: B images of a batch, n images in total, K classes, S classifiers.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import gather_rows, sum_over_ranks


class Scores(NamedTuple):
    """Evaluation of one classifier over `n` images."""

    top1: float  # percent
    top5: float  # percent; 100 with five classes or fewer
    loss: float  # mean cross-entropy, nats
    n: int
    per_class: float  # percent: mean of the classes' top-1, over classes that have an image


class Tally:
    """Running counts of S classifiers on the images of this rank, one label each: summed in double, divided once."""

    def __init__(self, classifiers: int, classes: int, device: torch.device | str = "cpu"):
        zeros = functools.partial(torch.zeros, device=device, dtype=torch.float64)
        self.counts, self.images = zeros(classifiers, 2), zeros(classes)  # correct within five and summed loss; images
        self.right = zeros(classifiers, classes)  # correct at the first guess

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (S,B,K) and classes (B,)."""
        self.images.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        hits = logits.topk(min(5, logits.shape[2])).indices == labels[:, None]  # (S,B,5)
        self.right.index_add_(1, labels, hits[:, :, 0].double())
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels.expand(len(logits), -1), reduction="none")
        self.counts += torch.stack([hits.sum((1, 2)).double(), losses.double().sum(1)], dim=1)

    def compute(self) -> list[Scores]:
        """Scores of each classifier over the images of all ranks; each rank must call it. ValueError without images."""
        parts = [self.counts, self.right, self.images]
        for part in parts:
            sum_over_ranks(part)
        counts, right, images = (part.cpu() for part in parts)
        n = int(images.sum())
        if not n:
            raise ValueError("no image to evaluate on: none could be read")
        present = images > 0
        per_class = (right[:, present] / images[present]).mean(1)
        shares = torch.stack([right.sum(1), counts[:, 0]], dim=1) / n
        return [
            Scores(*(100 * share).tolist(), loss.item() / n, n, 100 * mean.item())
            for share, mean, loss in zip(shares, per_class, counts[:, 1], strict=True)
        ]


class MultiLabelScores(NamedTuple):
    """Evaluation of one classifier of several labels over `n` images (paper: unstated; usual practice)."""

    map: float  # percent: mean of average_precision over the classes that have a positive image
    any_match: float  # percent of images whose highest logit is one of their labels (never, without labels)
    label_accuracy: float  # percent of n x K decisions that are correct; a label is predicted if its logit is > 0
    loss: float  # mean binary cross-entropy of the n x K decisions, nats
    n: int
    classes: int  # that have a positive image; `map` is their mean


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """(n,K) scores, (n,K) zeros and ones -> (K,) float64 average precision of each class, in [0, 1].

    sum over thresholds t of (R_t - R_(t-1)) P_t, over the class's distinct scores from the highest down, without
    interpolation, as sklearn.metrics.average_precision_score: images of equal score share a threshold, so their order
    does not matter. NaN for a class without a positive image, where it is undefined (sklearn and torchmetrics return
    0), and for a class with a NaN score.
    """
    order = scores.argsort(dim=0, descending=True)
    ranked, hits = scores.gather(0, order), targets.gather(0, order).double()
    n = len(scores)
    position = torch.arange(n, device=scores.device)[:, None].expand_as(order)
    is_last = torch.ones_like(ranked, dtype=torch.bool)  # of the images with its score
    is_last[:-1] = ranked[1:] != ranked[:-1]
    last = torch.where(is_last, position, n).flip(0).cummin(0).values.flip(0)
    precision = hits.cumsum(0).gather(0, last) / (last + 1)
    result = (hits * precision).sum(0) / hits.sum(0)
    return torch.where(scores.isnan().any(0), torch.nan, result)


class MultiLabelTally:
    """Logits of S classifiers and the labels of their images, kept on the CPU until `compute`.

    Memory: 4 n K S bytes over all ranks, plus 4 n K while scores are computed.
    """

    def __init__(self, classifiers: int, classes: int, device: torch.device | str = "cpu"):
        """device: of tensors exchanged between ranks (a GPU under NCCL)."""
        self.device = device
        self.logits = [[torch.empty(0, classes)] for _ in range(classifiers)]
        self.labels = [torch.empty(0, classes, dtype=torch.uint8)]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (S,B,K), and (B,K) zeros and ones."""
        for kept, scores in zip(self.logits, logits, strict=True):
            kept.append(scores.float().cpu())
        self.labels.append(labels.to("cpu", torch.uint8))

    def compute(self) -> list[MultiLabelScores]:
        """Scores of each classifier over the images of all ranks, to the same bits on any number of ranks.

        Each rank must call it. ValueError without images.
        """
        labels = gather_rows(torch.cat(self.labels).to(self.device)).cpu()
        if not len(labels):
            raise ValueError("no image to evaluate on: none could be read")
        gathered = (gather_rows(torch.cat(kept).to(self.device)).cpu() for kept in self.logits)  # one at a time
        return [multilabel_scores(logits, labels) for logits in gathered]


def multilabel_scores(logits: Tensor, labels: Tensor) -> MultiLabelScores:
    """(n,K) logits and (n,K) zeros and ones of all images -> scores; all but the loss NaN if a logit is NaN."""
    present = (labels > 0).any(0)
    precisions = average_precision(logits, labels)[present]
    matches = labels.gather(1, logits.argmax(1, keepdim=True)).double().mean()
    correct = ((logits > 0) == (labels > 0)).double().mean()
    # sorted before averaging, so that the order of images does not change the bits
    losses = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    loss = losses.flatten().sort().values.mean()
    values = torch.stack([precisions.mean(), matches, correct])
    if logits.isnan().any():
        values = torch.full_like(values, torch.nan)
    return MultiLabelScores(*(100 * values).tolist(), loss.item(), len(labels), int(present.sum()))
