"""The one-draw random crop of MAE's recipe."""

import math

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's RandomResizedCrop with a single draw of the window, its sides clamped to the image.

    torchvision instead draws up to ten times until the window fits and then falls back to a central crop, so that long
    windows are rarer. Draws (global torch generator): area share, log aspect ratio, top, left.
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
