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

from data_sets.loader import KeyedDataset, Sample, eval_transform
from models_mae import MaskedAutoencoder, denormalised, unpatchify
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


def tiled(pictures: np.ndarray, gap: int = 0) -> np.ndarray:
    """(n,4,h,w,3) -> one image, a row for each of the n, with so many white pixels between the pictures."""
    n, columns, h, w, _ = pictures.shape
    framed = np.ones((n, columns, h + gap, w + gap, 3))
    framed[:, :, :h, :w] = pictures
    image = framed.transpose(0, 2, 1, 3, 4).reshape(n * (h + gap), columns * (w + gap), 3)
    return image[: len(image) - gap, : image.shape[1] - gap]


@rc_context(STYLE)
def draw_reconstructions(pictures: np.ndarray, target: Path) -> None:
    """A row per image, under the names of the COLUMNS."""
    image = tiled(pictures, gap=max(1, pictures.shape[3] // 32))
    width, head = 0.67 * WIDTH, 0.2  # inches, of the figure and of the names
    height = width * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(width, height + head))
    axis = figure.add_axes((0, 0, 1, height / (height + head)))
    axis.imshow(image, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for index, name in enumerate(COLUMNS):
        axis.annotate(name, ((index + 0.5) / len(COLUMNS), 1), xycoords="axes fraction", xytext=(0, 3),
                      textcoords="offset points", ha="center")  # fmt: skip
    save_figure(figure, target)
