"""What is read in folders of classes, and what is not."""

import logging
import os
import shutil

import numpy as np
import pytest
from miniatures import make_imagenet, make_imagenet1pct, refused
from PIL import Image

from data_sets.imagenet import check_wnids
from data_sets.readers import image_suffixes, is_system_file
from data_sets.table import DATASETS, build_dataset, build_splits

SYSTEM_FOLDERS = (
    "__MACOSX", ".ipynb_checkpoints", "@eaDir", ".Trash-1000", "$RECYCLE.BIN", "System Volume Information",
    "lost+found", ".git", "#recycle",
)  # fmt: skip
SYSTEM_FILES = (
    ".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini", ".directory", "Icon\r", ".fuse_hidden0001.jpg", ".nfs0001.jpg",
    "0.jpg~", "~$0.jpg", "1.jpg.part", "1.jpg.crdownload", "0.jpg:Zone.Identifier", ".0.jpg",
)  # fmt: skip


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(2):
                save(tmp_path / split / name / f"{number}.jpg", 40 * (label + 2 * number) + (split == "val"))
    return tmp_path


def names(images):
    return ["/".join(path.split("/")[-2:]) for path, _ in images.samples]


PLAIN = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
@pytest.mark.parametrize("where", [".", "cat", "cat/deeper"])
def test_folders_of_systems_are_no_classes_and_hold_no_images(folder, caplog, name, where):
    save(folder / "train" / where / name / "._0.jpg")
    save(folder / "train" / where / name / "SYNOPHOTO_THUMB_M.jpg")
    with caplog.at_level(logging.INFO, "beyond_cls"):
        images = build_dataset("image_folder", folder, "train")
    assert (images.classes, names(images)) == (["cat", "dog"], PLAIN)
    assert f"skipped 1 entries left by systems or programs: {name!r}" in caplog.text


def test_files_of_systems_are_skipped_and_counted(folder, caplog):
    for where in (".", "cat", "dog"):
        for name in SYSTEM_FILES:
            shutil.copy(folder / "train/cat/0.jpg", folder / "train" / where / name)
    with caplog.at_level(logging.INFO, "beyond_cls"):
        images = build_dataset("image_folder", folder, "train")
    assert names(images) == PLAIN
    assert f"skipped {3 * len(SYSTEM_FILES)} entries" in caplog.text and "not read as images" not in caplog.text


@pytest.mark.parametrize("name", ["imagenet1k", "imagenet1pct"])
@pytest.mark.parametrize("flat", [None, "kaggle"])
def test_imagenet_ignores_what_systems_leave(tmp_path, monkeypatch, name, flat):
    train, val = make_imagenet(tmp_path, flat)
    if name == "imagenet1pct":
        shutil.rmtree(tmp_path)
        train, val = make_imagenet1pct(tmp_path)
    for split in ("train", "val"):
        for system in ("__MACOSX", ".ipynb_checkpoints"):
            save(tmp_path / split / system / "._ILSVRC2012_val_00000001.JPEG")
        save(tmp_path / split / "._ILSVRC2012_val_00000001.JPEG")
    entry = DATASETS[name]._replace(classes=3, images={"train": len(train), "val": len(val)})
    monkeypatch.setitem(DATASETS, name, entry)
    assert [len(images) for images in build_splits(name, tmp_path, 3)[:2]] == [len(train), len(val)]


def test_ordinary_names_are_not_those_of_systems():
    for name in ("cat", "n01440764", "0", "cat.jpg", "part.jpg", "my~cat", "icon", "recycle", "@home", "a.b", "thumbs"):
        assert not is_system_file(name)


def test_all_formats_of_pillow_are_read_and_other_files_are_counted(folder, caplog):
    suffixes = (".jfif", ".avif", ".gif", ".webp", ".tif", ".bmp", ".JPG", ".jp2", ".png")
    for number, suffix in enumerate(suffixes):
        save(folder / f"train/cat/more{suffix}", 60 + number)
    for name in ("a.txt", "b.txt", "c.npy", "LICENSE"):
        (folder / "train/dog" / name).touch()
    with caplog.at_level(logging.INFO, "beyond_cls"):
        images = build_dataset("image_folder", folder, "train")
    assert len(images) == 4 + len(suffixes)
    assert [np.asarray(image).shape for image, _ in images] == [(10, 12, 3)] * len(images)
    assert "4 of 17 files are not read as images: 2 .txt, " in caplog.text
    assert "1 .npy" in caplog.text and "1 (no suffix)" in caplog.text
    assert {".jpeg", ".tiff", ".ppm"} < image_suffixes() and not {".pdf", ".h5", ".mpg"} & image_suffixes()


def test_images_beside_class_folders_are_counted(folder, caplog):
    save(folder / "train/lost.jpg")
    with caplog.at_level(logging.INFO, "beyond_cls"):
        assert len(build_dataset("image_folder", folder, "train")) == 4
    assert "1 images beside the class folders are not read" in caplog.text


def test_a_link_that_makes_images_count_twice_is_refused(folder):
    (folder / "train/dog/more").symlink_to(folder / "train/cat")
    refused(r"dog/more is a link to .*train/cat, whose images would count twice", "image_folder", folder, "train")
    (folder / "train/dog/more").unlink()
    (folder / "train/dog/loop").symlink_to(folder / "train")
    refused("would count twice", "image_folder", folder, "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_named(folder):
    (folder / "train/cat/closed").mkdir(mode=0)
    refused("closed", "image_folder", folder, "train")


# ---- labels


def numbered(root, count=12):
    for split in ("train", "val"):
        for number in range(count):
            save(root / split / str(number) / "0.png", 20 * number + (split == "val"))


def test_class_folders_that_are_numbers_are_sorted_by_value(tmp_path, caplog):
    numbered(tmp_path)
    with caplog.at_level(logging.INFO, "beyond_cls"):
        images = build_dataset("image_folder", tmp_path, "train")
    assert images.classes == list(map(str, range(12)))
    assert [image.getpixel((0, 0))[0] // 20 for image, _ in images] == images.targets == list(range(12))
    assert "sorted by value, not alphabetically: label 2 is 2, not 10" in caplog.text


def test_mixed_class_folders_are_sorted_alphabetically(tmp_path, caplog):
    for name in ("10", "9", "a"):
        save(tmp_path / "train" / name / "0.png")
    with caplog.at_level(logging.INFO, "beyond_cls"):
        assert build_dataset("image_folder", tmp_path, "train").classes == ["10", "9", "a"]
    assert "by value" not in caplog.text


@pytest.mark.parametrize("name", ["imagenet1k", "imagenet1pct"])
def test_imagenet_refuses_classes_that_are_not_wnids(tmp_path, name):
    numbered(tmp_path)
    (tmp_path / "1percent.txt").write_text("0_0.JPEG\n")
    for split in ("train", "val"):
        refused(r"12 of 12 classes are not named by their WordNet id, .* but '0'", name, tmp_path, split)


def test_classes_of_a_published_classifier_are_imagenets_wnids_in_order():
    from timm.data import ImageNetInfo

    official = ImageNetInfo("imagenet1k").label_names()
    check_wnids(official)
    for classes, message in (
        (list(map(str, range(1000))), "class '0' is not the WordNet id n01440764"),
        ([*official[1:], official[0]], f"class '{official[1]}' is not the WordNet id n01440764"),
        (official[:10], "the data set has 10 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            check_wnids(classes)


# ---- the same image in both splits


def test_test_images_among_the_training_images_are_counted(folder, caplog):
    shutil.copy(folder / "train/cat/0.jpg", folder / "val/dog/another_name.jpg")
    with caplog.at_level(logging.INFO, "beyond_cls"):
        build_splits("image_folder", folder, 2)
    assert "1 of 5 test images are also training images, such as " in caplog.text
    assert "dog/another_name.jpg" in caplog.text
