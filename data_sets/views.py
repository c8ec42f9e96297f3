"""What becomes of an image before an encoder sees it: the recipe's random crops, and the test's central one.

torchvision takes two seconds to import: --help and mistakes in the arguments do not wait for it.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_sets.images import pixels_of, read_pixels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADERS = ("pil", "tensor")


class View:
    """An image -> pixels (3,h,w) in uint8, which loaders make and carry; and these -> float32, where the encoder is.

    Called, it does both. loader: "pil" resizes as the recipe does; "tensor" decodes JPEG files to uint8 tensors, the
    same ones, and resizes them with torchvision, which makes some pixels other by a level or two of 255.
    """

    def __init__(
        self, steps: Sequence[Callable], mean: tuple[float, ...], std: tuple[float, ...], loader: str = "pil"
    ):  # fmt: skip
        """steps: functions of PIL images and of uint8 tensors."""
        if loader not in LOADERS:
            raise ValueError(f"--loader {loader}: choose one of {', '.join(LOADERS)}")
        self.steps, self.mean, self.std, self.loader = steps, mean, std, loader
        self.constants: dict[torch.device, list[Tensor]] = {}

    def read(self, images: Dataset, index: int) -> tuple[Image.Image | Tensor, int | np.ndarray]:
        """An image of a data set, as the steps like it best, and its label."""
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

        All constants are tensors there: CUDA multiplies by the reciprocal of a number, which is not the same.
        """
        if pixels.device not in self.constants:
            columns = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in (self.mean, self.std))
            self.constants[pixels.device] = [torch.tensor(255.0, device=pixels.device), *columns]
        scale, mean, std = self.constants[pixels.device]
        result = torch.empty_like(pixels, dtype=torch.float32)
        alone = pixels.device.type == "cpu" and pixels.dim() == 4  # one image at a time stays in the cache
        for part, target in zip(pixels, result, strict=True) if alone else [(pixels, result)]:
            target.copy_(part).div_(scale).sub_(mean).div_(std)
        return result

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return self.normalise(self.pixels(image))


def train_transform(
    input_size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    scale: tuple[float, float] = (0.08, 1.0),
    crop: str = "mae",
    hflip: bool = True,
    loader: str = "pil",
) -> View:
    """The recipe's augmentation: random crop to input_size, horizontal flip, normalisation (paper, B.2).

    crop: "mae" draws once, "torchvision" up to ten times; "center" is no augmentation: eval_transform.
    """
    from torchvision import transforms

    from data_sets.crop import RandomResizedCrop, TorchvisionCrop

    if crop == "center":
        return eval_transform(input_size, mean, std, loader)
    cropper = {"mae": RandomResizedCrop, "torchvision": TorchvisionCrop}[crop]
    steps = [cropper(input_size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)]
    return View([*steps, *[transforms.RandomHorizontalFlip()] * hflip], mean, std, loader)


def eval_transform(
    input_size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    loader: str = "pil",
    whole: bool = False,
) -> View:
    """Resize the shorter side to input_size x 256 / 224 (bicubic), central crop, normalisation.

    whole: the shorter side becomes input_size, so that the crop covers it.
    """
    from torchvision.transforms import CenterCrop, InterpolationMode

    side = input_size if whole else int(input_size * 256 / 224)
    return View([_resize([side], InterpolationMode.BICUBIC), CenterCrop(input_size)], mean, std, loader)


def stretch_transform(size: int, mean: tuple[float, ...], std: tuple[float, ...], loader: str = "pil") -> View:
    """The whole image, each side resized by its own factor: what wsolevaluation shows its networks, bilinear too."""
    from torchvision.transforms import InterpolationMode

    return View([_resize([size, size], InterpolationMode.BILINEAR)], mean, std, loader)


def _resize(size: list[int], interpolation: object) -> Callable:
    """Of PIL images, and of uint8 tensors, which stay uint8."""
    from torchvision.transforms.v2 import functional

    return functools.partial(functional.resize, size=size, interpolation=interpolation, antialias=True)
