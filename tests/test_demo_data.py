"""The demo data set: what its images show, and how its folder comes to be."""

import csv
import json

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from data_sets import demo as demo_data
from data_sets.demo import CLASSES, SIZE, generate, render


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "set"
    generate(folder, train=30, val=20, seed=0, workers=1)
    return folder


def test_images_depend_on_seed_split_and_index_alone(demo, tmp_path):
    generate(tmp_path / "again", train=30, val=20, seed=0, workers=2)
    assert contents(tmp_path / "again") == contents(demo)
    image = render(0, "train", 3).pixels
    for other in (render(1, "train", 3), render(0, "val", 3), render(0, "train", 13)):
        assert (other.pixels != image).any()


def test_labels_are_balanced_and_split_in_both_folders_alike(demo):
    for split, each in (("train", 3), ("val", 2)):
        images = ImageFolder(demo / split)
        assert images.classes == list(CLASSES)
        assert np.bincount(images.targets).tolist() == [each] * len(CLASSES)


def test_every_box_holds_its_object_tightly_and_the_objects_fill_a_tenth_of_the_view(monkeypatch):
    def shades(value):  # the same images, their textures replaced by a flat shade
        flat = {name: lambda x, y, sign: np.full_like(x, value) for name in CLASSES}
        monkeypatch.setattr(demo_data, "TEXTURES", flat)
        return [render(0, "train", index) for index in range(60)]

    fractions = []
    for dark, light in zip(shades(-1.0), shades(1.0), strict=True):
        opacity = np.abs(dark.pixels.astype(float) - light.pixels).sum(2)
        opacity /= opacity.max()
        fractions.append(opacity.sum() / 64**2)  # what the test transform shows
        x0, y0, x1, y1 = dark.box
        rows, columns = np.nonzero(opacity > 0.55)
        assert x0 <= columns.min() and columns.max() <= x1 and y0 <= rows.min() and rows.max() <= y1
        assert max(columns.min() - x0, x1 - columns.max(), rows.min() - y0, y1 - rows.max()) <= 1
        assert min(x0, y0) >= 0 and max(x1, y1) < SIZE
    assert 0.08 < np.mean(fractions) < 0.11
    assert min(fractions) > 0.05 and max(fractions) < 0.15


def test_boxes_are_listed_by_image(demo):
    with open(demo / "boxes.csv") as file:
        rows = {row.pop("path"): tuple(map(int, row.values())) for row in csv.DictReader(file)}
    assert len(rows) == 50 and all((demo / path).is_file() for path in rows)
    assert rows[f"val/{CLASSES[3]}/000013.png"] == render(0, "val", 13).box


def test_generating_again_changes_nothing(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    generate(demo, train=30, val=20, seed=0)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_other_settings_other_folders_and_too_few_images_are_refused(demo, tmp_path):
    for settings in ({"train": 40}, {"val": 30}, {"seed": 1}):
        with pytest.raises(ValueError, match="made with other settings"):
            generate(demo, **{"train": 30, "val": 20, "seed": 0, **settings})
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="not a demo data set"):
        generate(tmp_path, train=10, val=10)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    with pytest.raises(ValueError, match="classes needs one"):
        generate(tmp_path / "set", train=30, val=5)


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / "set").mkdir()
    monkeypatch.setattr(json, "dumps", interrupted)  # the last thing to be written
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", train=10, val=10, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and not any((tmp_path / "set").iterdir())
