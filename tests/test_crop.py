"""The one-draw crop: its clamping and its distribution. test_fidelity.py has the published windows."""

import math

import pytest
import scipy.stats
import torch
from PIL import Image

from data_sets.crop import RandomResizedCrop

RATIO = (3 / 4, 4 / 3)


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (1, 1), (3, 1)])
def test_sides_are_clamped_to_the_image_instead_of_drawn_again(size):
    torch.manual_seed(0)
    width, height = size
    for _ in range(100):
        top, left, h, w = RandomResizedCrop.get_params(Image.new("RGB", size), (0.08, 1), RATIO)
        assert 1 <= h <= height and 1 <= w <= width
        assert 0 <= top <= height - h and 0 <= left <= width - w
        # torchvision would fall back to a central crop of the allowed ratio
        if max(size) == 400:
            assert min(h, w) == 20


def test_area_and_log_ratio_are_uniform():
    torch.manual_seed(0)
    image = Image.new("RGB", (2000, 2000))
    windows = [RandomResizedCrop.get_params(image, (0.1, 0.5), RATIO) for _ in range(2000)]  # none is clamped
    areas = [h * w / 2000**2 for _, _, h, w in windows]
    ratios = [math.log(w / h) for _, _, h, w in windows]
    assert scipy.stats.kstest(areas, "uniform", (0.1, 0.4)).pvalue > 0.01
    assert scipy.stats.kstest(ratios, "uniform", (math.log(3 / 4), math.log(16 / 9))).pvalue > 0.01
