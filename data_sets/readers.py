"""The files that data sets come in: lists, labels, archives. Whatever is wrong is one ValueError with the path."""

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from data_sets.images import FileImages
from util import distributed
from util.progress import log


def find_folder(
    root: Path, name: str, marker: str, url: str = "", md5: str | None = None, into: Path | None = None
) -> Path:
    """The folder `name` that a data set unpacks to: in `root`, or `root` itself.

    marker: a path that must be in it. url: of the archive, which is downloaded and unpacked `into` a folder (default:
    root) where the marker is not there; by rank 0, for which the others wait. ValueError where that is not possible.
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
    """The lines of a list that are not empty, without the white space around them."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def read_rows(path: Path, *kinds: Callable[[str], Any]) -> list[tuple]:
    """The rows of a list with one column for each of `kinds`, which reads it: int, str. Lines with # are left out."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line.startswith("#"):
            continue
        words = line.split(maxsplit=len(kinds) - 1)
        try:
            rows.append(tuple(kind(word) for kind, word in zip(kinds, words, strict=True)))
        except ValueError as error:
            wanted = " ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not of the form {wanted}") from error
    return rows


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_matlab(path: Path, name: str, *fields: str) -> np.ndarray:
    """A variable of a MATLAB file, as an array of at least one dimension. fields: what a structure must have."""
    # scipy raises anything over bytes that are no MATLAB file, and over some of them, its process crashes: a child's
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        try:
            content = child.submit(_matlab_variable, path, name).result()
        except BrokenProcessPool as error:
            raise ValueError(f"{path} cannot be read: it is damaged, and crashes its reader") from error
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if content is None:
        raise ValueError(f"{path} has no variable {name!r}")
    found = np.atleast_1d(content)
    if missing := [field for field in fields if field not in (found.dtype.names or ())]:
        raise ValueError(f"{path}: {name!r} has no {', '.join(missing)}")
    return found


def _matlab_variable(path: Path, name: str) -> Any:
    return scipy.io.loadmat(path, squeeze_me=True).get(name)


def read_flags(path: Path) -> np.ndarray:
    """A file of zeros and ones in lines: (n,) uint8."""
    try:
        words = path.read_bytes().split()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if strange := set(words) - {b"0", b"1"}:
        raise ValueError(f"{path}: a label is {sorted(strange)[0][:40].decode(errors='replace')!r}, neither 0 nor 1")
    return np.array([word == b"1" for word in words], dtype=np.uint8)


def read_bytes(path: Path, record: int) -> np.ndarray:
    """A file of records of `record` bytes each, mapped, not read: (n, record) uint8."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not size or size % record:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of records of {record:,}: it is damaged")
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, record)


def zero_based(labels: Iterable[int], classes: int, path: Path, first: int = 1) -> list[int]:
    """Labels counted from `first`, counted from 0. ValueError for one that is none of the classes."""
    found = [int(label) - first for label in labels]
    for number, label in enumerate(found, 1):
        if not 0 <= label < classes:
            raise ValueError(
                f"{path}: label {label + first} of entry {number} is not between {first} and {classes - 1 + first}"
            )
    return found


def same_length(what: Iterable, path: Path, others: Iterable, other: Path) -> None:
    """ValueError unless two lists that belong together have as many entries."""
    if len(what) != len(others):
        raise ValueError(f"{path} has {len(what):,} entries, but {other} {len(others):,}: they do not belong together")


def missing_files(paths: Iterable[Path]) -> list[int]:
    """Which of the files are not there, by position. Reads each folder once, which is fast on shared disks too."""
    content: dict[Path, set[str]] = {}
    missing = []
    for index, path in enumerate(paths):
        folder = path.parent
        if folder not in content:
            content[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if path.name not in content[folder]:
            missing.append(index)
    return missing


def listed_images(
    paths: list[Path], targets: list[int] | np.ndarray, classes: list[str], source: Path, allow_subset: bool
) -> FileImages:
    """The images that a list names. ValueError where some are not there; with allow_subset, they are left out."""
    missing = missing_files(paths)
    if missing:
        words = f"{len(missing):,} of the {len(paths):,} images that {source} names are not there"
        if not allow_subset or len(missing) == len(paths):
            raise ValueError(f"{words}, the first {paths[missing[0]]}")
        log.info("%s, and are left out", words)
        absent = set(missing)
        keep = [index for index in range(len(paths)) if index not in absent]
        paths = [paths[index] for index in keep]
        targets = targets[keep] if isinstance(targets, np.ndarray) else [targets[index] for index in keep]
    return FileImages(paths, targets, classes)
