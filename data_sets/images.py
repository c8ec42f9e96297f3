"""Images by their place in a data set: decoded to RGB the same way everywhere, from files or from arrays.

EXIF orientation is ignored, as torchvision's data sets ignore it: published accuracies were measured so.
"""

import contextlib
import hashlib
from collections.abc import Sequence
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


def fingerprint(images: Dataset) -> str:
    """sha256 of what a data set lists: classes, and the label and name of each image, in its order; not its pixels.

    Folders above an image's own do not count, so that a data set may move.
    """
    total = hashlib.sha256("\n".join(map(str, images.classes)).encode())
    total.update(np.asarray(images.targets, dtype=np.int64).tobytes())
    for path, _ in getattr(images, "samples", ()):
        total.update("/".join(Path(path).parts[-2:]).encode() + b"\n")
    return total.hexdigest()


def path_of(images: Dataset, index: int) -> str:
    """Where an image of a data set is: its file, or its number where it has none."""
    return images.samples[index][0] if hasattr(images, "samples") else f"number {index}"
