"""Weighted k-nearest-neighbour classification of frozen features, exact over any number of processes.

Letters: m test images, n training images, D width, K classes, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import gather_rows, gather_tensors

TEMPERATURE = 0.07  # as in DINO, whose protocol uses 10, 20, 100 and 200 neighbours
CHUNK = 512  # test images at a time; n x CHUNK similarities are in memory


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
    local = (images @ train.T).topk(min(most, len(train)), dim=1)
    similarity, labels = local.values, train_labels[local.indices]
    missing = most - similarity.shape[1]  # every rank contributes equally many
    similarity = F.pad(similarity, (0, missing), value=-torch.inf)
    similarity = torch.cat(gather_tensors(similarity), dim=1)
    labels = torch.cat(gather_tensors(F.pad(labels, (0, missing))), dim=1)
    best = similarity.topk(most, dim=1)
    return best.values, labels.gather(1, best.indices)
