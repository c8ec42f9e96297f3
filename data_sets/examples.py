"""Example images of an analysis, for its figures and maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_sets.images import DamagedImage, read_rgb
from util.seeding import stable_seed


class Example(NamedTuple):
    path: str
    index: int | None  # in the data set; None for another file
    image: Image.Image | Tensor


def read_image(path: str | Path) -> Image.Image:
    """ValueError names a file that is not an image."""
    try:
        return read_rgb(path)
    except Exception as error:  # decoders raise anything
        text = str(error)
        raise ValueError(text if "cannot read image" in text else f"cannot read image {path}: {text}") from error


def random_examples(images: Dataset, chosen: Sequence[int], count: int, seed: int) -> list[Example]:
    """Some of the chosen images, a function of the seed; damaged ones are skipped."""
    generator = torch.Generator().manual_seed(stable_seed("examples", seed))
    examples = []
    for position in torch.randperm(len(chosen), generator=generator).tolist():
        if len(examples) == count:
            break
        index = chosen[position]
        try:
            examples.append(Example(images.names[index], index, images[index][0]))
        except (DamagedImage, OSError, SyntaxError, ValueError):  # the pass over the images reports it
            continue
    return examples
