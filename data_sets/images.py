"""Images by their place in a data set: decoded to RGB the same way everywhere, from files or from arrays.

EXIF orientation is ignored, as torchvision's data sets ignore it: published accuracies were measured so.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class UnreadableImage(ValueError):
    """An image that cannot be read. A loader's worker hands its exceptions on with the traceback in their text; this
    one keeps only its own words."""

    def __init__(self, text: str):
        super().__init__(text[max(text.rfind("cannot read image"), 0) :].strip())


class DamagedImage(UnreadableImage):
    """An image whose file can be read and is no image, or not a whole one: what --on_bad_image is about."""


def read_rgb(path: str | Path) -> Image.Image:
    """The image of a file in RGB, 8 bits a channel. What PIL raises where it cannot be decoded, whole.

    As PIL's convert("RGB"): CMYK and palettes become colours, grey is repeated, transparency is dropped. Except for
    16 bits of grey, all but the darkest 256 levels of which PIL would make white: they keep their high byte, which is
    how PIL reads 16 bits of colour.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            high = np.asarray(image).astype(np.int64) >> 8
            return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def read_pixels(path: str | Path) -> Tensor:
    """(3,h,w) uint8: the pixels of read_rgb, to the bit, of JPEG files sooner.

    torchvision's decoder is the library that PIL's is. What it refuses is left to PIL: damaged files, and other colours
    than RGB and grey.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # late: see data_sets.views

    data = np.fromfile(path, dtype=np.uint8)
    if data[:2].tobytes() == b"\xff\xd8":
        with contextlib.suppress(RuntimeError):
            pixels = decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.UNCHANGED)
            if len(pixels) in (1, 3):
                return pixels.expand(3, -1, -1)
    return pixels_of(read_rgb(path))


def pixels_of(image: Image.Image | Tensor) -> Tensor:
    """(3,h,w) uint8 of an image in RGB."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FileImages(Dataset):
    """Images in files. Items are (PIL image, label), a label being a class or a (K,) uint8 row of zeros and ones."""

    def __init__(self, paths: Sequence[str | Path], targets: list[int] | np.ndarray, classes: list[str]):
        self.samples = list(zip(map(str, paths), targets, strict=True))  # as torchvision's ImageFolder has them
        self.targets, self.classes = targets, classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        path, target = self.samples[index]
        return read_rgb(path), target


class ArrayImages(Dataset):
    """Images in an array (n,h,w,3) uint8, perhaps mapped from a file. Items are (PIL image, label)."""

    def __init__(self, pixels: np.ndarray, targets: list[int], classes: list[str]):
        self.pixels, self.targets, self.classes = pixels, targets, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index])), self.targets[index]


WHOLE = 2**30  # bytes of image files up to which all of them are hashed: seconds
SAMPLE = 10_000  # files read of larger data sets


def fingerprint(images: Dataset, local: bool = False) -> str:
    """sha256 that identifies a data set by its pixels, on any machine and in any folder.

    It covers the classes and, in their order, each image's label, file name with the folder above it, file size and
    content; of arrays, the pixels. Of more than WHOLE bytes of files, it covers all sizes, but the content of SAMPLE
    files only, evenly spread: the first WHOLE / SAMPLE bytes of each. A file that is replaced by another of equal size
    may then go unnoticed, except with local = True, which adds the modification times of such data sets: for what stays
    on one machine, as caches do. Copies of a data set may differ in them.
    UnreadableImage for a file that is missing or cannot be read.
    """
    paths = [path for path, _ in getattr(images, "samples", ())]
    names = ["/".join(Path(path).parts[-2:]) for path in paths]
    total = hashlib.sha256(json.dumps([list(map(str, images.classes)), names]).encode())
    total.update(np.asarray(images.targets, dtype=np.int64).tobytes())
    if isinstance(images, ArrayImages):
        for row in images.pixels:
            total.update(np.ascontiguousarray(row))
    stats = np.array(list(_in_threads(_size_and_time, paths)), dtype=np.int64).reshape(-1, 2)
    sizes, times = stats.T
    total.update(sizes.tobytes())
    if sizes.sum() > WHOLE:
        share = WHOLE // SAMPLE
        paths = [paths[index] for index in np.unique(np.linspace(0, len(paths) - 1, SAMPLE, dtype=int))]
        total.update(times.tobytes() if local else b"")
    else:
        share = -1
    for content in _in_threads(functools.partial(_content_digest, share), paths):
        total.update(content)
    return total.hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _content_digest(share: int, path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(share)).digest()


def _in_threads(function: Callable, paths: Sequence[str]) -> Iterator:
    """function(path) in the order of the paths; threads hide the latency of network disks."""

    def apply(start: int) -> list:
        part = []
        for path in paths[start : start + 512]:
            try:
                part.append(function(path))
            except OSError as error:
                raise UnreadableImage(f"cannot read image {path}: {error.strerror}") from error
        return part

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield from itertools.chain.from_iterable(pool.map(apply, range(0, len(paths), 512)))


def path_of(images: Dataset, index: int) -> str:
    """Where an image of a data set is: its file, or its number where it has none."""
    return images.samples[index][0] if hasattr(images, "samples") else f"number {index}"
