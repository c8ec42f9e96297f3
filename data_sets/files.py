"""Find the images in folders: which files are read, in which order, and what is skipped."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from data_sets.images import Files, Images
from util.progress import log

# what systems and programs leave in folders
SYSTEM_NAMES = re.compile(
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
        for path, subfolders, names in os.walk(top, followlinks=True, onerror=_raise):
            first = visited.setdefault(os.path.realpath(path), path)
            if first != path:
                raise ValueError(f"{path} is a link to {first}, whose images would count twice: remove one of them")
            subfolders[:] = kept(subfolders)
            names = kept(names)
            other.update(os.path.splitext(name)[1].lower() or "(no suffix)" for name in names if not is_image(name))
            folders.append((path, [name for name in names if is_image(name)]))
        return [os.path.join(path, name) for path, names in sorted(folders) for name in names]

    _, folders, names = next(os.walk(folder, onerror=_raise))
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


def _raise(error: OSError) -> None:  # by default, os.walk skips folders that cannot be read
    raise error
