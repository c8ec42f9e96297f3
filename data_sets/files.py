"""Find the images in folders: which files are read, in which order, and what is skipped."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
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
    """Whether a file or folder of this name (without the folders above it) was left by an operating system or a
    program: hidden, a backup, an unfinished download, or another of SYSTEM_NAMES."""
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


def in_class_order(names: Collection[str], source: Path | str = "") -> list[str]:
    """Names of classes in the order of their labels: alphabetical, or by value if all are numbers. Logs if the two
    orders differ."""
    alphabetical = sorted(names)
    if not all(re.fullmatch("[0-9]+", name) for name in names):
        return alphabetical
    by_value = sorted(names, key=lambda name: (int(name), name))
    if differing := [pair for pair in enumerate(by_value) if pair[1] != alphabetical[pair[0]]]:
        label, name = differing[0]
        message = "%s: class names are numbers and sorted by value, not alphabetically: label %d is %s, not %s"
        log.info(message, source, label, name, alphabetical[label])
    return by_value


class Walk:
    """Lists images in a folder and counts what it skips."""

    def __init__(self, folder: Path):
        self.folder, self.visited = folder, {}
        self.system: list[str] = []
        self.other: Counter[str] = Counter()  # files that are no images, by suffix
        self.read = 0
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries}
        kept = self._without_system(is_folder)
        self.folders = [name for name in kept if is_folder[name]]
        self.beside = [name for name in kept if not is_folder[name] and is_image(name)]

    def _without_system(self, names: Iterable[str]) -> list[str]:
        """The names in order, except those that systems left."""
        kept = []
        for name in sorted(names):
            (self.system if is_system_file(name) else kept).append(name)
        return kept

    def images(self, name: str = "") -> list[str]:
        """Paths of the images in a subfolder (default: the folder) and the folders in it, sorted by folder, then by
        name. ValueError for a folder that is read twice, through a link."""

        def refuse(error: OSError) -> None:  # by default, os.walk skips folders that cannot be read
            raise error

        folders = []
        for path, subfolders, names in os.walk(self.folder / name, followlinks=True, onerror=refuse):
            first = self.visited.setdefault(os.path.realpath(path), path)
            if first != path:
                raise ValueError(f"{path} is a link to {first}, whose images would count twice: remove one of them")
            subfolders[:] = self._without_system(subfolders)
            names = self._without_system(names)
            images = [name for name in names if is_image(name)]
            self.other.update(os.path.splitext(name)[1].lower() or "(no suffix)" for name in set(names) - set(images))
            self.read += len(images)
            folders.append((path, images))
        return [os.path.join(path, name) for path, names in sorted(folders) for name in names]

    def log(self) -> None:
        if self.system:
            names = sorted(set(self.system))
            examples = ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)
            log.info("%s: skipped %d entries left by systems or programs: %s", self.folder, len(self.system), examples)
        if unread := self.other.total():
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self.other.most_common(10))
            log.info("%s: %d of %d files are not read as images: %s", self.folder, unread, unread + self.read, kinds)


def read_class_folders(folder: Path, may_be_empty: bool = False) -> Images:
    """The images of a folder of class folders, with any folders in these. Logs what is skipped.

    may_be_empty: accept and log classes without images. ValueError if there is no class folder, or no image.
    """
    walk = Walk(folder)
    classes = in_class_order(walk.folders, folder)
    if not classes:
        raise ValueError(f"{folder} holds no folder of a class (expected a folder of images per class)")
    paths = [walk.images(name) for name in classes]
    walk.log()
    if walk.beside:
        log.info("%s: %d images beside the class folders are not read", folder, len(walk.beside))
    if empty := [name for name, images in zip(classes, paths, strict=True) if not images]:
        problem = f"{len(empty)} of its class folders hold no image, such as {empty[0]}"
        if not may_be_empty or len(empty) == len(classes):
            raise ValueError(f"{folder} is not an image folder: {problem}: remove them, or put their images in")
        log.info("%s: %s", folder, problem)
    targets = [label for label, images in enumerate(paths) for _ in images]
    return Images(Files(itertools.chain.from_iterable(paths)), targets, classes)


def read_unlabelled(folder: Path) -> Images:
    """The images of a folder for programs that use no labels: of its class folders, or those that lie directly in it,
    as a single class."""
    walk = Walk(folder)
    if not walk.beside or any(walk.images(name) for name in walk.folders):
        return read_class_folders(folder, may_be_empty=True)
    return Images(Files(folder / name for name in walk.beside), [0] * len(walk.beside), ["(unlabelled)"])
