"""Example images of an analysis, for its figures and maps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_sets.images import DamagedImage
from util.seeding import stable_seed


class Example(NamedTuple):
    path: str
    index: int | None  # in the data set; None for another file
    image: Image.Image | Tensor


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
