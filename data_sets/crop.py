"""The part of an image that an encoder sees, cut and then resized: the crop of MAE's recipe, torchvision's, the central
crop, and the whole image. `cut` and `resize` take PIL images, and uint8 tensors, which stay uint8."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as v2

AnyImage = Image.Image | Tensor


class TorchvisionCrop(transforms.RandomResizedCrop):
    """torchvision's RandomResizedCrop, but uint8 tensors stay uint8 when they are resized: twice as fast."""

    def cut(self, img: AnyImage) -> AnyImage:
        return v2.crop(img, *self.get_params(img, self.scale, self.ratio))

    def resize(self, img: AnyImage) -> AnyImage:
        return v2.resize(img, list(self.size), self.interpolation, antialias=True)

    def forward(self, img: AnyImage) -> AnyImage:
        return self.resize(self.cut(img))


class RandomResizedCrop(TorchvisionCrop):
    """torchvision's RandomResizedCrop with a single draw of the window, its sides clamped to the image.

    torchvision draws up to ten times until the window fits, then falls back to a central crop, so long windows are
    rarer there. Draws from torch's global generator: fraction of the area, log aspect ratio, top, left.
    Source: the TensorFlow code of BYOL and SimCLR; MAE's linear probe uses the same.
    """

    @staticmethod
    def get_params(img: AnyImage, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the window in pixels of `img` (PIL image or (..., h, w) tensor)."""
        _, height, width = F.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        log_ratio = torch.log(torch.tensor(ratio))
        aspect = torch.exp(torch.empty(1).uniform_(log_ratio[0].item(), log_ratio[1].item())).item()
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        top = torch.randint(0, height - h + 1, (1,)).item()
        left = torch.randint(0, width - w + 1, (1,)).item()
        return top, left, h, w


class Whole:
    """The whole image, each side resized to `size` by its own factor."""

    def __init__(self, size: int, interpolation: str):
        self.size, self.interpolation = size, transforms.InterpolationMode(interpolation)

    def cut(self, img: AnyImage) -> AnyImage:
        return img

    def resize(self, img: AnyImage) -> AnyImage:
        return v2.resize(img, [self.size, self.size], self.interpolation, antialias=True)


class CentralCrop(Whole):
    """The shorter side resized to `side`, then the central size x size pixels."""

    PIXELS = 2**24  # of the resized image; beyond, only what the crop keeps is computed

    def __init__(self, size: int, side: int, interpolation: str = "bicubic"):
        super().__init__(size, interpolation)
        self.side = side

    def resize(self, img: AnyImage) -> AnyImage:
        _, *sides = F.get_dimensions(img)
        if max(sides) * self.side**2 <= min(sides) * self.PIXELS:
            img = v2.resize(img, [self.side], self.interpolation, antialias=True)
            return v2.center_crop(img, [self.size, self.size])
        picture = v2.to_pil_image(img.cpu()) if isinstance(img, Tensor) else img
        x = 1 - sides.index(max(sides))  # the axis of the longer side: 0 is horizontal
        resized = int(self.side * max(sides) / min(sides))
        factor = max(sides) / resized
        start = round((resized - self.size) / 2) * factor
        box, target = [0, 0, *picture.size], [self.side, self.side]
        box[x], box[x + 2], target[x] = start, start + self.size * factor, self.size
        picture = picture.resize(target, Image.Resampling[self.interpolation.name], box)
        picture = v2.center_crop(picture, [self.size, self.size])
        return v2.pil_to_tensor(picture).to(img.device) if isinstance(img, Tensor) else picture
