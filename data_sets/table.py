"""DATASETS: data sets by name, read from the files that their authors distribute, with official splits and counts.

Each has two splits: "train", and "val", the one that the paper measures accuracies on, whatever its authors call it.
Labels count from 0. Nothing is unpickled. Source of splits and protocols: paper, B.2.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_sets.demo import CLASSES as DEMO_CLASSES
from data_sets.files import Skipped, class_names, read_class_folders
from data_sets.images import ArrayImages, FileImages, path_of
from data_sets.readers import (
    find_folder,
    listed_images,
    read_bytes,
    read_flags,
    read_json,
    read_lines,
    read_matlab,
    read_rows,
    read_table,
    refuse_duplicates,
    same_length,
    zero_based,
)
from util.choices import instead_of
from util.progress import log

Images = FileImages | ArrayImages
ARCHIVES = {  # address and md5, as torchvision has them; CIFAR in its binary version, because Python's is pickled
    "imagenette": ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
                   "3df6f0d01a2c9592104656642f5e78a3"),
    "oxford_pets/images": ("https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
                           "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
    "oxford_pets/annotations": ("https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz",
                                "95a8c909bbe2e81eed6a22bccdf3f68f"),
    "food101": ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),
    "stl10": ("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}  # fmt: skip


class DatasetEntry(NamedTuple):
    """A data set. `build(root, split, allow_subset)` returns its images; build_dataset checks their counts.

    Images have `.classes` (names), `.targets` (list of n class numbers; (n,K) uint8 of zeros and ones if multi_label)
    and items (PIL image in RGB, label).
    """

    build: Callable[[Path, str, bool], Images]
    description: str
    classes: int | None = None  # None: any number
    images: dict[str, int] | None = None  # the official count of each split
    source: str = ""  # where to get it, with an address; required with `images`
    protocol: str = ""  # of the paper's probes: P-LP (LARS, batch 16,384), P-SGD (batch 1,024) or none
    multi_label: bool = False
    downloads: bool = False  # if it is missing


# ---- folders of classes


def _image_folder(root: Path, split: str, allow_subset: bool = False) -> FileImages:
    if not (root / split).is_dir():
        raise ValueError(f"no {split!r} folder in it (expected train/<class>/ and val/<class>/)")
    return read_class_folders(root / split)


def _imagenet1k(root: Path, split: str, allow_subset: bool) -> FileImages:
    """Folders of classes, or for val the flat folder of the official archive beside Kaggle's or the devkit's labels."""
    if split == "val" and next((root / split).glob("ILSVRC2012_val_*"), None) is not None:
        solution, devkit = root / "LOC_val_solution.csv", root / "ILSVRC2012_devkit_t12" / "data"
        labels = _kaggle_labels(solution) if solution.exists() else _devkit_labels(devkit)
        classes = sorted(set(labels.values()))
        numbers = {wnid: number for number, wnid in enumerate(classes)}
        source = solution if solution.exists() else devkit
        paths = [root / split / f"{name}.JPEG" for name in sorted(labels)]
        images = listed_images(paths, [numbers[labels[name]] for name in sorted(labels)], classes, source, allow_subset)
    else:
        images = _image_folder(root, split)
    _check_wnid_names(images.classes, root / split)
    return images


def _check_wnid_names(classes: Sequence[str], folder: Path) -> None:
    if odd := [name for name in classes if not re.fullmatch(r"n\d{8}", name)]:
        problem = f"{len(odd):,} of {len(classes):,} classes are not named by their WordNet id, like n01440764, but"
        raise ValueError(
            f"{folder}: {problem} {odd[0]!r}: rename the folders, because ImageNet's labels follow the ids"
        )


def check_wnids(classes: Sequence[str]) -> None:
    """ValueError unless the classes are ImageNet-1k's WordNet ids in their order, which published classifiers number.

    Source: timm's list of them.
    """
    from timm.data import ImageNetInfo

    official = ImageNetInfo("imagenet1k").label_names()
    if len(classes) != len(official):
        raise ValueError(f"the data set has {len(classes):,} classes, ImageNet-1k has {len(official):,}")
    for name, wnid in zip(classes, official, strict=True):
        if name != wnid:
            raise ValueError(f"class {name!r} is not the WordNet id {wnid}: name the class folders by ImageNet's ids")


def _kaggle_labels(path: Path) -> dict[str, str]:
    """{image: wnid} of lines like ILSVRC2012_val_00048981,n03995372 85 1 499 272"""
    header, *rows = (line.split(",") for line in read_lines(path))
    if header != ["ImageId", "PredictionString"] or any(len(row) != 2 or not row[1].startswith("n") for row in rows):
        raise ValueError(
            f"{path} is not Kaggle's LOC_val_solution.csv: line 1 is not ImageId,PredictionString, or another "
            "not of the form IMAGE,WNID ..."
        )
    refuse_duplicates([name for name, _ in rows], "image", path)
    return {name: prediction.split()[0] for name, prediction in rows}


def _devkit_labels(folder: Path) -> dict[str, str]:
    """{image: wnid}; the devkit numbers the classes in an order of its own."""
    if not folder.is_dir():
        root = folder.parent.parent
        raise ValueError(
            f"{root / 'val'} is flat, and its labels are not beside it: put LOC_val_solution.csv or "
            f"ILSVRC2012_devkit_t12 into {root}, or the images into val/<wnid>/"
        )
    path, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
    synsets = read_matlab(meta, "synsets", "ILSVRC2012_ID", "WNID", "num_children")
    leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
    refuse_duplicates([int(synset["ILSVRC2012_ID"]) for synset in leaves], "ILSVRC2012_ID", meta)
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    refuse_duplicates(list(wnids.values()), "WNID", meta)
    numbers = [number + 1 for number in zero_based((row[0] for row in read_rows(path, int)), len(wnids), path)]
    return {f"ILSVRC2012_val_{image:08d}": wnids[number] for image, number in enumerate(numbers, 1)}


def _imagenet1pct(root: Path, split: str, allow_subset: bool) -> FileImages:
    """1percent.txt has a line n02058221_3181.JPEG for each training image."""
    if split == "val":
        return _imagenet1k(root, split, allow_subset)
    source, train = root / "1percent.txt", root / "train"
    if not train.is_dir():
        raise ValueError("no 'train' folder in it" if root.is_dir() else "there is no such folder")
    names = read_lines(source)
    skipped = Skipped()
    classes = class_names(train, skipped)
    skipped.log(train)
    _check_wnid_names(classes, train)
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    wnids = [name.split("_")[0] for name in names]
    if unknown := sorted(set(wnids) - numbers.keys()):
        raise ValueError(f"{source}: {len(unknown):,} of its classes have no folder in {train}, such as {unknown[0]}")
    paths = [train / wnid / name for wnid, name in zip(wnids, names, strict=True)]
    return listed_images(paths, [numbers[wnid] for wnid in wnids], classes, source, allow_subset)


IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip


def _imagenette(root: Path, split: str, allow_subset: bool) -> FileImages:
    images = _image_folder(find_folder(root, "imagenette2-320", "train", *ARCHIVES["imagenette"]), split)
    if images.classes != list(IMAGENETTE):
        raise ValueError(f"{root} holds other classes than Imagenette's: {', '.join(images.classes[:3])}, ...")
    images.classes = list(IMAGENETTE.values())
    return images


def _demo(every: int, root: Path, split: str, allow_subset: bool) -> FileImages:
    """The procedural images of data_sets/demo.py; of each class for training, every tenth image or so."""
    images = _image_folder(root, split)
    if images.classes != list(DEMO_CLASSES):
        raise ValueError(f"{root / split} does not hold the {len(DEMO_CLASSES)} classes of the demo")
    if every == 1 or split == "val":
        return images
    chosen = []
    for label in range(len(DEMO_CLASSES)):
        chosen += [sample for sample in images.samples if sample[1] == label][::every]
    paths, targets = zip(*chosen, strict=True)
    return FileImages(paths, list(targets), images.classes)


# ---- lists of files


def _cub200(root: Path, split: str, allow_subset: bool) -> FileImages:
    folder = find_folder(root, "CUB_200_2011", "images.txt")
    names = read_table(folder / "images.txt", str)
    labels, splits = (read_table(folder / f"{name}.txt", int) for name in ("image_class_labels", "train_test_split"))
    for name, column in (("image_class_labels", labels), ("train_test_split", splits)):
        same_length(names, folder / "images.txt", column, folder / f"{name}.txt")
        if names.keys() != column.keys():
            raise ValueError(f"{folder}/{name}.txt and images.txt number the images differently")
    zero_based(splits.values(), 2, folder / "train_test_split.txt", first=0)
    classes = [name for _, name in sorted(read_table(folder / "classes.txt", str).items())]
    chosen = [image for image in sorted(names) if splits[image] == (split == "train")]
    targets = zero_based((labels[image] for image in chosen), len(classes), folder / "image_class_labels.txt")
    paths = [folder / "images" / names[image] for image in chosen]
    return listed_images(paths, targets, classes, folder / "images.txt", allow_subset)


def _stanford_cars(root: Path, split: str, allow_subset: bool) -> FileImages:
    folder = find_folder(root, "stanford_cars", "devkit/cars_meta.mat")
    source = folder / "devkit/cars_train_annos.mat"
    if split == "val":  # published later than the devkit, whose own annotations of the test images have no classes
        source = folder / "cars_test_annos_withlabels.mat"
        source = source if source.exists() else folder / "devkit" / source.name
    classes = [str(name) for name in read_matlab(folder / "devkit/cars_meta.mat", "class_names")]
    annotations = read_matlab(source, "annotations", "class", "fname")
    images = folder / ("cars_train" if split == "train" else "cars_test")
    paths = [images / str(name) for name in annotations["fname"]]
    targets = zero_based(annotations["class"], len(classes), source)
    return listed_images(paths, targets, classes, source, allow_subset)


def _oxford_pets(root: Path, split: str, allow_subset: bool) -> FileImages:
    name = "oxford-iiit-pet"
    for part in ("images", "annotations"):
        folder = find_folder(root, name, part, *ARCHIVES[f"oxford_pets/{part}"], into=root / name)
    source = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    rows = read_rows(source, str, int, int, int)  # image, class, species, breed
    breeds = [name.rsplit("_", 1)[0].replace("_", " ").title() for name, *_ in rows]
    names = dict(sorted({(label, breed) for (_, label, *_), breed in zip(rows, breeds, strict=True)}))
    classes = list(names.values())
    targets = zero_based((row[1] for row in rows), len(classes), source)
    if odd := [row for row, breed in zip(rows, breeds, strict=True) if names[row[1]] != breed]:
        raise ValueError(f"{source}: class {odd[0][1]} is {names[odd[0][1]]}, but also that of image {odd[0][0]}")
    paths = [folder / "images" / f"{row[0]}.jpg" for row in rows]
    return listed_images(paths, targets, classes, source, allow_subset)


def _food101(root: Path, split: str, allow_subset: bool) -> FileImages:
    folder = find_folder(root, "food-101", "meta", *ARCHIVES["food101"])
    source = folder / "meta" / ("train.json" if split == "train" else "test.json")
    content = read_json(source)
    if not (isinstance(content, dict) and all(isinstance(names, list) for names in content.values())):
        raise ValueError(f"{source} does not map classes to lists of images")
    classes = sorted(content)
    pairs = [(f"{name}.jpg", classes.index(label)) for label, names in content.items() for name in names]
    if odd := [name for name, label in pairs if name.split("/")[0] != classes[label]]:
        raise ValueError(f"{source}: image {odd[0]} is listed for another class than that of its folder")
    paths = [folder / "images" / name for name, _ in pairs]
    return listed_images(paths, [label for _, label in pairs], classes, source, allow_subset)


# ---- several labels an image


def _coco(year: int, root: Path, split: str, allow_subset: bool) -> FileImages:
    """Labels: the categories with at least one box, crowds included, in the order of their ids. Images in the order of
    theirs, those without a box included."""
    folder = find_folder(root, "coco", "annotations")
    source, name = folder / "annotations" / f"instances_{split}{year}.json", f"{split}{year}"
    content = read_json(source)
    try:
        categories = sorted((category["id"], str(category["name"])) for category in content["categories"])
        images = sorted((image["id"], folder / name / image["file_name"]) for image in content["images"])
        boxes = [(box["image_id"], box["category_id"]) for box in content["annotations"]]
        for key in ("categories", "images", "annotations"):
            refuse_duplicates([entry["id"] for entry in content[key] if "id" in entry], f"{key}: id", source)
        rows = {image: row for row, (image, _) in enumerate(images)}
        columns = {category: column for column, (category, _) in enumerate(categories)}
        hash(tuple(boxes))  # TypeError for lists and the like
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is not a file of COCO's boxes: {error}") from error
    if not boxes:
        raise ValueError(f"{source} holds no boxes, hence no labels")
    targets = np.zeros((len(images), len(categories)), np.uint8)
    for number, (image, category) in enumerate(boxes, 1):
        if image not in rows or category not in columns:
            raise ValueError(f"{source}: box {number} is of image {image} and category {category}, one of them unknown")
        targets[rows[image], columns[category]] = 1
    paths = [path for _, path in images]
    return listed_images(paths, targets, [name for _, name in categories], source, allow_subset)


def _nus_wide(drop_unlabelled: bool, root: Path, split: str, allow_subset: bool) -> FileImages:
    """ImageList.zip, ConceptsList.zip, Groundtruth.zip unpacked, and the images in Flickr/, as the lists name them."""
    folder = find_folder(root, "NUS-WIDE", "ImageList")
    part = "Train" if split == "train" else "Test"
    source, concepts = folder / "ImageList" / f"{part}Imagelist.txt", folder / "ConceptsList" / "Concepts81.txt"
    classes = read_lines(concepts if concepts.exists() else folder / concepts.name)
    names = [line.replace("\\", "/") for line in read_lines(source)]  # the lists were written on Windows
    columns = []
    for concept in classes:
        path = folder / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{part}.txt"
        columns.append(read_flags(path))
        same_length(names, source, columns[-1], path)
    targets = np.stack(columns, axis=1)
    if drop_unlabelled:
        keep = targets.any(axis=1)
        names, targets = [name for name, kept in zip(names, keep, strict=True) if kept], targets[keep]
    paths = [folder / "Flickr" / name for name in names]
    return listed_images(paths, targets, classes, source, allow_subset)


# ---- arrays


def _cifar10(root: Path, split: str, allow_subset: bool) -> ArrayImages:
    """Records of a label and 3 x 32 x 32 pixels."""
    folder = find_folder(root, "cifar-10-batches-bin", "batches.meta.txt", *ARCHIVES["cifar10"])
    parts = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    return _cifar(folder, parts, read_lines(folder / "batches.meta.txt"), labels=1)


def _cifar100(root: Path, split: str, allow_subset: bool) -> ArrayImages:
    """As CIFAR-10, with two labels: of the 20 coarse classes, unused here, then of the 100 fine ones."""
    folder = find_folder(root, "cifar-100-binary", "fine_label_names.txt", *ARCHIVES["cifar100"])
    parts = ["train.bin" if split == "train" else "test.bin"]
    return _cifar(folder, parts, read_lines(folder / "fine_label_names.txt"), labels=2)


def _cifar(folder: Path, parts: list[str], classes: list[str], labels: int) -> ArrayImages:
    pixels, targets = [], []
    for path in (folder / part for part in parts):
        records = read_bytes(path, labels + 3 * 32 * 32)
        targets += zero_based(records[:, labels - 1], len(classes), path, first=0)
        pixels.append(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ArrayImages(np.concatenate(pixels), targets, classes)


def _stl10(root: Path, split: str, allow_subset: bool) -> ArrayImages:
    """Pixels of an image: 3 x width x height, columns first."""
    folder = find_folder(root, "stl10_binary", "class_names.txt", *ARCHIVES["stl10"])
    part = "train" if split == "train" else "test"
    classes = read_lines(folder / "class_names.txt")
    source, images = folder / f"{part}_y.bin", folder / f"{part}_X.bin"
    targets = zero_based(read_bytes(source, 1)[:, 0], len(classes), source)
    pixels = read_bytes(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    same_length(pixels, images, targets, source)
    return ArrayImages(pixels, targets, classes)


# ---- the table

IMAGENET_SOURCE = (
    "https://image-net.org (train/<wnid>/ and val/<wnid>/; or val/ILSVRC2012_val_*.JPEG beside LOC_val_solution.csv of "
    "https://www.kaggle.com/c/imagenet-object-localization-challenge, or beside ILSVRC2012_devkit_t12)"
)
DEMO_SOURCE = "python scripts/make_demo_data.py FOLDER"
SIMCLR_LIST = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/1percent.txt"
COCO_SOURCE = "https://cocodataset.org/#download (train{0}/, val{0}/ and annotations/instances_*{0}.json)"
NUS_SOURCE = (
    "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html "
    "(ImageList/, ConceptsList/, Groundtruth/TrainTestLabels/, and the images in Flickr/)"
)

DATASETS = {
    "image_folder": DatasetEntry(_image_folder, "any folder: train/<class>/* and val/<class>/*"),
    "imagenet1k": DatasetEntry(
        _imagenet1k, "ImageNet-1k, ILSVRC 2012", 1000, {"train": 1_281_167, "val": 50_000}, IMAGENET_SOURCE, "P-LP"),
    "imagenet1pct": DatasetEntry(
        _imagenet1pct, "1 % of ImageNet-1k, SimCLR's list", 1000, {"train": 12_811, "val": 50_000},
        f"{SIMCLR_LIST} (beside train/ and val/ of ImageNet-1k)", "P-SGD"),
    "imagenette": DatasetEntry(
        _imagenette, "ten ImageNet classes, 320 px; downloaded if absent", 10, {"train": 9469, "val": 3925},
        "https://github.com/fastai/imagenette", downloads=True),
    "food101": DatasetEntry(
        _food101, "Food-101; downloaded if absent", 101, {"train": 75_750, "val": 25_250},
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101", "P-LP", downloads=True),
    "nus_wide": DatasetEntry(
        functools.partial(_nus_wide, False), "NUS-WIDE, 81 concepts, official lists", 81,
        {"train": 161_789, "val": 107_859}, NUS_SOURCE, "P-LP", multi_label=True),
    "nus_wide_labelled": DatasetEntry(
        functools.partial(_nus_wide, True), "NUS-WIDE without the images that have no concept", 81,
        {"train": 125_449, "val": 83_898}, NUS_SOURCE, multi_label=True),
    "coco": DatasetEntry(
        functools.partial(_coco, 2017), "COCO 2017, categories with a box", 80, {"train": 118_287, "val": 5_000},
        COCO_SOURCE.format(2017), "P-LP", multi_label=True),
    "coco2014": DatasetEntry(
        functools.partial(_coco, 2014), "COCO 2014, categories with a box", 80, {"train": 82_783, "val": 40_504},
        COCO_SOURCE.format(2014), multi_label=True),
    "cub200": DatasetEntry(
        _cub200, "CUB-200-2011, whole images", 200, {"train": 5_994, "val": 5_794},
        "https://www.vision.caltech.edu/datasets/cub_200_2011 (CUB_200_2011/)", "P-SGD"),
    "stanford_cars": DatasetEntry(
        _stanford_cars, "Stanford Cars", 196, {"train": 8_144, "val": 8_041},
        "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars (stanford_cars/: cars_train/, "
        "cars_test/, devkit/, cars_test_annos_withlabels.mat; the authors' own page is gone)", "P-SGD"),
    "oxford_pets": DatasetEntry(
        _oxford_pets, "Oxford-IIIT Pets; downloaded if absent", 37, {"train": 3_680, "val": 3_669},
        "https://www.robots.ox.ac.uk/~vgg/data/pets", "P-SGD", downloads=True),
    "stl10": DatasetEntry(
        _stl10, "STL-10; downloaded if absent", 10, {"train": 5_000, "val": 8_000},
        "https://cs.stanford.edu/~acoates/stl10", downloads=True),
    "cifar10": DatasetEntry(
        _cifar10, "CIFAR-10, binary version; downloaded if absent", 10, {"train": 50_000, "val": 10_000},
        "https://www.cs.toronto.edu/~kriz/cifar.html", downloads=True),
    "cifar100": DatasetEntry(
        _cifar100, "CIFAR-100, binary version; downloaded if absent", 100, {"train": 50_000, "val": 10_000},
        "https://www.cs.toronto.edu/~kriz/cifar.html", downloads=True),
    "demo": DatasetEntry(
        functools.partial(_demo, 1), "the procedural demo, any number of images", 10, None, DEMO_SOURCE),
    "demo_few": DatasetEntry(
        functools.partial(_demo, 10), "the same, with a tenth of its training images", 10, None, DEMO_SOURCE),
}  # fmt: skip


def build_dataset(name: str, root: Path, split: str, allow_subset: bool = False) -> Images:
    """Images without transform, by the name of an entry of DATASETS; split: "train" or "val".

    ValueError says what is missing and where to get it. allow_subset: accept and log fewer or more images than the
    official number, and leave out listed images that are missing. The number of classes must be the official one.
    """
    entry, root = DATASETS[check_dataset(name, root)], Path(root)
    try:
        images = entry.build(root, split, allow_subset)
        refuse_duplicates(images.classes, "class", root)
        _check_counts(entry, images, split, allow_subset)
    except (ValueError, OSError) as error:  # OSError: a folder without permission to read it
        raise ValueError(_with_source(name, root, error)) from error
    return images


def check_dataset(name: str, root: Path | None) -> str:
    """The name; ValueError if it is unknown, or if a data set that cannot be downloaded has no folder.

    root: None if this machine does not see it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {instead_of(name, DATASETS)}")
    if not (root is None or DATASETS[name].downloads or Path(root).is_dir()):
        problem = "this is a file, not a folder" if Path(root).is_file() else "there is no such folder"
        raise ValueError(_with_source(name, root, problem))
    return name


def _with_source(name: str, root: Path, problem: object) -> str:
    """A problem with the files of a data set, and where to get them."""
    source = f"; it comes from {DATASETS[name].source}" if DATASETS[name].source else ""
    flags = f"--data_path {root}" if name == "image_folder" else f"--dataset {name} --data_path {root}"
    return f"{flags}: {problem}{source}"


def _check_counts(entry: DatasetEntry, images: Images, split: str, allow_subset: bool) -> None:
    """ValueError if the numbers of classes and images are not the official ones."""
    if entry.classes is not None and len(images.classes) != entry.classes:
        raise ValueError(f"the {split} split has {len(images.classes):,} classes instead of {entry.classes:,}")
    if entry.images is None or len(images) == entry.images[split]:
        return
    difference = entry.images[split] - len(images)
    kind = "are missing" if difference > 0 else "too many"
    problem = f"{len(images):,} {split} images instead of {entry.images[split]:,}: {abs(difference):,} {kind}"
    if not allow_subset:
        raise ValueError(f"{problem}, perhaps an extraction was interrupted; --allow_subset takes what there is")
    log.info("%s", problem)


def build_splits(
    name: str, root: Path, nb_classes: int | None, allow_subset: bool = False
) -> tuple[Images, Images, int]:
    """Training images, test images and class count; ValueError if the classes of the splits or `nb_classes` disagree,
    or if a file is in both splits. Test images whose content is also in the training split are counted in the log."""
    train, val = (build_dataset(name, root, split, allow_subset) for split in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        problem = f"in one only: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}" if odd else "in different orders"
        raise ValueError(f"{root}: train has {len(train.classes)} classes and val {len(val.classes)}; {problem}")
    if nb_classes not in (None, len(train.classes)):
        problem = f"--nb_classes {nb_classes}, but {root} has {len(train.classes)} classes"
        raise ValueError(f"{problem}: correct it or leave it out")
    if shared := {path for path, _ in getattr(train, "samples", ())} & {
        path for path, _ in getattr(val, "samples", ())
    }:
        raise ValueError(f"{root}: {len(shared):,} images are in both splits, such as {min(shared)}")
    if train.digests is not None and val.digests is not None:
        known = set(map(bytes, train.digests))
        if copies := [index for index, digest in enumerate(map(bytes, val.digests)) if digest in known]:
            log.info(
                "%d of %d test images are also training images, such as %s",
                len(copies),
                len(val),
                path_of(val, copies[0]),
            )
    return train, val, len(train.classes)
