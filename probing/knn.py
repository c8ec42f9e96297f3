"""Weighted k-nearest-neighbour classification of frozen features, exact over any number of processes.

Letters: m test images, n training images, D width, K classes, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import gather_rows, gather_tensors

TEMPERATURE = 0.07  # as in DINO, whose protocol uses 10, 20, 100 and 200 neighbours
CHUNK, BLOCK = 512, 2**16  # test and training images at a time, whose similarities are in memory
GROUP = 16  # similarities of which only the largest is sorted at first


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: Sequence[int], classes: int
) -> dict[int, dict[str, float]]:
    """{k: {"top1", "top5" in percent}} of classifying test images by the k most similar training images.

    train (n,D), test (m,D): vectors of this rank, of any norm; labels (n,), (m,). Similarity is the cosine; a neighbour
    of similarity s votes for its class with weight exp(s / 0.07). Each rank must call it. ValueError for more
    neighbours than training images. Source: Wu et al., 2018, as evaluated in DINO (Caron et al., 2021).
    """
    total = sum(int(part) for part in gather_tensors(torch.tensor([len(train)], device=train.device)))
    most = max(neighbours)
    if most > total:
        raise ValueError(f"--knn {most}: must be <= {total}, the number of training images")
    train, test = F.normalize(train.float(), dim=1), F.normalize(gather_rows(test).float(), dim=1)
    test_labels = gather_rows(test_labels)
    correct = {k: torch.zeros(2, dtype=torch.int64, device=test.device) for k in neighbours}
    for images, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        similarity, voters = nearest(train, train_labels, images, most)
        for k in correct:
            votes = similarity.new_zeros(len(images), classes, dtype=torch.float64)
            votes.scatter_add_(1, voters[:, :k], (similarity[:, :k].double() / TEMPERATURE).exp())
            hits = votes.topk(min(5, classes)).indices == labels[:, None]
            correct[k] += torch.stack([hits[:, 0].sum(), hits.sum()])
    return {
        k: dict(zip(("top1", "top5"), (100 * count / len(test) for count in counts.tolist()), strict=True))
        for k, counts in correct.items()
    }


def nearest(train: Tensor, train_labels: Tensor, images: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Similarities (m,k) and labels (m,k) of the `most` nearest training images over all ranks, nearest first."""
    similarity = [images.new_full((len(images), most), -torch.inf)]  # every rank contributes at least `most`
    labels = [train_labels.new_zeros(len(images), most)]
    for vectors, classes in zip(train.split(BLOCK), train_labels.split(BLOCK), strict=True):
        values, indices = largest(images @ vectors.T, most)
        similarity, labels = merge([*similarity, values], [*labels, classes[indices]], most)
    similarity, labels = merge(gather_tensors(*similarity), gather_tensors(*labels), most)
    return similarity[0], labels[0]


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their columns, as topk (all, if there are fewer).

    They lie in the `count` groups with the largest maxima, so most values are compared and never sorted.
    """
    groups = values.shape[1] // GROUP
    if groups <= count:
        return values.topk(min(count, values.shape[1]), dim=1)
    rest = values[:, groups * GROUP :]
    grouped = values[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    best = grouped.amax(1).topk(count, dim=1).indices  # (m,k)
    rows = torch.arange(GROUP, device=values.device)[:, None] * groups
    columns = (rows + best[:, None]).flatten(1)  # (m, GROUP k)
    last = torch.arange(groups * GROUP, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, last], dim=1)
    top = torch.cat([grouped.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1), rest], dim=1).topk(count, dim=1)
    return top.values, columns.gather(1, top.indices)


def merge(values: list[Tensor], labels: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The `count` largest of several (m,k) with their labels, in descending order."""
    best = torch.cat(values, dim=1).topk(count, dim=1)
    return [best.values], [torch.cat(labels, dim=1).gather(1, best.indices)]
