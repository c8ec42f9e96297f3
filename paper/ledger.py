"""The results ledger: one small JSON file per measured table cell, with the origin of its number.

A cell is (dataset, model, arch, quantity, head) in the vocabulary of results/paper_numbers.json; its record is
`<results>/<dataset>/<model>.<arch>.<quantity>.<head>.json`. A record ends with a seal, the sha256 of its content, so
that an edited or misplaced record is refused. The seal guards against accidents, not against forgery.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_sets.table import DATASETS
from encoders.catalogue import CATALOGUE
from util.files import to_json, write_json

NAME = r"[\w=+-]+"  # each part of a cell; no dots, which separate the parts in the file's name
FIELDS = (
    *("value", "std", "n", "values", "seeds", "unit", "notes", "obstacles", "settings", "weights", "data"),
    *("commit", "dirty", "versions", "sources"),
)
UNITS = {"aggregation_entropy": "nats", "aggregation_entropy_block_mean": "nats"}  # all others: percent
INDEPENDENT = ["weights", "order", "views"]  # what independent runs of different --seed vary


class Cell(NamedTuple):
    dataset: str
    model: str
    arch: str
    quantity: str
    head: str

    @property
    def file(self) -> Path:
        """The record, relative to the folder of results."""
        return Path(self.dataset) / f"{'.'.join(self[1:])}.json"

    def __str__(self) -> str:
        return str(self.file.with_suffix(""))


def cell_of(dataset: str, encoder: dict, quantity: str, head: str, block: int | None = None) -> Cell:
    """encoder: as load_encoder records it; head: as --cls_features spells it; block: None for the last block."""
    suffix = "" if block is None else f"-block{block}"
    cell = Cell(dataset, model_of(encoder), encoder["model"], quantity, short_head(head) + suffix)
    if bad := [part for part in cell if not re.fullmatch(NAME, part)]:
        raise ValueError(f"{bad[0]!r} cannot be part of a record's name: use letters, digits, _, -, + and = only")
    return cell


def cell_in(record: dict) -> Cell:
    return Cell(*(str(record[name]) for name in Cell._fields))


def model_of(encoder: dict) -> str:
    """The family; for published weights other than the paper's of a family, also what tells them apart; for timm's,
    their name."""
    family, source, arch = encoder["family"], encoder["source"], encoder["model"]
    if family is None:
        return "random"
    if source in CATALOGUE:
        return source.replace(f"_{arch}", "", 1)
    if family == "timm":
        return "timm_" + re.sub(r"\W", "_", source)
    return family.removesuffix("_full")  # a file that holds more than the encoder


def short_head(head: str) -> str:
    """abmilp:depth=2 -> abmilp-d2-relu, abmilp:sa=both -> abmilp-sa, ap12 -> ap12."""
    name, _, text = head.partition(":")
    options = dict(option.split("=", 1) for option in text.split(",")) if text else {}
    parts = [name]
    if name == "abmilp" and "depth" in options:
        parts += [f"d{options.pop('depth')}", options.pop("act", "relu")]
    if name == "abmilp" and options.get("sa") == "both":
        del options["sa"]
        parts.append("sa")
    return "-".join([*parts, *(f"{key}={value}" for key, value in options.items())])


def make_record(cell: Cell, values: Sequence[float], seeds: Sequence[int | None], **fields: Any) -> dict:
    """The sealed record of a cell.

    values: one per seed; ValueError unless all are finite numbers, and percentages where the unit is %.
    sources: origin of each measured run; several runs differ in their seed alone.
    """
    unit = UNITS.get(cell.quantity, "%")
    if not values or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"{cell}: {list(values)} must be finite numbers, at least one")
    if unit == "%" and not all(0 <= value <= 100 for value in values):
        raise ValueError(f"{cell}: {list(values)} must be percentages")
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    numbers = {"value": mean, "std": std, "n": len(values), "values": list(values), "seeds": list(seeds), "unit": unit}
    record = {**numbers, **fields}
    if record.keys() != set(FIELDS):
        raise TypeError(f"missing or unknown fields of a record: {', '.join(sorted(record.keys() ^ set(FIELDS)))}")
    return sealed({**cell._asdict(), **{name: record[name] for name in FIELDS}})


def join(cell: Cell, records: Sequence[dict]) -> dict:
    """One record of several runs that differ in their seed alone. ValueError where two have the same seed.

    What no seed decides (seed None) has n = 1 however often it was measured; ValueError where the measurements differ.
    """
    rows = [row for record in records for row in zip(record["seeds"], record["values"], strict=True)]
    seeds = [seed for seed, _ in rows]
    if set(seeds) == {None}:
        if len({value for _, value in rows}) > 1:
            raise ValueError(f"several of these runs measured {cell}, with different results: give one of them")
        return records[0]
    if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"several of these runs measured {cell} with seed {repeated[0]}: give one of them")
    seeds, values = zip(*sorted(rows), strict=True)
    derived = ("value", "std", "n", "values", "seeds", "unit")
    fields = {name: records[0][name] for name in FIELDS if name not in derived}
    fields["sources"] = sorted((s for record in records for s in record["sources"]), key=lambda source: source["seed"])
    if all(record["n"] == 1 for record in records):  # separate runs
        views = fields["settings"].get("crop") != "center"
        fields["settings"] = {**fields["settings"], "seeds_vary": INDEPENDENT if views else INDEPENDENT[:2]}
    return make_record(cell, values, seeds, **fields)


def sealed(record: dict) -> dict:
    return {**record, "seal": seal_of(record)}


def seal_of(record: dict) -> str:
    content = json.loads(to_json({key: value for key, value in record.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(results: Path, record: dict, replace: bool = False) -> Path:
    """Write a record to its place. ValueError where another measurement of the cell is there, unless replace."""
    path = Path(results) / cell_in(record).file
    if path.exists() and not replace and read_record(results, path) != json.loads(to_json(record)):
        raise ValueError(f"{path} holds another measurement: remove it, or use --replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return path


def read_record(results: Path, path: Path) -> dict:
    """ValueError for a file that is no record, was changed after it was made, or lies in another cell's place."""
    try:
        record = json.loads(path.read_text())
        cell, expected = cell_in(record), {*Cell._fields, *FIELDS, "seal"}
        if odd := record.keys() ^ expected:
            raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, UnicodeDecodeError) else repr(error)  # it quotes the file
        raise ValueError(f"{path} is not a record ({reason}): make it with scripts/record.py") from error
    if record["seal"] != seal_of(record):
        raise ValueError(f"{path} was changed after it was made (its seal does not match): make it anew from its run")
    if path != Path(results) / cell.file:
        raise ValueError(f"{path} is the record of {cell}: it belongs in {Path(results) / cell.file}")
    return record


def read_ledger(results: Path, datasets: Sequence[str]) -> dict[Cell, dict]:
    """The records of these data sets; ValueError names a file among them that is not a record."""
    paths = (path for dataset in datasets for path in sorted((Path(results) / dataset).glob("*.json")))
    return {cell_in(record): record for record in (read_record(results, path) for path in paths)}


def recorded_datasets(results: Path) -> list[str]:
    """Those that have a folder, in the order of DATASETS."""
    return [name for name in DATASETS if (Path(results) / name).is_dir()]
