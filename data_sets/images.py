"""Images of a data set by index, whatever they are stored in, decoded to RGB in the same way everywhere.

EXIF orientation is ignored, as torchvision's data sets ignore it: published accuracies were measured so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from util.lazy import lazy
from util.seeding import stable_seed

if TYPE_CHECKING:
    from torch import Tensor

torch, torchvision_io = lazy("torch"), lazy("torchvision.io")

ON_BAD_IMAGE = ("error", "skip")
Label = int | np.ndarray  # a class; or (K,) zeros and ones in uint8


class UnreadableImage(ValueError):
    """An image that cannot be read. Of the traceback that a loader's worker passes on, it keeps its own message."""

    def __init__(self, text: str):
        super().__init__(text[max(text.rfind("cannot read image"), 0) :].strip())


class DamagedImage(UnreadableImage):
    """Content that is not a complete image, which --on_bad_image may skip."""


# ---- decoding


def decode(content: bytes | np.ndarray, name: str) -> Image.Image:
    """The image of an encoded file or of pixels (h,w,3) uint8 in RGB, as Pillow converts it; of an animation, the first
    frame.

    UnreadableImage for more than 8 bits a channel: which of their values are black and white is not in the file, and
    Pillow would make 12 bits in a 16-bit file nearly black. Whatever Pillow raises if the image cannot be decoded.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(content))
    with Image.open(io.BytesIO(content)) as image:
        if kind := deep_pixels(image, content):
            raise UnreadableImage(
                f"cannot read image {name}: its pixels have more than 8 bits ({image.format}, {kind}); scale the values"
                " that mean black to white to 0 to 255 and save it with 8 bits a channel"
            )
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def deep_pixels(image: Image.Image, content: bytes) -> str:
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
        # JPEG 2000: bits of the first channel are in the SIZ segment, the code stream's first (ISO 15444-1, A.5.1)
        segment = content.find(b"\xff\x4f\xff\x51", 0, len(content) - 42)
        if codec == "jpeg2k" and segment >= 0 and (bits := (content[segment + 42] & 0x7F) + 1) > 8:
            return f"{bits} bits"
    return ""


BITS_PER_SAMPLE = 258  # TIFF tag


def decode_tensor(content: bytes | np.ndarray, name: str) -> Tensor:
    """(3,h,w) uint8: the pixels of `decode`, to the bit, but of JPEG files faster. torchvision uses the same JPEG
    library; what it refuses is left to Pillow: damaged files, and colours other than RGB and grey."""
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content).permute(2, 0, 1)
    if content[:2] == b"\xff\xd8":
        with contextlib.suppress(RuntimeError):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = torchvision_io.decode_jpeg(data, mode=torchvision_io.ImageReadMode.UNCHANGED)
            if len(pixels) in (1, 3):
                return pixels.expand(3, -1, -1)
    return pixels_of(decode(content, name))


def pixels_of(image: Image.Image | Tensor) -> Tensor:
    """(3,h,w) uint8 of an image in RGB."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- data sets


class Content(Protocol):
    """Stored images: Files, Pixels, and the Slices and TableRows of other modules."""

    names: Sequence[str]  # for messages

    def read(self, index: int) -> bytes | np.ndarray: ...  # an encoded file, or pixels (h,w,3) uint8
    def part(self, indices: Sequence[int]) -> Content: ...
    def stats(self) -> np.ndarray: ...  # (n,2) int64: bytes, and when the file was modified (ns; 0: never)


class Files:
    """A file for each image."""

    def __init__(self, paths: Iterable[str | Path]):
        self.names = list(map(str, paths))

    def read(self, index: int) -> bytes:
        with open(self.names[index], "rb") as file:
            return file.read()

    def part(self, indices: Sequence[int]) -> Files:
        return type(self)(self.names[index] for index in indices)

    def stats(self) -> np.ndarray:
        stats = _in_threads(lambda index: os.stat(self.names[index]), range(len(self.names)), self.names)
        return np.array([(status.st_size, status.st_mtime_ns) for status in stats], np.int64).reshape(-1, 2)


class Pixels:
    """An array (n,h,w,3) uint8, perhaps mapped from a file."""

    def __init__(self, pixels: np.ndarray):
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pixels are {pixels.dtype} of shape {pixels.shape}: they must be uint8, (n, h, w, 3)")
        self.pixels, self.names = pixels, [f"number {index}" for index in range(len(pixels))]

    def read(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def part(self, indices: Sequence[int]) -> Pixels:
        return Pixels(self.pixels[indices])

    def stats(self) -> np.ndarray:
        return np.full((len(self.pixels), 2), (self.pixels[:1].nbytes, 0))


WHOLE = 2**30  # bytes of images up to which all of them are hashed: seconds
SAMPLE = 4096  # images that are read of larger data sets


class Images:
    """Images with labels: items (PIL image in RGB, label). targets: a list of n classes, or (n,K) zeros and ones."""

    def __init__(self, content: Content, targets: Sequence[int] | np.ndarray, classes: Sequence[str]):
        self.content, self.classes, self.names = content, list(classes), content.names
        self.targets = targets if isinstance(targets, np.ndarray) else list(targets)
        if len(self.names) != len(self.targets):
            raise ValueError(f"{len(self.names):,} images, but {len(self.targets):,} labels")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]:
        return decode(self.content.read(index), self.names[index]), self.targets[index]

    @functools.cached_property
    def samples(self) -> list[tuple[str, Label]]:
        """(path, label) as in torchvision's ImageFolder; AttributeError unless every image has a file of its own."""
        if not isinstance(self.content, Files):
            raise AttributeError("samples")
        return list(zip(self.names, self.targets, strict=True))

    def part(self, indices: Sequence[int]) -> Images:
        """Some of the images, in the order of `indices`."""
        several = isinstance(self.targets, np.ndarray)
        targets = self.targets[indices] if several else [self.targets[index] for index in indices]
        return Images(self.content.part(indices), targets, self.classes)

    @functools.cached_property
    def stats(self) -> np.ndarray:
        return self.content.stats()

    @functools.cached_property
    def digests(self) -> np.ndarray | None:
        """(n,32) uint8: sha256 of each image's content; None if they have more than WHOLE bytes altogether."""
        if self.stats[:, 0].sum() > WHOLE:
            return None
        return np.frombuffer(b"".join(self.sha256(range(len(self)))), np.uint8).reshape(-1, 32)

    def sha256(self, indices: Sequence[int], limit: int | None = None) -> Iterator[bytes]:
        """Of the first `limit` bytes of images."""

        def digest(index: int) -> bytes:
            content = self.content.read(index)
            return hashlib.sha256((content if isinstance(content, bytes) else content.tobytes())[:limit]).digest()

        return _in_threads(digest, indices, self.names)


class Example(NamedTuple):
    """An image for figures and maps."""

    path: str
    index: int | None  # in the data set; None for another file
    image: Image.Image | Tensor


def read_image(path: str | Path) -> Image.Image:
    """The image of a file, in RGB. ValueError names a file that is not an image."""
    try:
        return decode(Path(path).read_bytes(), os.fspath(path))
    except Exception as error:  # decoders raise anything
        text = str(error)
        raise ValueError(text if "cannot read image" in text else f"cannot read image {path}: {text}") from error


def random_examples(images: Images, chosen: Sequence[int], count: int, seed: int) -> list[Example]:
    """Some of the chosen images, a function of the seed; damaged ones, which the pass over the images reports, are
    skipped."""
    generator = torch.Generator().manual_seed(stable_seed("examples", seed))
    examples = []
    for index in (chosen[position] for position in torch.randperm(len(chosen), generator=generator).tolist()):
        if len(examples) < count:
            with contextlib.suppress(DamagedImage, OSError, SyntaxError, ValueError):
                examples.append(Example(images.names[index], index, images[index][0]))
    return examples


def fingerprint(images: Images, local: bool = False) -> str:
    """sha256 of classes and, in order, each image's label and content: equal on any machine and in any container.

    Of more than WHOLE bytes of images, it covers all sizes, but the content of SAMPLE images only, evenly spread: the
    first WHOLE / SAMPLE bytes of each. local: add the modification times of such data sets, for what stays on one
    machine, as caches do. UnreadableImage for a file that is missing or cannot be read.
    """
    total = hashlib.sha256(json.dumps(list(map(str, images.classes))).encode())
    total.update(np.asarray(images.targets, dtype=np.int64).tobytes())
    if images.digests is not None:
        total.update(images.digests)
        return total.hexdigest()
    total.update(np.ascontiguousarray(images.stats if local else images.stats[:, :1]))
    chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE, dtype=int))
    for digest in images.sha256(chosen, WHOLE // SAMPLE):
        total.update(digest)
    return total.hexdigest()


def _in_threads(function: Callable[[int], Any], indices: Sequence[int], names: Sequence[str]) -> Iterator:
    """function(index) in the order of the indices; threads hide the latency of network disks."""

    def checked(index: int) -> Any:
        try:
            return function(index)
        except OSError as error:
            raise UnreadableImage(f"cannot read image {names[index]}: {error.strerror or error}") from error

    with ThreadPool(16) as pool:
        yield from pool.imap(checked, indices, 512)
