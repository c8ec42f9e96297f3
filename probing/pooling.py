"""Interfaces of poolings: their input and output, and learned queries as columns of a matrix.

Letters: B images, M tokens to pool, D width, D' width of the pooled vector, C columns (queries).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models_vit import Features

NORM_EPS = 1e-6  # of LayerNorms on tokens, as in ViT and CAE


class Tokens(NamedTuple):
    """Shape of the tokens that a pooling is built for."""

    width: int
    grid: tuple[int, int]
    num_prefix: int


class Pooled(NamedTuple):
    vector: Tensor  # (B,D') one vector per image
    weights: Tensor | None  # (B,M), with several queries (B,H,M), of sum 1 over the tokens; None: no weights


class Needs(NamedTuple):
    """Inputs of a pooling beside the tokens."""

    cls_attention: bool = False  # Features.cls_attention
    cells: frozenset[int] = frozenset()  # patches whose attention is needed: Features.patch_attention
    oracle: bool = False  # Features.oracle

    def union(self, other: "Needs") -> "Needs":
        return Needs(self.cls_attention or other.cls_attention, self.cells | other.cells, self.oracle or other.oracle)


class Columns(NamedTuple):
    """Learned queries that are the same for every image: scores are tokens @ weight + offset.

    Terms equal for all tokens cancel in the softmax and are omitted. The parameters behind them (AbMILP's last bias,
    the bias of LNk) follow rounding errors of a zero gradient in the definitions; here they never change.
    """

    weight: Tensor  # (D,C)
    offset: Tensor | None = None  # (M,C), if scores depend on the token's position


class Pooling(nn.Module):
    """Tokens of a block -> one vector of `width` per image: `forward` takes Features and returns Pooled.

    weighs: whether it returns weights over the patches.
    """

    needs = Needs()
    weighs = True

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    @property
    def learned(self) -> bool:
        """Whether it has parameters."""
        return next(self.parameters(), None) is not None


class TokenPool(nn.Module):
    """A learned pooling: tokens (B,M,D) -> Pooled, with a vector of `width`.

    folds: its queries depend on no image, so it is a projection of softmax-weighted means of the tokens. Banks then
    compute many at once (probing/folding.py) by two methods that agree with `forward`, the definition:
    `columns() -> Columns`, the scores, and `project(pooled)`, from each query's weighted mean (B,C,D) to the vector
    (B,D'). normalised: the columns apply to tokens after a LayerNorm without affine.
    """

    folds = False
    normalised = False
    width: int

    @classmethod
    def of(cls, tokens: Tokens, content: str, **options: int | str) -> "TokenPool":
        """Build it for tokens of this shape; content: see PooledTokens."""
        return cls(tokens.width, **options)


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
