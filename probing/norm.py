"""Batch normalisation of a probe, whose statistics do not depend on how a batch is split over processes.

Letters: B images, G groups of images, D' width of a vector.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-6  # MAE's linear probe


class ProbeNorm(nn.BatchNorm1d):
    """BatchNorm1d without affine whose running statistics do not depend on how a batch is split over ranks.

    Training normalises each group of images (by default a micro-batch) by its own statistics, as nn.BatchNorm1d does,
    and stores them; `commit` then updates the running ones group by group, in the order of the data over all ranks. So
    any number of processes gets the values of nn.BatchNorm1d on one.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=BN_EPS, momentum=0.1, affine=False)
        # (G,2,D') of each forward pass since the last commit: mean and unbiased variance of its G groups of images
        self.pending: list[Tensor] = []
        self.groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, training=False, eps=self.eps)
        (normalised,), (statistics,) = normalise([x], self.groups)
        self.pending.append(statistics)
        return normalised

    @torch.no_grad()
    def commit(self, statistics: Tensor) -> None:
        """statistics (groups, 2, D'), in the order of the data."""
        for mean, variance in statistics:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1


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
