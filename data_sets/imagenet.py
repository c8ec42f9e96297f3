"""ImageNet-1k as distributed, and the test sets for its classifiers, whose classes it shares.

Classes are named by WordNet ids. A class of ObjectNet may be several of these, which "+" joins.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_sets.images import Files, Images, decode
from data_sets.readers import (
    images_by_class,
    is_system_file,
    parse_json,
    parse_matlab,
    read_class_folders,
    read_lines,
    reading,
    refuse_duplicates,
)
from data_sets.shards import read_tars

DEVKIT, SOLUTION = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
PIECES = {
    "train": ("train", "ILSVRC2012_img_train", "ILSVRC2012_img_train.tar"),
    "val": ("val", "ILSVRC2012_img_val", "ILSVRC2012_img_val.tar"),
    "labels": (SOLUTION, DEVKIT, f"{DEVKIT}.tar.gz"),
}
CONTENT = {"train": "n????????.tar", "val": "ILSVRC2012_val_*.JPEG", "labels": SOLUTION}  # of folders of any name
ALEXNET_ERRORS = tomllib.loads(Path(__file__).with_name("imagenet_c.toml").read_text(encoding="utf-8"))
SEVERITIES = 5
FRAME = 2  # pixels of ObjectNet's red frame


def wnids() -> list[str]:
    """ImageNet-1k's classes in the order of their labels: timm's list."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet1k").label_names())


def check_wnids(classes: Sequence[str]) -> None:
    """ValueError unless the classes are ImageNet-1k's in their order, which published classifiers number."""
    official = wnids()
    if len(classes) != len(official):
        raise ValueError(f"the data set has {len(classes):,} classes, ImageNet-1k has {len(official):,}")
    if odd := [pair for pair in zip(classes, official, strict=True) if pair[0] != pair[1]]:
        raise ValueError(f"class {odd[0][0]!r} is not the WordNet id {odd[0][1]}: name the class folders by these ids")


def check_wnid_names(classes: Sequence[str], source: Path) -> None:
    if odd := [name for name in classes if not re.fullmatch(r"n\d{8}", name)]:
        problem = f"{len(odd):,} of {len(classes):,} classes are not named by their WordNet id, like n01440764, but"
        remedy = "rename the folders, because ImageNet's labels follow the ids"
        raise ValueError(f"{source}: {problem} {odd[0]!r}: {remedy}")


def find_piece(root: Path, piece: str) -> Path:
    """The first file or folder of PIECES: in the root, in a folder in it, or in Kaggle's tree below these."""
    tops = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not is_system_file(path.name))]
    folders = [top / part for top in tops for part in ("", "ILSVRC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    paths = {kind: [folder / name for folder in folders for name in PIECES[kind]] for kind in PIECES}
    present = {kind: [path for path in paths[kind] if path.exists()] for kind in PIECES}
    for path in present[piece] or [folder for folder in folders if any(folder.glob(CONTENT[piece]))]:
        return path
    there = ", ".join(str(path.relative_to(root)) for paths in present.values() for path in paths)
    raise ValueError(f"none of {', '.join(PIECES[piece])} is in it; there is {there or 'no part of ImageNet'}")


def stem_of(name: str) -> str:
    """The file name, without suffix, of a path or of shard:path."""
    return Path(name.rpartition(":")[2]).stem


def imagenet1k(root: Path, split: str) -> Images:
    """Folders of classes; or the official archives, unpacked or not, with the labels of val from Kaggle's list or from
    the devkit."""
    path = find_piece(root, split)
    tars = [path] if path.is_file() else sorted(path.glob(CONTENT["train"]))
    if not tars and not any(path.glob(CONTENT["val"])):
        images = read_class_folders(path, may_be_empty=split == "val")
    elif split == "train":
        content = read_tars(tars)
        images = images_by_class(content, [[stem_of(name).split("_")[0]] for name in content.names])
    else:
        source = find_piece(root, "labels")
        labels = kaggle_labels(source) if source.name == SOLUTION else devkit_labels(source)
        content = read_tars(tars) if tars else Files(path / f"{name}.JPEG" for name in sorted(labels))
        classes = sorted(set(labels.values()))
        with reading(source):
            images = images_by_class(content, [[labels[stem_of(name)]] for name in content.names], classes)
    check_wnid_names(images.classes, path)
    return images


def kaggle_labels(path: Path) -> dict[str, str]:
    """{image: wnid} of lines like ILSVRC2012_val_00048981,n03995372 85 1 499 272"""
    header, *rows = (line.split(",") for line in read_lines(path))
    with reading(path):
        if header != ["ImageId", "PredictionString"]:
            raise ValueError("line 1 must be ImageId,PredictionString")
        refuse_duplicates([name for name, _ in rows], "image", SOLUTION)
        return {name: prediction.split()[0] for name, prediction in rows}


def devkit_labels(devkit: Path) -> dict[str, str]:
    """{image: wnid}; the devkit, a folder or an archive, numbers the classes in an order of its own."""
    names = [f"{DEVKIT}/data/{name}" for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")]
    with reading(devkit), contextlib.ExitStack() as stack:
        if devkit.is_dir():
            meta, truth = ((devkit.parent / name).read_bytes() for name in names)
        else:
            archive = stack.enter_context(tarfile.open(devkit))
            meta, truth = (archive.extractfile(name).read() for name in names)
        leaves = [synset for synset in parse_matlab(meta, "synsets") if int(synset["num_children"]) == 0]
        labels = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        if len(set(labels.values())) < len(leaves):
            raise ValueError("meta.mat has a class twice")
        return {f"ILSVRC2012_val_{image:08d}": labels[int(number)] for image, number in enumerate(truth.split(), 1)}


def imagenet1pct(root: Path, split: str) -> Images:
    """1percent.txt has a line n02058221_3181.JPEG for each training image."""
    if split == "val":
        return imagenet1k(root, split)
    source, train = root / "1percent.txt", find_piece(root, "train")
    names = read_lines(source)
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not is_system_file(path.name))
    check_wnid_names(classes, train)
    with reading(source):
        labels = [name.split("_")[0] for name in names]
        content = Files(train / label / name for label, name in zip(labels, names, strict=True))
        return images_by_class(content, [[label] for label in labels], classes)


# ---- test sets


def class_folders(root: Path, split: str) -> Images:
    """Folders of classes, named by WordNet id or label."""
    images = read_class_folders(root, may_be_empty=True)
    if all(name.isdecimal() and int(name) < 1000 for name in images.classes):
        official = wnids()
        images.classes = [official[int(name)] for name in images.classes]
    check_wnid_names(images.classes, root)
    return images


class Unframed(Files):
    """Image files without their frame."""

    def read(self, index: int) -> np.ndarray:
        return np.asarray(decode(super().read(index), self.names[index]))[FRAME:-FRAME, FRAME:-FRAME]


def objectnet(root: Path, split: str) -> Images:
    """Images of the 113 classes that ImageNet has, too."""
    images, mappings = read_class_folders(root / "images", may_be_empty=True), root / "mappings"
    with reading(mappings):
        names, lines, overlap = (
            parse_json((mappings / f"{name}.json").read_bytes())
            for name in ("folder_to_objectnet_label", "pytorch_to_imagenet_2012_id", "objectnet_to_imagenet_1k")
        )
        texts = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
        official = wnids()
        wnid_of = {texts[line].strip(): official[int(label)] for label, line in lines.items()}
        labels = [overlap.get(names[folder]) for folder in images.classes]
        labels = [label and "+".join(wnid_of[text] for text in label.split("; ")) for label in labels]
    kept = [(path, [labels[target]]) for path, target in images.samples if labels[target]]
    classes = [label for label in labels if label]
    return images_by_class(Unframed(path for path, _ in kept), [label for _, label in kept], classes)


def corruptions(root: Path) -> dict[str, list[Path]]:
    """{corruption: the folder of each severity} of ImageNet-C, unpacked in `root` or in folders of it.

    ValueError if one is missing.
    """
    folders = {name: next(iter(root.glob(f"*/{name}")), root / name) for name in ALEXNET_ERRORS}
    severities = {name: [folder / str(number + 1) for number in range(SEVERITIES)] for name, folder in folders.items()}
    if missing := [folder for each in severities.values() for folder in each if not folder.is_dir()]:
        raise ValueError(f"{len(missing)} of 15 corruptions x 5 severities are missing, such as {missing[0]}")
    return severities
