"""What becomes of images, against torchvision's own transforms and PIL's own decoder."""

import io
import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

from data_sets.crop import CentralCrop, RandomResizedCrop
from data_sets.images import decode_tensor, pixels_of, read_image
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.table import build_dataset
from data_sets.views import LOADERS, View, eval_transform, train_transform
from util.seeding import seeded

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
BICUBIC = transforms.InterpolationMode.BICUBIC
NORMALISE = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
FLIP = transforms.RandomHorizontalFlip()
RECIPES = {
    "train": (train_transform, {}, [RandomResizedCrop(32, interpolation=BICUBIC), FLIP]),
    "torchvision's crop": (
        train_transform,
        {"crop": "torchvision", "scale": (0.2, 1.0), "hflip": False},
        [transforms.RandomResizedCrop(32, scale=(0.2, 1.0), interpolation=BICUBIC)],
    ),
    "test": (eval_transform, {}, [transforms.Resize(36, interpolation=BICUBIC), transforms.CenterCrop(32)]),
    "all of the shorter side": (
        eval_transform,
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        [transforms.Resize(32), transforms.CenterCrop(32)],
    ),
    "both sides resized": (eval_transform, {"crop_pct": None}, [transforms.Resize((32, 32), interpolation=BICUBIC)]),
    "whole": (eval_transform, {"crop_pct": None, "interpolation": "bilinear"}, [transforms.Resize((32, 32))]),
}


def photo(width=90, height=70, mode="RGB", seed=0):
    """Smooth shapes and edges; noise would be lost in JPEG."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image, **options):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90, **options)
    return content.getvalue()


@pytest.mark.parametrize(("make", "options", "steps"), RECIPES.values(), ids=RECIPES)
def test_pixels_are_those_of_torchvisions_transforms_to_the_bit(make, options, steps):
    plain = transforms.Compose([*steps, *NORMALISE])
    view = make(32, mean=MEAN, std=STD, **options)
    for number, size in enumerate([(90, 70), (40, 33), (31, 120), (32, 32)]):
        image = photo(*size, seed=number)
        with seeded("view", number):
            expected = plain(image)
        with seeded("view", number):
            assert view(image).equal(expected)


@pytest.mark.parametrize("name", ["train", "test", "whole"])
def test_tensors_show_the_same_window_with_nearly_the_same_pixels(name):
    make, options, _ = RECIPES[name]
    exact, close = (make(32, mean=MEAN, std=STD, loader=loader, **options) for loader in ("pil", "tensor"))
    for number in range(20):
        image = photo(90, 70, seed=number)
        with seeded("view", number):
            expected = exact.pixels(image).int()
        with seeded("view", number):
            difference = (close.pixels(image).int() - expected).abs()
        assert difference.max() <= 12  # of 255, where a bicubic kernel shoots over an edge
        assert difference.float().mean() < 0.2


@pytest.fixture
def files(tmp_path):
    """{name: path} of files in every way that they come."""
    content = {
        "colour.jpg": jpeg(photo()),
        "progressive.jpg": jpeg(photo(), progressive=True),
        "444.jpg": jpeg(photo(), subsampling=0),
        "grey.jpg": jpeg(photo(mode="L")),
        "cmyk.jpg": jpeg(photo(mode="CMYK")),
        "turned.jpg": jpeg(photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    }
    for mode in ("RGB", "RGBA", "L", "P", "1"):
        target = io.BytesIO()
        photo(mode=mode).save(target, "PNG")
        content[f"{mode}.png"] = target.getvalue()
    content["a png.jpg"] = content["RGB.png"]
    for name, found in content.items():
        (tmp_path / name).write_bytes(found)
    return {name: tmp_path / name for name in content}


def test_tensors_of_files_are_the_pixels_that_pil_reads(files):
    for path in files.values():
        found, expected = decode_tensor(path.read_bytes(), "image"), pixels_of(read_image(path))
        assert found.dtype == torch.uint8
        assert found.equal(expected), path.name


def test_damaged_jpegs_are_damaged_for_either_decoder(files, tmp_path):
    """What both accept has the same pixels: libjpeg repairs the stream in the same way."""
    whole, random, refused = files["colour.jpg"].read_bytes(), np.random.default_rng(0), 0
    for number in range(60):
        content = bytearray(whole)
        if number % 2:
            content = content[: random.integers(2, len(whole))]
        else:
            content[random.integers(2, len(whole))] ^= 1 << random.integers(8)
        path = tmp_path / "damaged.jpg"
        path.write_bytes(content)
        try:
            expected = pixels_of(read_image(path))
        except Exception:  # PIL raises what it likes
            refused += 1
            with pytest.raises(Exception):  # noqa: B017
                decode_tensor(path.read_bytes(), "image")
        else:
            assert decode_tensor(path.read_bytes(), "image").equal(expected)
    assert refused > 10


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_carry_bytes_and_give_what_the_transform_gives(tmp_path, monkeypatch, loader, workers):
    for name in "abc":
        (tmp_path / "val" / name).mkdir(parents=True)
        photo(seed=ord(name)).save(tmp_path / "val" / name / "0.jpg", quality=90)
    images = build_dataset("image_folder", tmp_path, "val")
    dataset = KeyedDataset(images, eval_transform(32, MEAN, STD, loader), 0)
    expected = torch.stack([dataset[0, index].image for index in range(3)])
    carried, normalise = [], View.normalise

    def watched(view, pixels):
        carried.append(getattr(pixels, "pixels", pixels).dtype)
        return normalise(view, pixels)

    monkeypatch.setattr(View, "normalise", watched)
    (batch,) = build_loader(dataset, EvaluationBatches(3, 3), workers)
    assert batch.image.equal(expected)
    assert carried == [torch.uint8]
    assert dataset[0, 0].image.dtype == torch.float32  # a loader leaves the data set as it is
    plain = torchvision_datasets.ImageFolder(
        tmp_path / "val", transforms.Compose([transforms.Resize(36, BICUBIC), transforms.CenterCrop(32), *NORMALISE])
    )
    if loader == "pil":
        assert expected.equal(torch.stack([plain[index][0] for index in range(3)]))


def test_an_unknown_loader_is_refused():
    with pytest.raises(ValueError, match="'dali': choose one of pil, tensor, packed, gpu"):
        eval_transform(32, loader="dali")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 3)])
@pytest.mark.parametrize("loader", ["pil", "tensor"])
def test_only_the_kept_part_of_a_long_image_is_resized(monkeypatch, size, loader):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    view = eval_transform(28, loader=loader)
    found = view.pixels(image).int()
    monkeypatch.setattr(CentralCrop, "PIXELS", 2**40)
    assert (found - eval_transform(28).pixels(image).int()).abs().max() <= 1


def test_image_of_one_pixel_by_many_takes_little_memory():
    assert eval_transform(224).pixels(Image.new("RGB", (1, 20_000), (9, 8, 7))).unique().tolist() == [7, 8, 9]


# ---- the one-draw crop: its clamping and its distribution; test_fidelity.py has the published windows

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
