"""Attentive probing: learned queries attend to the tokens. As in CAE, and efficient probing.

Letters: B images, M tokens to pool, D width, H heads or queries, d head width, D' width of the vector.
"""

import torch
from torch import Tensor, nn

from probing.pooling import NORM_EPS, Columns, Pooled, TokenPool


class AttentivePool(TokenPool):
    """Multi-head cross-attention of one learned query q0 to the tokens, without residual and MLP.

        q = Wq LNq(q0) + bq,  k_i = Wk LNk(x_i),  v_i = Wv LNv(x_i) + bv
        z = Wo concat_h( sum_i softmax_i( q_h . k_ih / sqrt(d) ) v_ih ) + bo

    q0 and all biases start at 0, hence attention starts uniform; matrices are normal, std 0.02, cut at 2.
    heads: one keeps the full width; where it does not divide D, heads are floor(D / heads) wide and Wo maps back to D.
    Parameters: 4 D^2 + 10 D where heads divide D.
    Source: Chen et al., "Context autoencoder for self-supervised representation learning" (CAE), 2024, and its code,
    without the LayerNorm that the code defines but never uses.
    """

    folds = normalised = True

    def __init__(self, dim: int, heads: int = 12):
        super().__init__()
        if not 1 <= heads <= dim:
            raise ValueError(f"attentive probing of tokens of width {dim} needs 1 to {dim} heads, got {heads}")
        self.width, self.heads, self.head_width = dim, heads, dim // heads
        inner = heads * self.head_width
        self.query = nn.Parameter(
            torch.zeros(1, 1, dim)
        )  # CAE's shape; having several dimensions, it is scaled by LARS
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(3))
        self.q, self.k, self.v = nn.Linear(dim, inner), nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner)
        self.proj = nn.Linear(inner, dim)
        for layer in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Pooled:
        """(B,M,D) -> vector (B,D), weights (B,M), with several heads (B,H,M)."""

        def split(x: Tensor) -> Tensor:  # (.,.,Hd) -> (.,H,.,d)
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = self.q(self.norm_q(self.query)), self.k(self.norm_k(tokens)), self.v(self.norm_v(tokens))
        weights = (split(q) @ split(k).transpose(-2, -1) * self.head_width**-0.5).softmax(-1)  # (B,H,1,M)
        vector = self.proj((weights @ split(v)).flatten(1))
        return Pooled(vector, weights[:, 0, 0] if self.heads == 1 else weights[:, :, 0])

    def columns(self) -> Columns:
        # q_h . (Wk_h (gamma x^ + beta)) = (gamma * Wk_h^T q_h) . x^ + what is equal for all tokens
        q = self.q(self.norm_q(self.query)).view(self.heads, 1, -1)
        back = (q @ self.k.weight.unflatten(0, (self.heads, -1))).squeeze(1) * self.head_width**-0.5  # (H,D)
        return Columns((back * self.norm_k.weight).T)

    def project(self, pooled: Tensor) -> Tensor:
        values = pooled * self.norm_v.weight + self.norm_v.bias  # valid because the weights sum to 1
        heads = values.transpose(0, 1) @ self.v.weight.unflatten(0, (self.heads, -1)).transpose(1, 2)  # (H,B,d)
        return self.proj(heads.transpose(0, 1).flatten(1) + self.v.bias)


class EfficientPool(TokenPool):
    """Efficient probing: learned queries attend to the raw tokens, and each pools its share of the value channels.

        z = concat_j( sum_i softmax_i( q_j . x_i / sqrt(D) ) (V x_i)_j ),  with (V x)_j the j-th of H equal parts of V x

    No key projection, no output projection, no norm, no bias; queries start normal with std 0.02, V as nn.Linear does.
    Parameters: H D + D D / shrink. shrink: V maps to D / shrink channels (the authors' d_out).
    Source: Psomas et al., "Attention, please! Revisiting attentive probing through the lens of efficiency", 2025; their
    code github.com/billpsomas/efficient-probing, poolings/ep.py, with its default of one head.
    """

    folds = True

    def __init__(self, dim: int, queries: int = 32, shrink: int = 1):
        super().__init__()
        if dim % shrink or (dim // shrink) % queries:
            raise ValueError(
                f"efficient probing splits a vector of width {dim} / {shrink} into {queries} equal parts: choose "
                f"queries and shrink that divide {dim}"
            )
        self.width, self.queries, self.scale = dim // shrink, queries, dim**-0.5
        self.query = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.v = nn.Linear(dim, self.width, bias=False)

    def forward(self, tokens: Tensor) -> Pooled:
        """(B,M,D) -> vector (B,D'), weights (B,M), with several queries (B,H,M)."""
        weights = (self.query @ tokens.transpose(1, 2) * self.scale).softmax(-1)  # (B,H,M)
        values = self.v(tokens).unflatten(-1, (self.queries, -1))  # (B,M,H,d)
        vector = torch.einsum("bhm,bmhd->bhd", weights, values).flatten(1)
        return Pooled(vector, weights[:, 0] if self.queries == 1 else weights)

    def columns(self) -> Columns:
        return Columns(self.query[0].T * self.scale)

    def project(self, pooled: Tensor) -> Tensor:
        parts = pooled.transpose(0, 1) @ self.v.weight.unflatten(0, (self.queries, -1)).transpose(1, 2)  # (H,B,d)
        return parts.transpose(0, 1).flatten(1)
