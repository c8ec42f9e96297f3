"""TABLES: the cells of the paper's tables (tables.toml), and each cell's measured value beside the paper's.

A value that cannot be compared with the paper's has no difference; its notes say why.
"""

import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from attention.figures import model_name
from data_sets.table import DATASETS
from encoders.catalogue import PUBLICATIONS
from encoders.families import FAMILIES
from paper.cells import COMMON, Cell, Measurement
from probing.results import seeds_note

PAPER_DATASET = "imagenet1k"
DASH = "–"
PRINTED_PATCHES = 196  # the paper prints ln 196 for all models without [cls]
PAPER_SEEDS = 3
ENTROPY_OF_BLOCKS = "aggregation_entropy_block_mean"
DIGITS = {ENTROPY_OF_BLOCKS: (3, 2), "aggregation_entropy": (2, 2)}  # of ours, and of the paper's; others: 1
NAMES = {"mae_ft": "MAE-FT", "random": "random weights"}  # of encoders, beside those of PUBLICATIONS
# settings in which the cells of a table may differ only if their notes say so
PROTOCOL = ("optimizer", "blr", "epochs", "effective_batch", "bn_group", "input_size", "amp", *COMMON)
PROTOCOL += ("transform", "step", "oracle")


class Slot(NamedTuple):
    """What a column shows. head "baseline": cls, or pos for encoders without [cls]; dataset "": the table's own."""

    quantity: str
    head: str
    dataset: str = ""


class Table(NamedTuple):
    title: str
    encoders: list[str]  # the paper's, as model.arch, in its order; others that were measured follow
    lines: dict[str, dict[str, Slot]]  # {title of a row: {column: slot}}, of each encoder
    line_title: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for slots in self.lines.values() for column in slots))


def _read_tables() -> dict[str, Table]:
    tables = tomllib.loads(Path(__file__).with_name("tables.toml").read_text("utf-8"))
    for table in tables.values():
        for line in table["lines"].values():
            line.update({column: Slot(*text.split()) for column, text in line.items()})
    return {name: Table(**table) for name, table in tables.items()}


TABLES = _read_tables()
RULES = {line["top-1"].head: title for title, line in TABLES["6"].lines.items()}


class Entry(NamedTuple):
    """A cell of a table."""

    cell: Cell
    ours: tuple[float, ...] = ()  # two for entropies of encoders without [cls]: of their own patches, and of 196
    std: float | None = None
    paper: float | None = None
    differences: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def texts(self) -> tuple[str, str, str]:
        """Ours with its deviation over seeds, the paper's value, and the difference."""
        own, printed = DIGITS.get(self.cell.quantity, (1, 1))
        spread = f" ± {self.std:.{own}f}" if self.std is not None else ""
        return (
            " / ".join(f"{value:.{own}f}" for value in self.ours) + spread or DASH,
            DASH if self.paper is None else f"{self.paper:.{printed}f}",
            " / ".join(f"{round(value, printed) + 0:+.{printed}f}" for value in self.differences) or DASH,
        )


class Row(NamedTuple):
    encoder: str
    vit: str
    line: str
    entries: list[Entry | None]  # one per column; None where the table has no cell


def table_of(name: str, dataset: str) -> Table:
    """The table of a data set: other data sets than ImageNet have neither the paper's encoders nor its transfer."""
    table, is_paper = TABLES[name], dataset == PAPER_DATASET

    def belongs(slot: Slot) -> bool:
        if is_paper:
            return not slot.dataset.startswith("demo")
        return not slot.dataset or slot.dataset.startswith(dataset)

    lines = {t: {c: slot for c, slot in slots.items() if belongs(slot)} for t, slots in table.lines.items()}
    return table._replace(lines=lines, encoders=table.encoders if is_paper else [])


def datasets_of(table: Table, dataset: str) -> list[str]:
    return sorted({slot.dataset or dataset for slots in table.lines.values() for slot in slots.values()})


def rows_of(name: str, dataset: str, records: dict[Cell, Measurement], paper: Sequence[dict]) -> list[Row]:
    """The paper's encoders, then the others of which a cell of the table was measured."""
    table, rows = table_of(name, dataset), []
    slots = [slot for line in table.lines.values() for slot in line.values()]
    cells = [cell_at(slot, encoder, dataset) for encoder in {cell.encoder for cell in records} for slot in slots]
    shown = {cell: records[cell] for cell in cells if cell in records}
    differing = differing_settings(shown.values())
    for encoder in (*table.encoders, *sorted({cell.encoder for cell in shown} - set(table.encoders))):
        model, arch = encoder.split(".")
        title = NAMES.get(model) or (PUBLICATIONS[model].title if model in PUBLICATIONS else model)
        other = ["not in the paper's table"] * (dataset == PAPER_DATASET and encoder not in table.encoders)
        for line_title, line in table.lines.items():
            entries: list[Entry | None] = [None] * len(table.columns)
            for column, slot in line.items():
                cell = cell_at(slot, encoder, dataset)
                notes = [*other, differing.get(cell, "")]
                entries[table.columns.index(column)] = entry_of(name, cell, records.get(cell), paper, notes)
            rows.append(Row(title, model_name(arch), line_title, entries))
    return rows


def cell_at(slot: Slot, encoder: str, dataset: str) -> Cell:
    model, arch = encoder.split(".")
    head = slot.head
    if head == "baseline":
        has_cls = model not in FAMILIES or FAMILIES[model].vit.get("class_token", True)
        head = "cls" if has_cls else "pos"
    return Cell(slot.dataset or dataset, model, arch, slot.quantity, head)


def entry_of(name: str, cell: Cell, record: Measurement | None, paper: Sequence[dict], notes: Sequence[str]) -> Entry:
    printed, source = paper_value(name, cell, paper)
    of_paper = [f"the paper's value: {source}"] if source else []
    if record is None:
        return Entry(cell, paper=printed, notes=tuple(of_paper))
    ours = (record.mean,)
    if cell.quantity == ENTROPY_OF_BLOCKS and cell.head == "pos":
        ours = (record.mean, math.log(PRINTED_PATCHES))
        of_paper.append(f"ln of its own patches / ln {PRINTED_PATCHES}, which the paper prints for all such encoders")
    prefix = "" if printed is None else "not comparable: "
    obstacles = [prefix + text for text in record.obstacles]
    notes = dict.fromkeys([*of_paper, *filter(None, notes), *measured_on(record), *record.notes, *obstacles])
    differences = tuple(value - printed for value in ours) if printed is not None and not obstacles else ()
    return Entry(cell, ours, record.std, printed, differences, tuple(notes))


def measured_on(record: Measurement) -> list[str]:
    """Notes on a number: its images, where the data set's name does not say it; its seeds; its code."""
    result, settings, dataset, notes = record.result, record.settings, record.cell.dataset, []
    count = len(record.values)
    if DATASETS[dataset].images is None:
        notes.append(f"{result['n_test']:,} test images of {dataset} ({result['test_images'][:8]})")
        if "epochs" in settings:
            train = f"{result['n_train'] + result['n_val']:,} training images of {dataset}"
            notes.append(f"probes: {train}, {settings['epochs']} epochs")
    elif DATASETS[dataset].protocol and "epochs" in settings and count != PAPER_SEEDS:
        notes.append(f"{count} seed{'s' * (count > 1)}, the paper has {PAPER_SEEDS}")
    if record.std is not None:
        notes.append(f"± over {count} seeds; {seeds_note(settings)}")
    if result["dirty"] is not False:
        notes.append(f"made by code {'with uncommitted changes' if result['dirty'] else 'of an unknown commit'}")
    return notes


def differing_settings(records: Iterable[Measurement]) -> dict[Cell, str]:
    """A note for each record on the settings in which the records of a table differ without an obstacle or a note."""
    known = {}
    for record in records:
        settings, result, names = record.settings, record.result, ["amp"]
        if not DATASETS[record.cell.dataset].protocol:  # otherwise, departures from the paper are obstacles
            noted = {"epochs", *(("blr", "optimizer") if settings.get("chosen") else ())}
            names = [name for name in PROTOCOL if name not in noted]
        known[record.cell] = {name: settings[name] for name in names if settings.get(name) is not None}
        known[record.cell] |= {"commit": (result["commit"] or "unknown")[:7], "torch": result["versions"].get("torch")}
    values: dict[str, set] = {}
    for name, value in (item for settings in known.values() for item in settings.items()):
        values.setdefault(name, set()).add(value)
    return {
        cell: ", ".join(f"{name} {value}" for name, value in settings.items() if len(values[name]) > 1)
        for cell, settings in known.items()
    }


def paper_value(name: str, cell: Cell, paper: Sequence[dict]) -> tuple[float | None, str]:
    """The paper's value, and where it stands unless printed in this very table."""
    same = [value for value in paper if value["table"] != "ref" and Cell(*(value[f] for f in Cell._fields)) == cell]
    if not same:
        return None, ""
    best = min(same, key=lambda value: (value["table"] != name, value["certainty"]))
    return best["value"], best["source"] if best["table"] != name or best["certainty"] != "A" else ""
