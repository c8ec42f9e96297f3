"""Poolings of a whole bank at the price of two matrix products: every query is a column.

A learned query that no image changes scores tokens by a vector w: s_i = x_i . w + b_i. Its weighted mean of values that
are linear in the tokens is the linear map of the weighted mean of the tokens. So keys and values per token are never
made: O(MD) per query in place of O(MD^2).

Letters: B images, M tokens, D width, D' width of a vector, C columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from probing.pooling import NORM_EPS, TokenPool


def pool_together(pools: Sequence[TokenPool], tokens: Tensor, normalised: bool) -> list[Tensor]:
    """Poolings that fold, of the same tokens (B,M,D) -> the vector (B,D') of each, as its `forward` defines it.

    normalised: theirs are columns on the normalised tokens. Equal to the definition within rounding, gradients of the
    poolings' parameters too. No number of one pooling enters another's, not even as a zero weight.
    """
    if normalised:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)
    columns = [pool.columns() for pool in pools]
    counts = [column.weight.shape[1] for column in columns]
    scores = tokens @ torch.cat([column.weight for column in columns], dim=1)
    if any(column.offset is not None for column in columns):
        nothing = tokens.new_zeros(tokens.shape[1], max(counts))
        scores = scores + torch.cat([
            nothing[:, :count] if column.offset is None else column.offset
            for column, count in zip(columns, counts, strict=True)
        ], dim=1)  # fmt: skip
    weights = scores.softmax(dim=1)  # (B,M,C)
    pooled = weights.transpose(1, 2) @ tokens  # (B,C,D)
    return [pool.project(part) for pool, part in zip(pools, pooled.split(counts, dim=1), strict=True)]
