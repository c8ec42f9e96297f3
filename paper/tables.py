"""TABLES: what the paper's tables are made of, and their cells: what was measured beside what the paper has.

A table never compares unlike things in silence: what stands in the way is said in the notes of a cell, which then has
no difference. Cells are those of the ledger (paper/ledger.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_sets.loader import DATASETS
from encoders.catalogue import PUBLICATIONS
from encoders.families import FAMILIES
from paper.ledger import Cell
from util.plotting import model_name

PAPER_DATASET = "imagenet1k"
DASH = "–"
PRINTED_PATCHES = 196  # of which the paper prints the logarithm for all models without [cls]
PAPER_SEEDS = 3
ENTROPY_OF_BLOCKS = "aggregation_entropy_block_mean"
DIGITS = {ENTROPY_OF_BLOCKS: (3, 2), "aggregation_entropy": (2, 2)}  # of ours, and of the paper's; others: 1
NAMES = {"mae_ft": "MAE-FT", "random": "random weights"}  # of encoders, beside those of PUBLICATIONS


# ---------------------------------------------------------------------------------------------------------------------
# what the tables are
# ---------------------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """What a column shows: "baseline" is the head cls, or pos for encoders without [cls]; dataset: the table's own."""

    quantity: str
    head: str
    dataset: str = ""


class Table(NamedTuple):
    """Each encoder has a row for each entry of `lines`: words that tell it from the others, and its slot by column."""

    title: str
    encoders: tuple[str, ...]  # the paper's, model.arch, in its order; others that were measured follow
    columns: tuple[str, ...]
    lines: tuple[tuple[str, dict[str, Slot]], ...]
    line_title: str = ""


def heads(quantity: str, **columns: str) -> tuple[tuple[str, dict[str, Slot]], ...]:
    return (("", {title: Slot(quantity, head) for title, head in columns.items()}),)


B, H, L = "vit_base_patch16", "vit_huge_patch14", "vit_large_patch14"
MAE = ("mae.vit_small_patch16", f"mae.{B}", "mae.vit_large_patch16", f"mae.{H}")
ACTIVATIONS = ("relu", "gelu", "tanh")
DEPTHS = (2, 3, 4)
TRANSFER = {  # data sets of Table 2: title, and what is counted
    "imagenet1pct": ("ImageNet 1 %", "top1"), "cub200": ("CUB", "top1"), "stanford_cars": ("Cars", "top1"),
    "oxford_pets": ("Pets", "top1"), "food101": ("Food-101", "top1"), "coco": ("COCO", "map"),
    "nus_wide": ("NUS-WIDE", "map"),
}  # fmt: skip
DEMO_TRANSFER = {"demo": ("demo", "top1"), "demo_few": ("demo, a tenth", "top1")}
RULES = {
    "attn-mn": "mean [cls] attention", "attn-lcte": "lowest-entropy [cls] attention", "ca1": "central patch",
    "dino": "oracle's [cls] attention", "abmilp": "AbMILP",
}  # fmt: skip


def transfer(datasets: dict[str, tuple[str, str]]) -> Table:
    slots = {
        f"{title}, {name}": Slot(quantity, head, dataset)
        for dataset, (title, quantity) in datasets.items()
        for name, head in (("baseline", "baseline"), ("AbMILP", "abmilp"))
    }
    return Table(
        "Table 2: transfer, top-1 (%), on COCO and NUS-WIDE mean average precision (%); baseline: [cls], or the "
        "average patch of encoders without it",
        (f"mae.{B}", f"simmim.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}"), tuple(slots), (("", slots),),
    )  # fmt: skip


TABLES = {
    "1": Table(
        "Table 1: linear probing, top-1 (%)",
        (*MAE, f"simmim.{B}", f"maskfeat.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}", f"dino.{B}", f"mocov3.{B}",
         f"ibot.{B}"),
        ("[cls]", "average patch", "AbMILP"),
        heads("top1", **{"[cls]": "cls", "average patch": "pos", "AbMILP": "abmilp"}),
    ),
    "2": transfer(TRANSFER),
    "3": Table(
        "Table 3: aggregation entropy (nats), mean over heads, images and blocks",
        (f"mae.{B}", f"simmim.{B}", f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}", f"dino.{B}"),
        ("entropy",), heads(ENTROPY_OF_BLOCKS, entropy="baseline"),
    ),
    "5": Table(
        "Table 5: AbMILP by depth and activation, top-1 (%)", (f"mae.{B}",),
        ("depth 1", *(f"depth {depth}" for depth in DEPTHS)),
        (
            ("linear", {"depth 1": Slot("top1", "abmilp")}),
            *((act, {f"depth {depth}": Slot("top1", f"abmilp-d{depth}-{act}") for depth in DEPTHS})
              for act in ACTIVATIONS),
            ("self-attention, SGD", {"depth 1": Slot("top1", "abmilp-sa")}),
        ), "activation",
    ),
    "6": Table(
        "Table 6: aggregation rules, top-1 (%) of a probe and entropy of the vector (nats)", (f"mae.{B}",),
        ("top-1", "entropy"),
        tuple((words, {"top-1": Slot("top1", head), "entropy": Slot("aggregation_entropy", head)})
              for head, words in RULES.items()), "rule",
    ),
    "7": Table(
        "Table 7: AbMILP and attentive probing (AP), top-1 (%)",
        (*MAE, f"beitv2.{B}", f"ijepa.{H}", f"capi.{L}"), ("AbMILP", "AP, 1 head", "AP, 12 heads"),
        heads("top1", **{"AbMILP": "abmilp", "AP, 1 head": "ap1", "AP, 12 heads": "ap12"}),
    ),
    "8": Table(
        "Table 8: localisation, MaxBoxAccV2 (%)", (f"mae.{B}", f"beitv2.{B}"), ("[cls] attention", "AbMILP"),
        heads("maxboxaccv2", **{"[cls] attention": "cls", "AbMILP": "abmilp"}),
    ),
    "fig1": Table(
        "Figure 1: the baseline ([cls], or the average patch of encoders without it) and AbMILP, top-1 (%)",
        (f"mae.{B}", f"beitv2.{B}", f"ibot.{B}", f"mocov3.{B}", f"ijepa.{H}", f"capi.{L}"), ("baseline", "AbMILP"),
        heads("top1", baseline="baseline", AbMILP="abmilp"),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# cells
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One cell of a table, with all that is to be said of it."""

    cell: Cell
    column: str
    ours: tuple[float, ...] = ()  # two for entropies of encoders without [cls]: of their own patches, and of 196
    std: float | None = None
    n: int = 0
    paper: float | None = None
    differences: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def digits(self) -> tuple[int, int]:
        return DIGITS.get(self.cell.quantity, (1, 1))

    def texts(self) -> tuple[str, str, str]:
        """Ours over its seeds, the paper's value and the difference."""
        own, printed = self.digits
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
    entries: tuple[Entry | None, ...]  # one for each column; None where the table has no cell


def table_of(name: str, dataset: str) -> Table:
    """The table as it is for a data set: only ImageNet's has the paper's encoders, and the transfer of Table 2."""
    table = TABLES[name]
    if name == "2" and dataset != PAPER_DATASET:
        own = {dataset: (dataset, "map" if DATASETS[dataset].multi_label else "top1")}
        table = transfer(DEMO_TRANSFER if dataset == "demo" else own)
    return table if dataset == PAPER_DATASET else table._replace(encoders=())


def datasets_of(table: Table, dataset: str) -> set[str]:
    return {slot.dataset or dataset for _, slots in table.lines for slot in slots.values()}


def rows_of(name: str, dataset: str, records: dict[Cell, dict], paper: Sequence[dict]) -> list[Row]:
    """The paper's encoders, then all others of which a cell of the table was measured."""
    table, rows = table_of(name, dataset), []
    slots = [slot for _, line in table.lines for slot in line.values()]
    measured = {
        f"{cell.model}.{cell.arch}"
        for cell in records
        if any(cell == cell_at(slot, f"{cell.model}.{cell.arch}", dataset) for slot in slots)
    }
    for encoder in (*table.encoders, *sorted(measured - set(table.encoders))):
        model, arch = encoder.split(".")
        title = NAMES.get(model) or (PUBLICATIONS[model].title if model in PUBLICATIONS else model)
        others = ["not in the paper's table"] * (dataset == PAPER_DATASET and encoder not in table.encoders)
        for words, line in table.lines:
            entries = (
                entry_of(name, cell_at(line[column], encoder, dataset), column, records, paper, others)
                if column in line
                else None
                for column in table.columns
            )
            rows.append(Row(title, model_name({"encoder": {"model": arch}}), words, tuple(entries)))
    return rows


def cell_at(slot: Slot, encoder: str, dataset: str) -> Cell:
    model, arch = encoder.split(".")
    head = slot.head
    if head == "baseline":
        has_cls = model not in FAMILIES or FAMILIES[model].vit.get("class_token", True)
        head = "cls" if has_cls else "pos"
    return Cell(slot.dataset or dataset, model, arch, slot.quantity, head)


def entry_of(
    name: str, cell: Cell, column: str, records: dict[Cell, dict], paper: Sequence[dict], others: list[str]
) -> Entry:
    printed, source = paper_value(name, cell, paper)
    record = records.get(cell)
    notes = [f"the paper's value: {source}"] if source else []
    if record is None:
        return Entry(cell, column, paper=printed, notes=tuple(notes))
    ours = (record["value"],)
    if cell.quantity == ENTROPY_OF_BLOCKS and cell.head == "pos":
        ours = (record["value"], math.log(PRINTED_PATCHES))
        notes.append(f"ln of its own patches / ln {PRINTED_PATCHES}, which the paper prints for all such encoders")
    comparable = printed is not None and not record["obstacles"]
    prefix = "" if printed is None else "not comparable: "
    notes += [*others, *measured_on(record), *record["notes"], *(prefix + words for words in record["obstacles"])]
    differences = tuple(value - printed for value in ours) if comparable else ()
    return Entry(cell, column, ours, record["std"], record["n"], printed, differences, tuple(dict.fromkeys(notes)))


def measured_on(record: dict) -> list[str]:
    """Notes on what a number is of: the images, where the name of the data set does not say it; seeds; the code."""
    data, settings, notes = record["data"], record["settings"], []
    if DATASETS[record["dataset"]].images is None:
        notes.append(f"{data['n_test']:,} test images of {record['dataset']} (list {data['fingerprint'][:8]})")
        if "epochs" in settings:
            notes.append(f"probes: {data['n_train']:,} training images of {record['dataset']}, "
                         f"{settings['epochs']} epochs")  # fmt: skip
    elif DATASETS[record["dataset"]].protocol and "epochs" in settings and record["n"] != PAPER_SEEDS:
        notes.append(f"{record['n']} seed{'s' * (record['n'] > 1)}, the paper has {PAPER_SEEDS}")
    if record["dirty"] is not False:
        notes.append(f"made by code {'with changes that were not committed' if record['dirty'] else 'of no commit'}")
    return notes


def paper_value(name: str, cell: Cell, paper: Sequence[dict]) -> tuple[float | None, str]:
    """The paper's value, of its other tables where this one's is not known, and then where it stands."""
    same = [one for one in paper if one["table"] != "ref" and Cell(*(one[key] for key in Cell._fields)) == cell]
    if not same:
        return None, ""
    best = min(same, key=lambda one: (one["table"] != name, one["certainty"]))
    return best["value"], best["source"] if best["table"] != name or best["certainty"] != "A" else ""
