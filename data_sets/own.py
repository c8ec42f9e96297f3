"""Data sets of one's own: folders of classes, lists, COCO's format, WebDataset's shards, and Hugging Face's tables.

Samples of shards and tables are sorted by class and name, as in a folder of the same images, so that results do not
depend on how samples were distributed over files.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sets.images import Content, Files, Images
from data_sets.published import read_coco
from data_sets.readers import images_by_class, is_image, parse_json, read_class_folders, read_lines, reading
from data_sets.shards import read_tars
from util import distributed
from util.progress import log

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}  # the first that exists
PATHS = ("path", "image", "file", "filename", "file_name", "filepath")
LABELS = ("label", "labels", "class", "classes", "category")


def image_folder(root: Path, split: str) -> Images:
    if not (root / split).is_dir():
        alone = "main_linprobe.py --val_split 0.2 takes a folder of classes alone"
        raise ValueError(f"no {split!r} folder in it (expected train/<class>/ and val/<class>/; {alone})")
    return read_class_folders(root / split, may_be_empty=split == "val")


def split_files(root: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """Files of a split: in its folder, or with its name as a word in theirs."""
    for name in SPLITS[split]:
        word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)", re.IGNORECASE)
        files = [path for path in root.glob("*.*") if word.search(path.stem)] + list((root / name).rglob("*.*"))
        if files := sorted(path for path in files if path.suffix in suffixes):
            return files
    raise ValueError(f"no files of the {split} split in it: expected {split}/*{suffixes[0]} or *{split}*{suffixes[0]}")


def labels_of(value: Any, column: str | None = None) -> list[str]:
    """The names of classes that a value of a list, of JSON or of a table states."""
    if isinstance(value, dict):
        names = [column] if column else ["label", "labels", "cls", "class", "class_name"]
        value = next((value[name] for name in names if name in value), None)
    value = value.split("|") if isinstance(value, str) else value
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(name for item in values if (name := str(item).strip())))


def listed(root: Path, split: str, label_column: str | None = None, multi_label: bool = False) -> Images:
    """A list of each split, train.csv and val.csv (or .tsv, .jsonl), with paths relative to its folder. Labels are
    names, several of them separated by a vertical bar. The order of the images is that of the list."""
    source, *others = split_files(root, split, (".csv", ".tsv", ".jsonl"))
    with reading(source):
        if others:
            raise ValueError(f"{others[0].name} is a list of the {split} split too: remove one of them")
        lines = source.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may be in a name
        if source.suffix == ".jsonl":
            rows = [_parse_object(number, line) for number, line in enumerate(lines, 1) if line.strip()]
            columns = list(rows[0]) if rows else []
        else:
            separator = "\t" if source.suffix == ".tsv" else ","
            table = csv.DictReader((line + "\n" for line in lines), delimiter=separator, strict=True)
            try:
                rows = list(table)
            except csv.Error as error:
                raise ValueError(f"{error}: is a quotation mark not closed?") from error
            columns = [name for name in table.fieldnames if name] if rows else []  # all: a dict keeps one of equals
        paths = [name for name in columns if name.lower() in PATHS]
        labels = [name for name in columns if name == label_column or (label_column is None and name.lower() in LABELS)]
        if len(paths) != 1 or len(labels) != 1:
            expected = f"one of {', '.join(PATHS)}, and one of {label_column or ', '.join(LABELS)}"
            raise ValueError(f"its first line names {', '.join(columns) or 'no columns'}; expected {expected}")
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(paths[0]), str) or row.get(labels[0]) is None or None in row:
                raise ValueError(f"entry {number} is not a {paths[0]} and a {labels[0]}")
        content = Files(source.parent / row[paths[0]].strip().replace("\\", "/") for row in rows)
        return images_by_class(content, [labels_of(row[labels[0]]) for row in rows], None, multi_label)


def _parse_object(number: int, line: str) -> dict:
    with reading(f"line {number}"):
        row = parse_json(line.encode())
        if not isinstance(row, dict):
            raise ValueError("it is not a JSON object, which every line must be")
        return row


def own_coco(root: Path, split: str) -> Images:
    """annotations/instances_<split>.json and images in <split>/ or images/; or as Roboflow exports, with
    <split>/_annotations.coco.json beside the images."""
    patterns = ("annotations/*{}*.json", "{}/*coco*.json", "{}*.json")
    for name, pattern in ((name, pattern.format(name)) for name in SPLITS[split] for pattern in patterns):
        for source in sorted(root.glob(pattern)):
            stem = source.stem.removeprefix("instances_")
            folders = (stem, name, f"images/{stem}", f"images/{name}", "images", "")
            return read_coco(source, [*(root / folder for folder in folders), source.parent])
    raise ValueError(f"neither annotations/instances_{split}.json nor {split}/_annotations.coco.json is in it")


# ---- containers


def sorted_images(
    content: Content, names: Sequence[str], labels: Sequence[list], classes: list[str] | None, multi_label: bool
) -> Images:
    """Sorted by class and name. classes: names that numbered labels stand for; None: labels are names."""
    if classes is not None and all(name.isdigit() for given in labels for name in given):
        if (last := max((int(name) for given in labels for name in given), default=0)) >= len(classes):
            raise ValueError(f"a label is {last}, but only {len(classes)} classes are named")
        labels = [[classes[int(name)] for name in given] for given in labels]
    images = images_by_class(content, labels, classes, multi_label)
    targets = [0] * len(images) if multi_label else images.targets
    keys = [(target, *os.path.split(name)) for target, name in zip(targets, names, strict=True)]
    return images.part(sorted(range(len(keys)), key=keys.__getitem__))


def webdataset(root: Path, split: str, label_column: str | None = None, multi_label: bool = False) -> Images:
    """Members with equal names up to the first dot are a sample. Labels: its .cls or .json, or the folder in its name.
    Names of numbered classes: the lines of classes.txt or classnames.txt, if there is one."""
    shards = split_files(root, split, [".tar"])
    members = read_tars(shards, (".json",) if label_column else (".cls", ".json"))
    samples: dict[tuple, dict[str, int]] = {}
    for row, entry in enumerate(members.entries):
        folder, base = os.path.split(entry.name)
        stem, _, kind = base.partition(".")
        kind = "image" if is_image(entry.name) else kind.lower()
        if samples.setdefault((entry.shard, folder, stem), {}).setdefault(kind, row) != row:
            raise ValueError(f"{shards[entry.shard]}: sample {stem} has two members of kind {kind}: {entry.name}")
    rows, labels = [], []
    for (shard, folder, stem), parts in samples.items():
        if "image" in parts:
            label = os.path.basename(folder) or None
            if "cls" in parts:
                label = members.entries[parts["cls"]].labels[0]
            elif "json" in parts:
                with reading(f"{shards[shard]}: {stem}.json"):
                    label = parse_json(members.entries[parts["json"]].labels[0].encode())
            rows.append(parts["image"])
            labels.append(labels_of(label, label_column))
    classes = [read_lines(root / name) for name in ("classes.txt", "classnames.txt") if (root / name).exists()]
    names = [members.entries[row].name for row in rows]
    return sorted_images(members.part(rows), names, labels, classes[0] if classes else None, multi_label)


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"Hugging Face data sets need {name}: pip install -r requirements-data.txt") from error


class TableRows:
    """Encoded images in a column that is mapped from a file. A cell is empty where the image has a file of its own, at
    its path."""

    def __init__(self, cells: Any, paths: Sequence[str | None], rows: Sequence[int]):
        self.cells, self.paths, self.rows = cells, paths, rows
        self.names = [os.path.basename(paths[row] or "") or f"{row:09d}" for row in rows]

    def read(self, index: int) -> bytes:
        row = self.rows[index]
        content = self.cells[row].as_py()
        return Path(self.paths[row]).read_bytes() if content is None else content

    def stats(self) -> np.ndarray:
        sizes = library("pyarrow.compute").binary_length(self.cells).to_pylist()
        return np.array([(os.path.getsize(self.paths[r]) if sizes[r] is None else sizes[r], 0) for r in self.rows])

    def part(self, indices: Sequence[int]) -> TableRows:
        return TableRows(self.cells, self.paths, [self.rows[index] for index in indices])


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
    content = TableRows(cells, paths, range(len(table)))
    return sorted_images(content, content.names, list(map(labels_of, table[label])), classes, multi_label)


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
