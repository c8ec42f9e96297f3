"""Read the lists, labels and archives that data sets are distributed as. Every fault is a ValueError with the path."""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sets.images import FileImages
from util import distributed
from util.progress import log


def find_folder(
    root: Path, name: str, marker: str, url: str = "", md5: str | None = None, into: Path | None = None
) -> Path:
    """The folder `name` of an unpacked data set: in `root`, or `root` itself.

    marker: a path that must exist in it. url: of the archive; if the marker is missing, rank 0 downloads it and unpacks
    it `into` a folder (default: root) while the others wait. ValueError if that fails.
    """
    with distributed.main_process_first():
        if not _marked(root, name, marker) and url:
            from torchvision.datasets.utils import download_and_extract_archive

            log.info("downloading %s", url)
            try:
                download_and_extract_archive(url, str(into or root), md5=md5)
            except Exception as error:  # of the network, of tar, of the disk
                raise ValueError(f"{name}/{marker} is not there, and {url} cannot be downloaded: {error}") from error
    if folder := _marked(root, name, marker):
        return folder
    raise ValueError(f"neither {name}/{marker} nor {marker} is in it" if root.is_dir() else "there is no such folder")


def _marked(root: Path, name: str, marker: str) -> Path | None:
    return next((folder for folder in (root / name, root) if (folder / marker).exists()), None)


def read_lines(path: Path) -> list[str]:
    """The lines of a list, stripped, without empty ones."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def read_rows(path: Path, *kinds: Callable[[str], Any]) -> list[tuple]:
    """The rows of a list with one column for each of `kinds` (int, str). Lines that begin with # are comments."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line.startswith("#"):
            continue
        fields = line.split(maxsplit=len(kinds) - 1)
        try:
            rows.append(tuple(kind(field) for kind, field in zip(kinds, fields, strict=True)))
        except ValueError as error:
            wanted = " ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not of the form {wanted}") from error
    return rows


def read_json(path: Path) -> Any:
    def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # json keeps the last of them
            refuse_duplicates([name for name, _ in pairs], "entry", "an object")
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=entries)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_table(path: Path, kind: Callable[[str], Any]) -> dict[int, Any]:
    """{number: value} of a list of two columns. ValueError for a number that appears twice."""
    rows = read_rows(path, int, kind)
    refuse_duplicates([number for number, _ in rows], "number", path)
    return dict(rows)


def read_matlab(path: Path, name: str, *fields: str) -> np.ndarray:
    """A variable of a MATLAB file, as an array of at least one dimension. fields: those that a structure must have."""
    from scipy.io import loadmat

    try:
        _check_matlab(path.read_bytes())
        content = loadmat(path, squeeze_me=True).get(name)
    except Exception as error:  # scipy raises anything for damaged files
        raise ValueError(f"{path} cannot be read: {error}") from error
    if content is None:
        raise ValueError(f"{path} has no variable {name!r}")
    array = np.atleast_1d(content)
    if missing := [field for field in fields if field not in (array.dtype.names or ())]:
        raise ValueError(f"{path}: {name!r} has no {', '.join(missing)}")
    return array


def _check_matlab(data: bytes) -> None:
    """ValueError or zlib.error for a damaged MATLAB 5 file, over which scipy's compiled reader may crash: elements must
    fill the file, and the checksums of compressed ones, as all published files have, must hold."""
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


MATRIX, COMPRESSED = 14, 15  # data types of a MATLAB 5 file's elements


def read_flags(path: Path) -> np.ndarray:
    """A file of a 0 or a 1 in each line: (n,) uint8."""
    try:
        flags = path.read_bytes().split()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if strange := set(flags) - {b"0", b"1"}:
        raise ValueError(f"{path}: a label is {sorted(strange)[0][:40].decode(errors='replace')!r}, neither 0 nor 1")
    return np.array([flag == b"1" for flag in flags], dtype=np.uint8)


def read_bytes(path: Path, record: int) -> np.ndarray:
    """A file of records of `record` bytes each, memory-mapped: (n, record) uint8."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not size or size % record:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, not a multiple of {record:,}, a record's size")
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, record)


def zero_based(labels: Iterable[int], classes: int, path: Path, first: int = 1) -> list[int]:
    """Labels that count from `first`, changed to count from 0. ValueError for one out of range."""
    shifted = [int(label) - first for label in labels]
    for number, label in enumerate(shifted, 1):
        if not 0 <= label < classes:
            allowed = f"between {first} and {classes - 1 + first}"
            raise ValueError(f"{path}: label {label + first} of entry {number} is not {allowed}")
    return shifted


def refuse_duplicates(values: Sequence, what: str, source: Path | str) -> None:
    """ValueError with the first of the values that appears twice."""
    if len(set(values)) < len(values):
        value = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{source}: {what} {value} appears twice")


def same_length(what: Iterable, path: Path, others: Iterable, other: Path) -> None:
    """ValueError unless two lists that belong together have equally many entries."""
    if len(what) != len(others):
        raise ValueError(f"{path} has {len(what):,} entries, but {other} {len(others):,}: they do not belong together")


def missing_files(paths: Iterable[Path]) -> list[int]:
    """Indices of the files that do not exist. Reads each folder once, which is fast on network disks too."""

    @functools.cache
    def names(folder: Path) -> set[str]:
        return set(os.listdir(folder)) if folder.is_dir() else set()

    return [index for index, path in enumerate(paths) if path.name not in names(path.parent)]


def listed_images(
    paths: list[Path], targets: list[int] | np.ndarray, classes: list[str], source: Path, allow_subset: bool
) -> FileImages:
    """The images of a list. ValueError if one is listed twice, or missing; allow_subset leaves missing ones out."""
    refuse_duplicates(paths, "image", source)
    missing = missing_files(paths)
    if missing:
        problem = f"{len(missing):,} of the {len(paths):,} images that {source} lists are missing"
        if not allow_subset or len(missing) == len(paths):
            raise ValueError(f"{problem}, the first {paths[missing[0]]}")
        log.info("%s and left out", problem)
        keep = sorted(set(range(len(paths))) - set(missing))
        paths = [paths[index] for index in keep]
        targets = targets[keep] if isinstance(targets, np.ndarray) else [targets[index] for index in keep]
    return FileImages(paths, targets, classes)
