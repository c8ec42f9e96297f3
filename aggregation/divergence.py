"""Entropies of aggregation vectors, and divergences between pairs of rules.

A rule gives each image a float64 vector of weights over the patches that sums to 1. Logarithms are natural, without an
epsilon. NaN marks a missing vector; infinities are real. Letters: B images, R rules, M patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from util.moments import FiniteMoments


def normalised(weights: Tensor, patches: int) -> Tensor:
    """Weights over tokens, prefix first, (B,N) or (B,H,N) -> (B,M) over the patches, summing to 1, in float64.

    Heads or queries are averaged before the prefix is dropped, as the paper does for the attention of [cls]. NaN if
    the patches have no weight at all, or a weight that is not finite.
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

    Infinite where a row has weight on a patch to which the column gives none. floor: clamp all weights to at least this
    value and renormalise, which makes every divergence finite.
    """
    if floor:
        vectors = vectors.clamp(min=floor)
        vectors = vectors / vectors.sum(-1, keepdim=True)
    logs = vectors.log()
    rows = []
    for p, log_p in zip(vectors.unbind(1), logs.unbind(1), strict=True):  # by rows: R^2 M numbers per image are many
        terms = p[:, None] * (log_p[:, None] - logs)
        no_weight = (p == 0)[:, None].expand_as(terms) & ~vectors.isnan()  # 0 ln 0 = 0
        rows.append(torch.where(no_weight, 0.0, terms).sum(-1))
    return torch.stack(rows, dim=1)


def matrices(direction: str, floor: float) -> dict[str, str]:
    """{name: definition} of what is measured in nats for each pair of rules."""
    pair = {"row_col": "KL(row || column)", "col_row": "KL(column || row)"}[direction]
    floored = f"weights clamped to at least {floor:g} and renormalised" if floor else "unmodified weights"
    exact = "unmodified weights; mean over the images where it is finite"
    return {"kl": f"{pair}, {floored}", "kl_exact": f"{pair}, {exact}"}


class VectorStats:
    """Streaming entropies and matrices: float64 sums, each number averaged over the images for which it is finite."""

    def __init__(self, rules: int, direction: str, floor: float):
        self.rules, self.direction, self.floor = rules, direction, floor
        self.images = 0
        self.moments = FiniteMoments()

    def update(self, vectors: Tensor, indices: Sequence[int] = ()) -> None:
        """Add a batch (B,R,M) of at least one image; its indices in the data set do not matter."""
        pairs = [divergences(vectors, floor) for floor in (self.floor, 0.0)]
        pairs = [pair if self.direction == "row_col" else pair.transpose(1, 2) for pair in pairs]
        self.moments.update(torch.cat([entropies(vectors)[:, None], *pairs], dim=1).flatten(1))
        self.images += len(vectors)

    def state(self) -> dict[str, Any]:
        """Tensors and plain data, for `add_state`."""
        return {"images": self.images, "moments": vars(self.moments)}

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the images of another VectorStats. ValueError or TypeError for anything but its state."""
        moments = FiniteMoments(**state["moments"])
        shape = (self.rules + len(matrices(self.direction, self.floor)) * self.rules**2,)
        if any(part is not None and part.shape != shape for part in vars(moments).values()):
            raise ValueError(f"moments of another shape than {shape}")
        self.moments.merge(moments)
        self.images += state["images"]

    def results(self) -> tuple[list[dict], dict[str, dict]]:
        """The entropy of each rule, and the matrices by name.

        `images`: over how many a mean is; `infinite`: how many further images have an infinite value.
        """
        shape = (-1, self.rules)
        columns = {"mean": self.moments.averages(), "std": self.moments.std()}
        columns |= {"images": self.moments.count, "infinite": self.moments.infinite}
        columns = {name: values.view(shape).tolist() for name, values in columns.items()}
        entropy = [{key: columns[key][0][rule] for key in ("mean", "std", "images")} for rule in range(self.rules)]
        by_name = {}
        for number, (name, definition) in enumerate(matrices(self.direction, self.floor).items()):
            part = slice(1 + number * self.rules, 1 + (number + 1) * self.rules)
            by_name[name] = {"unit": "nats", "definition": definition}
            by_name[name] |= {key: values[part] for key, values in columns.items()}
        return entropy, by_name
