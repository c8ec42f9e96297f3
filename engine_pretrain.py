"""Masked-autoencoder pretraining: a micro-step, and pictures of what the model reconstructs.

Letters as in models_mae; n images.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_sets.loader import KeyedDataset, Sample
from data_sets.views import eval_transform
from models_mae import MaskedAutoencoder, denormalised, unpatchify
from runtime.training import OneNetwork

COLUMNS = ("image", "masked", "reconstruction", "reconstruction + visible")
GREY = 0.5  # of masked patches


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
        self.mask_ratio = mask_ratio

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        noise = sample.noise.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            return self.model(images, noise, self.mask_ratio).loss[None]


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
        for index, name in enumerate(COLUMNS):
            axis.annotate(name, ((index + 0.5) / len(COLUMNS), 1), xycoords="axes fraction", xytext=(0, 3),
                          textcoords="offset points", ha="center")  # fmt: skip
        save_figure(figure, target)
