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
from typing import Any

import numpy as np

from data_sets.files import in_class_order
from data_sets.images import Content, Images
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


def images_by_class(
    content: Content, labels: Sequence[Sequence], classes: Sequence | None = None, multi_label: bool = False
) -> Images:
    """Images with labels by name: exactly one each, or with multi_label any number.

    classes: in the order of their numbers; None: those that appear, in class order. ValueError for another name.
    """
    for name, given in zip(content.names, labels, strict=True):
        if len(given) != 1 and not multi_label:
            raise ValueError(f"{len(given)} labels of {name}, expected one; data sets multilabel_* take any number")
    known = {name for names in labels for name in names}
    classes = in_class_order(known) if classes is None else list(classes)
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := known - numbers.keys() or not known:
        raise ValueError(f"label {min(unknown)!r} is none of the classes" if known else "no image has a label")
    if not multi_label:
        return Images(content, [numbers[name] for (name,) in labels], classes)
    targets = np.zeros((len(labels), len(classes)), np.uint8)
    for row, names in enumerate(labels):
        targets[row, [numbers[name] for name in names]] = 1
    return Images(content, targets, classes)


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


def missing_files(paths: Iterable[str | Path]) -> list[int]:
    """Indices of the files that do not exist. Reads each folder once, which is fast on network disks too."""

    @functools.cache
    def names(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    parts = (os.path.split(path) for path in paths)
    return [index for index, (folder, name) in enumerate(parts) if name not in names(folder)]


def read_lines(path: Path) -> list[str]:
    """The lines of a list in UTF-8, stripped, without empty ones."""
    with reading(path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        if not any(lines):
            raise ValueError("it is empty")
        return [line for line in lines if line]


def read_rows(path: Path, *kinds: type) -> list[tuple]:
    """The rows of a list with one column for each of `kinds` (int, str). ValueError for a first column that repeats."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        with reading(f"{path}, line {number}: {line[:60]!r}"):
            fields = line.split(maxsplit=len(kinds) - 1)
            rows.append(tuple(kind(field) for kind, field in zip(kinds, fields, strict=True)))
    refuse_duplicates([row[0] for row in rows], "entry", path)
    return rows


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


COMPRESSED = 15  # a data type of a MATLAB 5 file's elements


def parse_matlab(data: bytes, name: str) -> np.ndarray:
    """A variable of a MATLAB 5 file, as an array of at least one dimension.

    Damaged files, over which scipy's compiled reader may crash, are refused before: elements must fill the file, and be
    compressed, as in all published files, with checksums that hold.
    """
    from scipy.io import loadmat

    order, start = "<" if data[126:128] == b"IM" else ">", 128
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if kind != COMPRESSED:
            raise ValueError("it is not a compressed MATLAB 5 file, or damaged")
        start += 8 + size
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
