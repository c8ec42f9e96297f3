"""The results ledger: one small file for each measured cell of a table, with where its number comes from.

A cell is (dataset, model, arch, quantity, head) in the vocabulary of results/paper_numbers.json; its record is
`<results>/<dataset>/<model>.<arch>.<quantity>.<head>.json`. A record carries a seal, the sha256 of its own content:
one that was edited, or that lies where another cell's belongs, is refused with its name. The seal is against accidents:
who edits a record can seal it anew, and is found out only where it no longer agrees with itself.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_sets.table import DATASETS
from encoders.catalogue import CATALOGUE
from util.files import to_json, write_json

WORD = r"[\w=+-]+"  # what the parts of a cell are made of, no dots among it: they part them
# what a record holds, in this order, beside its cell and its seal
DERIVED = ("value", "std", "n", "unit")  # of the others
FIELDS = (
    "value", "std", "n", "values", "seeds", "unit", "notes", "obstacles", "settings", "weights", "data", "commit",
    "dirty", "versions", "sources",
)  # fmt: skip
SOURCE = ("command", "seed", "hardware", "seconds", "finished", "result_sha256", "log_sha256")  # each run that it is of
# what the parts of a record are, where tables count on it
SHAPES: dict[str, Callable[[Any], bool]] = {
    "seeds": lambda seeds: type(seeds) is list and all(type(seed) in (int, type(None)) for seed in seeds),
    "notes": lambda notes: type(notes) is list and all(type(note) is str for note in notes),
    "obstacles": lambda notes: type(notes) is list and all(type(note) is str for note in notes),
    "settings": lambda settings: type(settings) is dict,
    "weights": lambda weights: type(weights) is dict and "source" in weights,
    "data": lambda data: type(data["fingerprint"]) is str and type(data["n_test"]) is int
    and type(data["n_train"]) in (int, type(None)),
    "sources": lambda sources: type(sources) is list,
}  # fmt: skip
UNITS = {"aggregation_entropy": "nats", "aggregation_entropy_block_mean": "nats"}  # of all others: percent


class Cell(NamedTuple):
    dataset: str
    model: str
    arch: str
    quantity: str
    head: str

    @property
    def file(self) -> Path:
        """Where its record is, below the folder of all results."""
        return Path(self.dataset) / f"{'.'.join(self[1:])}.json"

    def __str__(self) -> str:
        return str(self.file.with_suffix(""))


# ---------------------------------------------------------------------------------------------------------------------
# the vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def cell_of(dataset: str, encoder: dict, quantity: str, head: str, block: int | None = None) -> Cell:
    """encoder: as load_encoder records it; head: as --cls_features spells it; block: where it is not the last one."""
    place = "" if block is None else f"-block{block}"
    cell = Cell(dataset, model_of(encoder), encoder["model"], quantity, short_head(head) + place)
    if odd := [word for word in cell if not re.fullmatch(WORD, word)]:
        raise ValueError(f"{odd[0]!r} cannot be part of a record's name: letters, digits, _, -, + and = can")
    return cell


def model_of(encoder: dict) -> str:
    """The family. Of published weights that share it with those that the paper uses, what tells them apart; of timm's,
    their name."""
    family, source, arch = encoder["family"], encoder["source"], encoder["model"]
    if family is None:
        return "random"
    if source in CATALOGUE:
        return source.replace(f"_{arch}", "", 1)
    if family == "timm":
        return "timm_" + re.sub(r"\W", "_", source)
    return family.removesuffix("_full")  # a file that holds more than the encoder


def short_head(word: str) -> str:
    """abmilp:depth=2 -> abmilp-d2-relu, abmilp:sa=both -> abmilp-sa, ap12 -> ap12."""
    name, _, text = word.partition(":")
    options = dict(setting.split("=", 1) for setting in text.split(",")) if text else {}
    parts = [name]
    if name == "abmilp" and "depth" in options:
        parts += [f"d{options.pop('depth')}", options.pop("act", "relu")]
    if name == "abmilp" and options.get("sa") == "both":
        parts.append(options.pop("sa") and "sa")
    return "-".join([*parts, *(f"{key}={value}" for key, value in options.items())])


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------


def make_record(cell: Cell, values: Sequence[float], seeds: Sequence[int | None], **fields: Any) -> dict:
    """The record of a cell, sealed. values: one for each seed; ValueError where they are no numbers.

    sources: SOURCE of each run that has measured it; several, where they differ in nothing but their seed.
    """
    unit = UNITS.get(cell.quantity, "%")
    if not values or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"{cell}: {list(values)} are no measured values")
    if unit == "%" and not all(0 <= value <= 100 for value in values):
        raise ValueError(f"{cell}: {list(values)} are not percent")
    record = {
        "value": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values), "values": list(values), "seeds": list(seeds), "unit": unit, **fields,
    }  # fmt: skip
    if record.keys() != set(FIELDS):
        raise TypeError(f"a record has {', '.join(FIELDS)}; odd: {', '.join(sorted(record.keys() ^ set(FIELDS)))}")
    return sealed({**cell._asdict(), **{name: record[name] for name in FIELDS}})


def joined(cell: Cell, records: Sequence[dict]) -> dict:
    """One record of the records of several seeds, which are alike but for their values and sources. ValueError where
    two are of one seed. What no seed decides has n = 1, however often it was measured: ValueError where that differs.
    """
    values, seeds, sources = ([one for record in records for one in record[name]]
                              for name in ("values", "seeds", "sources"))  # fmt: skip
    if set(seeds) == {None}:
        if len(set(values)) > 1:
            raise ValueError(f"several of these runs have measured {cell}, with different results: name one of them")
        return records[0]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"several of these runs have measured {cell} with seed {twice[0]}: name one of them")
    same = {name: value for name, value in records[0].items() if name in FIELDS and name not in DERIVED}
    order = sorted(range(len(seeds)), key=lambda index: seeds[index])
    return make_record(cell, **{
        **same, "values": [values[i] for i in order], "seeds": [seeds[i] for i in order],
        "sources": sorted(sources, key=lambda source: source["seed"]),
    })  # fmt: skip


def sealed(record: dict) -> dict:
    return {**record, "seal": seal_of(record)}


def seal_of(record: dict) -> str:
    content = json.loads(to_json({key: value for key, value in record.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(results: Path, record: dict, replace: bool = False) -> Path:
    """Write it to its place, whole. ValueError where another measurement of the cell is there, unless replace, and for
    what read_record would refuse."""
    cell = cell_in(record)
    if contradiction := disagreement(cell, json.loads(to_json(record))):
        raise ValueError(f"{cell} is no record: {contradiction}")
    path = Path(results) / cell.file
    if path.exists() and not replace and read_record(results, path) != json.loads(to_json(record)):
        raise ValueError(f"{path} holds another measurement: remove it, or write --replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return path


def float_of_json(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def without_repetition(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON. ValueError where it has a name twice, of which readers show different values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def cell_in(record: dict) -> Cell:
    return Cell(*(str(record[name]) for name in Cell._fields))


def read_record(results: Path, path: Path) -> dict:
    """ValueError for what is no record, was changed after it was made, or lies where another cell's belongs."""
    try:
        record = json.loads(path.read_text(), parse_constant=float_of_json, object_pairs_hook=without_repetition)
        cell, names = cell_in(record), {*Cell._fields, *FIELDS, "seal"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = type(error).__name__ if isinstance(error, UnicodeDecodeError) else repr(error)  # it quotes the file
        raise ValueError(f"{path} is no record of a result: {told}; scripts/record.py makes them") from error
    if odd := sorted(record.keys() ^ names):
        raise ValueError(
            f"{path} is no record of a result, or one of another version: odd are {', '.join(odd)}; make it anew"
        )
    if record["seal"] != seal_of(record):
        raise ValueError(f"{path} was changed after it was made: its seal is not its content's; make it from its run")
    if path != Path(results) / cell.file:
        raise ValueError(f"{path} is the record of {cell}: it belongs into {Path(results) / cell.file}")
    if contradiction := disagreement(cell, record):
        raise ValueError(f"{path} contradicts itself: {contradiction}; make it from its run")
    return record


def disagreement(cell: Cell, record: dict) -> str:
    """Why a record can be no run's, though its seal is its content's; "" where nothing shows that."""
    try:
        again = make_record(cell, **{name: record[name] for name in FIELDS if name not in DERIVED})
        if odd := [name for name in DERIVED if again[name] != record[name]]:
            return f"{odd[0]} {record[odd[0]]}, where its values give {again[odd[0]]}"
        if odd := [name for name, known in SHAPES.items() if not known(record[name])]:
            return f"its {odd[0]} are not what scripts/record.py writes"
        seeds = [seed for seed in record["seeds"] if seed is not None]
        if len(record["seeds"]) != len(record["values"]):
            return f"{len(record['values'])} values of {len(record['seeds'])} seeds"
        if len(set(seeds)) != len(seeds):
            return f"a seed twice among {seeds}"
        for source in record["sources"] or [{}]:
            if missing := [name for name in SOURCE if name not in source]:
                return f"a run without its {missing[0]}"
        entry, data = DATASETS[cell.dataset], record["data"]
        if data["n_train"] is None and "epochs" in record["settings"]:
            return "it was trained on images of which it has no number"
        if entry.classes not in (None, data["classes"]):
            return f"{data['classes']} classes, where {cell.dataset} has {entry.classes}"
        if [words for words in other_counts(cell.dataset, val=data["n_test"]) if words not in record["obstacles"]]:
            return f"{data['n_test']:,} test images, where {cell.dataset} has {entry.images['val']:,}"
        weights = record["weights"]
        if "family" in weights and (of_weights := model_of({**weights, "model": cell.arch})) != cell.model:
            return f"weights of {of_weights}, its cell is of {cell.model}"
        for source in record["sources"]:
            for flag, of_cell in (("--dataset", cell.dataset), ("--model", cell.arch)):
                asked = re.findall(rf"(?<!\S){flag}[= ]((?:(?!--)\S+ ?)+)", source["command"])
                if asked and of_cell not in asked[-1].split():
                    return f"its command has {flag} {asked[-1].strip()}, its cell {of_cell}"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"it is not what scripts/record.py writes ({error!r})"
    return ""


def other_counts(dataset: str, **counts: int | None) -> list[str]:
    """In which splits, train or val, a data set was not taken whole: obstacles to a comparison."""
    official, words = DATASETS[dataset].images, {"train": "trained", "val": "tested"}
    return [
        f"{words[split]} on {count:,} images, the data set has {official[split]:,}"
        for split, count in counts.items()
        if official and count not in (None, official[split])
    ]


def read_ledger(results: Path, datasets: Sequence[str]) -> dict[Cell, dict]:
    """The records of these data sets; ValueError for a file among them that is none, with its name."""
    found = {}
    for dataset in datasets:
        for path in sorted((Path(results) / dataset).glob("*.json")):
            record = read_record(results, path)
            found[cell_in(record)] = record
    return found


def recorded_datasets(results: Path) -> list[str]:
    """Those that have a folder, in the order of DATASETS."""
    return [name for name in DATASETS if (Path(results) / name).is_dir()]
