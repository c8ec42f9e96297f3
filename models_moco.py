"""Momentum contrast of [cls] tokens, and several networks around one encoder.

Letters as in models_vit; G images of all processes, C width of the compared vectors.
Source: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers" (MoCo-v3), ICCV 2021.
"""

import copy
import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models_mae import Published, random_masking, take
from models_vit import VisionTransformer
from util.distributed import gather_tensors, rank, world_size

OUTPUT_WIDTH = 256  # C, as published


class Contrast(NamedTuple):
    loss: Tensor  # scalar, of both directions
    nearest: Tensor  # share of the images whose own key is the most similar one; by chance 1 / G
    spread: Tensor  # 1 - |mean of the [cls] directions|^2: 0 if all images have the same [cls]


def mlp(layers: int, width: int, hidden: int) -> nn.Sequential:
    """Linear layers without bias, each with BatchNorm, and ReLU between them; the last BatchNorm has no parameters.

    Networks in training normalise by the batch: running statistics would never be read.
    """
    widths = [width, *[hidden] * (layers - 1), OUTPUT_WIDTH]
    modules: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        last = index == layers - 1
        norm = nn.BatchNorm1d(outputs, affine=not last, track_running_stats=False)
        modules += [nn.Linear(inputs, outputs, bias=False), norm, *([] if last else [nn.ReLU()])]
    return nn.Sequential(*modules)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of queries and keys (G,C), whose rows with the same number are of the same image, times 2 temperature.

    Returns the loss and the share of queries whose own key is the most similar one.
    """
    queries, keys = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (queries, keys))
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    own = torch.arange(len(keys), device=keys.device)
    return F.cross_entropy(similarity, own) * 2 * temperature, (similarity.argmax(1) == own).float().mean()


def momentum_at(progress: float, start: float) -> float:
    """Momentum after a share of the training: from `start` to 1 along half a cosine."""
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)


def of_all_ranks(rows: Tensor) -> Tensor:
    """(B,D) of each process -> (G,D) of all, in rank order, the same everywhere; gradients reach the own rows.

    What follows is computed by every process alike. Averaging gradients over processes divides those of the own rows,
    which the other processes do not have, by the number of processes: they are multiplied by it.
    """
    parts = gather_tensors(rows.detach())
    parts[rank()] = rows + (world_size() - 1) * (rows - rows.detach())
    return torch.cat(parts)


def cls_tokens(encoder: VisionTransformer, images: Tensor, noise: Tensor, drop: float = 0.0) -> Tensor:
    """images (B,3,h,w) -> [cls] (B,D) after the final norm.

    drop: the share of patches that is left out: those of the highest noise (B,M).
    """
    prefix, patches = encoder.embed(images)
    if drop:
        patches = take(patches, random_masking(noise, drop)[0])
    tokens, last = torch.cat([prefix, patches], dim=1), len(encoder.blocks) - 1
    for index, block in enumerate(encoder.blocks):
        tokens = block(tokens, kept=slice(0, 1) if index == last else slice(None)).out
    return encoder.norm(tokens[:, 0])


class MomentumContrast(nn.Module):
    """MoCo-v3 around an encoder with a [cls] token: projector, predictor, and a momentum copy of encoder and projector.

    hidden: width of the MLPs between input and output. drop: share of the patches left out of the trained views; the
    momentum encoder sees all.
    """

    def __init__(self, encoder: VisionTransformer, hidden: int = 4096, temperature: float = 0.2, drop: float = 0.0):
        super().__init__()
        self.encoder, self.temperature, self.drop = encoder, temperature, drop
        self.projector = mlp(3, encoder.embed_dim, hidden)
        self.predictor = mlp(2, OUTPUT_WIDTH, hidden)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("epoch_sums", torch.zeros(4, dtype=torch.float64))  # of a Contrast, and their number

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the momentum copy towards the trained weights: momentum x copy + (1 - momentum) x trained."""
        copies = [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]
        trained = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_mul_(copies, momentum)
        torch._foreach_add_(copies, trained, alpha=1 - momentum)

    def forward(self, views: Tensor, noise: Tensor) -> Contrast:
        """Two views of each image (2,B,3,h,w), noise (2,B,M) of the dropped patches -> Contrast of all processes.

        BatchNorm and the loss are over the G images of all processes, as with MoCo's synchronised BatchNorm and
        gathered keys, and separate for each view.
        """
        images = views.flatten(0, 1)
        cls = cls_tokens(self.encoder, images, noise.flatten(0, 1), self.drop).chunk(2)
        with torch.no_grad():
            targets = cls_tokens(self.momentum_encoder, images, noise.flatten(0, 1)).chunk(2)
            keys = [self.momentum_projector(of_all_ranks(part)) for part in targets]
        cls = [of_all_ranks(part) for part in cls]
        queries = [self.predictor(self.projector(part)) for part in cls]
        with torch.autocast(images.device.type, enabled=False):
            parts = [
                contrastive_loss(query, key, self.temperature) for query, key in zip(queries, keys[::-1], strict=True)
            ]
            directions = F.normalize(torch.cat(cls).detach().double(), dim=1)
        (first, nearest_first), (second, nearest_second) = parts
        spread = 1 - directions.mean(0).square().sum()
        return Contrast(first + second, (nearest_first + nearest_second) / 2, spread)


class SharedEncoder(Published, nn.ModuleList):
    """Networks around one and the same encoder, saved in its published layout with their own tensors beside it."""

    prefix = r"\d+\.(encoder\.)?"
