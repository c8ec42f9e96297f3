"""Pretraining by masked reconstruction, momentum contrast or both: a micro-step, and pictures of reconstructions.

Letters as in models_mae; n images, V views of each.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_sets.loader import KeyedDataset, Sample
from data_sets.order import GlobalBatches
from data_sets.views import eval_transform
from models_mae import MaskedAutoencoder, denormalised, unpatchify
from models_moco import SharedEncoder, momentum_at
from runtime.training import OneNetwork
from util.distributed import world_size

COLUMNS = ("image", "masked", "reconstruction", "reconstruction + visible")
GREY = 0.5  # of masked patches
COLLAPSED = 0.01  # spread of [cls]; about 0.5 at random initial weights
AT_CHANCE = 0.99  # of the loss that equal similarities give


class Pretraining(OneNetwork):
    """A masked autoencoder and its optimizer, as a runtime.training.Method; samples carry the noise of their masks."""

    program = "main_pretrain.py"

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float,
        device: torch.device,
        amp: torch.dtype,
    ):
        super().__init__(model, optimizer, device, amp)
        self.autoencoder, self.mask_ratio = model, mask_ratio

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        noise = sample.noise.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            return self.model(images, noise, self.mask_ratio).loss[None]

    def record(self, loss: float) -> dict[str, float]:
        """What the log has of an epoch with this mean loss."""
        return {"loss": loss}

    def failure(self, record: dict[str, float]) -> str:
        """Why an epoch with this `record` learned nothing, although its loss is finite; "" if none is known."""
        return ""


class ContrastivePretraining(Pretraining):
    """(1 - weight) x masked reconstruction + weight x momentum contrast; a weight of 1 has no decoder.

    Samples hold the views (V,3,h,w): one to reconstruct unless the weight is 1, and two to compare, with the noise of
    their masks (V M). Source of the sum: Park et al., "What Do Self-Supervised Vision Transformers Learn?", ICLR 2023.
    """

    def __init__(
        self,
        model: SharedEncoder,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float,
        device: torch.device,
        amp: torch.dtype,
        weight: float,
        momentum: float,
        batches: GlobalBatches,
        epochs: int,
    ):
        """model: MaskedAutoencoder, unless the weight is 1, and MomentumContrast. momentum: at the first step."""
        super().__init__(model, optimizer, mask_ratio, device, amp)
        *autoencoder, self.contrast = model
        self.autoencoder = autoencoder[0] if autoencoder else None
        self.weight, self.momentum = weight, momentum
        self.batches, self.epochs = batches, epochs

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        _, epoch, chunk = words
        step, micro_step = divmod(chunk // world_size(), self.batches.accum_iter)
        if step == micro_step == 0:
            self.contrast.epoch_sums.zero_()
        if micro_step == 0:
            progress = (epoch + step / self.batches.steps) / self.epochs
            self.contrast.update(momentum_at(progress, self.momentum))
        views = sample.image.to(self.device, non_blocking=True).transpose(0, 1)
        noise = sample.noise.to(self.device, non_blocking=True).unflatten(1, (len(views), -1)).transpose(0, 1)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            contrast = self.contrast(views[-2:], noise[-2:])
            loss = self.weight * contrast.loss
            if self.autoencoder is not None:
                loss = loss + (1 - self.weight) * self.autoencoder(views[0], noise[0], self.mask_ratio).loss
        self.contrast.epoch_sums += torch.stack([part.detach().double() for part in (*contrast, loss.new_ones(()))])
        return loss[None]

    def record(self, loss: float) -> dict[str, float]:
        """The parts of the loss, the share of images whose own key is the nearest, and the spread of [cls]."""
        contrastive, nearest, spread = (self.contrast.epoch_sums[:3] / self.contrast.epoch_sums[3]).tolist()
        values = {"loss": loss, "contrastive_loss": contrastive, "nearest_key": nearest, "cls_spread": spread}
        if self.autoencoder is not None:
            values["reconstruction_loss"] = (loss - self.weight * contrastive) / (1 - self.weight)
        return values

    def failure(self, record: dict[str, float]) -> str:
        images = self.batches.batch_size * world_size()
        chance = 4 * self.contrast.temperature * math.log(images)
        if record["cls_spread"] < COLLAPSED:
            return (
                f"collapse: [cls] is nearly the same for all images (spread {record['cls_spread']:.2g}): "
                "lower the learning rate"
            )
        if record["contrastive_loss"] > AT_CHANCE * chance:
            return f"the contrastive loss {record['contrastive_loss']:.3f} is not below that of chance, {chance:.3f}"
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# pictures
# ---------------------------------------------------------------------------------------------------------------------


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
    """images (n,3,h,w) and noise (n,M), as from `examples` -> pictures (n,4,h,w,3) in [0,1]: the COLUMNS.

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


def tiled(pictures: np.ndarray, gap: int = 0) -> np.ndarray:
    """(n,4,h,w,3) -> one image with a row for each of the n, and `gap` white pixels between pictures."""
    padded = np.pad(pictures, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=1)
    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in padded])
    return rows[: len(rows) - gap, : rows.shape[1] - gap]


def draw_reconstructions(pictures: np.ndarray, target: Path) -> None:
    """One row per image, under the names of the COLUMNS."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from util.plotting import STYLE, WIDTH, save_figure

    image = tiled(pictures, gap=max(1, pictures.shape[3] // 32))
    width, head = 0.67 * WIDTH, 0.2  # inches, of the figure and of the names
    height = width * image.shape[0] / image.shape[1]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height + head))
        axis = figure.add_axes((0, 0, 1, height / (height + head)))
        axis.imshow(image, interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        above = {"xycoords": "axes fraction", "xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
        for index, name in enumerate(COLUMNS):
            axis.annotate(name, ((index + 0.5) / len(COLUMNS), 1), **above)
        save_figure(figure, target)
