"""Masked autoencoder: MAE's decoder and loss around the encoder of models_vit.

Letters as in models_vit; K visible (kept) patches, C = 3 p^2 values per patch, D' decoder width.
Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from models_vit import Block, VisionTransformer, init_weights
from util.pos_embed import sincos_pos_embed


class Reconstruction(NamedTuple):
    loss: Tensor  # scalar: mean squared error over masked patches
    prediction: Tensor  # (B,M,C) in the space of the targets
    mask: Tensor  # (B,M) 1 = masked, 0 = visible


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B,3,h,w) -> (B,M,C), row-major grid; within a patch: row, column, channel."""
    B, channels, height, width = images.shape
    grid = images.reshape(B, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify: (B,M,C) -> (B,3,h,w)."""
    cells = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """noise (B,M), uniform -> indices of the kept patches (B,K), K = floor(M (1 - ratio)), and mask (B,M), 1 = masked.

    The K patches of lowest noise are kept, so the noise alone decides the mask.
    """
    B, M = noise.shape
    kept = noise.argsort(dim=1)[:, : int(M * (1 - mask_ratio))]
    mask = torch.ones(B, M, device=noise.device).scatter(1, kept, 0.0)
    return kept, mask


class MaskedAutoencoder(nn.Module):
    """Encoder on the visible patches, a light decoder on all of them, loss on the masked ones.

    norm_pix_loss: predict pixels normalised by their patch's mean and variance (the published models do).
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        prefix = encoder.num_prefix_tokens
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, encoder.grid_size, prefix), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * encoder.patch_size**2)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Visible patches kept (B,K) of images (B,3,h,w) -> tokens (B,P+K,D) after the final norm."""
        prefix, patches = self.encoder.embed(images)
        visible = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        for step in self.encoder.trace_tokens(torch.cat([prefix, visible], dim=1)):
            tokens = step.out
        return self.encoder.norm(tokens)

    def decode(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Tokens (B,P+K,D) of the visible patches -> predicted pixels of all patches (B,M,C)."""
        prefix = self.encoder.num_prefix_tokens
        tokens = self.decoder_embed(tokens)
        visible = tokens[:, prefix:]
        M = self.decoder_pos_embed.shape[1] - prefix
        patches = self.mask_token.to(tokens.dtype).expand(len(tokens), M, -1)
        patches = patches.scatter(1, kept[..., None].expand(-1, -1, visible.shape[-1]), visible)
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens).out
        return self.decoder_pred(self.decoder_norm(tokens))[:, prefix:]

    def targets(self, images: Tensor) -> Tensor:
        """What the decoder has to predict: (B,M,C)."""
        patches = patchify(images, self.encoder.patch_size)
        if not self.norm_pix_loss:
            return patches
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> Reconstruction:
        """images (B,3,h,w), noise (B,M) uniform in [0,1), which decides the mask -> Reconstruction."""
        kept, mask = random_masking(noise, mask_ratio)
        prediction = self.decode(self.encode(images, kept), kept)
        error = (prediction.float() - self.targets(images)).square().mean(-1)
        return Reconstruction((error * mask).sum() / mask.sum(), prediction, mask)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Weights in MAE's published layout: encoder keys without prefix, `mask_token` and `decoder_*` beside them."""
        return {key.removeprefix("encoder."): value for key, value in self.state_dict().items()}

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of published_state_dict; strict."""
        names = {key.removeprefix("encoder."): key for key in self.state_dict()}
        self.load_state_dict({names.get(key, key): value for key, value in state.items()}, strict=True)


# Decoder by encoder: the published one for base and larger; 192 wide for the paper's ViT-S (paper, B.1).
DECODERS = {
    "vit_demo_patch8": {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 4},
    "vit_tiny_patch16": {"decoder_embed_dim": 192, "decoder_depth": 8, "decoder_num_heads": 16},
    "vit_small_patch16": {"decoder_embed_dim": 192, "decoder_depth": 8, "decoder_num_heads": 16},
    "vit_base_patch16": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "vit_large_patch16": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "vit_huge_patch14": {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
}
