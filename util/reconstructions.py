"""What a masked autoencoder makes of a few images: image, masked, reconstruction, reconstruction beside what was seen.

Letters as in models_mae; n images.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from models_mae import MaskedAutoencoder, denormalised, unpatchify
from util.datasets import KeyedDataset, Sample, eval_transform
from util.plotting import STYLE, WIDTH, save_figure, visible

COLUMNS = ("image", "masked", "reconstruction", "reconstruction + visible")
GREY = 0.5  # in place of what the encoder does not see


def examples(images: Dataset, input_size: int, seed: int, patches: int, count: int = 6) -> Sample:
    """At most `count` images, evenly spaced over a data set, as the test transform shows them, with the noise of masks.

    The same at every call; the next image stands in for a damaged one.
    """
    dataset = KeyedDataset(images, eval_transform(input_size), seed, patches, on_bad_image="skip", train=True)
    return default_collate([dataset[0, index] for index in range(0, len(dataset), -(-len(dataset) // count))])


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, mask_ratio: float, amp: torch.dtype
) -> np.ndarray:
    """images (n,3,h,w) as `examples` makes them, noise (n,M) -> pictures (n,4,h,w,3) in [0,1]: the COLUMNS.

    What was predicted as normalised pixels gets the mean and the variance of the patch that is there, which such a
    model does not predict: structure is its own, tones are given.
    """
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
    """(n,4,h,w,3) -> one image (n h, 4 w, 3), a row per image."""
    n, columns, h, w, _ = pictures.shape
    return pictures.transpose(0, 2, 1, 3, 4).reshape(n * h, columns * w, 3)


@rc_context(STYLE)
def draw_reconstructions(pictures: np.ndarray, target: Path) -> None:
    """A row per image, the COLUMNS named above."""
    n, columns, h, w, _ = pictures.shape
    side = WIDTH / 6
    figure = Figure(figsize=(side * columns, side * n * h / w + 0.2), layout="constrained")
    axes = figure.subplots(n, columns, squeeze=False)
    for row, line in zip(pictures, axes, strict=True):
        for picture, axis in zip(row, line, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(name)
    save_figure(figure, target)
