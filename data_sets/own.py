"""Data sets of one's own: folders of classes, lists of files, and COCO's format."""

from __future__ import annotations

import csv
from pathlib import Path

from data_sets.files import read_class_folders
from data_sets.images import Files, Images
from data_sets.published import read_coco
from data_sets.readers import images_by_class, parse_json, reading
from data_sets.shards import SPLITS, labels_of, split_files

PATHS = ("path", "image", "file", "filename", "file_name", "filepath")
LABELS = ("label", "labels", "class", "classes", "category")


def image_folder(root: Path, split: str) -> Images:
    if not (root / split).is_dir():
        alone = "main_linprobe.py --val_split 0.2 takes a folder of classes alone"
        raise ValueError(f"no {split!r} folder in it (expected train/<class>/ and val/<class>/; {alone})")
    return read_class_folders(root / split, may_be_empty=split == "val")


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
            between = "\t" if source.suffix == ".tsv" else ","
            table = csv.DictReader((line + "\n" for line in lines), delimiter=between, strict=True)
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
            raise ValueError("it is no JSON object, which every line is to be")
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
