"""What an encoder sees of an image: the recipe's random crops, or the test's central crop.

torch and torchvision are imported at first use: --help and mistakes in the arguments do not wait for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_sets.images import ArrayImages, FileImages, pixels_of, read_pixels
from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch, transforms, functional = map(lazy, ("torch", "torchvision.transforms", "torchvision.transforms.v2.functional"))

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PCT = 224 / 256  # of the shorter side, the share that the central crop keeps
LOADERS = ("pil", "tensor")
Numbers = tuple[float, ...]


class View:
    """An image -> pixels (3,h,w) uint8, made by loaders; and these -> normalised float32, on the encoder's device.

    Calling it does both. loader: "pil" resizes as the recipe does; "tensor" decodes JPEG files to uint8 tensors, with
    equal pixels, and resizes them with torchvision, which changes some pixels by a level or two of 255.
    """

    def __init__(self, steps: Sequence[Callable], mean: Numbers, std: Numbers, loader: str = "pil"):
        """steps: functions of PIL images and of uint8 tensors."""
        if loader not in LOADERS:
            raise ValueError(f"loader {loader!r}: choose one of {', '.join(LOADERS)}")
        self.steps, self.mean, self.std, self.loader = steps, mean, std, loader
        self.constants: dict[torch.device, list[Tensor]] = {}

    def read(self, images: FileImages | ArrayImages, index: int) -> tuple[Image.Image | Tensor, int | np.ndarray]:
        """An image of a data set, decoded for the steps, and its label."""
        if self.loader == "pil" or not hasattr(images, "samples"):
            return images[index]
        path, label = images.samples[index]
        return read_pixels(path), label

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        if self.loader == "tensor":
            image = pixels_of(image)
        for step in self.steps:
            image = step(image)
        return pixels_of(image).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(...,3,h,w) uint8 -> float32 on the same device: the bits of torchvision's ToTensor and Normalize.

        All constants are tensors, as there: CUDA multiplies by the reciprocal of a Python number, which rounds
        differently.
        """
        if pixels.device not in self.constants:
            columns = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in (self.mean, self.std))
            self.constants[pixels.device] = [torch.tensor(255.0, device=pixels.device), *columns]
        scale, mean, std = self.constants[pixels.device]
        result = torch.empty_like(pixels, dtype=torch.float32)
        in_turn = pixels.device.type == "cpu" and pixels.dim() == 4  # one image at a time stays in the cache
        for part, target in zip(pixels, result, strict=True) if in_turn else [(pixels, result)]:
            target.copy_(part).div_(scale).sub_(mean).div_(std)
        return result

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return self.normalise(self.pixels(image))


def train_transform(
    input_size: int,
    mean: Numbers = IMAGENET_MEAN,
    std: Numbers = IMAGENET_STD,
    scale: tuple[float, float] = (0.08, 1.0),
    crop: str = "mae",
    hflip: bool = True,
    loader: str = "pil",
    interpolation: str = "bicubic",
    crop_pct: float | None = CROP_PCT,
) -> View:
    """The recipe's augmentation: random crop to input_size, horizontal flip, normalisation (paper, B.2).

    crop: "mae" draws once, "torchvision" up to ten times; "center" is no augmentation: eval_transform, which alone
    reads crop_pct.
    """
    from data_sets.crop import RandomResizedCrop, TorchvisionCrop

    if crop == "center":
        return eval_transform(input_size, mean, std, loader, interpolation, crop_pct)
    cropper = {"mae": RandomResizedCrop, "torchvision": TorchvisionCrop}[crop]
    steps = [cropper(input_size, scale=scale, interpolation=transforms.InterpolationMode(interpolation))]
    return View([*steps, *[transforms.RandomHorizontalFlip()] * hflip], mean, std, loader)


def eval_transform(
    input_size: int,
    mean: Numbers = IMAGENET_MEAN,
    std: Numbers = IMAGENET_STD,
    loader: str = "pil",
    interpolation: str = "bicubic",
    crop_pct: float | None = CROP_PCT,
) -> View:
    """Resize the shorter side to input_size / crop_pct, central crop, normalisation.

    interpolation: a name of torchvision's InterpolationMode. crop_pct: None resizes both sides to input_size.
    """
    mode = transforms.InterpolationMode(interpolation)
    if crop_pct is None:
        return View([_resize([input_size, input_size], mode)], mean, std, loader)
    steps = [_resize([int(input_size / crop_pct)], mode), transforms.CenterCrop(input_size)]
    return View(steps, mean, std, loader)


def stretch_transform(size: int, mean: Numbers, std: Numbers, loader: str = "pil") -> View:
    """The whole image, each side resized by its own factor (bilinear), as in wsolevaluation."""
    return View([_resize([size, size], transforms.InterpolationMode.BILINEAR)], mean, std, loader)


def _resize(size: list[int], interpolation: transforms.InterpolationMode) -> Callable:
    """Of PIL images, and of uint8 tensors, which stay uint8."""
    return functools.partial(functional.resize, size=size, interpolation=interpolation, antialias=True)
