"""What poolings of tokens have in common: what goes in, what comes out, and how queries become columns.

Letters: B images, M tokens to pool, D width, D' width of the pooled vector, C columns (queries).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models_vit import Features

NORM_EPS = 1e-6  # of LayerNorms on tokens, as in ViT and CAE


class Tokens(NamedTuple):
    """What a pooling has to know of the tokens before it sees any."""

    width: int
    grid: tuple[int, int]
    num_prefix: int


class Pooled(NamedTuple):
    vector: Tensor  # (B,D') one vector per image
    weights: Tensor | None  # (B,M), of several queries (B,H,M): sum 1 over the tokens; None where nothing is weighted


class Needs(NamedTuple):
    """What a pooling reads beside the tokens."""

    cls_attention: bool = False  # Features.cls_attention
    cells: frozenset[int] = frozenset()  # patches whose row of the attention is in Features.patch_attention
    oracle: bool = False  # Features.oracle

    def union(self, other: "Needs") -> "Needs":
        return Needs(self.cls_attention or other.cls_attention, self.cells | other.cells, self.oracle or other.oracle)


class Columns(NamedTuple):
    """Learned queries that are the same for every image: scores are tokens @ weight + offset.

    What is equal for all tokens drops out of the softmax and is left out: in the definitions such parameters (AbMILP's
    last bias, the bias of LNk) follow the rounding of a gradient that is zero, here they stay where they are.
    """

    weight: Tensor  # (D,C)
    offset: Tensor | None = None  # (M,C), where scores depend on the token's position


class Pooling(nn.Module):
    """Tokens of a block -> one vector per image: `forward` takes Features, returns Pooled. `width` is the vector's.

    weighs: whether it returns weights over the patches.
    """

    needs = Needs()
    weighs = True

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    @property
    def learned(self) -> bool:
        """Whether it has parameters, so that it changes as its probe trains."""
        return next(self.parameters(), None) is not None


class TokenPool(nn.Module):
    """A learned pooling of tokens (B,M,D) -> Pooled. `width` is the vector's.

    One whose queries depend on no image `folds`: it is a projection of softmax-weighted means of the tokens. Then banks
    compute it together with others (probing/folding.py), by two methods beside `forward`, which stays the definition:
    `columns() -> Columns`, of which the scores come, and `project(pooled)`, from the weighted means of each query
    (B,C,D) to the vector (B,D'). normalised: the columns belong to tokens after a LayerNorm without affine.
    """

    folds = False
    normalised = False
    width: int


class PooledTokens(Pooling):
    """A TokenPool of the patch tokens (content "patch", the paper's) or of all tokens, prefix first (content "all")."""

    def __init__(self, pool: TokenPool, content: str = "patch"):
        super().__init__(pool.width)
        self.pool, self.content = pool, content

    def forward(self, features: Features) -> Pooled:
        return self.pool(select(features, self.content))


def select(features: Features, content: str) -> Tensor:
    """The patch tokens (B,M,D), or with content "all" the tokens (B,N,D): [cls], registers, patches."""
    if content == "patch":
        return features.patches
    prefix = [] if features.cls is None else [features.cls[:, None]]
    return torch.cat([*prefix, features.registers, features.patches], dim=1)
