"""Attentive probing: learned queries attend to the tokens. The published heads are rows of DESIGNS.

Letters: B images, M tokens to pool, D width, Q queries, H heads, d head width, C = Q H columns, D' width of the vector.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models_vit import Block, Mlp
from probing.norm import BN_EPS, ProbeNorm
from probing.pooling import Columns, TokenPool, Tokens


class Design(NamedTuple):
    """What distinguishes a published head. The letters q, k, v, o name linear maps: of the query, to keys, to values,
    and of the output."""

    maps: str
    biases: str  # maps that have one; keys need none, as it cancels in the softmax
    norm: str  # of the tokens: none, shared (keys and values), each (and the query), batch (over images and tokens)
    query: str  # its initial values: zeros, normal, trunc_normal (std 0.02), xavier; mean: the mean token, not learned
    init: str = ""  # of the maps: trunc_normal (std 0.02), xavier, or PyTorch's
    eps: float = 1e-6  # of the norms
    residual: bool = False  # add the query to the output
    mlp: str = ""  # activation of a final x + MLP(LayerNorm(x))
    widen: int = 1  # head width x heads / D


INITS = {"trunc_normal": functools.partial(nn.init.trunc_normal_, std=0.02), "xavier": nn.init.xavier_uniform_}
DESIGNS = {
    # Chen et al., "Context autoencoder for self-supervised representation learning", 2024; github.com/lxtGH/CAE;
    # without the LayerNorm that the code defines but never uses
    "cae": Design("qkvo", "qvo", "each", "zeros", "trunc_normal"),
    # Psomas et al., "Attention, please! Revisiting attentive probing through the lens of efficiency", 2025: each query
    # scores the raw tokens and pools its share of the value channels; github.com/billpsomas/efficient-probing
    "ep": Design("v", "", "none", "normal"),
    # El-Nouby et al., "Scalable pre-training of large autoregressive image models", 2024; github.com/apple/ml-aim
    "aim": Design("kv", "", "batch", "normal"),
    # Bardes et al., "Revisiting feature prediction for learning visual representations from video", 2024;
    # github.com/facebookresearch/jepa; without the output map that the code defines but never uses
    "vjepa": Design("qkv", "qv", "shared", "trunc_normal", "trunc_normal", eps=1e-5, residual=True, mlp="gelu"),
    # Zhai et al., "Sigmoid loss for language image pre-training", 2023; MAPHead of google-research/big_vision
    "siglip": Design("qkvo", "qvo", "none", "xavier", "xavier", mlp="gelu_tanh"),
    # Darcet et al., "Cluster and predict latent patches", 2025; github.com/facebookresearch/capi
    "capi": Design("kv", "v", "none", "trunc_normal", "trunc_normal"),
    # Psomas et al., "Keep it SimPool", 2023; github.com/billpsomas/simpool, without gamma
    "simpool": Design("qk", "", "shared", "mean"),
    # Ciernik et al., "Attentive multi-layer fusion for vision transformers", 2026; without the affine map of its batch
    # norm, which the classifier contains, its dropout and its jitter; github.com/lciernik/attentive-layer-fusion
    "alf": Design("qkvo", "o", "each", "normal", eps=1e-5, widen=2),
}


class AttentivePool(TokenPool):
    """Multi-head cross-attention of one or more queries q to the tokens.

        q = Wq nq(q0) + bq,  k_i = Wk nk(x_i),  v_i = Wv nv(x_i) + bv
        z = Wo mean_q concat_h( sum_i softmax_i( q_h . k_ih / sqrt(d) ) v_ih ) + bo

    Then z + q0 and z + MLP(LayerNorm(z)), as far as the design has them; maps that it lacks are the identity. Without
    Wk, a query is a head, and d is D.
    heads: where it does not divide D, heads are floor(D / heads) wide and Wo maps back to D. depth: depth - 1 blocks of
    self-attention precede. shrink: the vector is narrower than the tokens by this factor. eps: of the batch norm that
    follows; the vector is scaled to have that effect.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 12,
        design: str = "cae",
        queries: int = 1,
        depth: int = 1,
        shrink: int = 1,
        eps: str | float = BN_EPS,
    ):
        super().__init__()
        self.design = d = DESIGNS[design]
        heads, columns = (heads, queries) if "k" in d.maps else (queries, queries)
        self.width, self.heads = dim // shrink, heads
        if dim % shrink or not 1 <= heads <= self.width or (self.width % heads and "o" not in d.maps):
            allowed = f"1 to {self.width}" if "o" in d.maps else f"a divisor of {dim}" + f" / {shrink}" * (shrink > 1)
            raise ValueError(f"attentive probing of tokens of width {dim}: {heads} heads or queries; needs {allowed}")
        self.head_width, self.scale = self.width // heads * d.widen, (BN_EPS / float(eps)) ** 0.5
        inner = heads * self.head_width
        start = torch.randn(1, columns, dim) * 0.02 if d.query == "normal" else torch.zeros(1, columns, dim)
        self.query = None if d.query == "mean" else nn.Parameter(start)
        for name in {"shared": "k", "each": "qkv"}.get(d.norm, ""):
            setattr(self, f"norm_{name}", nn.LayerNorm(dim, eps=d.eps))
        self.batch_norm = ProbeNorm(dim) if d.norm == "batch" else None
        self.norm_eps = d.eps if d.norm in ("shared", "each") else None
        for name in d.maps:
            sizes = (inner, dim) if name == "o" else (dim, inner)
            setattr(self, "proj" if name == "o" else name, nn.Linear(*sizes, bias=name in d.biases))
        if d.mlp:
            self.norm, self.mlp = nn.LayerNorm(dim, eps=d.eps), Mlp(dim, 4 * dim, activation=d.mlp)
        norms = "layernorm" if d.eps == 1e-6 else "layernorm_eps1e-5"
        self.blocks = nn.ModuleList(Block(dim, heads, norm_layer=norms) for _ in range(depth - 1))
        for layer in self.modules() if d.init else ():
            if isinstance(layer, nn.Linear):
                INITS[d.init](layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if d.query in INITS:
            INITS[d.query](self.query.data[0])
        if d.residual:  # V-JEPA 2 divides the last matrix of a branch by sqrt(2 x number of its block)
            last = [(n, layer) for n, block in enumerate(self.blocks, 1) for layer in (block.attn.proj, block.mlp.fc2)]
            for number, layer in [*last, (max(len(self.blocks), 1), self.mlp.fc2)]:
                layer.weight.data /= (2 * number) ** 0.5

    @classmethod
    def of(cls, tokens: Tokens, content: str, width: int = 0, **options: int | str) -> "AttentivePool":
        """width: of a head, instead of their number."""
        dim = tokens.width
        if width and dim % width:
            raise ValueError(f"heads of width {width} do not divide tokens of width {dim}: choose a divisor")
        if width:
            options["heads"] = dim // width
        if content == "blocks":
            dim = tokens.block_width
            options["heads"] = options.get("heads") or tokens.blocks * (1 + tokens.has_cls)
        return cls(dim, **options)

    @property
    def folds(self) -> bool:
        return self.query is not None and self.batch_norm is None and not len(self.blocks)

    def prepare(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens).out
        if self.batch_norm is not None:
            return self.batch_norm(tokens.flatten(0, 1)).view_as(tokens)
        return super().prepare(tokens)

    def columns(self, tokens: Tensor | None = None) -> Columns:
        if "k" not in self.design.maps:
            return Columns(self.query[0].T * self.query.shape[2] ** -0.5)
        # q_h . (Wk_h (gamma x^ + beta)) = (gamma * Wk_h^T q_h) . x^ + what is equal for all tokens
        query = tokens.mean(1, keepdim=True) if self.query is None else self.query  # (1,Q,D) or (B,1,D)
        query = self.norm_q(query) if self.design.norm == "each" else query
        query = self.q(query) if "q" in self.design.maps else query
        keys = self.k.weight.unflatten(0, (self.heads, -1))  # (H,d,D)
        back = torch.einsum("bqhd,hdc->bqhc", query.unflatten(-1, (self.heads, -1)), keys) * self.head_width**-0.5
        back = back * self.norm_k.weight if self.norm_eps else back
        weight = back.flatten(1, 2).transpose(1, 2)
        return Columns(weight if self.query is None else weight[0])

    def project(self, pooled: Tensor) -> Tensor:
        d = self.design
        if self.norm_eps:
            norm = self.norm_v if d.norm == "each" else self.norm_k
            pooled = pooled * norm.weight + norm.bias  # valid because the weights sum to 1
        z = pooled.unflatten(1, (-1, self.heads))  # (B,Q,H,D)
        if "v" in d.maps:
            # weight first: its gradient comes out in its own layout
            values = self.v.weight.unflatten(0, (self.heads, -1)) @ z.flatten(0, 1).permute(1, 2, 0)  # (H,d,BQ)
            z = values.permute(2, 0, 1).unflatten(0, z.shape[:2])
            z = z if self.v.bias is None else z + self.v.bias.unflatten(0, (self.heads, -1))
        z = z.flatten(2).mean(1)
        z = self.proj(z) if "o" in d.maps else z
        z = z + self.query[:, 0] if d.residual else z
        z = z + self.mlp(self.norm(z)) if d.mlp else z
        return z * self.scale
