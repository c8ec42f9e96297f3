"""DATASETS: data sets by name, from the facts in table.toml and the readers in own.py, published.py and imagenet.py."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_sets import imagenet, own, published
from data_sets.images import Files, Images
from data_sets.order import hold_out
from data_sets.readers import find_folder, missing_files, read_class_folders, refuse_duplicates
from data_sets.shards import is_packed, read_packed
from util.choices import instead_of
from util.progress import log

READERS = vars(published) | vars(imagenet) | vars(own)
WITH_COLUMNS = ("listed", "webdataset", "hugging_face")


class DatasetEntry(NamedTuple):
    """A data set; table.toml explains the fields."""

    reader: str
    description: str
    options: Mapping[str, Any] = {}
    classes: int | None = None
    images: Mapping[str, int] | None = None
    source: str = ""
    folder: str = ""
    marker: str = ""
    archives: Sequence[tuple[str, str]] = ()
    into: str = ""
    splits: Mapping[str, str] = {"train": "train", "val": "val"}
    protocol: str = ""
    multi_label: bool = False

    def build(self, root: Path, split: str, **options: Any) -> Images:
        if self.images and split not in self.images:
            raise ValueError("this is a test set without training images: name it in scripts/evaluate_probe.py")
        if self.folder:
            root = find_folder(root, self.folder, self.marker, self.archives, self.into)
        return READERS[self.reader](root, self.splits[split], **self.options, **options)


FACTS = tomllib.loads(Path(__file__).with_name("table.toml").read_text(encoding="utf-8"))
DATASETS = {name: DatasetEntry(**{"reader": name, **facts}) for name, facts in FACTS.items()}


def build_dataset(
    name: str, root: Path, split: str, allow_subset: bool = False, label_column: str | None = None, labels: bool = True
) -> Images:
    """Images by the name of an entry of DATASETS; split: "train" or "val". A folder that scripts/pack_images.py made of
    the data set is read as the data set.

    allow_subset: accept and log fewer or more images than the official number, leave out listed images that are
    missing, and accept fewer classes for val. label_column: of a list or table. labels: False for programs that use
    none, which also take an image_folder without splits, with or without class folders. ValueError says what is missing
    and where to get it.
    """
    entry, root = DATASETS[check_dataset(name, root)], Path(root)
    build = functools.partial(entry.build, root, split)
    if is_packed(root):
        build = functools.partial(read_packed, root, name, split)
    elif label_column is not None:
        if entry.reader not in WITH_COLUMNS:
            raise ValueError(f"label_column {label_column!r} does not apply to data set {name!r}: omit it")
        build = functools.partial(build, label_column=label_column)
    elif not labels and name == "image_folder":
        folder = root / split if _has_splits(root) else root
        build = functools.partial(read_class_folders, folder, may_be_empty=True, labels=False)
    try:
        return _checked(entry, build(), root, split, allow_subset)
    except (ValueError, OSError) as error:  # OSError: a folder without permission to read it
        raise ValueError(_with_source(name, root, error)) from error


def check_dataset(name: str, root: Path | None) -> str:
    """The name; ValueError if it is unknown, or if a data set that cannot be downloaded has no folder.

    root: None if this machine does not see it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {instead_of(name, DATASETS)}")
    remote = DATASETS[name].reader == "hugging_face" and str(root).startswith("hf:")
    if not (root is None or remote or DATASETS[name].archives or Path(root).is_dir()):
        problem = "this is a file, not a folder" if Path(root).is_file() else "there is no such folder"
        raise ValueError(_with_source(name, root, problem))
    return name


def _has_splits(root: Path) -> bool:
    return any((Path(root) / split).is_dir() for split in ("train", "val"))


def _with_source(name: str, root: Path, problem: object) -> str:
    """A problem with the files of a data set, and where to get them."""
    source = f"; it comes from {DATASETS[name].source}" if DATASETS[name].source else ""
    flags = f"--data_path {root}" if name == "image_folder" else f"--dataset {name} --data_path {root}"
    return f"{flags}: {problem}{source}"


def _checked(entry: DatasetEntry, images: Images, root: Path, split: str, allow_subset: bool) -> Images:
    """ValueError for names that appear twice, missing files and unofficial numbers of classes and images;
    allow_subset leaves missing images out."""
    refuse_duplicates(images.classes, "class", root)
    if isinstance(images.content, Files):
        refuse_duplicates(images.names, "image", root)
        if missing := missing_files(images.names):
            problem = f"{len(missing):,} of the {len(images):,} listed images are missing"
            if not allow_subset or len(missing) == len(images):
                raise ValueError(f"{problem}, the first {images.names[missing[0]]}")
            log.info("%s: %s and left out", root, problem)
            images = images.part(sorted(set(range(len(images))) - set(missing)))
    fewer = allow_subset and split == "val" and len(images.classes) < (entry.classes or 0)
    if entry.classes not in (None, len(images.classes)) and not fewer:
        raise ValueError(f"the {split} split has {len(images.classes):,} classes instead of {entry.classes:,}")
    official = (entry.images or {}).get(split, len(images))
    if official != len(images):
        difference = f"{abs(official - len(images)):,} {'are missing' if official > len(images) else 'too many'}"
        problem = f"{len(images):,} {split} images instead of {official:,}: {difference}"
        if not allow_subset:
            raise ValueError(f"{problem}; --allow_subset takes what there is")
        log.info("%s", problem)
    return images


def build_splits(
    name: str,
    root: Path,
    nb_classes: int | None,
    allow_subset: bool = False,
    label_column: str | None = None,
    val_split: float = 0.0,
    seed: int = 0,
) -> tuple[Images, Images, int]:
    """Training images, test images and class count.

    val_split: share of each class of a folder of classes that becomes the test set, a function of the seed. The test
    set may lack classes. ValueError if it has others, if `nb_classes` differs, or if a file is in both splits. Test
    images whose content is also in the training split are counted in the log.
    """
    if val_split:
        if name != "image_folder" or is_packed(root) or _has_splits(root):
            problem = "it needs --dataset image_folder and a folder of classes without train/ and val/"
            raise ValueError(f"--val_split {val_split:g} splits one folder of classes: {problem}, got {root}")
        images = build_dataset(name, root, "train", labels=False)
        train, val = (images.part(indices) for indices in hold_out(images.targets, val_split, seed))
        log.info("%s: %d images for training and %d for testing", root, len(train), len(val))
    else:
        train, val = (build_dataset(name, root, split, allow_subset, label_column) for split in ("train", "val"))
    if len(train.classes) < 2 and not isinstance(train.targets, np.ndarray):
        raise ValueError(f"{root} has one class, {train.classes[0]!r}: a probe needs at least two")
    if nb_classes not in (None, len(train.classes)):
        problem = f"--nb_classes {nb_classes}, but {root} has {len(train.classes)} classes"
        raise ValueError(f"{problem}: correct it or leave it out")
    val = _with_classes_of(train, val, root)
    if isinstance(train.content, Files) and (shared := set(train.names) & set(val.names)):
        raise ValueError(f"{root}: {len(shared):,} images are in both splits, such as {min(shared)}")
    if train.digests is not None and val.digests is not None:
        known = set(map(bytes, train.digests))
        if copies := [index for index, digest in enumerate(map(bytes, val.digests)) if digest in known]:
            message = "%d of %d test images are also training images, such as %s"
            log.info(message, len(copies), len(val), val.names[copies[0]])
    return train, val, len(train.classes)


def _with_classes_of(train: Images, val: Images, root: Path) -> Images:
    """Test images with labels that count the training classes. ValueError for other classes."""
    if unknown := sorted(set(val.classes) - set(train.classes)):
        counts = f"train has {len(train.classes)} classes and val {len(val.classes)}"
        raise ValueError(f"{root}: {counts}; only in val: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}")
    numbers = np.array([train.classes.index(name) for name in val.classes])
    if several := isinstance(val.targets, np.ndarray):
        targets = np.zeros((len(val), len(train.classes)), np.uint8)
        targets[:, numbers] = val.targets
    else:
        targets = numbers[val.targets].tolist()
    present = np.count_nonzero(targets.any(0)) if several else len(set(targets))
    if present < len(train.classes):
        message = "%s: test images of %d of %d classes; scores per class are means over these"
        log.info(message, root, present, len(train.classes))
    return Images(val.content, targets, train.classes)
