"""Read folders of images, and the lists, labels and archives that data sets are distributed as.

Every fault is a ValueError with the path.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_sets.images import Content, Files, Images
from util import distributed
from util.progress import log

SYSTEM_NAMES = re.compile(  # what systems and programs leave in folders
    r"\..*|~\$.*|.*~|#.*#"  # hidden files, AppleDouble (._a.jpg) and .nfs0 among them; locks and backups of editors
    r"|.*\.(part|partial|crdownload|opdownload|download|filepart|aria2|!ut|tmp)"  # unfinished downloads
    r"|__macosx|icon\r|network trash folder|temporary items|thevolumesettingsfolder|resource\.frk|finder\.dat"
    r"|thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini|autorun\.inf|\$recycle\.bin|recycle[rd]"  # Windows
    r"|system volume information|wpsettings\.dat|indexervolumeguid|found\.\d{3}|.*:zone\.identifier"
    r"|@eadir|@recycle|@recently-snapshot|@tmp|#recycle|#snapshot|~snapshot"  # network storage
    r"|lost\+found|__pycache__|cvs|_vti_cnf|lost\.dir|picasa\.ini|pspbrwse\.jbf|sync\.ffs_db",
    re.IGNORECASE | re.DOTALL,
)


def is_system_file(name: str) -> bool:
    """Whether a file or folder of this name was left by an operating system or a program: see SYSTEM_NAMES."""
    return SYSTEM_NAMES.fullmatch(name) is not None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow decodes, in lower case."""
    Image.init()
    stubs = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # need another program, or hold no pixels
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, format in known if format in Image.OPEN and format not in stubs)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def in_class_order(names: Collection[str], source: Path | str = "labels") -> list[str]:
    """Names of classes in the order of their labels: alphabetical, or by value if all are numbers. Logs if the two
    orders differ."""
    alphabetical = sorted(names)
    if not all(re.fullmatch("[0-9]+", name) for name in names):
        return alphabetical
    by_value = sorted(names, key=lambda name: (int(name), name))
    if by_value != alphabetical:
        label = next(label for label, name in enumerate(by_value) if name != alphabetical[label])
        message = "%s: class names are numbers and sorted by value, not alphabetically: label %d is %s, not %s"
        log.info(message, source, label, by_value[label], alphabetical[label])
    return by_value


def read_class_folders(folder: Path, may_be_empty: bool = False, labels: bool = True) -> Images:
    """The images of a folder of class folders, with any folders in these, sorted by folder, then by name. Logs what is
    skipped.

    may_be_empty: accept and log classes without images. labels: False for programs that use none, which also take a
    folder of images without class folders. ValueError if there is no class folder, or no image; for a folder that is
    read twice, through a link; OSError for one that cannot be read.
    """
    system: list[str] = []
    other: Counter[str] = Counter()  # files that are no images, by suffix
    visited: dict[str, str] = {}

    def kept(names: Collection[str]) -> list[str]:
        system.extend(filter(is_system_file, names))
        return sorted(name for name in names if not is_system_file(name))

    def images_below(top: Path) -> list[str]:
        folders = []
        for path, subfolders, names in os.walk(top, followlinks=True, onerror=fail):
            first = visited.setdefault(os.path.realpath(path), path)
            if first != path:
                raise ValueError(f"{path} is a link to {first}, whose images would count twice: remove one of them")
            subfolders[:] = kept(subfolders)
            names = kept(names)
            other.update(os.path.splitext(name)[1].lower() or "(no suffix)" for name in names if not is_image(name))
            folders.append((path, [name for name in names if is_image(name)]))
        return [os.path.join(path, name) for path, names in sorted(folders) for name in names]

    def fail(error: OSError) -> None:  # by default, os.walk skips folders that cannot be read
        raise error

    _, folders, names = next(os.walk(folder, onerror=fail))
    classes = in_class_order(kept(folders), folder)
    beside = [os.path.join(folder, name) for name in kept(names) if is_image(name)]
    paths = [images_below(folder / name) for name in classes]
    if not labels and beside and not any(paths):
        classes, paths, beside = ["(unlabelled)"], [beside], []
    targets = [label for label, images in enumerate(paths) for _ in images]
    if system:
        examples = ", ".join(map(repr, sorted(set(system))[:5])) + ", ..." * (len(set(system)) > 5)
        log.info("%s: skipped %d entries left by systems or programs: %s", folder, len(system), examples)
    if unread := other.total():
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in other.most_common(10))
        log.info("%s: %d of %d files are not read as images: %s", folder, unread, unread + len(targets), kinds)
    if not classes:
        raise ValueError(f"{folder} holds no folder of a class (expected a folder of images per class)")
    if beside:
        log.info("%s: %d images beside the class folders are not read", folder, len(beside))
    if empty := [name for name, images in zip(classes, paths, strict=True) if not images]:
        problem = f"{len(empty)} of its class folders hold no image, such as {empty[0]}"
        if not may_be_empty or not targets:
            raise ValueError(f"{folder} is not an image folder: {problem}: remove them, or put their images in")
        log.info("%s: %s", folder, problem)
    return Images(Files(path for images in paths for path in images), targets, classes)


# ---- lists and archives


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
    """The folder of an unpacked data set: in `root`, with a name of this pattern, or `root` itself.

    marker: a path that must exist in it. archives: (address, md5); if the marker is missing, rank 0 downloads and
    unpacks them in the folder `into` of root while the others wait.
    """

    def marked() -> Path | None:
        folders = (folder for folder in (*sorted(root.glob(name)), root) if folder.is_dir())
        return next((folder for folder in folders if (folder / marker).exists()), None)

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
    """The lines of a list in UTF-8, stripped, without empty ones. ValueError for a list without any."""
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

    scipy's compiled reader may crash on a damaged file. So elements must fill the file, and be compressed, as in all
    published files, with checksums that hold.
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
    if wrong := [number for number, label in enumerate(shifted) if not 0 <= label < classes]:
        problem = f"label {shifted[wrong[0]] + first} of entry {wrong[0] + 1}"
        raise ValueError(f"{path}: {problem} is not between {first} and {classes - 1 + first}")
    return shifted


def refuse_duplicates(values: Sequence, kind: str, source: Path | str) -> None:
    """ValueError with the first of the values that appears twice."""
    if len(set(values)) < len(values):
        value = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{source}: {kind} {value} appears twice")
