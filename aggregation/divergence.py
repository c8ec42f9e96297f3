"""What is measured of aggregation vectors: entropies, divergences between rules, and whether they peak alike.

A rule gives each image a vector of weights over the patches, of sum 1, in float64. Natural logarithms; nothing is added
to them. Letters: B images, R rules, M patches. NaN marks what an image does not have, infinity is meant.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from util.moments import FiniteMoments

KL_FLOOR = 1e-8  # decision D26 of the reproduction: the paper's Fig. 7


def normalised(weights: Tensor, patches: int) -> Tensor:
    """Weights over tokens, prefix first, (B,N) or (B,H,N) -> (B,M) over the patches, of sum 1, in float64.

    Of several heads or queries, the mean, before the prefix is left out: as the paper takes the attention of [cls].
    NaN where the patches have no weight at all, or one that is not finite.
    """
    weights = weights.double()
    over_patches = (weights.mean(1) if weights.ndim == 3 else weights)[:, -patches:]
    total = over_patches.sum(1, keepdim=True)
    return torch.where((total > 0) & total.isfinite(), over_patches / total, torch.nan)


def entropies(vectors: Tensor) -> Tensor:
    """(B,R,M) -> (B,R) nats, from 0 to ln M."""
    return torch.special.entr(vectors).sum(-1)


def divergences(vectors: Tensor, floor: float = 0.0) -> Tensor:
    """KL(row || column) = sum_j p_j (ln p_j - ln q_j) of each pair of rules, (B,R,M) -> (B,R,R) nats.

    Infinite where a row has weight on a patch that has none in the column. floor: raise all weights to it and normalise
    them anew, which leaves nothing infinite.
    """
    if floor:
        vectors = vectors.clamp(min=floor)
        vectors = vectors / vectors.sum(-1, keepdim=True)
    logs = vectors.log()
    rows = []
    for p, log_p in zip(vectors.unbind(1), logs.unbind(1), strict=True):  # by rows: R^2 M numbers an image are many
        terms = p[:, None] * (log_p[:, None] - logs)
        nothing = (p == 0)[:, None].expand_as(terms) & ~vectors.isnan()  # 0 ln 0 = 0
        rows.append(torch.where(nothing, 0.0, terms).sum(-1))
    return torch.stack(rows, dim=1)


def same_peaks(vectors: Tensor) -> Tensor:
    """(B,R,R): 1 where two rules have their largest weight on the same patch, else 0; NaN where one has several such
    patches, as uniform weights do."""
    largest = vectors.amax(-1, keepdim=True)  # NaN where there is none
    single = (vectors == largest).sum(-1) == 1
    patch = vectors.nan_to_num(0.0).argmax(-1)
    same = (patch[:, :, None] == patch[:, None]).to(vectors.dtype)
    return torch.where(single[:, :, None] & single[:, None], same, torch.nan)


class Matrix(NamedTuple):
    """What is measured of each pair of rules."""

    unit: str
    definition: str


def matrices(direction: str, floor: float) -> dict[str, Matrix]:
    pair = {"row_col": "KL(row || column)", "col_row": "KL(column || row)"}[direction]
    floored = f"weights raised to {floor:g} and normalised anew" if floor else "of the weights as they are"
    both = "half of KL(row || column) + KL(column || row)"
    return {
        "kl": Matrix("nats", f"{pair}, {floored}"),
        "kl_symmetric": Matrix("nats", f"{both}, {floored}"),
        "kl_exact": Matrix("nats", f"{pair}, of the weights as they are; mean over the images where it is finite"),
        "kl_symmetric_exact": Matrix("nats", f"{both}, of the weights as they are; mean where it is finite"),
        "same_peak": Matrix("share", "images where both have their largest weight on the same patch"),
    }


class VectorStats:
    """Entropies and matrices over the images, streaming: sums in float64, each number over the images that have it."""

    def __init__(self, rules: int, direction: str, floor: float):
        self.rules, self.direction, self.floor = rules, direction, floor
        self.images = 0
        self.moments = FiniteMoments()

    def update(self, vectors: Tensor) -> None:
        """One batch (B,R,M) of at least one image."""
        found = [entropies(vectors)[:, None]]
        for floor in (self.floor, 0.0):
            divergence = divergences(vectors, floor)
            reverse = divergence.transpose(1, 2)
            found += [divergence if self.direction == "row_col" else reverse, (divergence + reverse) / 2]
        found.append(same_peaks(vectors))
        self.moments.update(torch.cat(found, dim=1).flatten(1))
        self.images += len(vectors)

    def merge(self, other: "VectorStats") -> None:
        self.moments.merge(other.moments)
        self.images += other.images

    def state(self) -> dict[str, Any]:
        """Tensors and plain data, for `take`."""
        return {"images": self.images, "moments": vars(self.moments)}

    def take(self, state: dict[str, Any]) -> None:
        """Add the images that another has seen. ValueError or TypeError for what is not its state."""
        moments = FiniteMoments(**state["moments"])
        numbers = (self.rules + len(matrices(self.direction, self.floor)) * self.rules**2,)
        if any(part is not None and part.shape != numbers for part in vars(moments).values()):
            raise ValueError(f"its moments are not of {numbers[0]} numbers")
        self.moments.merge(moments)
        self.images += state["images"]

    def results(self) -> tuple[list[dict], dict[str, dict]]:
        """Per rule, the entropy; and the matrices by name. `images`: how many a mean is over; `infinite`: how many more
        there are whose value is infinite."""
        shape = (-1, self.rules)
        mean, std = self.moments.averages().view(shape), self.moments.std().view(shape)
        count, infinite = self.moments.count.view(shape), self.moments.infinite.view(shape)
        entropy = [
            {"mean": float(m), "std": float(s), "images": int(n)}
            for m, s, n in zip(mean[0], std[0], count[0], strict=True)
        ]
        found = {}
        for number, (name, matrix) in enumerate(matrices(self.direction, self.floor).items()):
            part = slice(1 + number * self.rules, 1 + (number + 1) * self.rules)
            found[name] = {
                **matrix._asdict(), "mean": mean[part].tolist(), "std": std[part].tolist(),
                "images": count[part].tolist(), "infinite": infinite[part].tolist(),
            }  # fmt: skip
        return entropy, found
