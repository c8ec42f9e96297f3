"""TABLES: the cells of the paper's tables, and each cell's measured value beside the paper's.

What makes a measured value incomparable with the paper's is said in the cell's notes, and the cell then has no
difference.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from attention.figures import model_name
from data_sets.table import DATASETS
from encoders.catalogue import PUBLICATIONS
from encoders.families import FAMILIES
from paper.cells import Cell, Measurement
from probing.results import seeds_note

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


class Slot(NamedTuple):
    """What a column shows. head "baseline": cls, or pos for encoders without [cls]; dataset "": the table's own."""

    quantity: str
    head: str
    dataset: str = ""


class Table(NamedTuple):
    """Each encoder has a row per entry of `lines`: (its title, {column: slot})."""

    title: str
    encoders: tuple[str, ...]  # the paper's, as model.arch, in its order; others that were measured follow
    lines: tuple[tuple[str, dict[str, Slot]], ...]
    line_title: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, slots in self.lines for column in slots))


def encoders(models: str) -> tuple[str, ...]:
    """model or model/size, as model.arch; the size is the paper's."""
    archs = {"S": "vit_small_patch16", "B": "vit_base_patch16", "L": "vit_large_patch16", "H": "vit_huge_patch14"}
    archs |= {"ijepa": "vit_huge_patch14", "capi": "vit_large_patch14"}
    pairs = (name.partition("/") for name in models.split())
    return tuple(f"{model}.{archs.get(size or model, archs['B'])}" for model, _, size in pairs)


def heads(quantity: str, **columns: str) -> tuple[tuple[str, dict[str, Slot]], ...]:
    return (("", {title: Slot(quantity, head) for title, head in columns.items()}),)


TRANSFER = {  # data sets of Table 2: title; by top-1, or mean average precision where images have several labels
    **{"imagenet1pct": "ImageNet 1 %", "cub200": "CUB", "stanford_cars": "Cars", "oxford_pets": "Pets"},
    **{"food101": "Food-101", "coco": "COCO", "nus_wide": "NUS-WIDE"},
}
DEMO_TRANSFER = {"demo": "demo", "demo_few": "demo, a tenth"}
RULES = {
    **{"attn-mn": "mean [cls] attention", "attn-lcte": "lowest-entropy [cls] attention", "ca1": "central patch"},
    **{"dino": "oracle's [cls] attention", "abmilp": "AbMILP"},
}
MAE = "mae/S mae mae/L mae/H "


def transfer(datasets: dict[str, str]) -> Table:
    slots = {
        f"{title}, {name}": Slot("map" if DATASETS[dataset].multi_label else "top1", head, dataset)
        for dataset, title in datasets.items()
        for name, head in (("baseline", "baseline"), ("AbMILP", "abmilp"))
    }
    title = (
        "Table 2: transfer, top-1 (%), on COCO and NUS-WIDE mean average precision (%); baseline: [cls], or the "
        "average patch of encoders without it"
    )
    return Table(title, encoders("mae simmim beitv2 ijepa capi"), (("", slots),))


def depths(activation: str) -> dict[str, Slot]:
    return {f"depth {depth}": Slot("top1", f"abmilp-d{depth}-{activation}") for depth in (2, 3, 4)}


TABLES = {
    "1": Table(
        "Table 1: linear probing, top-1 (%)",
        encoders(MAE + "simmim maskfeat beitv2 ijepa capi dino mocov3 ibot"),
        heads("top1", **{"[cls]": "cls", "average patch": "pos", "AbMILP": "abmilp"}),
    ),
    "2": transfer(TRANSFER),
    "3": Table(
        "Table 3: aggregation entropy (nats), mean over heads, images and blocks",
        encoders("mae simmim beitv2 ijepa capi dino"),
        heads(ENTROPY_OF_BLOCKS, entropy="baseline"),
    ),
    "5": Table(
        "Table 5: AbMILP by depth and activation, top-1 (%)",
        encoders("mae"),
        (
            ("linear", {"depth 1": Slot("top1", "abmilp")}),
            *((activation, depths(activation)) for activation in ("relu", "gelu", "tanh")),
            ("self-attention, SGD", {"depth 1": Slot("top1", "abmilp-sa")}),
        ),
        "activation",
    ),
    "6": Table(
        "Table 6: aggregation rules, top-1 (%) of a probe and entropy of the vector (nats)",
        encoders("mae"),
        tuple(
            (title, {"top-1": Slot("top1", head), "entropy": Slot("aggregation_entropy", head)})
            for head, title in RULES.items()
        ),
        "rule",
    ),
    "7": Table(
        "Table 7: AbMILP and attentive probing (AP), top-1 (%)",
        encoders(MAE + "beitv2 ijepa capi"),
        heads("top1", **{"AbMILP": "abmilp", "AP, 1 head": "ap1", "AP, 12 heads": "ap12"}),
    ),
    "8": Table(
        "Table 8: localisation, MaxBoxAccV2 (%)",
        encoders("mae beitv2"),
        heads("maxboxaccv2", **{"[cls] attention": "cls", "AbMILP": "abmilp"}),
    ),
    "fig1": Table(
        "Figure 1: the baseline ([cls], or the average patch of encoders without it) and AbMILP, top-1 (%)",
        encoders("mae beitv2 ibot mocov3 ijepa capi"),
        heads("top1", baseline="baseline", AbMILP="abmilp"),
    ),
}


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
        table = transfer(DEMO_TRANSFER if dataset == "demo" else {dataset: dataset})
    return table if dataset == PAPER_DATASET else table._replace(encoders=())


def datasets_of(table: Table, dataset: str) -> set[str]:
    return {slot.dataset or dataset for _, slots in table.lines for slot in slots.values()}


def rows_of(name: str, dataset: str, records: dict[Cell, Measurement], paper: Sequence[dict]) -> list[Row]:
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
    name: str, cell: Cell, column: str, record: Measurement | None, paper: Sequence[dict], notes: Sequence[str]
) -> Entry:
    printed, source = paper_value(name, cell, paper)
    of_paper = [f"the paper's value: {source}"] if source else []
    if record is None:
        return Entry(cell, column, paper=printed, notes=tuple(of_paper))
    ours = (record.mean,)
    if cell.quantity == ENTROPY_OF_BLOCKS and cell.head == "pos":
        ours = (record.mean, math.log(PRINTED_PATCHES))
        of_paper.append(f"ln of its own patches / ln {PRINTED_PATCHES}, which the paper prints for all such encoders")
    prefix = "" if printed is None else "not comparable: "
    obstacles = [prefix + text for text in record.obstacles]
    notes = dict.fromkeys([*of_paper, *notes, *measured_on(record), *record.notes, *obstacles])
    differences = tuple(value - printed for value in ours) if printed is not None and not obstacles else ()
    return Entry(cell, column, ours, record.std, len(record.values), printed, differences, tuple(notes))


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


def differing_settings(records: Sequence[Measurement]) -> dict[Cell, list[str]]:
    """A note per record on the settings in which the records of a table differ without an obstacle or a note on it."""
    every = {}
    for record in records:
        settings, names = record.settings, ["amp"]
        if not DATASETS[record.cell.dataset].protocol:  # otherwise, departures from the paper are obstacles
            noted = ("blr", "optimizer") if settings.get("chosen") else ()
            names = [name for name in PROTOCOL if name not in ("epochs", *noted)]
        known = {name: settings[name] for name in names if settings.get(name) is not None}
        known["commit"] = (record.result["commit"] or "unknown")[:7]
        every[record.cell] = known | {n: v for n, v in record.result["versions"].items() if n == "torch"}
    values: dict[str, set] = {}
    for name, value in (item for known in every.values() for item in known.items()):
        values.setdefault(name, set()).add(value)
    texts = {c: [f"{name} {known[name]}" for name in known if len(values[name]) > 1] for c, known in every.items()}
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
