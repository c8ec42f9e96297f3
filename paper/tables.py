"""TABLES: the cells of the paper's tables, and each cell's measured value beside the paper's.

What makes a measured value incomparable with the paper's is said in the cell's notes, and the cell then has no
difference. Cells are those of the ledger (paper/ledger.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_sets.table import DATASETS
from encoders.catalogue import PUBLICATIONS
from encoders.families import FAMILIES
from paper.ledger import Cell
from probing.results import seeds_note
from util.plotting import model_name

PAPER_DATASET = "imagenet1k"
DASH = "–"
PRINTED_PATCHES = 196  # the paper prints ln 196 for all models without [cls]
PAPER_SEEDS = 3
ENTROPY_OF_BLOCKS = "aggregation_entropy_block_mean"
DIGITS = {ENTROPY_OF_BLOCKS: (3, 2), "aggregation_entropy": (2, 2)}  # of ours, and of the paper's; others: 1
NAMES = {"mae_ft": "MAE-FT", "random": "random weights"}  # of encoders, beside those of PUBLICATIONS
# of a record's settings: those in which cells of one table may differ only if their notes say so
PROTOCOL = (
    *("optimizer", "blr", "epochs", "effective_batch", "bn_group", "input_size", "amp", "final_norm", "init", "crop"),
    *(
        "no_hflip",
        "cache_views",
        "warmup_epochs",
        "min_lr",
        "weight_decay",
        "start_epoch",
        "transform",
        "step",
        "oracle",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# the tables
# ---------------------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """What a column shows. head "baseline": cls, or pos for encoders without [cls]; dataset "": the table's own."""

    quantity: str
    head: str
    dataset: str = ""


class Table(NamedTuple):
    """Each encoder has a row per entry of `lines`: (its title, {column: slot})."""

    title: str
    encoders: tuple[str, ...]  # the paper's, as model.arch, in its order; others that were measured follow
    columns: tuple[str, ...]
    lines: tuple[tuple[str, dict[str, Slot]], ...]
    line_title: str = ""


def heads(quantity: str, **columns: str) -> tuple[tuple[str, dict[str, Slot]], ...]:
    return (("", {title: Slot(quantity, head) for title, head in columns.items()}),)


B, H, L = "vit_base_patch16", "vit_huge_patch14", "vit_large_patch14"
MAE = ("mae.vit_small_patch16", f"mae.{B}", "mae.vit_large_patch16", f"mae.{H}")
ACTIVATIONS = ("relu", "gelu", "tanh")
DEPTHS = (2, 3, 4)
TRANSFER = {  # data sets of Table 2: title and quantity
    "imagenet1pct": ("ImageNet 1 %", "top1"),
    "cub200": ("CUB", "top1"),
    "stanford_cars": ("Cars", "top1"),
    "oxford_pets": ("Pets", "top1"),
    "food101": ("Food-101", "top1"),
    "coco": ("COCO", "map"),
    "nus_wide": ("NUS-WIDE", "map"),
}
DEMO_TRANSFER = {"demo": ("demo", "top1"), "demo_few": ("demo, a tenth", "top1")}
RULES = {
    "attn-mn": "mean [cls] attention",
    "attn-lcte": "lowest-entropy [cls] attention",
    "ca1": "central patch",
    "dino": "oracle's [cls] attention",
    "abmilp": "AbMILP",
}


def transfer(datasets: dict[str, tuple[str, str]]) -> Table:
    slots = {
        f"{title}, {name}": Slot(quantity, head, dataset)
        for dataset, (title, quantity) in datasets.items()
        for name, head in (("baseline", "baseline"), ("AbMILP", "abmilp"))
    }
    title = (
        "Table 2: transfer, top-1 (%), on COCO and NUS-WIDE mean average precision (%); baseline: [cls], or the "
        "average patch of encoders without it"
    )
    encoders = (f"mae.{B}", f"simmim.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}")
    return Table(title, encoders, tuple(slots), (("", slots),))


TABLES = {
    "1": Table(
        "Table 1: linear probing, top-1 (%)",
        (
            *(*MAE, f"simmim.{B}", f"maskfeat.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}"),
            *(f"dino.{B}", f"mocov3.{B}", f"ibot.{B}"),
        ),
        ("[cls]", "average patch", "AbMILP"),
        heads("top1", **{"[cls]": "cls", "average patch": "pos", "AbMILP": "abmilp"}),
    ),
    "2": transfer(TRANSFER),
    "3": Table(
        "Table 3: aggregation entropy (nats), mean over heads, images and blocks",
        (f"mae.{B}", f"simmim.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}", f"dino.{B}"),
        ("entropy",),
        heads(ENTROPY_OF_BLOCKS, entropy="baseline"),
    ),
    "5": Table(
        "Table 5: AbMILP by depth and activation, top-1 (%)",
        (f"mae.{B}",),
        ("depth 1", *(f"depth {depth}" for depth in DEPTHS)),
        (
            ("linear", {"depth 1": Slot("top1", "abmilp")}),
            *(
                (act, {f"depth {depth}": Slot("top1", f"abmilp-d{depth}-{act}") for depth in DEPTHS})
                for act in ACTIVATIONS
            ),
            ("self-attention, SGD", {"depth 1": Slot("top1", "abmilp-sa")}),
        ),
        "activation",
    ),
    "6": Table(
        "Table 6: aggregation rules, top-1 (%) of a probe and entropy of the vector (nats)",
        (f"mae.{B}",),
        ("top-1", "entropy"),
        tuple(
            (title, {"top-1": Slot("top1", head), "entropy": Slot("aggregation_entropy", head)})
            for head, title in RULES.items()
        ),
        "rule",
    ),
    "7": Table(
        "Table 7: AbMILP and attentive probing (AP), top-1 (%)",
        (*MAE, f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}"),
        ("AbMILP", "AP, 1 head", "AP, 12 heads"),
        heads("top1", **{"AbMILP": "abmilp", "AP, 1 head": "ap1", "AP, 12 heads": "ap12"}),
    ),
    "8": Table(
        "Table 8: localisation, MaxBoxAccV2 (%)",
        (f"mae.{B}", f"beitv2.{B}"),
        ("[cls] attention", "AbMILP"),
        heads("maxboxaccv2", **{"[cls] attention": "cls", "AbMILP": "abmilp"}),
    ),
    "fig1": Table(
        "Figure 1: the baseline ([cls], or the average patch of encoders without it) and AbMILP, top-1 (%)",
        (f"mae.{B}", f"beitv2.{B}", f"ibot.{B}", f"mocov3.{B}", f"ijepa.{H}", f"capi.{L}"),
        ("baseline", "AbMILP"),
        heads("top1", baseline="baseline", AbMILP="abmilp"),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# cells
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One cell of a table."""

    cell: Cell
    column: str
    ours: tuple[float, ...] = ()  # two for entropies of encoders without [cls]: of their own patches, and of 196
    std: float | None = None
    n: int = 0
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
    entries: tuple[Entry | None, ...]  # one per column; None where the table has no cell


def table_of(name: str, dataset: str) -> Table:
    """The table for a data set: only ImageNet's has the paper's encoders, and the data sets of Table 2."""
    table = TABLES[name]
    if name == "2" and dataset != PAPER_DATASET:
        own = {dataset: (dataset, "map" if DATASETS[dataset].multi_label else "top1")}
        table = transfer(DEMO_TRANSFER if dataset == "demo" else own)
    return table if dataset == PAPER_DATASET else table._replace(encoders=())


def datasets_of(table: Table, dataset: str) -> set[str]:
    return {slot.dataset or dataset for _, slots in table.lines for slot in slots.values()}


def rows_of(name: str, dataset: str, records: dict[Cell, dict], paper: Sequence[dict]) -> list[Row]:
    """The paper's encoders, then the others of which a cell of the table was measured."""
    table, rows = table_of(name, dataset), []
    encoders = {f"{cell.model}.{cell.arch}" for cell in records}
    slots = [slot for _, line in table.lines for slot in line.values()]
    shown = {at: records[at] for e in encoders for slot in slots if (at := cell_at(slot, e, dataset)) in records}
    notes = differing_settings(list(shown.values()))
    measured = sorted({f"{cell.model}.{cell.arch}" for cell in shown} - set(table.encoders))
    for encoder in (*table.encoders, *measured):
        model, arch = encoder.split(".")
        title = NAMES.get(model) or (PUBLICATIONS[model].title if model in PUBLICATIONS else model)
        other = ["not in the paper's table"] * (dataset == PAPER_DATASET and encoder not in table.encoders)
        for line_title, line in table.lines:
            cells = [cell_at(line[column], encoder, dataset) if column in line else None for column in table.columns]
            entries = (
                cell and entry_of(name, cell, column, records.get(cell), paper, [*other, *notes.get(cell, [])])
                for cell, column in zip(cells, table.columns, strict=True)
            )
            rows.append(Row(title, model_name({"encoder": {"model": arch}}), line_title, tuple(entries)))
    return rows


def cell_at(slot: Slot, encoder: str, dataset: str) -> Cell:
    model, arch = encoder.split(".")
    head = slot.head
    if head == "baseline":
        has_cls = model not in FAMILIES or FAMILIES[model].vit.get("class_token", True)
        head = "cls" if has_cls else "pos"
    return Cell(slot.dataset or dataset, model, arch, slot.quantity, head)


def entry_of(
    name: str, cell: Cell, column: str, record: dict | None, paper: Sequence[dict], notes: Sequence[str]
) -> Entry:
    printed, source = paper_value(name, cell, paper)
    of_paper = [f"the paper's value: {source}"] if source else []
    if record is None:
        return Entry(cell, column, paper=printed, notes=tuple(of_paper))
    ours = (record["value"],)
    if cell.quantity == ENTROPY_OF_BLOCKS and cell.head == "pos":
        ours = (record["value"], math.log(PRINTED_PATCHES))
        of_paper.append(f"ln of its own patches / ln {PRINTED_PATCHES}, which the paper prints for all such encoders")
    prefix = "" if printed is None else "not comparable: "
    obstacles = [prefix + text for text in record["obstacles"]]
    notes = dict.fromkeys([*of_paper, *notes, *measured_on(record), *record["notes"], *obstacles])
    differences = tuple(value - printed for value in ours) if printed is not None and not obstacles else ()
    return Entry(cell, column, ours, record["std"], record["n"], printed, differences, tuple(notes))


def measured_on(record: dict) -> list[str]:
    """Notes on a number: its images, where the data set's name does not say it; its seeds; its code."""
    data, settings, notes = record["data"], record["settings"], []
    if DATASETS[record["dataset"]].images is None:
        notes.append(f"{data['n_test']:,} test images of {record['dataset']} ({data['fingerprint'][:8]})")
        if "epochs" in settings:
            train = f"{data['n_train']:,} training images of {record['dataset']}"
            notes.append(f"probes: {train}, {settings['epochs']} epochs")
    elif DATASETS[record["dataset"]].protocol and "epochs" in settings and record["n"] != PAPER_SEEDS:
        notes.append(f"{record['n']} seed{'s' * (record['n'] > 1)}, the paper has {PAPER_SEEDS}")
    if record["std"] is not None:
        notes.append(f"± over {record['n']} seeds; {seeds_note(settings)}")
    if record["dirty"] is not False:
        notes.append(f"made by code {'with uncommitted changes' if record['dirty'] else 'of an unknown commit'}")
    return notes


def differing_settings(records: Sequence[dict]) -> dict[Cell, list[str]]:
    """A note per record on the settings in which the records of a table differ without an obstacle or a note on it."""

    def settings(record: dict) -> dict[str, object]:
        origin = {"commit": (record["commit"] or "unknown")[:7], "torch": record["versions"].get("torch")}
        chosen = record["settings"].get("rate_chosen_on_held_out_images")
        if DATASETS[record["dataset"]].protocol:  # elsewhere, its departures from the paper are obstacles
            return {"amp": record["settings"].get("amp"), **origin}
        hidden = {"epochs", *(["blr", "optimizer"] if chosen else [])}  # noted anyway
        return {**{name: record["settings"].get(name) for name in PROTOCOL if name not in hidden}, **origin}

    every = [(Cell(*(record[name] for name in Cell._fields)), settings(record)) for record in records]
    values: dict[str, set] = {}
    for _, one in every:
        for name, value in one.items():
            if value is not None:
                values.setdefault(name, set()).add(value)
    differing = [name for name in values if len(values[name]) > 1]
    texts = {cell: [f"{name} {one[name]}" for name in differing if one.get(name) is not None] for cell, one in every}
    return {cell: [", ".join(text)] for cell, text in texts.items() if text}


def paper_value(name: str, cell: Cell, paper: Sequence[dict]) -> tuple[float | None, str]:
    """The paper's value, and where it stands unless printed in this very table."""
    same = [
        value for value in paper if value["table"] != "ref" and all(value[f] == getattr(cell, f) for f in cell._fields)
    ]
    if not same:
        return None, ""
    best = min(same, key=lambda value: (value["table"] != name, value["certainty"]))
    return best["value"], best["source"] if best["table"] != name or best["certainty"] != "A" else ""
