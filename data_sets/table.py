"""DATASETS: the data sets by name, read from the files that their authors distribute; official splits, counts checked.

Each has two splits: "train", and "val", which is the split that the paper's accuracies are measured on, whatever its
authors call it. Labels count from 0. Nothing is unpickled. Source of splits and protocols: paper, B.2.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data_sets.demo import CLASSES as DEMO_CLASSES
from data_sets.images import ArrayImages, FileImages, read_rgb
from data_sets.readers import (
    find_folder,
    listed_images,
    read_bytes,
    read_flags,
    read_json,
    read_lines,
    read_matlab,
    read_rows,
    same_length,
    zero_based,
)
from util.choices import instead_of
from util.progress import log


class DatasetEntry(NamedTuple):
    """A data set. `build(root, split, allow_subset)` returns its images, without counting them.

    What it returns has `.classes` (names), `.targets` (list of n class numbers; (n,K) uint8 of zeros and ones where
    multi_label) and items (PIL image in RGB, label).
    """

    build: Callable[[Path, str, bool], Dataset]
    description: str
    classes: int | None = None  # None: whatever there is
    images: dict[str, int] | None = None  # the official count of each split
    source: str = ""  # where to get it, with an address; needed where `images` are counted
    protocol: str = ""  # of the paper's probes: P-LP (LARS, batch 16,384) or P-SGD (batch 1,024); "" where it has none
    multi_label: bool = False
    downloads: bool = False  # it comes by itself where it is not there


def published() -> ModuleType:
    """torchvision's data sets, imported late as in data_sets.views."""
    from torchvision import datasets

    return datasets


# ---------------------------------------------------------------------------------------------------------------------
# folders of classes
# ---------------------------------------------------------------------------------------------------------------------


def _image_folder(root: Path, split: str, allow_subset: bool = False) -> Dataset:
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"no {split!r} folder in it (expected train/<class>/ and val/<class>/)")
    try:
        return published().ImageFolder(folder, loader=read_rgb)
    except FileNotFoundError as error:
        if not any(path.is_dir() for path in folder.iterdir()):
            raise ValueError(f"{folder} holds no folder of a class (expected a folder of images per class)") from error
        raise ValueError(f"{folder} is not an image folder: {error}") from error  # a class without images


def _imagenet1k(root: Path, split: str, allow_subset: bool) -> Dataset:
    """An image folder, or for val the official archive's flat folder beside Kaggle's or the devkit's labels."""
    if split == "val" and next((root / split).glob("ILSVRC2012_val_*"), None) is not None:
        solution, devkit = root / "LOC_val_solution.csv", root / "ILSVRC2012_devkit_t12" / "data"
        labels = _kaggle_labels(solution) if solution.exists() else _devkit_labels(devkit)
        classes = sorted(set(labels.values()))
        numbers = {wnid: number for number, wnid in enumerate(classes)}
        source = solution if solution.exists() else devkit
        paths = [root / split / f"{name}.JPEG" for name in sorted(labels)]
        return listed_images(paths, [numbers[labels[name]] for name in sorted(labels)], classes, source, allow_subset)
    return _image_folder(root, split)


def _kaggle_labels(path: Path) -> dict[str, str]:
    """{image: wnid} of lines like ILSVRC2012_val_00048981,n03995372 85 1 499 272"""
    rows = [line.split(",") for line in read_lines(path)[1:]]
    if any(len(row) != 2 or not row[1].startswith("n") for row in rows):
        raise ValueError(f"{path} is not Kaggle's LOC_val_solution.csv: its lines are not of the form IMAGE,WNID ...")
    return {name: prediction.split()[0] for name, prediction in rows}


def _devkit_labels(folder: Path) -> dict[str, str]:
    """{image: wnid}; the devkit numbers the classes in an order of its own."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder.parent.parent / 'val'} is flat, and its labels are not beside it: put LOC_val_solution.csv or "
            f"ILSVRC2012_devkit_t12 into {folder.parent.parent}, or the images into val/<wnid>/"
        )
    path, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
    synsets = read_matlab(meta, "synsets", "ILSVRC2012_ID", "WNID", "num_children")
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    numbers = [number + 1 for number in zero_based((row[0] for row in read_rows(path, int)), len(wnids), path)]
    return {f"ILSVRC2012_val_{image:08d}": wnids[number] for image, number in enumerate(numbers, 1)}


def _imagenet1pct(root: Path, split: str, allow_subset: bool) -> Dataset:
    """1percent.txt holds a line n02058221_3181.JPEG for each training image."""
    if split == "val":
        return _imagenet1k(root, split, allow_subset)
    source, train = root / "1percent.txt", root / "train"
    if not train.is_dir():
        raise ValueError("no 'train' folder in it" if root.is_dir() else "there is no such folder")
    names = read_lines(source)
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    wnids = [name.split("_")[0] for name in names]
    if strangers := sorted(set(wnids) - numbers.keys()):
        raise ValueError(f"{source}: {len(strangers):,} of its classes are no folders of {train}, like {strangers[0]}")
    if len(set(names)) < len(names):
        raise ValueError(f"{source} names {len(names) - len(set(names)):,} images twice")
    paths = [train / wnid / name for wnid, name in zip(wnids, names, strict=True)]
    return listed_images(paths, [numbers[wnid] for wnid in wnids], classes, source, allow_subset)


def _imagenette(root: Path, split: str, allow_subset: bool) -> Dataset:
    url, md5 = published().Imagenette._ARCHIVES["320px"]
    folder = find_folder(root, "imagenette2-320", "train", url, md5)
    images = _image_folder(folder, split)
    # wnids in their order are how torchvision numbers the classes too
    images.classes = [published().Imagenette._WNID_TO_CLASS.get(wnid, (wnid,))[0] for wnid in images.classes]
    return images


def _demo(every: int, root: Path, split: str, allow_subset: bool) -> Dataset:
    """The procedural images of data_sets/demo.py, known by their classes; of those for training, every tenth or so of
    each class."""
    images = _image_folder(root, split)
    if images.classes != list(DEMO_CLASSES):
        raise ValueError(f"{root / split} holds other classes than the demo's {len(DEMO_CLASSES)}")
    if every == 1 or split == "val":
        return images
    of_class = {label: [path for path, one in images.samples if one == label] for label in range(len(images.classes))}
    chosen = [(path, label) for label, paths in of_class.items() for path in paths[::every]]
    paths, targets = zip(*chosen, strict=True)
    return FileImages(paths, list(targets), images.classes)


# ---------------------------------------------------------------------------------------------------------------------
# lists of files
# ---------------------------------------------------------------------------------------------------------------------


def _cub200(root: Path, split: str, allow_subset: bool) -> Dataset:
    folder = find_folder(root, "CUB_200_2011", "images.txt")
    lists = ("images", "image_class_labels", "train_test_split")
    names, labels, splits = (
        dict(read_rows(folder / f"{name}.txt", int, str if name == "images" else int)) for name in lists
    )
    for name, column in zip(lists[1:], (labels, splits), strict=True):
        same_length(names, folder / "images.txt", column, folder / f"{name}.txt")
        if names.keys() != column.keys():
            raise ValueError(f"{folder}/{name}.txt and {folder}/images.txt number the images differently")
    classes = [name for _, name in sorted(read_rows(folder / "classes.txt", int, str))]
    chosen = [image for image in sorted(names) if splits[image] == (split == "train")]
    targets = zero_based((labels[image] for image in chosen), len(classes), folder / "image_class_labels.txt")
    paths = [folder / "images" / names[image] for image in chosen]
    return listed_images(paths, targets, classes, folder / "images.txt", allow_subset)


def _stanford_cars(root: Path, split: str, allow_subset: bool) -> Dataset:
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


def _oxford_pets(root: Path, split: str, allow_subset: bool) -> Dataset:
    name = "oxford-iiit-pet"
    for part, (url, md5) in zip(("images", "annotations"), published().OxfordIIITPet._RESOURCES, strict=True):
        folder = find_folder(root, name, part, url, md5, into=root / name)
    source = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    rows = read_rows(source, str, int, int, int)  # image, class, species, breed
    names = {label: name.rsplit("_", 1)[0].replace("_", " ").title() for name, label, *_ in rows}
    classes = [names[label] for label in sorted(names)]
    targets = zero_based((row[1] for row in rows), len(classes), source)
    paths = [folder / "images" / f"{row[0]}.jpg" for row in rows]
    return listed_images(paths, targets, classes, source, allow_subset)


def _food101(root: Path, split: str, allow_subset: bool) -> Dataset:
    folder = find_folder(root, "food-101", "meta", published().Food101._URL, published().Food101._MD5)
    source = folder / "meta" / ("train.json" if split == "train" else "test.json")
    content = read_json(source)
    if not (isinstance(content, dict) and all(isinstance(names, list) for names in content.values())):
        raise ValueError(f"{source} does not map classes to lists of images")
    classes = sorted(content)
    paths = [folder / "images" / f"{name}.jpg" for names in content.values() for name in names]
    targets = [number for number, name in ((classes.index(c), c) for c in content) for _ in content[name]]
    return listed_images(paths, targets, classes, source, allow_subset)


# ---------------------------------------------------------------------------------------------------------------------
# several labels an image
# ---------------------------------------------------------------------------------------------------------------------


def _coco(year: int, root: Path, split: str, allow_subset: bool) -> Dataset:
    """Labels: the categories with at least one box, crowds among them; in the order of their ids. Images in the order
    of theirs, those without a box too."""
    folder = find_folder(root, "coco", "annotations")
    source, name = folder / "annotations" / f"instances_{split}{year}.json", f"{split}{year}"
    content = read_json(source)
    try:
        categories = sorted((category["id"], str(category["name"])) for category in content["categories"])
        images = sorted((image["id"], folder / name / image["file_name"]) for image in content["images"])
        boxes = [(box["image_id"], box["category_id"]) for box in content["annotations"]]
        rows = {image: row for row, (image, _) in enumerate(images)}
        columns = {category: column for column, (category, _) in enumerate(categories)}
        hash(tuple(boxes))  # lists and the like are no ids
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is not a file of COCO's boxes: {error}") from error
    targets = np.zeros((len(images), len(categories)), np.uint8)
    for number, (image, category) in enumerate(boxes, 1):
        if image not in rows or category not in columns:
            raise ValueError(f"{source}: box {number} is of image {image} and category {category}, one of them unknown")
        targets[rows[image], columns[category]] = 1
    paths = [path for _, path in images]
    return listed_images(paths, targets, [name for _, name in categories], source, allow_subset)


def _nus_wide(drop_unlabelled: bool, root: Path, split: str, allow_subset: bool) -> Dataset:
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


# ---------------------------------------------------------------------------------------------------------------------
# arrays
# ---------------------------------------------------------------------------------------------------------------------

TORONTO = "https://www.cs.toronto.edu/~kriz"


def _cifar10(root: Path, split: str, allow_subset: bool) -> Dataset:
    """Records of a label and 3 x 32 x 32 pixels. The version in binary: the one in Python is pickles."""
    url, md5 = f"{TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    folder = find_folder(root, "cifar-10-batches-bin", "batches.meta.txt", url, md5)
    parts = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    return _cifar(folder, parts, read_lines(folder / "batches.meta.txt"), labels=1)


def _cifar100(root: Path, split: str, allow_subset: bool) -> Dataset:
    """As CIFAR-10, with two labels: of the 20 coarse classes, unused here, then of the 100 fine ones."""
    url, md5 = f"{TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
    folder = find_folder(root, "cifar-100-binary", "fine_label_names.txt", url, md5)
    parts = ["train.bin" if split == "train" else "test.bin"]
    return _cifar(folder, parts, read_lines(folder / "fine_label_names.txt"), labels=2)


def _cifar(folder: Path, parts: list[str], classes: list[str], labels: int) -> ArrayImages:
    pixels, targets = [], []
    for path in (folder / part for part in parts):
        records = read_bytes(path, labels + 3 * 32 * 32)
        targets += zero_based(records[:, labels - 1], len(classes), path, first=0)
        pixels.append(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ArrayImages(np.concatenate(pixels), targets, classes)


def _stl10(root: Path, split: str, allow_subset: bool) -> Dataset:
    """Pixels of an image: 3 x width x height, columns first."""
    folder = find_folder(root, "stl10_binary", "class_names.txt", published().STL10.url, published().STL10.tgz_md5)
    part = "train" if split == "train" else "test"
    classes = read_lines(folder / "class_names.txt")
    source, images = folder / f"{part}_y.bin", folder / f"{part}_X.bin"
    targets = zero_based(read_bytes(source, 1)[:, 0], len(classes), source)
    pixels = read_bytes(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    same_length(pixels, images, targets, source)
    return ArrayImages(pixels, targets, classes)


# ---------------------------------------------------------------------------------------------------------------------
# the table
# ---------------------------------------------------------------------------------------------------------------------

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
        f"{TORONTO}/cifar.html", downloads=True),
    "cifar100": DatasetEntry(
        _cifar100, "CIFAR-100, binary version; downloaded if absent", 100, {"train": 50_000, "val": 10_000},
        f"{TORONTO}/cifar.html", downloads=True),
    "demo": DatasetEntry(
        functools.partial(_demo, 1), "the procedural demo, any number of images", 10, None, DEMO_SOURCE),
    "demo_few": DatasetEntry(
        functools.partial(_demo, 10), "the same, with a tenth of its training images", 10, None, DEMO_SOURCE),
}  # fmt: skip


def build_dataset(name: str, root: Path, split: str, allow_subset: bool = False) -> Dataset:
    """Images without transform, by the name of an entry of DATASETS; split: "train" or "val".

    ValueError says what is missing and where to get it. allow_subset: another number of images than the official one is
    logged instead, and images that a list names and that are not there are left out. Never another number of classes.
    """
    entry, root = DATASETS[check_dataset(name, root)], Path(root)
    try:
        images = entry.build(root, split, allow_subset)
        _check_counts(entry, images, split, allow_subset)
    except (ValueError, OSError) as error:  # of the system: a folder that may not be read
        raise ValueError(_lacking(name, root, error)) from error
    return images


def check_dataset(name: str, root: Path | None) -> str:
    """The name; ValueError where it is of no data set, and where the folder of one is not there that is not downloaded.

    root: None where it is out of sight.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {instead_of(name, DATASETS)}")
    if not (root is None or DATASETS[name].downloads or Path(root).is_dir()):
        raise ValueError(
            _lacking(name, root, "a file, no folder" if Path(root).is_file() else "there is no such folder")
        )
    return name


def _lacking(name: str, root: Path, problem: object) -> str:
    """A problem with the files of a data set, and where to get them."""
    source = f"; it comes from {DATASETS[name].source}" if DATASETS[name].source else ""
    asked = f"--data_path {root}" if name == "image_folder" else f"--dataset {name} --data_path {root}"
    return f"{asked}: {problem}{source}"


def _check_counts(entry: DatasetEntry, images: Dataset, split: str, allow_subset: bool) -> None:
    """ValueError where classes or images are not as many as they officially are."""
    if entry.classes is not None and len(images.classes) != entry.classes:
        raise ValueError(f"the {split} split has {len(images.classes):,} classes instead of {entry.classes:,}")
    if entry.images is None or len(images) == entry.images[split]:
        return
    difference = entry.images[split] - len(images)
    words = (
        f"{len(images):,} {split} images instead of {entry.images[split]:,}: {abs(difference):,} "
        f"{'are missing' if difference > 0 else 'too many'}"
    )
    if not allow_subset:
        raise ValueError(f"{words}, perhaps an extraction was interrupted; --allow_subset takes what there is")
    log.info("%s", words)


def build_splits(
    name: str, root: Path, nb_classes: int | None, allow_subset: bool = False
) -> tuple[Dataset, Dataset, int]:
    """Training set, test set and class count; ValueError where the splits or `nb_classes` disagree."""
    train, val = (build_dataset(name, root, split, allow_subset) for split in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(map(str, train.classes)) ^ set(map(str, val.classes)))
        raise ValueError(
            f"{root}: train has {len(train.classes)} classes and val {len(val.classes)}; "
            + (f"in one only: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}" if odd else "in different orders")
        )
    if nb_classes is not None and nb_classes != len(train.classes):
        raise ValueError(
            f"--nb_classes {nb_classes}, but {root} has {len(train.classes)} classes: correct it or leave it out"
        )
    return train, val, len(train.classes)
