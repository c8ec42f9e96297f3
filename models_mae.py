"""Masked autoencoder: MAE's decoder and loss around the encoder of models_vit.

Letters as in models_vit; K visible (kept) patches, W = M - K masked ones, C = 3 p^2 values per patch, D' decoder width.
The encoder embeds only the visible patches. The decoder takes the visible tokens, then the masked ones: attention
ignores order, and positions are looked up. In training, its last block computes only the masked patches.
Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models_vit import ARCHITECTURES, Backbone, Block, BlockTrace, VisionTransformer, init_weights
from util.pos_embed import resample_pos_embed, sincos_pos_embed

EPS = 1e-6  # added to the variance of a patch's pixels, as published


class Reconstruction(NamedTuple):
    loss: Tensor  # scalar: mean squared error over the masked patches
    prediction: Tensor  # (B,W,C) of the masked patches, in the space of the targets
    kept: Tensor  # (B,K) indices of the visible patches
    masked: Tensor  # (B,W) indices of the others


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B,3,h,w) -> (B,M,C), row-major grid; within a patch: row, column, channel."""
    grid = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify: (B,M,C) -> (B,3,h,w)."""
    cells = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Uniform noise (B,M) -> indices of the kept patches (B,K) of lowest noise, K = floor(M (1 - ratio)), and of the
    masked patches (B,W)."""
    kept = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    return order[:, :kept], order[:, kept:]


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B,M,D), indices (B,n) -> (B,n,D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def normalised(patches: Tensor) -> Tensor:
    """Pixels (...,C) standardised by the mean and variance of their patch."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + EPS).sqrt()


def denormalised(values: Tensor, patches: Tensor) -> Tensor:
    """The inverse of `normalised`: values (...,C) with the mean and variance of the patches (...,C)."""
    return values * (patches.var(-1, keepdim=True) + EPS).sqrt() + patches.mean(-1, keepdim=True)


class Published(nn.Module):
    """A network whose files omit `prefix`, a regular expression, from the keys; equal keys are the same tensor."""

    prefix: str

    def _names(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for key in self.state_dict():
            names.setdefault(re.sub(f"^{self.prefix}", "", key), []).append(key)
        return names

    def published_state_dict(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {name: state[keys[0]] for name, keys in self._names().items()}

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of published_state_dict; strict."""
        names = self._names()
        self.load_state_dict({key: value for name, value in state.items() for key in names.get(name, [name])})


class MaskedAutoencoder(Published):
    """norm_pix_loss: predict pixels standardised per patch, as the published models do."""

    prefix = r"encoder\."

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

    def encode(self, patches: Tensor, kept: Tensor) -> Tensor:
        """Pixels (B,M,C) of all patches, indices (B,K) of the visible ones -> tokens (B,P+K,D) after the final norm."""
        embed = self.encoder.patch_embed.proj
        weight = embed.weight.permute(0, 2, 3, 1).flatten(1)  # row, column, channel, as patchify has them
        visible = F.linear(take(patches, kept), weight, embed.bias)
        prefix, positions = self.encoder.prefix_and_positions(self.encoder.grid_size)
        if positions is not None:
            visible = visible + positions[0][kept]
        tokens = self.encoder.norm_pre(torch.cat([prefix.expand(len(patches), -1, -1), visible], dim=1))
        for step in self.encoder.trace_tokens(tokens):
            tokens = step.out
        return self.encoder.norm(tokens)

    def decode(self, tokens: Tensor, kept: Tensor, masked: Tensor, first: int = 0) -> Tensor:
        """The encoder's tokens (B,P+K,D) -> the decoder's (B,P+M-first,D') from position `first` on: prefix, visible
        patches, masked patches."""
        prefix, table = self.encoder.num_prefix_tokens, self.decoder_pos_embed[0]
        B, W = masked.shape
        order = torch.cat([kept, masked], dim=1)
        positions = torch.cat([table[:prefix].expand(B, -1, -1), table[prefix:][order]], dim=1)
        tokens = torch.cat([self.decoder_embed(tokens), self.mask_token.expand(B, W, -1)], dim=1) + positions
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens).out
        return self.decoder_blocks[-1](tokens, kept=slice(first, None)).out

    def predict(self, tokens: Tensor) -> Tensor:
        """The decoder's tokens (B,n,D') -> predicted pixels of their patches (B,n,C)."""
        return self.decoder_pred(self.decoder_norm(tokens))

    def cut(self, images: Tensor) -> Tensor:
        """Images -> patches (B,M,C). ValueError for images of another size than the model was built for."""
        size = tuple(side * self.encoder.patch_size for side in self.encoder.grid_size)
        if images.shape[-2:] != size:
            height, width = images.shape[-2:]
            raise ValueError(f"images of {height} x {width} pixels: this autoencoder takes {size[0]} x {size[1]}")
        return patchify(images, self.encoder.patch_size)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> Reconstruction:
        """images (B,3,h,w), noise (B,M) of the mask, uniform in [0,1) -> Reconstruction."""
        patches = self.cut(images)
        kept, masked = random_masking(noise, mask_ratio)
        visible = self.encode(patches, kept)
        prediction = self.predict(self.decode(visible, kept, masked, first=visible.shape[1]))
        hidden = take(patches, masked)
        targets = normalised(hidden) if self.norm_pix_loss else hidden
        return Reconstruction((prediction.float() - targets).square().mean(), prediction, kept, masked)

    def predict_all(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor]:
        """Predictions (B,M,C) of all patches in row-major order, and the mask (B,M), 1 = masked."""
        kept, masked = random_masking(noise, mask_ratio)
        tokens = self.decode(self.encode(self.cut(images), kept), kept, masked)
        inverse = torch.cat([kept, masked], dim=1).argsort(dim=1)
        mask = torch.ones_like(noise).scatter(1, kept, 0.0)
        return take(self.predict(tokens[:, self.encoder.num_prefix_tokens :]), inverse), mask


class WithDecoder(Backbone):
    """An encoder and, as further blocks, its MAE decoder on all patches: none is masked, so there is no mask token.

    `embed_dim` is the encoder's; `widths` has that of each block, `num_heads` those of the last.
    """

    def __init__(self, autoencoder: MaskedAutoencoder):
        super().__init__()
        encoder, blocks = autoencoder.encoder, autoencoder.decoder_blocks
        self.autoencoder, self.encoder_depth, self.norm = autoencoder, encoder.depth, autoencoder.decoder_norm
        for name in ("embed_dim", "patch_size", "grid_size", "num_registers", "num_prefix_tokens", "has_cls"):
            setattr(self, name, getattr(encoder, name))
        self.pos_resampling, self.num_heads = encoder.pos_resampling, blocks[0].attn.num_heads
        self.depth = encoder.depth + len(blocks)
        self.widths = (encoder.embed_dim,) * encoder.depth + (autoencoder.decoder_embed.out_features,) * len(blocks)

    def norm_after(self, block: int) -> nn.Module:
        return self.autoencoder.encoder.norm if block < self.encoder_depth else self.norm

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        model, encoder = self.autoencoder, self.autoencoder.encoder
        for step in encoder.trace(images):
            yield step
        grid, table = self.grid_of(*images.shape[-2:]), (encoder.num_prefix_tokens, self.pos_resampling)
        positions = resample_pos_embed(model.decoder_pos_embed, self.grid_size, grid, *table)
        tokens = model.decoder_embed(encoder.norm(step.out)) + positions
        for index, block in enumerate(model.decoder_blocks, self.encoder_depth):
            step = block(tokens)._replace(index=index)
            yield step
            tokens = step.out


def with_decoder(encoder: VisionTransformer, weights: dict[str, Tensor], num_heads: int) -> WithDecoder:
    """The encoder and the decoder of a file in MAE's layout. ValueError if the file holds no whole decoder."""
    kept = {key: value for key, value in weights.items() if key.startswith("decoder_") or key == "mask_token"}
    depth = len({key.split(".")[1] for key in kept if key.startswith("decoder_blocks.")})
    if not depth or "decoder_embed.weight" not in kept:
        raise ValueError("it holds no decoder: main_pretrain.py --keep_decoder, or its checkpoints, keep it")
    model = MaskedAutoencoder(encoder, len(kept["decoder_embed.weight"]), depth, num_heads)
    try:
        model.load_published_state_dict({**encoder.state_dict(), **kept})
    except RuntimeError as error:
        raise ValueError(f"its decoder cannot be read: {' '.join(str(error).split())}") from error
    return WithDecoder(model.eval().requires_grad_(False))


# decoder of each encoder: as published for base and larger; width 192 for the paper's ViT-S (B.1) and smaller
DECODERS = {
    name: {"decoder_embed_dim": 512 if sizes["embed_dim"] > 384 else 192, "decoder_depth": 8, "decoder_num_heads": 16}
    for name, sizes in ARCHITECTURES.items()
}
DECODERS["vit_demo_patch8"] = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 4}
