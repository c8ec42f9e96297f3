"""BOX_SOURCES: bounding boxes of images, read from the files in which they are published.

Boxes are x0, y0, x1, y1 in pixels of the image, inclusive, exactly as written in the file.
"""

from __future__ import annotations

import contextlib
import csv
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from data_sets.readers import is_system_file, missing_files
from data_sets.views import CROP_PCT
from util.files import digest
from util.progress import log

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Size = tuple[int, int]  # width and height
BOX, SIDES = ("x0", "y0", "x1", "y1"), ("width", "height")
MAX_SIDE = 2**31  # in pixels; beyond any image format


class Annotation(NamedTuple):
    boxes: list[tuple[int, int, int, int]]
    size: Size | None  # of the image in which the boxes were drawn, if the source states it


class Row(NamedTuple):
    """A box as a file has it."""

    where: str  # file and line, for errors
    image: str
    box: Sequence[str | None]  # x0, y0, x1, y1
    size: Sequence[str | None] = ()  # width, height


class BoxSource(NamedTuple):
    """A file format. `fits(path)` detects it and `rows(path)` yields its boxes.

    An image is named by its path, absolute or relative to the file's folder (by_path), else by its file name without
    suffix.
    """

    description: str
    fits: Callable[[Path], bool]
    rows: Callable[[Path], Iterable[Row]]
    by_path: bool = False


# ---- formats


def _integers(where: str, texts: Sequence[str | None], meaning: str) -> list[int]:
    """Whole numbers, which tables of floats write as 10.0; ValueError for all else."""
    with contextlib.suppress(TypeError, ValueError):
        numbers = [float(text) for text in texts]
        if all(number.is_integer() for number in numbers):
            return [int(number) for number in numbers]
    raise ValueError(f"{where}: {', '.join(text or '' for text in texts)} are not {meaning}")


def _annotations(rows: Iterable[Row]) -> dict[str, Annotation]:
    annotations: dict[str, Annotation] = {}
    for where, image, texts, sides in rows:
        x0, y0, x1, y1 = box = tuple(_integers(where, texts, "four integers x0, y0, x1, y1"))
        size = tuple(_integers(where, sides, "a width and height in pixels")) if sides else None
        known = annotations.setdefault(image, Annotation([], size))
        if not (0 <= x0 <= x1 < MAX_SIDE and 0 <= y0 <= y1 < MAX_SIDE):
            problem = f"{x0}, {y0}, {x1}, {y1} is not a box: need 0 <= x0 <= x1 and 0 <= y0 <= y1"
        elif size is not None and min(size) < 1:
            problem = f"no image has {size[0]} x {size[1]} pixels"
        elif size is not None and (x1 > size[0] or y1 > size[1]):  # VOC counts from 1: a box may end at the width
            problem = f"{x0}, {y0}, {x1}, {y1} exceeds its image of {size[0]} x {size[1]} pixels"
        elif not image:
            problem = "the image has no name"
        elif known.size != size:
            problem = f"{image} has two sizes, {known.size} and {size} pixels: correct one of them"
        else:
            known.boxes.append(box)
            continue
        raise ValueError(f"{where}: {problem}")
    return annotations


def _table(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, row) of a table with these columns (default: those that its first line names)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, columns)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where} does not have {len(reader.fieldnames)} columns")
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _columns(path: Path) -> list[str]:
    """Those that the first line of a table names; none if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError, csv.Error), open(path, newline="", encoding="utf-8-sig") as f:
        return next(csv.reader(f), [])
    return []


def _xml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.xml") if not is_system_file(path.name))


def _xml_folder(folder: Path) -> Iterator[Row]:
    """One PASCAL VOC file per image: ILSVRC2012_bbox_val_v3.tgz, or Annotations/CLS-LOC/val."""
    for path in _xml_files(folder):
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, OSError) as error:
            raise ValueError(f"{path} is not an annotation in XML: {error}") from error
        size = [tree.findtext(f"size/{side}") for side in SIDES]
        for item in tree.iterfind("object[bndbox]"):
            box = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            yield Row(str(path), path.stem, box, size)


def _kaggle(path: Path) -> Iterator[Row]:
    """LOC_val_solution.csv: ILSVRC2012_val_00048981,n03995372 85 1 499 272 n03995372 ..."""
    for where, row in _table(path):
        fields = row["PredictionString"].split()
        if not fields or len(fields) % 5:
            raise ValueError(f"{where}: {' '.join(fields)[:60]!r} is not of the form WNID X0 Y0 X1 Y1 ...")
        for start in range(0, len(fields), 5):
            yield Row(where, row["ImageId"], fields[start + 1 : start + 5])


def _wsol(path: Path) -> Iterator[Row]:
    """localization.txt with a line `path,x0,y0,x1,y1` per box, beside image_sizes.txt with `path,width,height`."""
    path = path / "localization.txt" if path.is_dir() else path
    size_file, images = path.parent / "image_sizes.txt", {}
    sizes = {row["path"]: [row[side] for side in SIDES] for _, row in _table(size_file, ("path", *SIDES))}
    for where, row in _table(path, ("path", *BOX)):
        image, stem = row["path"], Path(row["path"]).stem
        if image not in sizes:
            raise ValueError(f"{where}: {image} is not in {size_file}")
        if images.setdefault(stem, image) != image:
            raise ValueError(f"{where}: {image} and {images[stem]} have the same file name in different folders")
        yield Row(where, stem, [row[side] for side in BOX], sizes[image])


def _csv(path: Path) -> Iterator[Row]:
    """Columns path (or file), x0, y0, x1, y1 in any order; w and h (or width and height), if present, are the image's
    size."""
    path = path / "boxes.csv" if path.is_dir() else path
    columns = _columns(path)
    name = "file" if "file" in columns and "path" not in columns else "path"
    sides = next((sides for sides in (("w", "h"), SIDES) if set(sides) & set(columns)), ())
    for column in (name, *BOX, *sides):
        if (count := columns.count(column)) != 1:
            raise ValueError(f"{path} has {count} columns called {column} instead of 1: {', '.join(columns)}")
    for where, row in _table(path):
        image = row[name].replace("\\", "/")
        yield Row(where, image and os.path.normpath(image), [row[x] for x in BOX], [row[side] for side in sides])


BOX_SOURCES = {
    "imagenet-xml": BoxSource(
        "folder of ImageNet's annotations, one XML file per image",
        lambda path: path.is_dir() and bool(_xml_files(path)),
        _xml_folder,
    ),
    "imagenet-csv": BoxSource(
        "LOC_val_solution.csv of Kaggle",
        lambda path: path.suffix == ".csv" and _columns(path)[:2] == ["ImageId", "PredictionString"],
        _kaggle,
    ),
    "wsol": BoxSource(
        "localization.txt of wsolevaluation, or its folder, with image_sizes.txt",
        lambda path: path.name == "localization.txt" or (path / "localization.txt").is_file(),
        _wsol,
    ),
    "csv": BoxSource(
        "table with the columns path, x0, y0, x1, y1, or a folder with such a boxes.csv",
        lambda path: (path.suffix == ".csv" and set(BOX) <= set(_columns(path))) or (path / "boxes.csv").is_file(),
        _csv,
        by_path=True,
    ),
}


# ---- the boxes of a data set


class ImageBoxes:
    """The true boxes of a data set's images, in pixels of the transformed image.

    images: their files are opened for their size; None: every annotation states its own. crop_pct: of the encoder's
    central crop.
    """

    crop_pct: float | None = CROP_PCT

    def __init__(self, images: Dataset | None, annotations: Sequence[Annotation | None], source: Path):
        self.images, self.annotations, self.source = images, annotations, source

    def fingerprint(self) -> str:
        return digest([annotation and (annotation.boxes, annotation.size) for annotation in self.annotations])

    def original(self, index: int) -> tuple[np.ndarray, Size]:
        """Boxes (m,4), and the size of the image in which they were drawn. ValueError if they do not fit the file."""
        annotation = self.annotations[index]
        boxes = np.array(annotation.boxes, np.int64)
        if self.images is None:
            return boxes, annotation.size
        path = self.images.samples[index][0]
        with Image.open(path) as image:
            width, height = image.size
        if annotation.size is None:
            if (boxes[:, 2:] > (width, height)).any():
                raise ValueError(f"{self.source}: a box of {path} exceeds the image of {width} x {height} pixels")
            return boxes, (width, height)
        w, h = annotation.size
        if abs(width * h - height * w) > max(width + height, w + h):  # more than rounding: cropped or rotated
            raise ValueError(
                f"{self.source}: the boxes of {path} were drawn in an image of {w} x {h} pixels, but the file has "
                f"{width} x {height}, another aspect ratio: use the images that were annotated"
            )
        return boxes, annotation.size

    def resized(self, index: int, size: int) -> np.ndarray:
        """(m,4) in the image stretched to size x size, truncated to integers."""
        boxes, (width, height) = self.original(index)
        return (boxes * float(size) / np.array([width, height, width, height])).astype(np.int64)

    def cropped(self, index: int, size: int) -> np.ndarray:
        """(m,4) in the view of data_sets.views.eval_transform: clipped to the crop; boxes outside of it are dropped."""
        if self.crop_pct is None:
            return self.resized(index, size)
        boxes, sides = self.original(index)
        # torchvision's Resize of the shorter side, and its CenterCrop
        short, target = min(sides), int(size / self.crop_pct)
        resized = [target if side == short else int(target * side / short) for side in sides]
        corner = [round((side - size) / 2.0) for side in resized]
        moved = boxes * np.tile(np.array(resized) / np.array(sides), 2) - np.tile(corner, 2)
        inside = (moved[:, 2:] >= 0).all(1) & (moved[:, :2] < size).all(1)
        return moved[inside].clip(0, size - 1).astype(np.int64)


def read_boxes(
    path: Path, kind: str | None, images: Dataset, root: Path, chosen: Sequence[int], allow_subset: bool = False
) -> ImageBoxes:
    """The boxes of the chosen images of a data set in the folder `root`.

    kind: a name in BOX_SOURCES; None: detected. ValueError for a source of unknown format or with damaged content, for
    chosen images without a box, and for boxes of images that do not exist (logged instead with allow_subset).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    kind = kind or next((name for name, source in BOX_SOURCES.items() if source.fits(path)), None)
    if kind is None:
        known = "; ".join(f"{name}, {source.description}" for name, source in BOX_SOURCES.items())
        raise ValueError(f"{path} has none of the known formats: {known}")
    if not hasattr(images, "samples"):
        raise ValueError(f"{path}: boxes are matched by file name, but the images of this data set are not files")
    annotations, path_and_kind = _annotations(BOX_SOURCES[kind].rows(path)), f"{path} ({kind})"
    if not annotations:
        raise ValueError(f"{path_and_kind} holds no boxes")
    if BOX_SOURCES[kind].by_path:
        keys, absent = _match_paths(images, annotations, (path if path.is_dir() else path.parent, Path(root)))
    else:
        keys = [Path(file).stem for file, _ in images.samples]
        absent = sorted(annotations.keys() - set(keys))
        name, count = Counter(keys).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{path_and_kind} names images without their folder, but two images are called {name}")
    matched = [annotations.get(key) for key in keys]
    if not any(matched):
        other, first = next(iter(annotations)), images.samples[0][0]
        raise ValueError(f"{path_and_kind} has boxes of other images, such as {other}, and none of {first}")
    if absent:
        message = f"{path}: {len(absent):,} images with boxes do not exist, the first {absent[0]}"
        if not allow_subset:
            raise ValueError(f"{message}; --allow_subset ignores them")
        log.info("%s", message)
    if without := [images.samples[index][0] for index in chosen if matched[index] is None]:
        counts = f"{len(without):,} of {len(chosen):,}"
        raise ValueError(f"{path_and_kind}: {counts} images have no box, the first {without[0]}")
    return ImageBoxes(images, matched, path)


def _match_paths(
    images: Dataset, annotations: dict[str, Annotation], bases: Sequence[Path]
) -> tuple[list[str], list[str]]:
    """Each image's path as the source writes it, absolute or relative to the first base that gives any match; and the
    annotated images that do not exist."""
    for base in ("/", *bases):
        prefix = "/" if base == "/" else ""
        keys = [prefix + Path(os.path.relpath(file, base)).as_posix() for file, _ in images.samples]
        if any(key in annotations for key in keys):
            break
    others = list(annotations.keys() - set(keys))  # such as images of another split
    folder = next((base for base in bases if others and os.path.exists(base / others[0])), bases[0])
    return keys, sorted(others[index] for index in missing_files(folder / key for key in others))
