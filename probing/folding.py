"""All poolings of a bank by two matrix products, with every learned query as a column.

A query that does not depend on the image scores tokens by a vector w: s_i = x_i . w + b_i. The weighted mean of values
linear in the tokens is the linear map of the tokens' weighted mean. So keys and values per token are never computed:
O(MD) per query instead of O(MD^2).

Letters: B images, M tokens, D width, S probes, C columns of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probing.pooling import Columns


def fold(tokens: Tensor, columns: Sequence[Columns]) -> list[Tensor]:
    """Tokens (B,M,D) and Columns with weights (S,D,C) and offsets (S,M,C) -> the weighted means (B,S,C,D) of each.

    No value of one column enters another, not even with weight 0.
    """
    shapes = [(len(each.weight), each.weight.shape[2]) for each in columns]
    counts = [S * C for S, C in shapes]
    scores = tokens @ torch.cat([each.weight.transpose(0, 1).flatten(1) for each in columns], dim=1)
    if any(each.offset is not None for each in columns):
        none = tokens.new_zeros(tokens.shape[1], max(counts))
        offsets = [
            none[:, :count] if each.offset is None else each.offset.transpose(0, 1).flatten(1)
            for each, count in zip(columns, counts, strict=True)
        ]
        scores = scores + torch.cat(offsets, dim=1)
    weights = scores.softmax(dim=1)  # (B,M, sum of counts)
    means = weights.transpose(1, 2) @ tokens
    return [part.unflatten(1, shape) for part, shape in zip(means.split(counts, dim=1), shapes, strict=True)]
