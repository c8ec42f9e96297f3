"""What an encoder sees of an image: the recipe's random crops, the test's central crop, or contrastive views.

torch and torchvision are imported at first use: --help and mistakes in the arguments do not wait for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageFilter, ImageOps

from data_sets.images import Images, Label, decode_tensor, pixels_of
from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

    from data_sets.crop import TorchvisionCrop, Whole

torch, crops, transforms = lazy("torch"), lazy("data_sets.crop"), lazy("torchvision.transforms")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADERS = {
    "pil": "the pixels of the paper's recipe",
    "tensor": "faster, pixels differ by 1/255 here and there",
    "packed": "as tensor, for a folder of scripts/pack_images.py",
    "gpu": "as tensor, but the device resizes",
}
CROP_PCT = 224 / 256  # of the shorter side, the share that the central crop keeps
Numbers = tuple[float, ...]


class Windows(NamedTuple):
    """Images of different sizes, to be resized on a device: all pixels in one tensor, and (B,2) heights and widths."""

    pixels: Tensor
    sizes: Tensor

    def images(self) -> list[Tensor]:
        """B of (3,h,w) uint8."""
        parts = self.pixels.split((3 * self.sizes.prod(1)).tolist())
        return [part.view(3, *size) for part, size in zip(parts, self.sizes.tolist(), strict=True)]


@dataclass(eq=False)
class View:
    """An image -> pixels (3,h,w) uint8, made by loaders; and these -> normalised float32, on the encoder's device.

    Calling it does both. shape: what is cut out of the image and how that is resized; steps: then, functions of PIL
    images and of uint8 tensors. loader: "pil" resizes as the recipe does; "tensor" and "packed" decode to uint8
    tensors, with equal pixels, and resize them with torchvision, which changes some pixels by a level or two of 255;
    "gpu" leaves resizing to the device: `pixels` is then the window to resize, of any size.
    """

    shape: TorchvisionCrop | Whole
    steps: Sequence[Callable] = ()
    mean: Numbers = IMAGENET_MEAN
    std: Numbers = IMAGENET_STD
    loader: str = "pil"
    constants: dict[torch.device, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loader not in LOADERS:
            raise ValueError(f"loader {self.loader!r}: choose one of {', '.join(LOADERS)}")

    def read(self, images: Images, index: int) -> tuple[Image.Image | Tensor, Label]:
        """An image of a data set, decoded for the loader, and its label."""
        if self.loader == "pil" or not isinstance(images, Images):
            return images[index]
        return decode_tensor(images.content.read(index), images.names[index]), images.targets[index]

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        image = self.shape.cut(image if self.loader == "pil" else pixels_of(image))
        for step in [*[self.shape.resize] * (self.loader != "gpu"), *self.steps]:
            image = step(image)
        return pixels_of(image).contiguous()

    def normalise(self, pixels: Tensor | Windows) -> Tensor:
        """(...,3,h,w) uint8, or windows to resize -> float32 on the same device: the bits of torchvision's ToTensor and
        Normalize.

        All constants are tensors, as there: CUDA multiplies by the reciprocal of a Python number, which rounds
        differently.
        """
        if isinstance(pixels, Windows):
            pixels = torch.stack([self.shape.resize(window) for window in pixels.images()])
        if pixels.device not in self.constants:
            columns = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in (self.mean, self.std))
            self.constants[pixels.device] = [torch.tensor(255.0, device=pixels.device), *columns]
        scale, mean, std = self.constants[pixels.device]
        result = torch.empty_like(pixels, dtype=torch.float32)
        in_turn = pixels.device.type == "cpu" and pixels.dim() >= 4  # one image at a time stays in the cache
        for part, target in zip(pixels, result, strict=True) if in_turn else [(pixels, result)]:
            target.copy_(part).div_(scale).sub_(mean).div_(std)
        return result

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = self.pixels(image)
        return self.normalise(self.shape.resize(pixels) if self.loader == "gpu" else pixels)


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
    if crop == "center":
        return eval_transform(input_size, mean, std, loader, interpolation, crop_pct)
    cropper = {"mae": crops.RandomResizedCrop, "torchvision": crops.TorchvisionCrop}[crop]
    shape = cropper(input_size, scale=scale, interpolation=transforms.InterpolationMode(interpolation))
    return View(shape, [transforms.RandomHorizontalFlip()] * hflip, mean, std, loader)


def eval_transform(
    input_size: int,
    mean: Numbers = IMAGENET_MEAN,
    std: Numbers = IMAGENET_STD,
    loader: str = "pil",
    interpolation: str = "bicubic",
    crop_pct: float | None = CROP_PCT,
    steps: Sequence[Callable] = (),
) -> View:
    """Resize the shorter side to input_size / crop_pct, central crop, normalisation.

    interpolation: a name of torchvision's InterpolationMode. crop_pct: None resizes both sides to input_size.
    steps: of View.
    """
    if crop_pct is None:
        return View(crops.Whole(input_size, interpolation), steps, mean, std, loader)
    return View(crops.CentralCrop(input_size, int(input_size / crop_pct), interpolation), steps, mean, std, loader)


# ---- contrastive pretraining


class Stacked(View):
    """Several views of each image, one after the other: pixels (V,3,h,w)."""

    def __init__(self, views: Sequence[View]):
        first = views[0]
        super().__init__(first.shape, (), first.mean, first.std, first.loader)
        self.views = views

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        return torch.stack([view.pixels(image) for view in self.views])


def contrastive_views(input_size: int, smallest: float = 0.08, grey: float = 0.2, loader: str = "pil") -> list[View]:
    """The two views that MoCo-v3 compares, BYOL's: random crop, colour jitter, grey, blur, solarisation and flip. The
    first is always blurred; the second rarely, but sometimes solarised.

    smallest: smallest share of the image in a crop. grey: probability of a view without colour. Sources: Chen, Xie and
    He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021; Grill et al., "Bootstrap Your
    Own Latent", NeurIPS 2020.
    """
    if loader == "gpu":
        raise ValueError("loader gpu only crops and flips: views to compare need the loader pil, tensor or packed")

    def as_picture(image: Image.Image | Tensor) -> Image.Image:
        return transforms.functional.to_pil_image(image) if isinstance(image, torch.Tensor) else image

    def blur(image: Image.Image) -> Image.Image:  # standard deviation 0.1 to 2 pixels at an input size of 224
        return image.filter(ImageFilter.GaussianBlur(input_size / 224 * random.uniform(0.1, 2.0)))

    def view(blurred: float, solarised: float) -> View:
        steps = [
            as_picture,
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(grey),
            transforms.RandomApply([blur], p=blurred),
            transforms.RandomApply([ImageOps.solarize], p=solarised),
            transforms.RandomHorizontalFlip(),
        ]
        return View(crops.TorchvisionCrop(input_size, scale=(smallest, 1.0)), steps, loader=loader)

    return [view(blurred=1.0, solarised=0.0), view(blurred=0.1, solarised=0.2)]
