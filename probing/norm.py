"""Batch normalisation of probes, whose statistics do not depend on how a batch is split over processes.

Letters: B images, G groups of images, D' width of a vector, V vectors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-6  # MAE's linear probe
MOMENTUM = 0.1


class ProbeNorm(nn.BatchNorm1d):
    """BatchNorm1d without affine. In a bank, it hands out the statistics of a training batch instead of using them.

    Training normalises each of `groups` consecutive parts of the images by its own statistics. `pending`, if it is a
    list, receives these as (G,2,D'): the bank updates the running statistics once per optimizer step, see `commit`.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=BN_EPS, momentum=MOMENTUM, affine=False)
        self.pending: list[Tensor] | None = None
        self.groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.pending is None:
            return super().forward(x)
        (normalised,), (statistics,) = normalise([x], self.groups)
        self.pending.append(statistics)
        return normalised


@torch.no_grad()
def commit(mean: Tensor, variance: Tensor, count: Tensor, statistics: Tensor, alive: Tensor) -> None:
    """Update running statistics (S,D') and the number of updates (S,), as nn.BatchNorm1d does, where `alive` (S,).

    statistics: (groups,2,V,D') of all groups of all processes in the order of the data, V = S or 1.
    """
    for group in statistics:
        for running, value in zip((mean, variance), group, strict=True):
            running.lerp_(torch.where(alive[:, None], value, running), MOMENTUM)
    count += alive * len(statistics)


def normalise(vectors: Sequence[Tensor], groups: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Batch normalisation without affine of several (B,D') in one call; also the (G,2,D') statistics of each.

    groups: G consecutive parts of the images, each normalised by itself. The statistics are the mean and the unbiased
    variance. ValueError for groups of fewer than two images.
    """
    joined = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]  # channels are independent
    images, width = joined.shape
    if images // groups < 2:
        raise ValueError("batch normalisation needs at least two images: raise --batch_size or --bn_group")
    if groups > 1:  # groups as channels
        joined = joined.view(groups, -1, width).transpose(0, 1).flatten(1)
    with torch.no_grad():
        variance, mean = torch.var_mean(joined, dim=0)
    normalised = F.batch_norm(joined, None, None, training=True, eps=BN_EPS)
    if groups > 1:
        normalised = normalised.unflatten(1, (groups, width)).transpose(0, 1).flatten(0, 1)
    widths = [vector.shape[1] for vector in vectors]
    statistics = torch.stack([mean, variance]).unflatten(1, (groups, width)).transpose(0, 1)
    return list(normalised.split(widths, dim=1)), list(statistics.split(widths, dim=2))
