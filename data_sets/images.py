"""Images of a data set by index: decoded to RGB in the same way everywhere, from files or from arrays.

EXIF orientation is ignored, as torchvision's data sets ignore it: published accuracies were measured so.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch, io = lazy("torch"), lazy("torchvision.io")

ON_BAD_IMAGE = ("error", "skip")


class UnreadableImage(ValueError):
    """An image that cannot be read. A loader's worker passes its exceptions on with the traceback in their text; this
    one keeps its own text only."""

    def __init__(self, text: str):
        super().__init__(text[max(text.rfind("cannot read image"), 0) :].strip())


class DamagedImage(UnreadableImage):
    """A file that can be read, but does not hold a complete image: what --on_bad_image is about."""


def read_rgb(path: str | Path) -> Image.Image:
    """The image of a file in RGB, 8 bits a channel; of an animation, the first frame.

    As Pillow's convert("RGB"): CMYK and palettes become colours, grey is repeated, transparency is dropped.
    UnreadableImage for more than 8 bits a channel: which of their values are black and white is not in the file, and
    Pillow would clip grey and cut colours, so that 12 bits in a 16-bit file become nearly black. Whatever Pillow
    raises if the image cannot be decoded.
    """
    with Image.open(path) as image:
        if kind := deep_pixels(image):
            raise UnreadableImage(
                f"cannot read image {path}: its pixels have more than 8 bits ({image.format}, {kind}); scale the values"
                " that mean black to white to 0 to 255 and save it with 8 bits a channel"
            )
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def deep_pixels(image: Image.Image) -> str:
    """How the pixels of an opened, not yet loaded image are stored if they have more than 8 bits a channel; else ""."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return f"mode {image.mode}"
    if image.format == "TIFF" and max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8:
        return f"{max(image.tag_v2[BITS_PER_SAMPLE])} bits"
    for codec, *_, args in image.tile:
        args = args if isinstance(args, tuple) else (args,)
        if raw := re.match(r"(?!BGR)\w+;(?:16|32)", str(args[0])):  # BGR;16 is 5, 6 and 5 bits
            return raw[0]
        if codec == "SGI16" or (codec.startswith("ppm") and args[-1] > 255):
            return "16 bits"
        if codec == "jpeg2k" and (bits := _jpeg2000_bits(image.filename)) > 8:
            return f"{bits} bits"
    return ""


BITS_PER_SAMPLE = 258  # TIFF tag


def _jpeg2000_bits(path: str | Path) -> int:
    """Bits of the first channel: in the SIZ segment, with which the code stream begins (ISO 15444-1, A.5.1)."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    segment = head.find(b"\xff\x4f\xff\x51")
    return (head[segment + 42] & 0x7F) + 1 if 0 <= segment < len(head) - 42 else 8


def read_pixels(path: str | Path) -> Tensor:
    """(3,h,w) uint8: the pixels of read_rgb, to the bit, but JPEG files faster.

    torchvision uses the same JPEG library as Pillow. What it refuses is left to Pillow: damaged files, and colours
    other than RGB and grey.
    """
    data = np.fromfile(path, dtype=np.uint8)
    if data[:2].tobytes() == b"\xff\xd8":
        with contextlib.suppress(RuntimeError):
            pixels = io.decode_jpeg(torch.from_numpy(data), mode=io.ImageReadMode.UNCHANGED)
            if len(pixels) in (1, 3):
                return pixels.expand(3, -1, -1)
    return pixels_of(read_rgb(path))


def pixels_of(image: Image.Image | Tensor) -> Tensor:
    """(3,h,w) uint8 of an image in RGB."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


WHOLE = 2**30  # bytes of image files up to which all of them are hashed: seconds
SAMPLE = 4096  # files that are read of larger data sets


class FileImages:
    """Images in files. Items are (PIL image, label), a label being a class or a (K,) uint8 row of zeros and ones."""

    def __init__(self, paths: Sequence[str | Path], targets: list[int] | np.ndarray, classes: list[str]):
        self.samples = list(zip(map(str, paths), targets, strict=True))  # as torchvision's ImageFolder has them
        self.targets, self.classes = targets, classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        path, target = self.samples[index]
        return read_rgb(path), target

    @functools.cached_property
    def stats(self) -> np.ndarray:
        """(n,2) int64: size and modification time in ns of each file."""
        stats = _in_threads(os.stat, [path for path, _ in self.samples])
        return np.array([(status.st_size, status.st_mtime_ns) for status in stats], np.int64).reshape(-1, 2)

    @functools.cached_property
    def digests(self) -> np.ndarray | None:
        """(n,32) uint8: sha256 of each image's content; None if the files have more than WHOLE bytes altogether."""
        if self.stats[:, 0].sum() > WHOLE:
            return None
        contents = _in_threads(functools.partial(_sha256, -1), [path for path, _ in self.samples])
        return np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 32)


class ArrayImages:
    """Images in an array (n,h,w,3) uint8, perhaps mapped from a file. Items are (PIL image, label)."""

    def __init__(self, pixels: np.ndarray, targets: list[int], classes: list[str]):
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}: they must be uint8, (n, h, w, 3)")
        self.pixels, self.targets, self.classes = pixels, targets, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index])), self.targets[index]

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """(n,32) uint8: sha256 of each image's content."""
        contents = (hashlib.sha256(np.ascontiguousarray(image)).digest() for image in self.pixels)
        return np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 32)


def fingerprint(images: FileImages | ArrayImages, local: bool = False) -> str:
    """sha256 that identifies a data set by its pixels, on any machine and in any folder.

    It covers the classes and, in their order, each image's label, file name with the folder above it, and content. Of
    more than WHOLE bytes of files, it covers all sizes, but the content of SAMPLE files only, evenly spread: the first
    WHOLE / SAMPLE bytes of each. A file that is replaced by another of equal size may then go unnoticed, except with
    local = True, which adds the modification times of such data sets: for what stays on one machine, as caches do.
    Copies of a data set may differ in them.
    UnreadableImage for a file that is missing or cannot be read.
    """
    paths = [path for path, _ in getattr(images, "samples", ())]
    names = ["/".join(Path(path).parts[-2:]) for path in paths]
    total = hashlib.sha256(json.dumps([list(map(str, images.classes)), names]).encode())
    total.update(np.asarray(images.targets, dtype=np.int64).tobytes())
    if images.digests is not None:
        total.update(images.digests)
        return total.hexdigest()
    total.update(np.ascontiguousarray(images.stats if local else images.stats[:, :1]))
    chosen = np.unique(np.linspace(0, len(paths) - 1, SAMPLE, dtype=int))
    for content in _in_threads(functools.partial(_sha256, WHOLE // SAMPLE), [paths[index] for index in chosen]):
        total.update(content)
    return total.hexdigest()


def _sha256(limit: int, path: str) -> bytes:
    """Of the first bytes of a file; limit = -1: of all."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(limit)).digest()


def _in_threads(function: Callable, paths: Sequence[str]) -> Iterator:
    """function(path) in the order of the paths; threads hide the latency of network disks."""

    def apply(start: int) -> list:
        results = []
        for path in paths[start : start + 512]:
            try:
                results.append(function(path))
            except OSError as error:
                raise UnreadableImage(f"cannot read image {path}: {error.strerror}") from error
        return results

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield from itertools.chain.from_iterable(pool.map(apply, range(0, len(paths), 512)))


def path_of(images: FileImages | ArrayImages, index: int) -> str:
    """The path of an image of a data set, or its number if it has no file."""
    return images.samples[index][0] if hasattr(images, "samples") else f"number {index}"
