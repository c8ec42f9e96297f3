"""The views of an image that contrastive pretraining compares: MoCo-v3's augmentations, which are BYOL's.

Sources: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021;
Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020.
"""

import random
from collections.abc import Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from data_sets.crop import TorchvisionCrop
from data_sets.views import View

BLUR = (0.1, 2.0)  # standard deviation in pixels at an input size of 224


class Stacked(View):
    """Several views of each image, one after the other: pixels (V,3,h,w)."""

    def __init__(self, views: Sequence[View]):
        first = views[0]
        super().__init__(first.shape, (), first.mean, first.std, first.loader)
        self.views = views

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        return torch.stack([view.pixels(image) for view in self.views])


class Blur:
    """Gaussian blur of a random width, in proportion to the input size."""

    def __init__(self, input_size: int):
        self.scale = input_size / 224

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.scale * random.uniform(*BLUR)))


def contrastive_views(input_size: int, smallest: float = 0.08, grey: float = 0.2, loader: str = "pil") -> list[View]:
    """Two views by random crop, colour jitter, grey, blur, solarisation and flip. The first is always blurred; the
    second rarely, but sometimes solarised.

    smallest: smallest share of the image in a crop. grey: probability of a view without colour.
    """
    if loader == "gpu":
        raise ValueError("loader gpu only crops and flips: views to compare need the loader pil, tensor or packed")

    def view(blur: float, solarize: float) -> View:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        steps = [
            lambda image: functional.to_pil_image(image) if isinstance(image, Tensor) else image,
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(grey),
            transforms.RandomApply([Blur(input_size)], p=blur),
            transforms.RandomApply([ImageOps.solarize], p=solarize),
            transforms.RandomHorizontalFlip(),
        ]
        return View(TorchvisionCrop(input_size, scale=(smallest, 1.0)), steps, loader=loader)

    return [view(blur=1.0, solarize=0.0), view(blur=0.1, solarize=0.2)]
