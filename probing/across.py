"""Poolings across blocks: weights of an earlier block for later tokens, and blocks fused by attention (appendix D).

Letters: B images, L blocks, M patches, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import Features
from probing.pooling import JoinedBlocks, Pooled, Pooling, Tokens


def by_block(features: Features | JoinedBlocks) -> list[Features]:
    return list(features.blocks.values()) if isinstance(features, JoinedBlocks) else [features]


class EarlierWeights(Pooling):
    """The patches of the last block, weighted as another head weighs those of the first."""

    def __init__(self, tokens: Tokens, by: Callable[[Tokens], Pooling]):
        """by: makes the pooling whose weights are used."""
        single = tokens._replace(width=tokens.block_width, blocks=1, widths=())
        super().__init__(single.width)
        self.scorer = by(single)
        self.needs = self.scorer.needs

    def forward(self, features: Features | JoinedBlocks) -> Pooled:
        blocks = by_block(features)
        weights, patches = self.scorer(blocks[0]).weights, blocks[-1].patches
        return Pooled(torch.einsum("bm,bmd->bd", weights.to(patches.dtype), patches), weights)


class FusedBlocks(Pooling):
    """sum_l a_l z_l of the blocks' pooled vectors z_l = sum_i w_li x_li, with learned s_l and u:

        w_l = softmax_i(x_li . s_l),  a = softmax_l(z_l . u)

    Tokens x are normalised (LayerNorm without affine), as blocks differ in scale. Weights of patches: sum_l a_l w_l.
    """

    def __init__(self, tokens: Tokens):
        super().__init__(tokens.block_width)
        self.score = nn.Linear(self.width, tokens.blocks, bias=False)
        self.fusion = nn.Linear(self.width, 1, bias=False)

    def forward(self, features: Features | JoinedBlocks) -> Pooled:
        tokens = torch.stack([F.layer_norm(block.patches, (self.width,)) for block in by_block(features)], dim=1)
        weights = torch.einsum("blmd,ld->blm", tokens, self.score.weight).softmax(-1)
        vectors = torch.einsum("blm,blmd->bld", weights, tokens)
        shares = self.fusion(vectors).softmax(1)  # (B,L,1)
        return Pooled((shares * vectors).sum(1), (shares * weights).sum(1))
