"""Interfaces of poolings: their input and output, and learned queries as columns of a matrix.

Letters: B images, M tokens to pool, D width, D' width of the pooled vector, C columns (queries).
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import Features, VisionTransformer


class Tokens(NamedTuple):
    """Shape of the tokens that a pooling is built for."""

    width: int  # of one block
    grid: tuple[int, int]
    num_prefix: int
    has_cls: bool = True
    pooled: Mapping[str, int] = MappingProxyType({})  # widths of Features.pooled
    blocks: int = 1  # whose tokens are side by side in channels
    widths: tuple[int, ...] = ()  # of each of the encoder's blocks, or of the joined ones, where they may differ

    @classmethod
    def of(cls, backbone: VisionTransformer, grid: tuple[int, int]) -> "Tokens":
        """Those of one block of a backbone."""
        prefix, widths = backbone.num_prefix_tokens, backbone.widths
        return cls(backbone.embed_dim, grid, prefix, backbone.has_cls, backbone.pooled, widths=widths)

    def joined(self, blocks: Sequence[int]) -> "Tokens":
        """Those of the given blocks, by read_blocks."""
        widths = tuple(self.widths[block] if self.widths else self.width for block in blocks)
        return self._replace(width=sum(widths), blocks=len(blocks), widths=widths)

    @property
    def block_width(self) -> int:
        """Width of each of the joined blocks. ValueError where it differs."""
        if len(set(self.widths)) > 1:
            raise ValueError(f"this head needs blocks of one width, got {self.widths}: name such blocks after @")
        return self.width // self.blocks


class Pooled(NamedTuple):
    vector: Tensor  # (B,D') one vector per image
    weights: Tensor | None  # (B,M), with several queries (B,H,M), of sum 1 over the tokens; None: no weights


class Needs(NamedTuple):
    """Inputs of a pooling beside the tokens."""

    cls_attention: bool = False  # Features.cls_attention
    cells: frozenset[int] = frozenset()  # patches whose attention is needed: Features.patch_attention
    oracle: bool = False  # Features.oracle
    pooled: bool = False  # Features.pooled

    def union(self, other: "Needs") -> "Needs":
        return Needs(*(ours | theirs for ours, theirs in zip(self, other, strict=True)))


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


class Parts(Pooling):
    """The vectors of several poolings, concatenated; each reads its own blocks. No weights."""

    weighs = False

    def __init__(self, poolings: Sequence[Pooling], blocks: Sequence[tuple[int, ...]]):
        super().__init__(sum(pooling.width for pooling in poolings))
        self.poolings, self.blocks = nn.ModuleList(poolings), blocks
        self.needs = functools.reduce(Needs.union, (pooling.needs for pooling in poolings))

    def forward(self, features: "Features | JoinedBlocks") -> Pooled:
        """features: of all blocks of the parts, in ascending order."""
        vectors = []
        for pooling, blocks in zip(self.poolings, self.blocks, strict=True):
            own = read_blocks(features.blocks, blocks) if isinstance(features, JoinedBlocks) else features
            vectors.append(pooling(own).vector)
        return Pooled(torch.cat(vectors, dim=1), None)


class TokenPool(nn.Module):
    """A learned pooling: tokens (B,M,D) -> Pooled, with a vector of `width`.

    Its queries score tokens by vectors, `columns() -> Columns`; `project` maps the weighted mean of each query (B,C,D)
    to the vector (B,D'). So keys and values per token are never computed: O(MD) per query instead of O(MD^2).
    norm_eps: of a LayerNorm without affine that precedes both; None: no norm. folds: the queries depend on no image and
    `prepare` is that norm, so banks may pool many at once, see `fold`.
    """

    folds = False
    norm_eps: float | None = None
    width: int

    @classmethod
    def of(cls, tokens: Tokens, content: str, **options: int | str) -> "TokenPool":
        """Build it for tokens of this shape; content: see PooledTokens."""
        return cls(tokens.width, **options)

    def prepare(self, tokens: Tensor) -> Tensor:
        """The tokens that are scored and averaged."""
        return tokens if self.norm_eps is None else F.layer_norm(tokens, tokens.shape[-1:], eps=self.norm_eps)

    def forward(self, tokens: Tensor) -> Pooled:
        """(B,M,D) -> vector (B,D'), weights (B,M), with several queries (B,C,M)."""
        columns, tokens = self.columns(tokens), self.prepare(tokens)
        scores = tokens @ columns.weight
        weights = (scores if columns.offset is None else scores + columns.offset).softmax(1).transpose(1, 2)
        return Pooled(self.project(weights @ tokens), weights.squeeze(1) if weights.shape[1] == 1 else weights)


def fold(tokens: Tensor, columns: Sequence[Columns]) -> list[Tensor]:
    """All poolings of a bank by two matrix products, with every learned query as a column.

    Tokens (B,M,D) and, for S probes each, Columns with weights (S,D,C) and offsets (S,M,C) -> the weighted means
    (B,S,C,D) of each. No value of one column enters another, not even with weight 0.
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


class PooledTokens(Pooling):
    """A TokenPool of the tokens that `content` names; see select."""

    def __init__(self, pool: TokenPool, content: str = "patch"):
        super().__init__(pool.width)
        self.pool, self.content = pool, content
        self.weighs = content != "blocks"

    def forward(self, features: Features) -> Pooled:
        return self.pool(select(features, self.content))


def select(features: "Features | JoinedBlocks", content: str) -> Tensor:
    """Tokens to pool. "patch" (the paper's): (B,M,D); "all": (B,N,D), [cls], registers, patches; "blocks": (B,2L,D), of
    each of L blocks the [cls] token, if there is one, and the mean patch, with a norm of 1."""
    if content == "patch":
        return features.patches
    if content == "all":
        prefix = [] if features.cls is None else [features.cls[:, None]]
        return torch.cat([*prefix, features.registers, features.patches], dim=1)
    blocks = features.blocks.values() if isinstance(features, JoinedBlocks) else [features]
    summaries = [x for block in blocks for x in (block.cls, block.patches.mean(1)) if x is not None]
    return F.normalize(torch.stack(summaries, dim=1), dim=-1)


class JoinedBlocks:
    """Features of several blocks, whose tokens are side by side in channels; attention and own poolings are those of
    the last block. Tensors are joined when they are read, and kept."""

    def __init__(self, blocks: Mapping[int, Features]):
        self.blocks = blocks

    def __getattr__(self, name: str) -> Tensor | None:
        values = [getattr(features, name) for features in self.blocks.values()]
        joined = name in ("cls", "registers", "patches") and values[0] is not None
        value = torch.cat(values, dim=-1) if joined else values[-1]
        setattr(self, name, value)
        return value


def read_blocks(features: Mapping[int, Features], blocks: Sequence[int]) -> Features | JoinedBlocks:
    """The features of a block, or of several."""
    return features[blocks[0]] if len(blocks) == 1 else JoinedBlocks({block: features[block] for block in blocks})
