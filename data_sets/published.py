"""Published data sets, read from the files that their authors distribute, with official splits.

A reader takes the folder of a data set and a split, "train" or "val": the one that the paper measures accuracies on,
whatever its authors call it (paper, B.2). Labels count from 0. Nothing is unpickled. table.toml has the counts.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_sets import readers
from data_sets.demo import CLASSES as DEMO_CLASSES
from data_sets.files import is_system_file, read_class_folders
from data_sets.images import Files, Images, Pixels
from data_sets.shards import read_tars

FACTS = tomllib.loads((Path(__file__).parent / "table.toml").read_text(encoding="utf-8"))
ARCHIVES = {name: facts["archives"] for name, facts in FACTS.items() if "archives" in facts}

# ---- ImageNet

DEVKIT, SOLUTION = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
PIECES = {
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC2012_img_train.tar"),
    "val": ("val", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar"),
    "labels": (SOLUTION, DEVKIT, f"{DEVKIT}.tar.gz"),
}
CONTENT = {"train": "n????????.tar", "val": "ILSVRC2012_val_*.JPEG", "labels": SOLUTION}  # of folders of any name


def imagenet_piece(root: Path, piece: str) -> Path:
    """The first file or folder of PIECES: in the root, in a folder in it, or in Kaggle's tree below these."""
    tops = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not is_system_file(path.name))]
    folders = [top / part for top in tops for part in ("", "ILSVRC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    paths = {kind: [folder / name for folder in folders for name in PIECES[kind]] for kind in PIECES}
    seen = {kind: [path for path in paths[kind] if path.exists()] for kind in PIECES}
    for path in seen[piece] or [folder for folder in folders if any(folder.glob(CONTENT[piece]))]:
        return path
    there = ", ".join(str(path.relative_to(root)) for found in seen.values() for path in found)
    raise ValueError(f"none of {', '.join(PIECES[piece])} is in it; there is {there or 'no part of ImageNet'}")


def stem_of(name: str) -> str:
    """The file name, without suffix, of a path or of shard:path."""
    return Path(name.rpartition(":")[2]).stem


def imagenet1k(root: Path, split: str) -> Images:
    """Folders of classes; or the official archives, unpacked or not, with the labels of val from Kaggle's list or from
    the devkit."""
    path = imagenet_piece(root, split)
    tars = [path] if path.is_file() else sorted(path.glob(CONTENT["train"]))
    if not tars and not any(path.glob(CONTENT["val"])):
        images = read_class_folders(path, may_be_empty=split == "val")
    elif split == "train":
        content = read_tars(tars)
        images = readers.images_by_class(content, [[stem_of(name).split("_")[0]] for name in content.names])
    else:
        source = imagenet_piece(root, "labels")
        wnids = kaggle_labels(source) if source.name == SOLUTION else devkit_labels(source)
        content = read_tars(tars) if tars else Files(path / f"{name}.JPEG" for name in sorted(wnids))
        with readers.reading(source):
            labels = [[wnids[stem_of(name)]] for name in content.names]
            images = readers.images_by_class(content, labels, sorted(set(wnids.values())))
    check_wnid_names(images.classes, path)
    return images


def check_wnid_names(classes: Sequence[str], source: Path) -> None:
    if odd := [name for name in classes if not re.fullmatch(r"n\d{8}", name)]:
        problem = f"{len(odd):,} of {len(classes):,} classes are not named by their WordNet id, like n01440764, but"
        remedy = "rename the folders, because ImageNet's labels follow the ids"
        raise ValueError(f"{source}: {problem} {odd[0]!r}: {remedy}")


def check_wnids(classes: Sequence[str]) -> None:
    """ValueError unless the classes are ImageNet-1k's WordNet ids in their order, which published classifiers number.

    Source: timm's list of them.
    """
    from timm.data import ImageNetInfo

    official = ImageNetInfo("imagenet1k").label_names()
    if len(classes) != len(official):
        raise ValueError(f"the data set has {len(classes):,} classes, ImageNet-1k has {len(official):,}")
    if odd := [pair for pair in zip(classes, official, strict=True) if pair[0] != pair[1]]:
        raise ValueError(f"class {odd[0][0]!r} is not the WordNet id {odd[0][1]}: name the class folders by these ids")


def kaggle_labels(path: Path) -> dict[str, str]:
    """{image: wnid} of lines like ILSVRC2012_val_00048981,n03995372 85 1 499 272"""
    header, *rows = (line.split(",") for line in readers.read_lines(path))
    with readers.reading(path):
        if header != ["ImageId", "PredictionString"]:
            raise ValueError("line 1 must be ImageId,PredictionString")
        readers.refuse_duplicates([name for name, _ in rows], "image", SOLUTION)
        return {name: prediction.split()[0] for name, prediction in rows}


def devkit_labels(devkit: Path) -> dict[str, str]:
    """{image: wnid}; the devkit, a folder or an archive, numbers the classes in an order of its own."""
    with readers.reading(devkit), contextlib.ExitStack() as stack:
        archive = None if devkit.is_dir() else stack.enter_context(tarfile.open(devkit))

        def content(name: str) -> bytes:
            path = f"{DEVKIT}/data/{name}"
            return archive.extractfile(path).read() if archive else (devkit.parent / path).read_bytes()

        synsets = readers.parse_matlab(content("meta.mat"), "synsets")
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        if len(set(wnids.values())) < len(leaves):
            raise ValueError("meta.mat has a class twice")
        truth = content("ILSVRC2012_validation_ground_truth.txt").split()
        return {f"ILSVRC2012_val_{image:08d}": wnids[int(number)] for image, number in enumerate(truth, 1)}


def imagenet1pct(root: Path, split: str) -> Images:
    """1percent.txt has a line n02058221_3181.JPEG for each training image."""
    if split == "val":
        return imagenet1k(root, split)
    source, train = root / "1percent.txt", imagenet_piece(root, "train")
    names = readers.read_lines(source)
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not is_system_file(path.name))
    check_wnid_names(classes, train)
    with readers.reading(source):
        wnids = [name.split("_")[0] for name in names]
        content = Files(train / wnid / name for wnid, name in zip(wnids, names, strict=True))
        return readers.images_by_class(content, [[wnid] for wnid in wnids], classes)


IMAGENETTE = FACTS["imagenette"]["names"]  # {WordNet id: name}


def imagenette(root: Path, split: str) -> Images:
    images = read_class_folders(readers.find_folder(root, "imagenette2-320", "train", ARCHIVES["imagenette"]) / split)
    if images.classes != list(IMAGENETTE):
        raise ValueError(f"{root} holds other classes than Imagenette's: {', '.join(images.classes[:3])}, ...")
    return Images(images.content, images.targets, list(IMAGENETTE.values()))


def demo(root: Path, split: str, every: int) -> Images:
    """The procedural images of data_sets/demo.py; of each class for training, every tenth image or so."""
    with readers.reading(root / split):
        images = read_class_folders(root / split)
    if images.classes != list(DEMO_CLASSES):
        raise ValueError(f"{root / split} does not hold the {len(DEMO_CLASSES)} classes of the demo")
    if every == 1 or split == "val":
        return images
    targets = np.array(images.targets)
    return images.part(np.concatenate([np.flatnonzero(targets == k)[::every] for k in range(len(DEMO_CLASSES))]))


# ---- lists of files


def cub200(root: Path, split: str) -> Images:
    """Labels are the names of the folders in images.txt, numbered in alphabetical order, as in the other lists."""
    folder = readers.find_folder(root, "CUB_200_2011", "images.txt")
    names, in_train = dict(readers.read_rows(folder / "images.txt", int, str)), folder / "train_test_split.txt"
    splits = dict(readers.read_rows(in_train, int, int))
    if names.keys() != splits.keys() or not {0, 1} >= set(splits.values()):
        raise ValueError(f"{in_train} does not state 0 or 1 for each image of images.txt")
    chosen = [names[image] for image in sorted(names) if splits[image] == (split == "train")]
    content = Files(folder / "images" / name for name in chosen)
    classes = sorted({name.split("/")[0] for name in names.values()})
    return readers.images_by_class(content, [[name.split("/")[0]] for name in chosen], classes)


def stanford_cars(root: Path, split: str) -> Images:
    folder = readers.find_folder(root, "stanford_cars", "devkit/cars_meta.mat")
    meta, source = folder / "devkit/cars_meta.mat", folder / "devkit/cars_train_annos.mat"
    if split == "val":  # published later than the devkit, whose own annotations of the test images have no classes
        source = folder / "cars_test_annos_withlabels.mat"
        source = source if source.exists() else folder / "devkit" / source.name
    with readers.reading(meta):
        classes = [str(name) for name in readers.parse_matlab(meta.read_bytes(), "class_names")]
    with readers.reading(source):
        annotations = readers.parse_matlab(source.read_bytes(), "annotations")
        names, labels = annotations["fname"], annotations["class"]
    images = folder / ("cars_train" if split == "train" else "cars_test")
    return Images(
        Files(images / str(name) for name in names), readers.zero_based(labels, len(classes), source), classes
    )


def oxford_pets(root: Path, split: str) -> Images:
    name = "oxford-iiit-pet"
    for part, archive in zip(("images", "annotations"), ARCHIVES["oxford_pets"], strict=True):
        folder = readers.find_folder(root, name, part, [archive], into=name)
    source = folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    rows = readers.read_rows(source, str, int, int, int)  # image, class, species, breed
    pairs = {(label, image.rsplit("_", 1)[0].replace("_", " ").title()) for image, label, *_ in rows}
    readers.refuse_duplicates([label for label, _ in pairs], "class", f"{source}: images of two breeds")
    targets = readers.zero_based((row[1] for row in rows), len(pairs), source)
    return Images(
        Files(folder / "images" / f"{row[0]}.jpg" for row in rows), targets, [name for _, name in sorted(pairs)]
    )


def food101(root: Path, split: str) -> Images:
    folder = readers.find_folder(root, "food-101", "meta", ARCHIVES["food101"])
    source = folder / "meta" / ("train.json" if split == "train" else "test.json")
    with readers.reading(source):
        names = [name for names in readers.parse_json(source.read_bytes()).values() for name in names]
        content = Files(folder / "images" / f"{name}.jpg" for name in names)
        return readers.images_by_class(content, [[name.split("/")[0]] for name in names])


# ---- several labels an image


def coco(root: Path, split: str, year: int) -> Images:
    folder = readers.find_folder(root, "coco", "annotations")
    return read_coco(folder / "annotations" / f"instances_{split}{year}.json", [folder / f"{split}{year}"])


def read_coco(source: Path, folders: Sequence[Path]) -> Images:
    """Labels: the categories with at least one box, crowds included, in the order of their ids. Images in the order of
    theirs, those without a box included, in the first of the folders that has any of them."""
    with readers.reading(source):
        content = readers.parse_json(source.read_bytes())
        for key in ("categories", "images", "annotations"):
            readers.refuse_duplicates([entry["id"] for entry in content[key] if "id" in entry], "id", key)
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


def nus_wide(root: Path, split: str, drop_unlabelled: bool) -> Images:
    """ImageList.zip, ConceptsList.zip, Groundtruth.zip unpacked, and the images in Flickr/, as the lists name them."""
    folder = readers.find_folder(root, "NUS-WIDE", "ImageList")
    part = "Train" if split == "train" else "Test"
    concepts = folder / "ConceptsList" / "Concepts81.txt"
    classes = readers.read_lines(concepts if concepts.exists() else folder / concepts.name)
    source = folder / "ImageList" / f"{part}Imagelist.txt"
    names = readers.read_lines(source)
    targets = np.zeros((len(names), len(classes)), np.uint8)
    for column, concept in enumerate(classes):
        path = folder / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{part}.txt"
        flags = readers.read_lines(path)
        if len(flags) != len(names) or not {"0", "1"} >= set(flags):
            raise ValueError(f"{path} does not state 0 or 1 for each of the {len(names):,} entries of {source}")
        targets[:, column] = np.array(flags) == "1"
    content = Files(folder / "Flickr" / name.replace("\\", "/") for name in names)  # lists were written on Windows
    images = Images(content, targets, classes)
    return images.part(np.flatnonzero(targets.any(axis=1))) if drop_unlabelled else images


# ---- arrays


def cifar10(root: Path, split: str) -> Images:
    """Records of a label and 3 x 32 x 32 pixels."""
    folder = readers.find_folder(root, "cifar-10-batches-bin", "batches.meta.txt", ARCHIVES["cifar10"])
    parts = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    return _cifar(folder, parts, "batches.meta.txt", labels=1)


def cifar100(root: Path, split: str) -> Images:
    """As CIFAR-10, with two labels: of the 20 coarse classes, unused here, then of the 100 fine ones."""
    folder = readers.find_folder(root, "cifar-100-binary", "fine_label_names.txt", ARCHIVES["cifar100"])
    return _cifar(folder, ["train.bin" if split == "train" else "test.bin"], "fine_label_names.txt", labels=2)


def _cifar(folder: Path, parts: list[str], names: str, labels: int) -> Images:
    classes, pixels, targets = readers.read_lines(folder / names), [], []
    for path in (folder / part for part in parts):
        records = readers.read_records(path, labels + 3 * 32 * 32)
        targets += readers.zero_based(records[:, labels - 1], len(classes), path, first=0)
        pixels.append(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(Pixels(np.concatenate(pixels)), targets, classes)


def stl10(root: Path, split: str) -> Images:
    """Pixels of an image: 3 x width x height, columns first."""
    folder = readers.find_folder(root, "stl10_binary", "class_names.txt", ARCHIVES["stl10"])
    part, classes = "train" if split == "train" else "test", readers.read_lines(folder / "class_names.txt")
    source = folder / f"{part}_y.bin"
    targets = readers.zero_based(readers.read_records(source, 1)[:, 0], len(classes), source)
    pixels = readers.read_records(folder / f"{part}_X.bin", 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return Images(Pixels(pixels), targets, classes)
