"""Read the lists, labels and archives that data sets are distributed as. Every fault is a ValueError with the path."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_sets.files import in_class_order
from data_sets.images import Content, Files, Images
from util import distributed
from util.progress import log


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Raise whatever a missing or damaged file raises as a ValueError of one line with its path."""
    try:
        yield
    except Exception as error:  # parsers of damaged content raise anything
        reason = repr(error)
        if isinstance(error, ValueError | OSError | KeyError):
            reason = "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason[:300]}") from error


class Listing(NamedTuple):
    """Image files with their labels, as a list of a data set states them."""

    source: Path  # the list
    paths: list[Path]
    targets: list[int] | np.ndarray  # classes from 0; or (n,K) zeros and ones
    classes: list[str]

    def images(self, allow_subset: bool) -> Images:
        """ValueError if an image is listed twice, or missing; allow_subset leaves missing ones out."""
        refuse_duplicates(self.paths, "image", self.source)
        images = Images(Files(self.paths), self.targets, self.classes)
        missing = missing_files(self.paths)
        if not missing:
            return images
        problem = f"{len(missing):,} of the {len(self.paths):,} images that {self.source} lists are missing"
        if not allow_subset or len(missing) == len(self.paths):
            raise ValueError(f"{problem}, the first {self.paths[missing[0]]}")
        log.info("%s and left out", problem)
        return images.part(sorted(set(range(len(images))) - set(missing)))


def images_by_class(
    content: Content, labels: Sequence[Sequence[str]], classes: Sequence[str] | None, multi_label: bool
) -> Images:  # fmt: skip
    """Images with labels by name: exactly one each, or with multi_label any number.

    classes: in the order of their numbers; None: those that appear, in class order. ValueError for another name.
    """
    for name, mine in zip(content.names, labels, strict=True):
        if len(mine) != 1 and not multi_label:
            raise ValueError(f"{len(mine)} labels of {name}, expected one; data sets multilabel_* take any number")
    known = {name for names in labels for name in names}
    classes = in_class_order(known) if classes is None else list(classes)
    if unknown := sorted(known - set(classes)):
        raise ValueError(f"label {unknown[0]!r} is none of the {len(classes):,} classes")
    if not known:
        raise ValueError("no image has a label")
    return Images(content, targets_of(labels, classes, multi_label), classes)


def targets_of(labels: Sequence[Sequence[str]], classes: Sequence[str], multi_label: bool) -> list[int] | np.ndarray:
    numbers = {name: number for number, name in enumerate(classes)}
    if not multi_label:
        return [numbers[name] for (name,) in labels]
    targets = np.zeros((len(labels), len(classes)), np.uint8)
    for row, names in enumerate(labels):
        targets[row, [numbers[name] for name in names]] = 1
    return targets


def find_folder(root: Path, name: str, marker: str, archives: Sequence[tuple[str, str]] = (), into: str = "") -> Path:
    """The folder `name` of an unpacked data set: in `root`, or `root` itself.

    marker: a path that must exist in it. archives: (address, md5); if the marker is missing, rank 0 downloads and
    unpacks them in the folder `into` of root while the others wait.
    """

    def marked() -> Path | None:
        return next((folder for folder in (root / name, root) if (folder / marker).exists()), None)

    with distributed.main_process_first():
        for url, md5 in archives if not marked() else ():
            from torchvision.datasets.utils import download_and_extract_archive

            log.info("downloading %s", url)
            try:
                download_and_extract_archive(url, str(root / into), md5=md5)
            except Exception as error:  # of the network, of tar, of the disk
                raise ValueError(f"{name}/{marker} is missing, and {url} cannot be downloaded: {error}") from error
    if folder := marked():
        return folder
    raise ValueError(f"neither {name}/{marker} nor {marker} is in it" if root.is_dir() else "there is no such folder")


def missing_files(paths: Iterable[Path]) -> list[int]:
    """Indices of the files that do not exist. Reads each folder once, which is fast on network disks too."""

    @functools.cache
    def names(folder: Path) -> set[str]:
        return set(os.listdir(folder)) if folder.is_dir() else set()

    return [index for index, path in enumerate(paths) if path.name not in names(path.parent)]


def read_lines(path: Path) -> list[str]:
    """The lines of a list in UTF-8, stripped, without empty ones."""
    with reading(path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        if not any(lines):
            raise ValueError("it is empty")
        return [line for line in lines if line]


def read_rows(path: Path, *kinds: type) -> list[tuple]:
    """The rows of a list with one column for each of `kinds` (int, str). Lines that begin with # are comments."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.startswith("#"):
            with reading(f"{path}, line {number}: {line[:60]!r}"):
                fields = line.split(maxsplit=len(kinds) - 1)
                rows.append(tuple(kind(field) for kind, field in zip(kinds, fields, strict=True)))
    return rows


def read_table(path: Path, kind: type) -> dict[int, Any]:
    """{number: value} of a list of two columns. ValueError for a number that appears twice."""
    rows = read_rows(path, int, kind)
    refuse_duplicates([number for number, _ in rows], "number", path)
    return dict(rows)


def parse_json(content: bytes) -> Any:
    """ValueError for a name that an object has twice."""

    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_duplicates([name for name, _ in pairs], "entry", "an object")  # json would keep the last of them
        return dict(pairs)

    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=entries)


def read_records(path: Path, size: int) -> np.ndarray:
    """A file of records of `size` bytes each, memory-mapped: (n, size) uint8."""
    with reading(path):
        length = path.stat().st_size
        if not length or length % size:
            raise ValueError(f"it has {length:,} bytes, not a multiple of {size:,}, a record's size")
        return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, size)


MATRIX, COMPRESSED = 14, 15  # data types of a MATLAB 5 file's elements


def parse_matlab(data: bytes, name: str) -> np.ndarray:
    """A variable of a MATLAB 5 file, as an array of at least one dimension.

    Damaged files, over which scipy's compiled reader may crash, are refused before: elements must fill the file, and
    the checksums of compressed ones, as all published files have, must hold.
    """
    from scipy.io import loadmat

    order, start = "<" if data[126:128] == b"IM" else ">", 128
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if kind not in (COMPRESSED, MATRIX):
            raise ValueError("it is not a MATLAB 5 file, or damaged")
        start += 8 + size
        if kind == COMPRESSED:
            zlib.decompress(data[start - size : start])
    if start != len(data) or start == 128:
        raise ValueError("it is cut off")
    return np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)[name])


def zero_based(labels: Iterable[int], classes: int, path: Path, first: int = 1) -> list[int]:
    """Labels that count from `first`, changed to count from 0. ValueError for one out of range."""
    shifted = [int(label) - first for label in labels]
    for number, label in enumerate(shifted, 1):
        if not 0 <= label < classes:
            allowed = f"between {first} and {classes - 1 + first}"
            raise ValueError(f"{path}: label {label + first} of entry {number} is not {allowed}")
    return shifted


def refuse_duplicates(values: Sequence, kind: str, source: Path | str) -> None:
    """ValueError with the first of the values that appears twice."""
    if len(set(values)) < len(values):
        value = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{source}: {kind} {value} appears twice")
