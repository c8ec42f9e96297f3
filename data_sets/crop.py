"""Random crops: the crop of MAE's recipe, which draws once, and torchvision's."""

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as v2


class TorchvisionCrop(transforms.RandomResizedCrop):
    """torchvision's RandomResizedCrop, but uint8 tensors stay uint8 when they are resized: twice as fast."""

    def forward(self, img: Image.Image | Tensor) -> Image.Image | Tensor:
        window = self.get_params(img, self.scale, self.ratio)
        return v2.resized_crop(img, *window, self.size, self.interpolation, antialias=True)


class RandomResizedCrop(TorchvisionCrop):
    """torchvision's RandomResizedCrop with a single draw of the window, its sides clamped to the image.

    torchvision draws up to ten times until the window fits, then falls back to a central crop, so long windows are
    rarer there. Draws from torch's global generator: fraction of the area, log aspect ratio, top, left.
    Source: the TensorFlow code of BYOL and SimCLR; MAE's linear probe uses the same.
    """

    @staticmethod
    def get_params(img: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
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
