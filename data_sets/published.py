"""Published data sets, read from the files that their authors distribute, with official splits.

A reader takes the folder of a data set, found by the marker in table.toml, and a split by its authors' name: the one
that the paper measures accuracies on is our "val", whatever its name (paper, B.2). Labels count from 0. Nothing is
unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_sets.demo import CLASSES as DEMO_CLASSES
from data_sets.images import Files, Images, Pixels
from data_sets.readers import (
    images_by_class,
    parse_json,
    parse_matlab,
    read_class_folders,
    read_lines,
    read_records,
    read_rows,
    reading,
    refuse_duplicates,
    zero_based,
)


def imagenette(folder: Path, split: str, names: dict[str, str]) -> Images:
    """names: {WordNet id: name} of the classes."""
    images = read_class_folders(folder / split)
    if images.classes != list(names):
        raise ValueError(f"{folder} holds other classes than Imagenette's: {', '.join(images.classes[:3])}, ...")
    return Images(images.content, images.targets, list(names.values()))


def demo(root: Path, split: str, every: int = 1) -> Images:
    """The procedural images of data_sets/demo.py; of each class for training, every tenth image or so."""
    with reading(root / split):
        images = read_class_folders(root / split)
    if images.classes != list(DEMO_CLASSES):
        raise ValueError(f"{root / split} does not hold the {len(DEMO_CLASSES)} classes of the demo")
    if every == 1 or split == "val":
        return images
    targets = np.array(images.targets)
    return images.part(np.concatenate([np.flatnonzero(targets == k)[::every] for k in range(len(DEMO_CLASSES))]))


# ---- lists of files


def cub200(folder: Path, split: str) -> Images:
    """Labels are the names of the folders in images.txt, numbered in alphabetical order, as in the other lists."""
    names, in_train = dict(read_rows(folder / "images.txt", int, str)), folder / "train_test_split.txt"
    splits = dict(read_rows(in_train, int, int))
    if names.keys() != splits.keys() or not {0, 1} >= set(splits.values()):
        raise ValueError(f"{in_train} does not state 0 or 1 for each image of images.txt")
    chosen = [names[image] for image in sorted(names) if splits[image] == (split == "train")]
    classes = sorted({name.split("/")[0] for name in names.values()})
    content = Files(folder / "images" / name for name in chosen)
    return images_by_class(content, [[name.split("/")[0]] for name in chosen], classes)


def stanford_cars(folder: Path, split: str) -> Images:
    meta, source = folder / "devkit/cars_meta.mat", folder / "devkit/cars_train_annos.mat"
    if split == "test":  # published later than the devkit, whose own annotations of the test images have no classes
        source = folder / "cars_test_annos_withlabels.mat"
        source = source if source.exists() else folder / "devkit" / source.name
    with reading(meta):
        classes = [str(name) for name in parse_matlab(meta.read_bytes(), "class_names")]
    with reading(source):
        annotations = parse_matlab(source.read_bytes(), "annotations")
        names, labels = annotations["fname"], annotations["class"]
    content = Files(folder / f"cars_{split}" / str(name) for name in names)
    return Images(content, zero_based(labels, len(classes), source), classes)


def oxford_pets(folder: Path, split: str) -> Images:
    source = folder / "annotations" / f"{split}.txt"
    rows = read_rows(source, str, int, int, int)  # image, class, species, breed
    pairs = {(label, image.rsplit("_", 1)[0].replace("_", " ").title()) for image, label, *_ in rows}
    refuse_duplicates([label for label, _ in pairs], "class", f"{source}: images of two breeds")
    targets = zero_based((row[1] for row in rows), len(pairs), source)
    content = Files(folder / "images" / f"{row[0]}.jpg" for row in rows)
    return Images(content, targets, [name for _, name in sorted(pairs)])


def food101(folder: Path, split: str) -> Images:
    source = folder / "meta" / f"{split}.json"
    with reading(source):
        names = [name for names in parse_json(source.read_bytes()).values() for name in names]
        content = Files(folder / "images" / f"{name}.jpg" for name in names)
        return images_by_class(content, [[name.split("/")[0]] for name in names])


# ---- several labels an image


def coco(folder: Path, split: str) -> Images:
    return read_coco(folder / "annotations" / f"instances_{split}.json", [folder / split])


def read_coco(source: Path, folders: Sequence[Path]) -> Images:
    """Labels: the categories with at least one box, crowds included, in the order of their ids. Images in the order of
    theirs, those without a box included, in the first of the folders that has any of them."""
    with reading(source):
        content = parse_json(source.read_bytes())
        for key in ("categories", "images", "annotations"):
            refuse_duplicates([entry["id"] for entry in content[key] if "id" in entry], "id", key)
        categories = sorted((category["id"], str(category["name"])) for category in content["categories"])
        images = sorted((image["id"], str(image["file_name"])) for image in content["images"])
        rows = {image: row for row, (image, _) in enumerate(images)}
        columns = {category: column for column, (category, _) in enumerate(categories)}
        targets = np.zeros((len(images), len(categories)), np.uint8)
        for number, box in enumerate(content["annotations"], 1):
            image, category = box["image_id"], box["category_id"]
            if image not in rows or category not in columns:
                raise ValueError(f"box {number} is of image {image} and category {category}, one of them unknown")
            targets[rows[image], columns[category]] = 1
        if not targets.any():
            raise ValueError("it holds no boxes, hence no labels")
    folder = next((folder for folder in folders if any((folder / name).exists() for _, name in images)), folders[0])
    return Images(Files(folder / name for _, name in images), targets, [name for _, name in categories])


def nus_wide(folder: Path, split: str, drop_unlabelled: bool = False) -> Images:
    """ImageList.zip, ConceptsList.zip, Groundtruth.zip unpacked, and the images in Flickr/, as the lists name them."""
    concepts = folder / "ConceptsList" / "Concepts81.txt"
    classes = read_lines(concepts if concepts.exists() else folder / concepts.name)
    source = folder / "ImageList" / f"{split}Imagelist.txt"
    names = read_lines(source)
    targets = np.zeros((len(names), len(classes)), np.uint8)
    for column, concept in enumerate(classes):
        path = folder / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{split}.txt"
        flags = read_lines(path)
        if len(flags) != len(names) or not {"0", "1"} >= set(flags):
            raise ValueError(f"{path} does not state 0 or 1 for each of the {len(names):,} entries of {source}")
        targets[:, column] = np.array(flags) == "1"
    content = Files(folder / "Flickr" / name.replace("\\", "/") for name in names)  # lists were written on Windows
    images = Images(content, targets, classes)
    return images.part(np.flatnonzero(targets.any(axis=1))) if drop_unlabelled else images


# ---- arrays


def cifar(folder: Path, files: str, names: str, labels: int) -> Images:
    """Records of one label (CIFAR-10), or two (CIFAR-100: the coarse class, unused here, and the fine one), and
    3 x 32 x 32 pixels. files: pattern of their names; names: file of the classes."""
    classes, pixels, targets = read_lines(folder / names), [], []
    for path in sorted(folder.glob(files)) or [folder / files]:
        records = read_records(path, labels + 3 * 32 * 32)
        targets += zero_based(records[:, labels - 1], len(classes), path, first=0)
        pixels.append(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(Pixels(np.concatenate(pixels)), targets, classes)


def stl10(folder: Path, split: str) -> Images:
    """Pixels of an image: 3 x width x height, columns first."""
    source, classes = folder / f"{split}_y.bin", read_lines(folder / "class_names.txt")
    targets = zero_based(read_records(source, 1)[:, 0], len(classes), source)
    pixels = read_records(folder / f"{split}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return Images(Pixels(pixels), targets, classes)
