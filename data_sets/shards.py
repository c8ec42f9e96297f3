"""Images in containers: tar shards (WebDataset, ImageNet's archives) and the tables of Hugging Face data sets.

Samples are sorted by class and name, as in a folder of the same images, so that results do not depend on how samples
were distributed over shards. Tar files are scanned once; their index is kept beside them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_sets.files import is_image
from data_sets.images import Content, Images, UnreadableImage
from data_sets.readers import images_by_class, parse_json, read_lines, reading
from util import distributed
from util.files import write_atomically
from util.progress import log

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}  # the first that exists


def split_files(root: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """Files of a split: in its folder, or with its name as a word in theirs."""
    for name in SPLITS[split]:
        word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)", re.IGNORECASE)
        files = [path for path in root.glob("*.*") if word.search(path.stem)] + list((root / name).rglob("*.*"))
        if files := sorted(path for path in files if path.suffix in suffixes):
            return files
    raise ValueError(f"no files of the {split} split in it: expected {split}/*{suffixes[0]} or *{split}*{suffixes[0]}")


class Index(NamedTuple):
    """Encoded images in slices of larger files, in columns."""

    names: list[str]
    labels: list[list]
    shard: list[int]  # numbers of the files
    start: list[int]  # first byte
    size: list[int]  # bytes
    shape: list[list[int] | None] | None = None  # height and width of images that are stored as pixels
    sha256: list[str] | None = None

    def in_order(self, order: Sequence[int]) -> Index:
        return Index(*(column and [column[index] for index in order] for column in self))

    @classmethod
    def save(cls, rows: Sequence[tuple], path: Path, facts: dict) -> None:
        """Write the index of rows, whole or not at all, with other plain data."""
        text = json.dumps({"facts": facts, "index": list(zip(*rows, strict=True))})
        write_atomically(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())

    @classmethod
    def load(cls, path: Path) -> tuple[dict, Index]:
        """(facts, index); ValueError for a file that `save` did not write."""
        with reading(path):
            digest, text = path.read_text().split("\n", 1)
            if digest != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError("its content has changed")
            return json.loads(text)["facts"], cls(*json.loads(text)["index"])


class Slices:
    """The images of an index. Pixels are mapped from the file, so that only what a crop needs is read."""

    def __init__(self, files: Sequence[Path], index: Index):
        self.files, self.index = files, index
        self.names = [f"{files[shard]}:{name}" for shard, name in zip(index.shard, index.names, strict=True)]

    def read(self, index: int) -> bytes | np.ndarray:
        path, start, size = self.files[self.index.shard[index]], self.index.start[index], self.index.size[index]
        if shape := self.index.shape and self.index.shape[index]:
            return _mapped(path)[start : start + size].reshape(*shape, 3)
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
        digests = self.index.sha256
        if len(content) < size or (digests and digests[index] != hashlib.sha256(content).hexdigest()):
            raise UnreadableImage(f"cannot read image {self.names[index]}: it is cut off or has changed")
        return content

    def stats(self) -> np.ndarray:
        modified = [os.stat(path).st_mtime_ns for path in self.files]
        return np.array(
            [(size, modified[shard]) for size, shard in zip(self.index.size, self.index.shard, strict=True)]
        )


@functools.cache
def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="c")  # copied on write: torch takes no read-only arrays


def images_of_index(
    index: Index, content: Callable[[Index], Content], classes: list[str] | None, multi_label: bool
) -> Images:
    """Sorted by class and name. classes: names that numbered labels stand for; None: labels are names."""
    if classes is not None and all(name.isdigit() for names in index.labels for name in names):
        if (last := max((int(name) for names in index.labels for name in names), default=0)) >= len(classes):
            raise ValueError(f"a label is {last}, but only {len(classes)} classes are named")
        index = index._replace(labels=[[classes[int(name)] for name in names] for names in index.labels])
    targets = images_by_class(content(index), index.labels, classes, multi_label).targets
    paths = [os.path.split(name) for name in index.names]
    index = index.in_order(sorted(range(len(paths)), key=lambda row: (0 if multi_label else targets[row], *paths[row])))
    return images_by_class(content(index), index.labels, classes, multi_label)


# ---- tar files


def tar_members(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of the files in an uncompressed tar file that begins at a byte of `path`; files of tar
    files in it included. ValueError if it is damaged."""
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and member.name.endswith(".tar"):
                    yield from tar_members(path, member.offset_data)
                elif member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # an archive ends with blocks of zeros
                raise ValueError(f"damaged or cut off at byte {archive.offset:,}")


def read_tars(shards: Sequence[Path], kinds: Sequence[str] = ()) -> Slices:
    """The images of tar files, sorted by name. kinds: suffixes of members to take besides, with their content as label.

    Rank 0 keeps the index in a file while the others wait; where it cannot be written, each process scans the shards.
    """
    stamps = [[path.name, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in shards]
    facts = {"format": 1, "shards": stamps}
    key = hashlib.sha256(json.dumps([shards[0].name, *kinds]).encode()).hexdigest()
    path = shards[0].parent / f".index-{key[:8]}.json"
    with distributed.main_process_first():
        try:
            known, index = Index.load(path)
        except ValueError:
            known = None
        if known != facts:
            rows = [row for number, shard in enumerate(shards) for row in _scan(shard, number, kinds)]
            index = Index(*map(list, zip(*rows, strict=True))) if rows else Index([], [], [], [], [])
            try:
                Index.save(rows, path, facts)
            except OSError as error:
                log.info("%s: the index cannot be kept (%s) and will be made again", path.parent, error.strerror)
    return Slices(shards, index.in_order(sorted(range(len(index.names)), key=index.names.__getitem__)))


def _scan(shard: Path, number: int, kinds: Sequence[str]) -> Iterator[tuple]:
    with open(shard, "rb") as file:
        for name, start, size in tar_members(shard):
            if os.path.splitext(name)[1] in kinds:
                file.seek(start)
                yield name, [file.read(size).decode("utf-8", "backslashreplace")], number, start, size
            elif is_image(name):
                yield name, [], number, start, size


def labels_of(value: Any, column: str | None = None) -> list[str]:
    """The names of classes that a value of a list, of JSON or of a table states."""
    if isinstance(value, dict):
        names = [column] if column else ["label", "labels", "cls", "class", "class_name"]
        value = next((value[name] for name in names if name in value), None)
    value = value.split("|") if isinstance(value, str) else value
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(name for item in values if (name := str(item).strip())))


def webdataset(root: Path, split: str, label_column: str | None = None, multi_label: bool = False) -> Images:
    """Members with equal names up to the first dot are a sample. Labels: its .cls or .json, or the folder in its name.
    Names of numbered classes: the lines of classes.txt or classnames.txt, if there is one."""
    shards = split_files(root, split, [".tar"])
    members = read_tars(shards, (".json",) if label_column else (".cls", ".json")).index
    samples: dict[tuple, dict[str, int]] = {}
    for row, name in enumerate(members.names):
        folder, base = os.path.split(name)
        stem, _, kind = base.partition(".")
        kind = "image" if is_image(name) else kind.lower()
        if samples.setdefault((members.shard[row], folder, stem), {}).setdefault(kind, row) != row:
            raise ValueError(f"{shards[members.shard[row]]}: sample {stem} has two members of kind {kind}: {name}")
    rows, labels = [], []
    for (shard, folder, stem), parts in samples.items():
        if "image" in parts:
            label = os.path.basename(folder) or None
            if "cls" in parts:
                label = members.labels[parts["cls"]][0]
            elif "json" in parts:
                with reading(f"{shards[shard]}: {stem}.json"):
                    label = parse_json(members.labels[parts["json"]][0].encode())
            rows.append(parts["image"])
            labels.append(labels_of(label, label_column))
    classes = [read_lines(root / name) for name in ("classes.txt", "classnames.txt") if (root / name).exists()]
    index = members.in_order(rows)._replace(labels=labels)
    return images_of_index(index, functools.partial(Slices, shards), classes[0] if classes else None, multi_label)


# ---- Hugging Face


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"Hugging Face data sets need {name}: pip install -r requirements-data.txt") from error


class TableRows:
    """Encoded images in a column that is mapped from a file; `start` of the index is the row. A cell is empty where the
    image has a file of its own, at its path."""

    def __init__(self, cells: Any, paths: Sequence[str | None], index: Index):
        self.cells, self.paths, self.index, self.names = cells, paths, index, index.names

    def read(self, index: int) -> bytes:
        row = self.index.start[index]
        content = self.cells[row].as_py()
        return Path(self.paths[row]).read_bytes() if content is None else content

    def stats(self) -> np.ndarray:
        return np.array([(size, 0) for size in self.index.size])


def hugging_face(root: Path, split: str, label_column: str | None = None, multi_label: bool = False) -> Images:
    """A folder in the Hub's layout, such as parquet files in data/, or hf:ORG/NAME[@REVISION] at one revision. The
    datasets library converts it once to a file in its own cache, which is mapped; no code of the data set is run."""
    datasets, compute, source, revision = library("datasets"), library("pyarrow.compute"), str(root), None
    with reading(source):
        if source.startswith("hf:"):
            source, _, revision = source.removeprefix("hf:").partition("@")
            if not revision:
                revision = library("huggingface_hub").HfApi().dataset_info(source).sha
                log.info("%s is at revision %s: pin it with hf:%s@%s", source, revision, source, revision)
        with distributed.main_process_first():
            splits = datasets.load_dataset(source, revision=revision)
    table = next((splits[name] for name in SPLITS[split] if name in splits), None)
    if table is None:
        raise ValueError(f"no {split} split in it; there is {', '.join(splits)}")
    image, label, classes = _columns(table.features.to_dict(), label_column)
    cells, paths = table.data.column(image), [None] * len(table)
    if "struct" in str(cells.type):
        cells, paths = (compute.struct_field(cells, part) for part in ("bytes", "path"))
        paths = paths.to_pylist()
    sizes = compute.binary_length(cells).to_pylist()
    sizes = [os.path.getsize(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]
    names = [os.path.basename(path or "") or f"{row:09d}" for row, path in enumerate(paths)]
    index = Index(names, list(map(labels_of, table[label])), [0] * len(names), list(range(len(names))), sizes)
    return images_of_index(index, functools.partial(TableRows, cells, paths), classes, multi_label)


def _columns(features: dict[str, Any], label_column: str | None) -> tuple[str, str, list[str] | None]:
    """The columns of images and labels, and the names of numbered labels."""
    inner = {}
    for name, feature in features.items():
        while isinstance(feature, list) or "feature" in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        inner[name] = feature
    kinds = {name: feature.get("_type") for name, feature in inner.items()}
    binary = {"binary", "large_binary"}
    kinds |= {name: "Image" for name, feature in inner.items() if "bytes" in feature or feature.get("dtype") in binary}
    images, numbered = ([name for name in kinds if kinds[name] == kind] for kind in ("Image", "ClassLabel"))
    labels = [label_column] if label_column else [name for name in ("label", "labels") if name in inner][:1] or numbered
    if len(images) != 1 or len(labels) != 1 or labels[0] not in inner:
        raise ValueError(f"expected one column of images and one of labels (--label_column), got {', '.join(features)}")
    return images[0], labels[0], inner[labels[0]].get("names")
