"""The demo: a procedural data set in which the texture of one object is the class.

Each image shows smooth colour clutter, flat distractor shapes and one textured object of the same kinds of shape, which
covers about a tenth of the image. All but the texture is random. Textures keep their identity under the recipe's crops
and flips. So the mean of an image is mostly background, and only the object's patches show the class.

CUES: with "agree", the object's outline shows the class as well; with "conflict", the outline is the class's and the
texture that of another class, which ends the file's name (Geirhos et al., "ImageNet-trained CNNs are biased towards
texture", ICLR 2019). Both show the same scenes but for the texture.

Every image is a function of (seed, split, index) and cues: a PNG file in its class folder. `boxes.csv` beside the
splits holds each object's box: `path,x0,y0,x1,y1`, in pixels, inclusive.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.files import reading
from util.seeding import stable_seed

SIZE = 72  # pixels; the test transform resizes to 73 and crops 64
OBJECT_RADIUS = (9.0, 13.0)  # pixels: a disc of radius 13 covers a tenth of the image
PERIOD = (5.0, 8.0)  # pixels, about one patch
MARGIN = 5  # pixels that the central crop removes on each side


def _wave(t: np.ndarray) -> np.ndarray:
    """Stripes of period 1: a square wave with soft edges, in [-1, 1]."""
    return np.tanh(3.0 * np.sin(2 * np.pi * t))


def _lines(t: np.ndarray) -> np.ndarray:
    """Thin lines of period 1: high near integers, in [-1, 1]."""
    return np.tanh(4.0 * (np.cos(2 * np.pi * t) - 0.6))


# The classes: texture(x, y, sign) in [-1, 1]; x, y in periods from a random origin near the object's centre. A texture
# with a handedness depends on the random sign = +-1, so that a flipped texture is as likely as the original.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "bricks": lambda x, y, sign: np.maximum(_lines(2 * y), _lines(x + 0.5 * np.floor(2 * y))),
    "checks": lambda x, y, sign: np.tanh(4.0 * np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y)),
    "diagonals": lambda x, y, sign: _wave((x + sign * y) / np.sqrt(2)),
    "diamonds": lambda x, y, sign: np.tanh(4.0 * np.sin(np.pi * 1.4 * (x + y)) * np.sin(np.pi * 1.4 * (x - y))),
    "dots": lambda x, y, sign: np.tanh(3.0 * (np.cos(2 * np.pi * x) + np.cos(2 * np.pi * y) - 0.8)),
    "grid": lambda x, y, sign: np.maximum(_lines(x), _lines(y)),
    "horizontals": lambda x, y, sign: _wave(y),
    "rings": lambda x, y, sign: _wave(np.hypot(x, y)),
    "verticals": lambda x, y, sign: _wave(x),
    "zigzags": lambda x, y, sign: _wave(y + np.abs((x / 1.6) % 1.0 - 0.5) * 1.6),
}
CLASSES = tuple(TEXTURES)
CUES = ("texture", "agree", "conflict")

# outlines of the classes where shape is a cue: lobes, and their height relative to the radius (negative: a gap on top)
LOBES = (0, 0.0), (2, 0.35), (2, -0.35), (3, 0.35), (3, -0.35), (4, 0.35), (4, -0.35), (5, 0.35), (6, 0.35), (8, 0.35)


class DemoImage(NamedTuple):
    pixels: np.ndarray  # (SIZE, SIZE, 3) uint8
    label: int
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the object, inclusive
    texture: int  # class of the texture: the label, unless cues conflict


def _clutter(rng: np.random.Generator) -> np.ndarray:
    """A smooth colour field: random low frequencies, (SIZE, SIZE, 3) around 0.5."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    field = np.full((SIZE, SIZE, 3), 0.5) + rng.uniform(-0.15, 0.15, 3)
    for _ in range(4):
        fx, fy = rng.uniform(-1.5, 1.5, 2)
        field += np.sin(2 * np.pi * (fx * x + fy * y + rng.uniform()))[..., None] * rng.uniform(-0.12, 0.12, 3)
    return field


def _shape(rng: np.random.Generator, cx: float, cy: float, radius: float) -> np.ndarray:
    """Soft mask of a disc, a square or a diamond of about the same area, (SIZE, SIZE) in [0, 1]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = np.abs(x - cx), np.abs(y - cy)
    distance = [np.hypot(dx, dy), np.maximum(dx, dy) * 1.13, (dx + dy) * 0.8][rng.integers(3)]
    return np.clip(radius - distance + 0.5, 0, 1)


def _lobed(cx: float, cy: float, radius: float, lobes: int, height: float) -> np.ndarray:
    """Soft mask with an outline of lobes, symmetric to the vertical, with the area of a disc of this radius."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = x - cx, y - cy
    edge = radius * (1 + height * np.cos(lobes * np.arctan2(dx, -dy))) / np.sqrt(1 + height**2 / 2)
    return np.clip(edge - np.hypot(dx, dy) + 0.5, 0, 1)


def render(seed: int, split: str, index: int, cues: str = "texture") -> DemoImage:
    """The image with this index; its class is index mod 10. cues: of CUES."""
    rng = np.random.default_rng(stable_seed("demo", seed, split, index))
    label = texture = index % len(CLASSES)
    if cues == "conflict":
        texture = (label + stable_seed("texture", seed, split, index) % (len(CLASSES) - 1) + 1) % len(CLASSES)
    image = _clutter(rng)
    for _ in range(rng.integers(2, 5)):  # distractors: flat shapes
        mask = _shape(rng, *rng.uniform(0, SIZE, 2), rng.uniform(5, 12))[..., None]
        image = image * (1 - mask) + rng.uniform(0.1, 0.9, 3) * mask

    radius = rng.uniform(*OBJECT_RADIUS)
    lobes, height = LOBES[label]
    reach = radius if cues == "texture" else radius * (1 + abs(height))
    cx, cy = rng.uniform(MARGIN + reach, SIZE - 1 - MARGIN - reach, 2)
    mask = _shape(rng, cx, cy, radius) if cues == "texture" else _lobed(cx, cy, radius, lobes, height)
    period, sign = rng.uniform(*PERIOD), int(rng.choice([-1, 1]))
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    ox, oy = cx + rng.uniform(-0.5, 0.5) * period, cy + rng.uniform(-0.5, 0.5) * period
    value = TEXTURES[CLASSES[texture]]((x - ox) / period, (y - oy) / period, sign)
    base, contrast = rng.uniform(0.35, 0.65, 3), rng.uniform(0.25, 0.4) * rng.choice([-1, 1])
    surface = base + contrast * value[..., None] * rng.uniform(0.7, 1.0, 3)
    image = image * (1 - mask[..., None]) + surface * mask[..., None]

    rows, columns = np.nonzero(mask.max(1) > 0.5)[0], np.nonzero(mask.max(0) > 0.5)[0]
    box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    return DemoImage((np.clip(image, 0, 1) * 255).round().astype(np.uint8), label, box, texture)


def _write(job: tuple[Path, int, str, int, str]) -> tuple[str, int, int, int, int]:
    folder, *key = job
    image, (_, split, index, _) = render(*key), key
    ending = f"-{CLASSES[image.texture]}" if image.texture != image.label else ""
    path = Path(split) / CLASSES[image.label] / f"{index:06d}{ending}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.pixels).save(folder / path, compress_level=1)
    return (path.as_posix(), *image.box)


def generate(
    folder: Path, train: int, val: int, seed: int = 0, workers: int | None = None, cues: str = "texture"
) -> None:
    """Write the data set to `folder`, completely or not at all. Does nothing if the same data set is already there.

    ValueError if `folder` holds anything else, a demo set with other settings included.
    """
    folder = Path(folder)
    if min(train, val) < len(CLASSES):
        raise ValueError(f"{train} training and {val} validation images: each of the {len(CLASSES)} classes needs one")
    description = {"seed": seed, "train": train, "val": val, "size": SIZE, "classes": list(CLASSES), "version": 1}
    description |= {"cues": cues} if cues != "texture" else {}
    if (record := folder / "demo.json").exists():
        with reading(record, "what describes a demo data set"):
            same = json.loads(record.read_text("utf-8")) == description
        if same:
            return
        raise ValueError(f"{folder} holds a demo data set made with other settings: remove it or name another folder")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} holds files that are not a demo data set: name another folder")
    with new_folder(folder) as new, Pool(workers or os.cpu_count()) as pool:
        counts = {"train": train, "val": val}
        jobs = [(new, seed, split, index, cues) for split, count in counts.items() for index in range(count)]
        rows = pool.map(_write, jobs, chunksize=64)
        pool.close()
        pool.join()  # else the end of the block sends SIGTERM, which a worker that waits for a job may not notice
        lines = [",".join(map(str, row)) for row in [("path", "x0", "y0", "x1", "y1"), *rows]]
        (new / "boxes.csv").write_text("\n".join(lines) + "\n")
        (new / "demo.json").write_text(json.dumps(description, indent=1))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` when the block ends well, removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        try:
            yield new
        except OSError as error:
            error.filename = error.filename or str(folder)
            raise
        new.rename(folder)
