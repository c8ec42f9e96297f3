"""Test sets for classifiers of ImageNet-1k, read as distributed, for scripts/evaluate_probe.py.

Classes are named by ImageNet's WordNet ids. A class of ObjectNet may be several of these, which "+" joins.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_sets.files import read_class_folders
from data_sets.images import Files, Images, decode
from data_sets.published import check_wnid_names
from data_sets.readers import parse_json, reading

# {corruption of ImageNet-C: AlexNet's mean error over severities} (Hendrycks and Dietterich, 2019, and their code)
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = 5
BORDER = 2  # pixels of ObjectNet's red frame


class Unframed(Files):
    """Image files without their frame."""

    def read(self, index: int) -> np.ndarray:
        return np.asarray(decode(super().read(index), self.names[index]))[BORDER:-BORDER, BORDER:-BORDER]


def wnids() -> list[str]:
    """ImageNet-1k's classes in the order of their labels."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet1k").label_names())


def robustness(root: Path, split: str, folder: str = "") -> Images:
    """Folders of classes, named by WordNet id or label, in `root` or in a folder of it that the pattern matches."""
    _check_split(split)
    images = read_class_folders(_inside(root, folder), may_be_empty=True)
    if all(name.isdecimal() and int(name) < 1000 for name in images.classes):
        known = wnids()
        images.classes = [known[int(name)] for name in images.classes]
    check_wnid_names(images.classes, root)
    return images


def objectnet(root: Path, split: str) -> Images:
    """Images of the 113 classes that ImageNet has, too."""
    _check_split(split)
    root = _inside(root, "objectnet-1.0")
    images, mappings = read_class_folders(root / "images", may_be_empty=True), root / "mappings"
    with reading(mappings):
        names, lines, overlap = (
            parse_json((mappings / f"{name}.json").read_bytes())
            for name in ("folder_to_objectnet_label", "pytorch_to_imagenet_2012_id", "objectnet_to_imagenet_1k")
        )
        texts = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
        known = wnids()
        wnid_of = {texts[line].strip(): known[int(label)] for label, line in lines.items()}
        classes = {
            label: "+".join(wnid_of[text] for text in overlap[names[folder]].split("; "))
            for label, folder in enumerate(images.classes)
            if names[folder] in overlap
        }
    kept = [(path, label) for path, label in images.samples if label in classes]
    numbers = {label: number for number, label in enumerate(classes)}
    return Images(Unframed(path for path, _ in kept), [numbers[label] for _, label in kept], list(classes.values()))


def corruptions(root: Path) -> dict[str, list[Path]]:
    """{corruption: the folder of each severity} of ImageNet-C, unpacked in `root` or in folders of it.

    ValueError if one is missing.
    """
    folders = {name: next(iter(root.glob(f"*/{name}")), root / name) for name in ALEXNET_ERRORS}
    severities = {name: [folder / str(number + 1) for number in range(SEVERITIES)] for name, folder in folders.items()}
    if missing := [folder for each in severities.values() for folder in each if not folder.is_dir()]:
        raise ValueError(f"{len(missing)} of 15 corruptions x 5 severities are missing, such as {missing[0]}")
    return severities


def _check_split(split: str) -> None:
    if split != "val":
        raise ValueError("this is a test set without training images: name it in scripts/evaluate_probe.py")


def _inside(root: Path, pattern: str) -> Path:
    return next((path for path in sorted(root.glob(pattern)) if path.is_dir()), root) if pattern else root
