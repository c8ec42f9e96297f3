"""Attention-based multiple-instance pooling (AbMILP): a learned weighted mean of tokens.

Letters: B images, M tokens to pool, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models_vit import Attention
from util.pos_embed import sincos_pos_embed

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Pooled(NamedTuple):
    vector: Tensor  # (B,D') one vector per image
    weights: Tensor | None  # (B,M) weights over the pooled tokens, summing to 1; None where no weighting is involved


class AbMILP(nn.Module):
    """z = sum_i s_i x_i with s = softmax_i(f(x_i)): the paper's selective aggregation.

    depth: f is (depth - 1) x [Linear(D, D), activation], then Linear(D, 1); the paper's main head has depth 1.
    self_attention: one-head self-attention over the tokens, without residual; "map": the scores come from its output,
    "both": scores and values do (SA-AbMILP), "none": neither.
    condition: "pe" adds MAE's fixed sine-cosine positions to the input of f; it needs `grid` and the number of prefix
    tokens that precede the patches among the pooled tokens.
    Source: the paper, Section 5 and C.2; Ilse et al., "Attention-based deep multiple instance learning", 2018.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        activation: str = "relu",
        self_attention: str = "none",
        condition: str = "none",
        grid: tuple[int, int] | None = None,
        num_prefix: int = 0,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"AbMILP has a depth of at least 1, not {depth}")
        self.values_attend = self_attention == "both"
        self.self_attention = Attention(dim, num_heads=1, qkv_bias=False) if self_attention != "none" else None
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(dim, dim), ACTIVATIONS[activation]())]
        self.score = nn.Sequential(*hidden, nn.Linear(dim, 1))
        positions = sincos_pos_embed(dim, grid, num_prefix) if condition == "pe" else None
        self.register_buffer("positions", positions, persistent=False)  # fixed: never trained, never saved

    def forward(self, tokens: Tensor) -> Pooled:
        """(B,M,D) -> vector (B,D), weights (B,M)."""
        scored = values = tokens
        if self.self_attention is not None:
            scored = self.self_attention(tokens)[0]
            values = scored if self.values_attend else tokens
        if self.positions is not None:
            scored = scored + self.positions
        weights = self.score(scored).squeeze(-1).softmax(dim=1)
        return Pooled(torch.einsum("bm,bmd->bd", weights, values), weights)
