"""Pretraining by masked reconstruction, momentum contrast or both: a micro-step, and pictures of reconstructions.

Letters as in models_mae; n images, V views of each.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_sets.loader import KeyedDataset, Sample
from data_sets.order import GlobalBatches
from data_sets.views import eval_transform
from models_mae import MaskedAutoencoder, denormalised, unpatchify
from models_moco import SharedEncoder, momentum_at
from runtime.training import OneNetwork
from util.distributed import world_size
from util.files import atomic_path

GREY = 0.5  # of masked patches
COLLAPSED = 0.01  # spread of [cls]; about 0.5 at random initial weights
AT_CHANCE = 0.99  # of the loss that equal similarities give


class Comparison(NamedTuple):
    """How much of the loss is the contrast, and over which steps its momentum rises."""

    weight: float
    momentum: float  # at the first step
    batches: GlobalBatches
    epochs: int


class Pretraining(OneNetwork):
    """Masked reconstruction, or (1 - weight) x reconstruction + weight x contrast, as a runtime.training.Method.

    With a contrast, samples hold the views (V,3,h,w): one to reconstruct unless the weight is 1, and two to compare,
    with the noise of their masks (V M). Source of the sum: Park et al., "What Do Self-Supervised Vision Transformers
    Learn?", ICLR 2023.
    """

    program = "main_pretrain.py"

    def __init__(
        self,
        model: MaskedAutoencoder | SharedEncoder,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float,
        device: torch.device,
        amp: torch.dtype,
        comparison: Comparison | None = None,
    ):
        """model: of a comparison, SharedEncoder: MaskedAutoencoder (unless the weight is 1), MomentumContrast."""
        super().__init__(model, optimizer, device, amp)
        self.mask_ratio, self.comparison = mask_ratio, comparison
        parts = list(model) if comparison else [model, None]
        self.autoencoder, self.contrast = parts if len(parts) == 2 else (None, parts[0])

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        noise = sample.noise.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            if self.comparison is None:
                return self.model(images, noise, self.mask_ratio).loss[None]
            self._begin(*words[1:])
            views = images.transpose(0, 1)
            noise = noise.unflatten(1, (len(views), -1)).transpose(0, 1)
            contrast, weight = self.contrast(views[-2:], noise[-2:]), self.comparison.weight
            loss = weight * contrast.loss
            if self.autoencoder is not None:
                loss = loss + (1 - weight) * self.autoencoder(views[0], noise[0], self.mask_ratio).loss
        self.contrast.epoch_sums += torch.stack([part.detach().double() for part in (*contrast, loss.new_ones(()))])
        return loss[None]

    def _begin(self, epoch: int, chunk: int) -> None:
        """At the first micro-step of an optimizer step, move the momentum encoder; at that of an epoch, clear sums."""
        _, momentum, batches, epochs = self.comparison
        step, micro_step = divmod(chunk // world_size(), batches.accum_iter)
        if micro_step == 0:
            self.contrast.update(momentum_at((epoch + step / batches.steps) / epochs, momentum))
            self.contrast.epoch_sums *= step > 0

    def record(self, loss: float) -> dict[str, float]:
        """What the log has of an epoch with this mean loss: of a comparison also the parts of the loss, the share of
        images whose own key is the nearest, and the spread of [cls]."""
        if self.comparison is None:
            return {"loss": loss}
        contrastive, nearest, spread = (self.contrast.epoch_sums[:3] / self.contrast.epoch_sums[3]).tolist()
        values = {"loss": loss, "contrastive_loss": contrastive, "nearest_key": nearest, "cls_spread": spread}
        if self.autoencoder is not None:
            weight = self.comparison.weight
            values["reconstruction_loss"] = (loss - weight * contrastive) / (1 - weight)
        return values

    def failure(self, record: dict[str, float]) -> str:
        """Why an epoch with this `record` learned nothing, although its loss is finite; "" if none is known."""
        if self.comparison is None:
            return ""
        chance = 4 * self.contrast.temperature * math.log(self.comparison.batches.batch_size * world_size())
        if (spread := record["cls_spread"]) < COLLAPSED:
            return f"collapse: [cls] is nearly the same for all images (spread {spread:.2g}): lower the learning rate"
        if record["contrastive_loss"] > AT_CHANCE * chance:
            return f"the contrastive loss {record['contrastive_loss']:.3f} is not below that of chance, {chance:.3f}"
        return ""


# ---- pictures


def examples(images: Dataset, input_size: int, seed: int, patches: int, count: int = 6) -> Sample:
    """At most `count` images, evenly spaced over a data set, in the test view, with the noise of their masks.

    The same at every call; a damaged image is replaced by the next one.
    """
    dataset = KeyedDataset(images, eval_transform(input_size), seed, patches, on_bad_image="skip", train=True)
    return default_collate([dataset[0, index] for index in range(0, len(dataset), -(-len(dataset) // count))])


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, mask_ratio: float, amp: torch.dtype
) -> np.ndarray:
    """images (n,3,h,w) and noise (n,M), as from `examples` -> pictures (n,4,h,w,3) in [0,1]: the image, its
    visible patches, the reconstruction, and the same with the visible patches put in.

    A model of normalised pixels does not predict the mean and variance of a patch: these are taken from the image.
    """
    from util.plotting import visible  # matplotlib takes a second to import

    with torch.autocast(images.device.type, dtype=amp, enabled=amp != torch.float32):
        predicted, mask = model.predict_all(images, noise, mask_ratio)
    patches, predicted = model.cut(images), predicted.float()
    if model.norm_pix_loss:
        predicted = denormalised(predicted, patches)
    size, grid = model.encoder.patch_size, model.encoder.grid_size
    result = unpatchify(predicted, size, grid)
    hidden = unpatchify(mask[..., None].expand_as(patches), size, grid) > 0
    columns = [images, images.masked_fill(hidden, torch.nan), result, torch.where(hidden, result, images)]
    pictures = visible(torch.stack(columns, dim=1).cpu(), eval_transform(images.shape[-1]))
    return np.nan_to_num(pictures, nan=GREY)


def tiled(pictures: np.ndarray) -> np.ndarray:
    """(n,4,h,w,3) -> one image (n h, 4 w, 3) with a row for each of the n."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in pictures])


def save_picture(image: np.ndarray, target: Path) -> None:
    """Write an image (h,w,3) in [0,1] as PNG, whole, enlarged to at least 1,000 pixels in width."""
    scale = -(-1000 // image.shape[1])
    pixels = np.rint(255 * image).astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_path(target) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
