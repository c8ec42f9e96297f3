"""The one-draw crop: its draws, its clamping, its distribution."""

import math

import pytest
import scipy.stats
import torch
from PIL import Image

from util.crop import RandomResizedCrop

RATIO = (3 / 4, 4 / 3)


def test_window_comes_from_one_draw_of_area_ratio_top_and_left():
    image = Image.new("RGB", (500, 300))
    for seed in range(50):
        torch.manual_seed(seed)
        area = 300 * 500 * torch.empty(1).uniform_(0.08, 1).item()
        log_ratio = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item()
        width = min(round(math.sqrt(area * math.exp(log_ratio))), 500)
        height = min(round(math.sqrt(area / math.exp(log_ratio))), 300)
        top, left = torch.randint(0, 301 - height, (1,)).item(), torch.randint(0, 501 - width, (1,)).item()
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert RandomResizedCrop.get_params(image, (0.08, 1), RATIO) == (top, left, height, width)
        assert torch.get_rng_state().equal(after)


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


def test_crop_resizes_its_window_bicubically():
    torch.manual_seed(0)
    image = Image.effect_noise((60, 50), 80).convert("RGB")
    crop = RandomResizedCrop(32, interpolation=Image.Resampling.BICUBIC)
    torch.manual_seed(1)
    top, left, h, w = crop.get_params(image, (0.08, 1), RATIO)
    torch.manual_seed(1)
    expected = image.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
    assert crop(image).tobytes() == expected.tobytes()
