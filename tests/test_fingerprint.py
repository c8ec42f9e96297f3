"""The fingerprint of a data set: what it is made of, and what it is not."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_sets import images as images_module
from data_sets.images import Images, Pixels, UnreadableImage, fingerprint
from data_sets.table import build_dataset


@pytest.fixture
def folder(tmp_path):
    """Six uncompressed images of two classes: all files have equal sizes."""
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "data" / "train" / ("cat", "dog")[number // 3] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def of(folder, **options):
    return fingerprint(build_dataset("image_folder", folder, "train"), **options)


def invert(path):
    ImageOps.invert(Image.open(path)).save(path)


def change_order(path):
    path.rename(path.with_name("2.bmp"))


def rename_class(path):
    path.parent.rename(path.parent.with_name("eel"))


CHANGES = {"pixels": invert, "the order": change_order, "a class": rename_class, "the number of images": os.unlink}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprint_changes_with_one_image(folder, change):
    before = of(folder)
    size = (folder / "train/dog/5.bmp").stat().st_size
    change(folder / "train/dog/5.bmp")
    assert of(folder) != before
    assert change is not invert or (folder / "train/dog/5.bmp").stat().st_size == size


def test_fingerprint_is_that_of_any_copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copy)  # not the times
    assert of(tmp_path / "elsewhere" / "copy") == of(folder)
    os.utime(folder / "train/cat/0.bmp", (0, 0))
    (folder / "train/cat/0.bmp").rename(folder / "train/cat/00.bmp")  # in the same order
    assert of(folder, local=True) == of(folder) == of(tmp_path / "elsewhere" / "copy")


def test_large_data_sets_are_known_by_all_sizes_and_a_sample_of_their_content(folder, monkeypatch):
    monkeypatch.setattr(images_module, "WHOLE", 4096)
    monkeypatch.setattr(images_module, "SAMPLE", 3)
    before, before_here = of(folder), of(folder, local=True)
    invert(folder / "train/cat/1.bmp")  # not in the sample
    assert of(folder) == before and of(folder, local=True) != before_here
    with open(folder / "train/cat/1.bmp", "ab") as file:
        file.write(b"\0")
    assert of(folder) != before
    before = of(folder)
    for path in (folder / "train").rglob("*.bmp"):
        invert(path)
    assert of(folder) != before


def test_fingerprint_of_arrays_changes_with_a_pixel():
    def made(value=0, label=1):
        pixels = np.zeros((3, 4, 5, 3), np.uint8)
        pixels[2, 3, 4, 1] = value
        return fingerprint(Images(Pixels(pixels), [0, 1, label], ["cat", "dog"]))

    assert made() == made()
    assert len({made(), made(value=1), made(label=0)}) == 3


def test_a_file_that_is_gone_is_named(folder):
    images = build_dataset("image_folder", folder, "train")
    (folder / "train/dog/4.bmp").unlink()
    with pytest.raises(UnreadableImage, match=r"cannot read image .*dog/4\.bmp: No such file"):
        fingerprint(images)
