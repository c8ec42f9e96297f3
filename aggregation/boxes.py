"""BOX_SOURCES: the boxes of objects in images, read from the files that they are published in.

Boxes are x0, y0, x1, y1 in pixels of the image, inclusive, taken as they are written.
"""

import csv
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data_sets.readers import missing_files, read_lines
from util.progress import log

Size = tuple[int, int]  # width and height
MOST_PIXELS = 2**31  # of a side; more than any format of images has


class Annotation(NamedTuple):
    boxes: list[tuple[int, int, int, int]]
    size: Size | None  # of the image that the boxes were drawn in, where the source says it


class BoxSource(NamedTuple):
    """A format. `read(path)` gives {image: Annotation}; an image is named by its path where `by_path`, from the file's
    folder, else by its file's name without folders and suffix. `fits(path)`: whether it looks like one."""

    description: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], dict[str, Annotation]]
    by_path: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# formats
# ---------------------------------------------------------------------------------------------------------------------


def _annotations(rows: Iterable[tuple[str, Sequence[str], str, Size | None]]) -> dict[str, Annotation]:
    """From rows (image, four numbers as text, where that is written, size)."""
    found: dict[str, Annotation] = {}
    for image, words, place, size in rows:
        try:
            x0, y0, x1, y1 = map(int, words)
        except ValueError as error:
            raise ValueError(
                f"{place}: {', '.join(map(str, words))} are not the four whole numbers of a box"
            ) from error
        if not (0 <= x0 <= x1 < MOST_PIXELS and 0 <= y0 <= y1 < MOST_PIXELS):
            raise ValueError(f"{place}: {x0}, {y0}, {x1}, {y1} is no box: x0 <= x1 and y0 <= y1, none negative")
        if size is not None and (x1 > size[0] or y1 > size[1]):  # VOC's boxes end at the width: they count from 1
            raise ValueError(f"{place}: {x0}, {y0}, {x1}, {y1} leaves its image of {size[0]} x {size[1]} pixels")
        found.setdefault(image, Annotation([], size)).boxes.append((x0, y0, x1, y1))
    return found


def _xml_folder(folder: Path) -> dict[str, Annotation]:
    """A PASCAL VOC file for each image: ILSVRC2012_bbox_val_v3.tgz, or Annotations/CLS-LOC/val."""

    def rows() -> Iterable[tuple[str, Sequence[str], str, Size | None]]:
        for path in sorted(folder.glob("*.xml")):
            try:
                tree = ElementTree.parse(path)
                size = tuple(int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
                boxes = [
                    [box.findtext(side, "") for side in ("xmin", "ymin", "xmax", "ymax")]
                    for box in tree.iterfind("object/bndbox")
                ]
            except (ElementTree.ParseError, OSError, ValueError) as error:
                raise ValueError(f"{path} is no annotation with a size and boxes: {error}") from error
            for box in boxes:
                yield path.stem, box, str(path), size

    return _annotations(rows())


def _kaggle(path: Path) -> dict[str, Annotation]:
    """LOC_val_solution.csv: ILSVRC2012_val_00048981,n03995372 85 1 499 272 n03995372 ..."""

    def rows() -> Iterable[tuple[str, Sequence[str], str, Size | None]]:
        for number, line in enumerate(read_lines(path)[1:], 2):
            image, comma, text = line.partition(",")
            words = text.split()
            if not comma or not words or len(words) % 5:
                raise ValueError(f"{path}, line {number}: {line[:60]!r} is not of the form IMAGE,WNID X0 Y0 X1 Y1 ...")
            for start in range(0, len(words), 5):
                yield image, words[start + 1 : start + 5], f"{path}, line {number}", None

    return _annotations(rows())


def _wsol(path: Path) -> dict[str, Annotation]:
    """localization.txt, a line `path,x0,y0,x1,y1` for each box, beside image_sizes.txt, `path,width,height`."""
    path = path / "localization.txt" if path.is_dir() else path
    sizes = {}
    for number, words in _comma_rows(path.parent / "image_sizes.txt", 3):
        try:
            sizes[words[0]] = (int(words[1]), int(words[2]))
        except ValueError as error:
            raise ValueError(f"{path.parent / 'image_sizes.txt'}, line {number}: no width and height") from error

    def rows() -> Iterable[tuple[str, Sequence[str], str, Size | None]]:
        stems: dict[str, str] = {}
        for number, (image, *box) in _comma_rows(path, 5):
            if image not in sizes:
                raise ValueError(f"{path}, line {number}: {image} is not in {path.parent / 'image_sizes.txt'}")
            if stems.setdefault(Path(image).stem, image) != image:
                raise ValueError(f"{path}: {image} and {stems[Path(image).stem]} differ in their folder alone")
            yield Path(image).stem, box, f"{path}, line {number}", sizes[image]

    return _annotations(rows())


def _comma_rows(path: Path, columns: int) -> Iterable[tuple[int, list[str]]]:
    for number, line in enumerate(read_lines(path), 1):
        words = line.rsplit(",", columns - 1)
        if len(words) != columns:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} has not {columns} columns")
        yield number, words


CSV_NAMES, CSV_BOX = ("path", "file"), ("x0", "y0", "x1", "y1")


def _csv_columns(path: Path) -> list[str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _csv(path: Path) -> dict[str, Annotation]:
    """Columns path (or file), x0, y0, x1, y1, in any order, others beside them; w and h are the image's size."""
    path = path / "boxes.csv" if path.is_dir() else path
    columns = _csv_columns(path)
    name = next((name for name in CSV_NAMES if name in columns), CSV_NAMES[0])
    if missing := [column for column in (name, *CSV_BOX) if column not in columns]:
        raise ValueError(f"{path} has no column {', '.join(missing)}: its columns are {', '.join(columns) or 'none'}")

    def rows() -> Iterable[tuple[str, Sequence[str], str, Size | None]]:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                place = f"{path}, line {number}"
                try:
                    size = (int(row["w"]), int(row["h"])) if {"w", "h"} <= row.keys() else None
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{place}: w and h are not the size of an image") from error
                yield row[name] or "", [row[column] or "" for column in CSV_BOX], place, size

    try:
        return _annotations(rows())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


BOX_SOURCES = {
    "imagenet-xml": BoxSource(
        "folder of ImageNet's annotations, an XML file for each image",
        lambda path: path.is_dir() and next(path.glob("*.xml"), None) is not None, _xml_folder),
    "imagenet-csv": BoxSource(
        "LOC_val_solution.csv of Kaggle",
        lambda path: path.suffix == ".csv" and _csv_columns(path)[:2] == ["ImageId", "PredictionString"], _kaggle),
    "wsol": BoxSource(
        "localization.txt of wsolevaluation, or its folder; image_sizes.txt beside it",
        lambda path: path.name == "localization.txt" or (path / "localization.txt").is_file(), _wsol),
    "csv": BoxSource(
        "table with the columns path, x0, y0, x1, y1, or a folder with such a boxes.csv, as the demo's",
        lambda path: (path.suffix == ".csv" and set(CSV_BOX) <= set(_csv_columns(path)))
        or (path / "boxes.csv").is_file(), _csv, by_path=True),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the boxes of a data set
# ---------------------------------------------------------------------------------------------------------------------


class ImageBoxes:
    """The true boxes of the images of a data set, in pixels of what a transform makes of them."""

    def __init__(self, images: Dataset, annotations: Sequence[Annotation | None], source: Path):
        self.images, self.annotations, self.source = images, annotations, source

    def original(self, index: int) -> tuple[np.ndarray, Size]:
        """Boxes (m,4), and the size of the image that they belong to."""
        annotation = self.annotations[index]
        boxes = np.array(annotation.boxes, np.int64)
        if annotation.size is not None:
            return boxes, annotation.size
        path = self.images.samples[index][0]
        with Image.open(path) as image:
            size = image.size
        if (boxes[:, 2:] > size).any():
            raise ValueError(f"{self.source}: a box of {path} leaves the image, which has {size[0]} x {size[1]} pixels")
        return boxes, size

    def resized(self, index: int, size: int) -> np.ndarray:
        """(m,4) in the image resized to size x size, each side by its own factor; cut off to whole pixels."""
        boxes, (width, height) = self.original(index)
        return (boxes * float(size) / np.array([width, height, width, height])).astype(np.int64)

    def cropped(self, index: int, size: int) -> np.ndarray:
        """(m,4) in the image as data_sets.views.eval_transform makes it: boxes are cut at the crop's border, and those
        that lie outside of it are left out, perhaps all."""
        boxes, sides = self.original(index)
        # torchvision's Resize of the shorter side, and its CenterCrop
        short, target = min(sides), int(size * 256 / 224)
        resized = [target if side == short else int(target * side / short) for side in sides]
        corner = [round((side - size) / 2.0) for side in resized]
        moved = boxes * np.tile(np.array(resized) / np.array(sides), 2) - np.tile(corner, 2)
        inside = (moved[:, 2:] >= 0).all(1) & (moved[:, :2] < size).all(1)
        return moved[inside].clip(0, size - 1).astype(np.int64)


def read_boxes(
    path: Path, kind: str | None, images: Dataset, root: Path, chosen: Sequence[int], allow_subset: bool = False
) -> ImageBoxes:
    """The boxes of the chosen images of a data set in the folder `root`.

    kind: of BOX_SOURCES; None: the one that the file looks like. ValueError for a source that is none or is damaged,
    for chosen images without a box, and for boxes of images that do not exist; allow_subset logs the last instead.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--boxes {path}: there is no such file or folder")
    if kind is None:
        fitting = [name for name, source in BOX_SOURCES.items() if source.fits(path)]
        if not fitting:
            known = "; ".join(f"{name}, {source.description}" for name, source in BOX_SOURCES.items())
            raise ValueError(f"--boxes {path} is none of these: {known}")
        kind = fitting[0]
    if not hasattr(images, "samples"):
        raise ValueError("--boxes: the images of this data set are no files, by whose names boxes could be told")
    annotations = BOX_SOURCES[kind].read(path)
    if not annotations:
        raise ValueError(f"--boxes {path} ({kind}) holds no box")
    folder = path if path.is_dir() else path.parent
    if BOX_SOURCES[kind].by_path:
        keys = _keys_by_path(images, annotations, (folder, Path(root)))
        strangers = list(annotations.keys() - set(keys))
        if strangers:  # boxes of another split are none of this one's business
            bases = [base for base in (folder, Path(root)) if os.path.exists(base / strangers[0])]
            absent = missing_files([(bases or [folder])[0] / key for key in strangers])
            strangers = sorted(strangers[index] for index in absent)
    else:
        keys = [Path(file).stem for file, _ in images.samples]
        if len(set(keys)) < len(keys):
            twice = next(key for key, count in Counter(keys).items() if count > 1)
            raise ValueError(f"--boxes {path} ({kind}) names images without their folder, and two are called {twice}")
        strangers = sorted(annotations.keys() - set(keys))
    found = [annotations.get(key) for key in keys]
    if not any(found):
        raise ValueError(
            f"--boxes {path} ({kind}): they are boxes of other images, such as {next(iter(annotations))}, and not of "
            f"{images.samples[0][0]}"
        )
    if strangers:
        words = f"{len(strangers):,} images that have boxes do not exist, the first {strangers[0]}"
        if not allow_subset:
            raise ValueError(f"--boxes {path}: {words}; --allow_subset takes the others")
        log.info("%s: %s", path, words)
    if without := [index for index in chosen if found[index] is None]:
        raise ValueError(
            f"--boxes {path} ({kind}): {len(without):,} of {len(chosen):,} images have no box, "
            f"the first {images.samples[without[0]][0]}"
        )
    return ImageBoxes(images, found, path)


def _keys_by_path(images: Dataset, annotations: dict[str, Annotation], bases: Sequence[Path]) -> list[str]:
    """Each image's path as the source writes it: from the first of the folders where the first of them has boxes."""
    for base in bases:
        keys = [Path(os.path.relpath(file, base)).as_posix() for file, _ in images.samples]
        if any(key in annotations for key in keys):
            return keys
    return keys
