"""DATASETS: data sets by name, from the facts in table.toml and the readers in published.py, own.py and shards.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_sets import own, published, shards
from data_sets.files import read_unlabelled
from data_sets.images import Images
from data_sets.order import hold_out
from data_sets.packed import is_packed, read_packed
from data_sets.readers import Listing, refuse_duplicates
from util.choices import instead_of
from util.progress import log


class DatasetEntry(NamedTuple):
    """A data set; table.toml explains the fields. `build(root, split)` returns its images."""

    build: Callable[..., Images | Listing]
    description: str
    classes: int | None = None
    images: dict[str, int] | None = None  # {split: official count}
    source: str = ""
    protocol: str = ""
    multi_label: bool = False
    downloads: bool = False

    @classmethod
    def of(cls, name: str, facts: dict) -> DatasetEntry:
        reader = facts.get("reader", name)
        build = next(getattr(module, reader) for module in (own, published, shards) if hasattr(module, reader))
        counts = {split: facts[split] for split in ("train", "val") if split in facts}
        known = {
            key: facts[key] for key in ("description", "classes", "source", "protocol", "multi_label") if key in facts
        }
        build = functools.partial(build, **facts.get("options", {}))
        return cls(build, images=counts or None, downloads="archives" in facts, **known)


DATASETS = {name: DatasetEntry.of(name, facts) for name, facts in published.FACTS.items()}
LABEL_COLUMNS = (own.listed, shards.webdataset, shards.hugging_face)  # readers with a choice of the labels' column


def build_dataset(
    name: str, root: Path, split: str, allow_subset: bool = False, label_column: str | None = None
) -> Images:  # fmt: skip
    """Images by the name of an entry of DATASETS; split: "train" or "val".

    ValueError says what is missing and where to get it. allow_subset: accept and log fewer or more images than the
    official number, and leave out listed images that are missing. The number of classes must be the official one.
    label_column: of a list or table. A folder that scripts/pack_images.py made of the data set is read as the data set.
    """
    entry, root = DATASETS[check_dataset(name, root)], Path(root)
    build = entry.build
    if label_column is not None:
        if build.func not in LABEL_COLUMNS:
            raise ValueError(
                f"data set {name!r} has no columns, so label_column {label_column!r} does not apply: omit it"
            )
        build = functools.partial(build, label_column=label_column)
    try:
        images = read_packed(root, name, split) if is_packed(root) else build(root, split)
        images = images.images(allow_subset) if isinstance(images, Listing) else images
        refuse_duplicates(images.classes, "class", root)
        _check_counts(entry, images, split, allow_subset)
    except (ValueError, OSError) as error:  # OSError: a folder without permission to read it
        raise ValueError(_with_source(name, root, error)) from error
    return images


def unlabelled_images(name: str, root: Path, split: str = "val", **options) -> Images:
    """Images for programs that use no labels: as build_dataset; of an image_folder without splits, all its images,
    with or without class folders."""
    folder = next((path for path in (root / split, root) if path.is_dir()), root)
    if name != "image_folder" or is_packed(root) or not root.is_dir():
        return build_dataset(name, root, split, **options)
    if folder == root and any((root / other).is_dir() for other in ("train", "val")):
        return build_dataset(name, root, split, **options)
    try:
        return read_unlabelled(folder)
    except (ValueError, OSError) as error:
        raise ValueError(_with_source(name, root, error)) from error


def check_dataset(name: str, root: Path | None) -> str:
    """The name; ValueError if it is unknown, or if a data set that cannot be downloaded has no folder.

    root: None if this machine does not see it.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {instead_of(name, DATASETS)}")
    remote = DATASETS[name].build.func is shards.hugging_face and str(root).startswith("hf:")
    if not (root is None or remote or DATASETS[name].downloads or Path(root).is_dir()):
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
    fewer = allow_subset and split == "val" and len(images.classes) < (entry.classes or 0)
    if entry.classes not in (None, len(images.classes)) and not fewer:
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
    name: str, root: Path, nb_classes: int | None, allow_subset: bool = False, label_column: str | None = None,
    val_split: float = 0.0, seed: int = 0,
) -> tuple[Images, Images, int]:  # fmt: skip
    """Training images, test images and class count.

    val_split: share of each class of a folder of classes that becomes the test set, a function of the seed. The test
    set may lack classes. ValueError if it has other classes or another order, if `nb_classes` differs, or if a file is
    in both splits. Test images whose content is also in the training split are counted in the log.
    """
    if val_split:
        train, val = _split_folder(name, Path(root), val_split, seed)
    else:
        train, val = (build_dataset(name, root, split, allow_subset, label_column) for split in ("train", "val"))
        val = _with_classes_of(train, val, root)
    if nb_classes not in (None, len(train.classes)):
        problem = f"--nb_classes {nb_classes}, but {root} has {len(train.classes)} classes"
        raise ValueError(f"{problem}: correct it or leave it out")
    if shared := set(train.names) & set(val.names) if hasattr(train, "samples") else ():
        raise ValueError(f"{root}: {len(shared):,} images are in both splits, such as {min(shared)}")
    if train.digests is not None and val.digests is not None:
        known = set(map(bytes, train.digests))
        if copies := [index for index, digest in enumerate(map(bytes, val.digests)) if digest in known]:
            message = "%d of %d test images are also training images, such as %s"
            log.info(message, len(copies), len(val), val.names[copies[0]])
    return train, val, len(train.classes)


def _split_folder(name: str, root: Path, val_split: float, seed: int) -> tuple[Images, Images]:
    if name != "image_folder" or is_packed(root) or any((root / split).is_dir() for split in ("train", "val")):
        problem = "it needs --dataset image_folder and a folder of classes without train/ and val/"
        raise ValueError(f"--val_split {val_split:g} splits one folder of classes: {problem}, got {root}")
    images = unlabelled_images(name, root)
    if len(images.classes) < 2:
        raise ValueError(f"--val_split {val_split:g} needs a folder for each class in {root}")
    kept, held_out = hold_out(images.targets, val_split, seed)
    log.info("%s: %d images for training and %d for testing", root, len(kept), len(held_out))
    return images.part(kept), images.part(held_out)


def _with_classes_of(train: Images, val: Images, root: Path) -> Images:
    """Test images with labels that count the training classes. ValueError for other classes or another order."""
    if unknown := sorted(set(val.classes) - set(train.classes)):
        names = f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        counts = f"train has {len(train.classes)} classes and val {len(val.classes)}"
        raise ValueError(f"{root}: {counts}; only in val: {names}")
    numbers = np.array([train.classes.index(name) for name in val.classes])
    if (np.diff(numbers) < 0).any():
        raise ValueError(f"{root}: train and val have their classes in different orders")
    targets = np.asarray(val.targets)
    if targets.ndim == 1:
        targets = numbers[targets].tolist()
        present = len(set(targets))
    else:
        columns = np.zeros((len(val), len(train.classes)), np.uint8)
        columns[:, numbers] = targets
        targets, present = columns, int(columns.any(0).sum())
    if present < len(train.classes):
        log.info("%s: test images of %d of %d classes; scores per class are means over these",
                 root, present, len(train.classes))  # fmt: skip
    return Images(val.content, targets, train.classes)
