"""Tokens of a frozen encoder: how they are read, and why they are not finite where they are not.

Letters: B images, M patches, D' width of a vector.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from models_vit import Features, VisionTransformer
from probing.pooling import Needs
from util.distributed import gather_tensors
from util.finite import all_finite, overflow_cause

# input of a bank: {block: tokens}, or the pooled vectors (B,D')
Read = dict[int, Features] | list[Tensor]


class FrozenTokens(NamedTuple):
    """A frozen backbone and how to read it. Call: images (B,3,h,w) -> float32 tokens by block, without autograd.

    final_norm: apply the backbone's last norm (MAE's probe does, the paper's does not). needs: what to return beside
    the tokens. oracle: images -> attention (B,M), called if `needs` includes it.
    """

    backbone: VisionTransformer
    blocks: tuple[int, ...]
    amp: torch.dtype
    final_norm: bool = False
    needs: Needs = Needs()
    oracle: Callable[[Tensor], Tensor] | None = None

    # no_grad, not inference_mode: the probes keep the tokens for their backward pass
    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[int, Features]:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            features = self.backbone(images, self.blocks, *self.needs[:2], pooled=self.needs.pooled)
        attention = self.oracle(images) if self.needs.oracle else None

        def prepare(tokens: Tensor | None, block: int) -> Tensor | None:
            if tokens is None:
                return None
            return self.backbone.norm_after(block)(tokens.float()) if self.final_norm else tokens.float()

        return {
            block: f._replace(
                cls=prepare(f.cls, block),
                registers=prepare(f.registers, block),
                patches=prepare(f.patches, block),
                oracle=attention,
                pooled=f.pooled and {name: output.float() for name, output in f.pooled.items()},
            )
            for block, f in features.items()
        }


def concat_reads(reads: Sequence[Read]) -> Read:
    """Join what was read of several micro-batches along the images."""
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *reads)


class FiniteCheck:
    """Record whether all tokens seen are finite and every attention over patches has a sum above 0.

    `see` does not wait for a GPU; `check` does, and raises on every rank, so each rank must call it.
    """

    def __init__(self, tokens: FrozenTokens, device: torch.device):
        self.tokens, self.healthy = tokens, torch.ones(2, dtype=torch.bool, device=device)

    def see(self, read: Read) -> Read:
        """Check what was read and return it."""
        leaves = [leaf for leaf in pytree.tree_leaves(read) if leaf is not None and leaf.numel()]
        finite = all_finite(leaves)
        sums = [torch.ones(1, device=self.healthy.device)]
        for features in read.values() if isinstance(read, dict) else ():
            rows = [*(features.patch_attention or {}).values(), features.cls_attention]
            sums += [row.mean(1).sum(-1) for row in rows if row is not None]
            sums += [] if features.oracle is None else [features.oracle.sum(-1)]
        self.healthy &= torch.stack([finite, (torch.cat(sums) > 0).all() | ~finite])
        return read

    def check(self) -> None:
        """ValueError with the cause if something was not finite."""
        finite, attended = torch.stack(gather_tensors(self.healthy)).all(0).tolist()
        if not finite:
            models = {
                "the encoder's": self.tokens.backbone,
                "the oracle's": getattr(self.tokens.oracle, "backbone", None),
            }
            raise ValueError(f"the encoder's tokens are not finite: {overflow_cause(models, self.tokens.amp)}")
        if not attended:
            raise ValueError(
                "an image's attention to its patches is 0 in every head, so it cannot weight them: leave out the heads "
                "attn-mn, attn-lcte, ca and dino"
            )
