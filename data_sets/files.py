"""Find the images in folders of classes: what is read, in which order, and what is skipped."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from data_sets.images import FileImages
from util.progress import log

# what systems and programs leave in folders, beside all names that begin with a dot
SYSTEM_NAMES = {
    "macOS": ("__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder",
              "resource.frk", "finder.dat"),
    "Windows": ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "autorun.inf", "$recycle.bin",
                "recycler", "recycled", "system volume information", "wpsettings.dat", "indexervolumeguid"),
    "Linux": ("lost+found",),
    "network storage": ("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot"),
    "programs": ("__pycache__", "cvs", "_vti_cnf", "lost.dir", "picasa.ini", "pspbrwse.jbf", "sync.ffs_db"),
}  # fmt: skip
SYSTEM_PATTERN = re.compile(
    r"\..*|~\$.*|.*~|#.*#"  # hidden files, AppleDouble (._a.jpg) and .nfs0 among them; locks and backups of editors
    r"|found\.\d{3}|.*:zone\.identifier"
    r"|.*\.(part|partial|crdownload|opdownload|download|filepart|aria2|!ut|tmp)"  # unfinished downloads
    r"|" + "|".join(re.escape(name) for names in SYSTEM_NAMES.values() for name in names),
    re.IGNORECASE | re.DOTALL,
)


def is_system_file(name: str) -> bool:
    """Whether a file or folder of this name (without the folders above it) is no part of a data set, but left in it by
    an operating system or a program: hidden, a backup, an unfinished download, or one of SYSTEM_NAMES."""
    return SYSTEM_PATTERN.fullmatch(name) is not None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow decodes, in lower case."""
    Image.init()
    stubs = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # need another program, or hold no pixels
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, format in known if format in Image.OPEN and format not in stubs)


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class Skipped:
    """Counts what is not read in a folder."""

    def __init__(self) -> None:
        self.beside = 0  # images that are in no class folder
        self.system: list[str] = []
        self.suffixes: Counter[str] = Counter()
        self.read = 0

    def without_system(self, names: Iterable[str]) -> list[str]:
        """The names in order, but for those that systems left."""
        kept = []
        for name in sorted(names):
            (self.system if is_system_file(name) else kept).append(name)
        return kept

    def images(self, names: Iterable[str]) -> list[str]:
        """The names of images among those of files."""
        kept = self.without_system(names)
        images = [name for name in kept if suffix(name) in image_suffixes()]
        self.read += len(images)
        self.suffixes.update(suffix(name) or "(no suffix)" for name in set(kept) - set(images))
        return images

    def log(self, folder: Path) -> None:
        if self.system:
            names = sorted(set(self.system))
            examples = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
            log.info("%s: skipped %d entries left by systems or programs: %s", folder, len(self.system), examples)
        if unread := self.suffixes.total():
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self.suffixes.most_common(10))
            log.info("%s: %d of %d files are not read as images: %s", folder, unread, unread + self.read, kinds)
        if self.beside:
            log.info("%s: %d images beside the class folders are not read", folder, self.beside)


def class_names(folder: Path, skipped: Skipped) -> list[str]:
    """The class folders in a folder in the order of their labels: alphabetical, or by value if all are numbers."""
    with os.scandir(folder) as entries:
        is_folder = {entry.name: entry.is_dir() for entry in entries}
    kept = skipped.without_system(is_folder)
    names = [name for name in kept if is_folder[name]]
    skipped.beside = sum(not is_folder[name] and suffix(name) in image_suffixes() for name in kept)
    if names and all(re.fullmatch("[0-9]+", name) for name in names):
        numeric = sorted(names, key=lambda name: (int(name), name))
        if numeric != names:
            first = next(label for label, name in enumerate(numeric) if name != names[label])
            log.info(
                "%s: class folders are numbers and sorted by value, not alphabetically: label %d is folder %s, not %s",
                folder, first, numeric[first], names[first],
            )  # fmt: skip
        return numeric
    return names


def images_below(folder: Path, skipped: Skipped, visited: dict[str, str]) -> list[str]:
    """Paths of the images in a folder and the folders in it, sorted by folder, then by name.

    visited: real path of each folder read so far. ValueError for one that is read twice, through a link.
    """

    def refuse(error: OSError) -> None:  # os.walk skips folders that cannot be read unless told otherwise
        raise error

    folders = []
    for path, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        first = visited.setdefault(os.path.realpath(path), path)
        if first != path:
            raise ValueError(f"{path} is a link to {first}, whose images would count twice: remove one of them")
        subfolders[:] = skipped.without_system(subfolders)
        folders.append((path, skipped.images(names)))
    return [os.path.join(path, name) for path, names in sorted(folders) for name in names]


def read_class_folders(folder: Path) -> FileImages:
    """The images of a folder of class folders, with any folders in these. Logs what is skipped.

    ValueError if there is no class folder, or one without images.
    """
    skipped, visited = Skipped(), {}
    classes = class_names(folder, skipped)
    if not classes:
        raise ValueError(f"{folder} holds no folder of a class (expected a folder of images per class)")
    paths: list[str] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        paths += images_below(folder / name, skipped, visited)
        targets += [label] * (len(paths) - len(targets))
    skipped.log(folder)
    if empty := [classes[label] for label in sorted(set(range(len(classes))) - set(targets))]:
        problem = f"{len(empty)} of its class folders hold no image, such as {empty[0]}"
        raise ValueError(f"{folder} is not an image folder: {problem}: remove them, or put their images in")
    return FileImages(paths, targets, classes)
