"""All poolings of a bank by two matrix products, with every learned query as a column.

A query that does not depend on the image scores tokens by a vector w: s_i = x_i . w + b_i. The weighted mean of values
linear in the tokens is the linear map of the tokens' weighted mean. So keys and values per token are never computed:
O(MD) per query instead of O(MD^2).

Letters: B images, M tokens, D width, D' width of a vector, C columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probing.pooling import TokenPool


def pool_together(pools: Sequence[TokenPool], tokens: Tensor) -> list[Tensor]:
    """Poolings that fold, on the same tokens (B,M,D) -> the vector (B,D') of each.

    All have the same `prepare`. Equal to each pooling's `forward` within rounding, as are the gradients of its
    parameters. No value of one pooling enters another, not even with weight 0.
    """
    tokens = pools[0].prepare(tokens)
    columns = [pool.columns() for pool in pools]
    counts = [column.weight.shape[1] for column in columns]
    scores = tokens @ torch.cat([column.weight for column in columns], dim=1)
    if any(column.offset is not None for column in columns):
        zeros = tokens.new_zeros(tokens.shape[1], max(counts))
        pairs = zip(columns, counts, strict=True)
        scores = scores + torch.cat([zeros[:, :n] if c.offset is None else c.offset for c, n in pairs], dim=1)
    weights = scores.softmax(dim=1)  # (B,M,C)
    pooled = weights.transpose(1, 2) @ tokens  # (B,C,D)
    return [pool.project(part) for pool, part in zip(pools, pooled.split(counts, dim=1), strict=True)]
