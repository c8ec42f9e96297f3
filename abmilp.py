"""Attention-based multiple-instance pooling (AbMILP): a learned weighted mean of tokens.

Letters: B images, M tokens to pool, D width, H branches.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import Attention
from probing.pooling import Columns, Pooled, TokenPool, Tokens
from util.pos_embed import sincos_pos_embed

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class GatedTanh(nn.Module):
    """tanh(V x) * sigmoid(U x): the hidden layer of gated attention (Ilse et al., 2018, equation 9)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.V = nn.Linear(dim, hidden)
        self.U = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.V(x).tanh() * self.U(x).sigmoid()


class ResidualSelfAttention(nn.Module):
    """x + gamma * attention(x), with queries and keys of width D/8, no scaling, and gamma = 0 at start.

    Source: Rymarczyk et al., "Kernel self-attention for weakly-supervised image classification using deep multiple
    instance learning", 2021, after the self-attention of SAGAN (Zhang et al., 2019).
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 8:
            raise ValueError(f"residual self-attention needs tokens of width >= 8 (queries have D/8), got {dim}")
        self.query, self.key, self.value = nn.Linear(dim, dim // 8), nn.Linear(dim, dim // 8), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B,M,D) -> (B,M,D)."""
        update = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), scale=1.0)
        return self.gamma * update + x


class AbMILP(TokenPool):
    """z = sum_i s_i x_i with s = softmax_i(f(x_i)): the paper's selective aggregation.

    depth: f is (depth - 1) x [Linear, act], then Linear(., 1); the paper's main head has depth 1. act: of the hidden
    layers; "gated" makes each tanh(Vx) * sigmoid(Ux), at depth 2 the gated attention of Ilse et al. hidden: their
    width; 0: D, as in the paper.
    sa: one-head self-attention over the tokens first. "map": scores come from its output, "both": scores and values
    do (SA-AbMILP; scaled, without residual), "residual": both do, in the form of Rymarczyk et al., whose scores are
    depth 2 with act "tanh"; "none": neither.
    cond: "pe" adds MAE's fixed sine-cosine positions to the input of f; it needs `grid` and the number of prefix
    tokens that precede the patches among the pooled tokens.
    branches: H scores per token on the same hidden layers; their weighted means are concatenated (the K of Ilse et
    al.'s code). At depth 1 these are H AbMILPs side by side: the paper's horizontal scaling, which its released code
    fixes at one branch.
    Source: the paper, Section 5 and C.2; Ilse et al., "Attention-based deep multiple instance learning", 2018.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        act: str = "relu",
        sa: str = "none",
        cond: str = "none",
        hidden: int = 0,
        branches: int = 1,
        grid: tuple[int, int] | None = None,
        num_prefix: int = 0,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"AbMILP depth must be >= 1, got {depth}")
        self.width = branches * dim
        self.values_attend = sa in ("both", "residual")
        self.self_attention = None
        if sa != "none":
            self.self_attention = ResidualSelfAttention(dim) if sa == "residual" else Attention(dim, 1, qkv_bias=False)
        widths = [dim, *[hidden or dim] * (depth - 1)]
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [GatedTanh(before, after)] if act == "gated" else [nn.Linear(before, after), ACTIVATIONS[act]()]
        self.score = nn.Sequential(*layers, nn.Linear(widths[-1], branches))
        positions = sincos_pos_embed(dim, grid, num_prefix) if cond == "pe" else None
        self.register_buffer("positions", positions, persistent=False)  # fixed: never trained, never saved

    def forward(self, tokens: Tensor) -> Pooled:
        """(B,M,D) -> vector (B,HD), weights (B,M), with several branches (B,H,M)."""
        scored = values = tokens
        if self.self_attention is not None:
            attended = self.self_attention(tokens)
            scored = attended[0] if isinstance(attended, tuple) else attended
            values = scored if self.values_attend else tokens
        if self.positions is not None:
            scored = scored + self.positions
        weights = self.score(scored).softmax(dim=1).transpose(1, 2)  # (B,H,M)
        vector = self.project(torch.einsum("bhm,bmd->bhd", weights, values))
        return Pooled(vector, weights.squeeze(1) if weights.shape[1] == 1 else weights)

    @classmethod
    def of(cls, tokens: Tokens, content: str, **options: int | str) -> "AbMILP":
        num_prefix = tokens.num_prefix if content == "all" else 0
        return cls(tokens.width, grid=tokens.grid, num_prefix=num_prefix, **options)

    @property
    def folds(self) -> bool:
        return len(self.score) == 1 and self.self_attention is None

    def columns(self, tokens: Tensor | None = None) -> Columns:
        weight = self.score[-1].weight.T
        return Columns(weight, None if self.positions is None else self.positions[0] @ weight)

    def project(self, pooled: Tensor) -> Tensor:
        return pooled.flatten(1)
