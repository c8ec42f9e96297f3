"""Moments over images, streaming: exact for any split into batches or processes."""

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Mean and second moment over images of K numbers, streaming in float64.

    The result does not depend on how the images are split into batches or ranks (to rounding, about 1e-15 relative).
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self, count: int = 0, mean: Tensor | float = 0.0, squares: Tensor | float = 0.0):
        self.count = count
        self.mean = mean  # (K,)
        self.squares = squares  # (K,) sums of squared deviations from the mean

    @staticmethod
    def squared(deviations: Tensor) -> Tensor:
        """What the second moment sums up over the images: (B,K) -> (K,)."""
        return deviations.square().sum(0)

    def update(self, values: Tensor) -> None:
        """Add one batch of at least one image, (B,K)."""
        values = values.double()
        mean = values.mean(0)
        self.merge(type(self)(len(values), mean, self.squared(values - mean)))

    def merge(self, other: "Moments") -> None:
        """Add the images that another has seen; either may have seen none."""
        count = self.count + other.count
        if other.count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        between = self.squared(delta[None]) * (self.count * other.count / count)
        self.squares = self.squares + other.squares + between
        self.count = count

    def std(self) -> Tensor:
        """(K,) over the images (population)."""
        return (self.squares / self.count).sqrt()


class Covariance(Moments):
    """The same with the covariances of the K numbers: `squares` is (K,K)."""

    @staticmethod
    def squared(deviations: Tensor) -> Tensor:
        return deviations.T @ deviations

    def matrix(self) -> Tensor:
        """(K,K) covariance over the images (population)."""
        return self.squares / self.count


@dataclass
class FiniteMoments:
    """Mean and second moment of K numbers that not every image has: each over the images where it is finite.

    NaN is left out; infinities are left out and counted. Exact for any split, as Moments. None: of no images.
    """

    count: Tensor | None = None  # (K,), as the others
    infinite: Tensor | None = None
    mean: Tensor | None = None
    squares: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add one batch of at least one image, (B,K)."""
        values = values.double()
        finite = values.isfinite()
        count = finite.sum(0)
        mean = torch.where(finite, values, 0.0).sum(0) / count.clamp(min=1)
        squares = torch.where(finite, values - mean, 0.0).square().sum(0)
        self.merge(FiniteMoments(count, values.isinf().sum(0), mean, squares))

    def merge(self, other: "FiniteMoments") -> None:
        """Add the images that another has seen; either may have seen none."""
        if other.count is None:
            return
        if self.count is None:
            vars(self).update(vars(other))
            return
        count = self.count + other.count
        share = other.count / count.clamp(min=1).double()  # whole numbers would divide in float32
        delta = other.mean - self.mean
        self.squares = self.squares + other.squares + delta.square() * self.count * share
        self.mean = torch.where(other.count > 0, self.mean + delta * share, self.mean)
        self.count, self.infinite = count, self.infinite + other.infinite

    def averages(self) -> Tensor:
        """(K,) over the images that have the number; NaN where none has."""
        return self.mean.where(self.count > 0, torch.nan)

    def std(self) -> Tensor:
        """(K,) over the same images (population)."""
        return (self.squares / self.count.clamp(min=1)).sqrt().where(self.count > 0, torch.nan)
