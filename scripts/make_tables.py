"""The paper's tables beside what was measured: python scripts/make_tables.py --table 3 RESULT.json ... [--output FILE]

Results are the attention.json of main_analyze_attention.py for Table 3, the aggregation.json of
main_analyze_aggregation.py for Tables 6 and 8. Each encoder stands beside the paper's values for its family and
architecture (results/paper_numbers.json). Notes say which rows cannot be compared, and why; they have no difference.
ImageNet's validation set is told by its 50,000 images. What the paper has and nobody measured is a dash.
"""

import argparse
import csv
import functools
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import Parser, run_main
from util.catalogue import CATALOGUE, PUBLICATIONS
from util.files import write_atomically
from util.plotting import load_attention, model_name

PAPER = Path(__file__).resolve().parent.parent / "results" / "paper_numbers.json"
DASH = "–"
VAL_IMAGES = 50_000  # of ImageNet-1k
PRINTED_PATCHES = 196  # of which the paper prints the logarithm for all models without [cls]


class Row(NamedTuple):
    cells: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Table(NamedTuple):
    """What a table shows: its rows are a function of the results and of the paper's records (PAPER.md's vocabulary)."""

    title: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[dict], Sequence[dict]], list[Row]]
    load: Callable[[Path], dict] = load_attention  # ValueError for a file of something else


# ---------------------------------------------------------------------------------------------------------------------
# Table 3
# ---------------------------------------------------------------------------------------------------------------------


def rows_of_table_3(results: Sequence[dict], paper: Sequence[dict]) -> list[Row]:
    """Aggregation entropy: the paper's encoders in its order, then all others."""
    records = [r for r in paper if (r["table"], r["quantity"]) == ("3", "aggregation_entropy_block_mean")]
    keys = [(record["model"], record["arch"]) for record in records]
    rows = []
    for key, record in zip(keys, records, strict=True):
        mine = [result for result in results if paper_key(result) == key]
        rows += [entropy_row(result, record) for result in mine] or [unmeasured(record)]
    return rows + [entropy_row(result, None) for result in results if paper_key(result) not in keys]


def paper_key(result: dict) -> tuple[str | None, str] | None:
    """Model and architecture as the paper's records have them; None for published weights that it does not use."""
    encoder = result["encoder"]
    used = f"{encoder['family']}_{encoder['model']}"  # what the paper uses is called like that in the catalogue
    if encoder["source"] in CATALOGUE and encoder["source"] != used:
        return None
    return encoder["family"], encoder["model"]


def unmeasured(record: dict) -> Row:
    name = model_name({"encoder": {"model": record["arch"]}})
    return Row((PUBLICATIONS[record["model"]].title, name, DASH, DASH, DASH, f"{record['value']:.2f}", DASH))


def entropy_row(result: dict, record: dict | None) -> Row:
    """One encoder; record: the paper's value of it, if it has one. ValueError where entropies were not measured."""
    patches, source = result["patches"], result["encoder"]["source"]
    has_cls = result["tokens"] - patches - result.get("registers", 0) > 0
    notes, obstacles = [], []
    if record is None:
        notes.append("not in the paper's table")
    elif source not in CATALOGUE:
        notes.append(f"weights from {source}, of the family and architecture of the paper's encoder; nothing shows "
                     "that they are the same")  # fmt: skip
    if result["random_weights"]:
        obstacles.append("random weights")
    if has_cls:
        values = [block_mean(result)]
        if result["images"] != VAL_IMAGES:
            obstacles.append(f"other images than the {VAL_IMAGES:,} of ImageNet-1k's validation set")
        if result["input_size"] != 224:
            obstacles.append(f"images of {result['input_size']} pixels, the paper's have 224")
    else:
        values = [math.log(patches), math.log(PRINTED_PATCHES)]
        notes.append(f"no [cls] token, hence uniform weights: ln {patches} of its own patches / "
                     f"ln {PRINTED_PATCHES}, which the paper prints for all such models")  # fmt: skip
        if record is not None and record["head"] == "cls":
            obstacles.append("the paper measured this encoder with its [cls] token")
    label, published = result["label"], record and PUBLICATIONS[record["model"]].title
    name = label if published in (None, label) else f"{published} ({label})"
    difference = DASH
    if record is not None and not obstacles:
        difference = " / ".join(f"{round(value - record['value'], 2) + 0:+.2f}" for value in values)
    return Row(
        (
            name, model_name(result), f"{patches}", f"{result['images']:,}" if has_cls else DASH,
            " / ".join(f"{value:.3f}" for value in values), f"{record['value']:.2f}" if record else DASH, difference,
        ),
        (*notes, *(f"not comparable: {obstacle}" if record else obstacle for obstacle in obstacles)),
    )  # fmt: skip


def block_mean(result: dict, metric: str = "cls_patch_entropy") -> float:
    if metric not in result["metrics"]:
        raise ValueError(f"{result['label']}: {metric} was not measured: run main_analyze_attention.py --metrics paper")
    blocks = result["metrics"][metric]["blocks"]
    return sum(block["mean"] for block in blocks) / len(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Tables 6 and 8
# ---------------------------------------------------------------------------------------------------------------------

PAPER_ORACLE = "dino_vit_base_patch16"
RULES = {  # of the paper's tables, by their names in its records: the rule of aggregation.json, and in words
    "attn-mn": ("attn-mn", "mean [cls] attention"),
    "attn-lcte": ("attn-lcte", "lowest-entropy [cls] attention"),
    "ca1": ("ca1", "central patch"),
    "dino": ("dino", "oracle's [cls] attention"),
    "cls": ("attn-mn", "mean [cls] attention"),
    "abmilp": ("abmilp", "AbMILP"),
}


def load_aggregation(path: Path) -> dict:
    """The aggregation.json of main_analyze_aggregation.py; ValueError where the file is something else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not {"encoder", "rules", "over_seeds", "uniform_entropy"} <= result.keys():
        raise ValueError(f"{path} is no aggregation.json of main_analyze_aggregation.py")
    return result


def aggregation_rows(
    table: str, quantities: Sequence[str], others: bool, results: Sequence[dict], paper: Sequence[dict]
) -> list[Row]:
    """A row for each rule of the table, the encoders in the paper's order, then all other encoders; for each of the
    quantities ours, the paper's and the difference. others: rules that the table lacks are rows of their encoder, too.
    ValueError where one of the quantities was not measured at all."""
    records = {(r["model"], r["arch"], r["head"], r["quantity"]): r["value"] for r in paper if r["table"] == table}
    keys = list(dict.fromkeys(key[:2] for key in records))
    for result in results:
        if not any(quantities[-1] in values for values in result["over_seeds"].values()):
            raise ValueError(f"{encoder_name(result)}: {quantities[-1]} was not measured; it takes another run of "
                             "main_analyze_aggregation.py, without --boxes_only or with --boxes")  # fmt: skip
    rows = []
    for key in keys:
        heads = list(dict.fromkeys(record[2] for record in records if record[:2] == key))
        printed = {head: [records.get((*key, head, quantity)) for quantity in quantities] for head in heads}
        mine = [result for result in results if paper_key(result) == key]
        for result in mine or [None]:
            rows += rows_of_rules(key, result, printed, quantities, others)
    heads = list(dict.fromkeys(record[2] for record in records))
    unknown = {head: [None] * len(quantities) for head in heads}
    for result in results:
        if paper_key(result) not in keys:
            rows += rows_of_rules(None, result, unknown, quantities, others)
    return rows


def rows_of_rules(
    key: tuple[str, str] | None, result: dict | None, printed: dict[str, list[float | None]],
    quantities: Sequence[str], others: bool,
) -> list[Row]:  # fmt: skip
    """One encoder: the rules of `printed` (the paper's values by head), then those that it lacks."""
    name = PUBLICATIONS[key[0]].title if key else encoder_name(result)
    architecture = model_name(result or {"encoder": {"model": key[1]}})
    words = {RULES[head][0]: (RULES[head][1], values) for head, values in printed.items()}
    if others and result is not None:
        words |= {rule: (rule, [None] * len(quantities)) for rule in result["over_seeds"] if rule not in words}
    notes, obstacles = aggregation_notes(key, result)
    rows = []
    for rule, (title, values) in words.items():
        found = result["over_seeds"].get(rule, {}) if result else {}
        cells, own = [name, architecture, title], list(notes)
        for quantity, value in zip(quantities, values, strict=True):
            digits = 2 if quantity == "aggregation_entropy" else 1
            cells += comparison(found.get(quantity), value, digits, not obstacles)
        oracle = (result.get("oracle") or {}).get("source") if result else None
        if rule == "dino" and oracle not in (None, PAPER_ORACLE):
            own.append(f"the oracle is {oracle}, the paper's is DINO")
        if key and found:
            own += [f"not comparable: {obstacle}" for obstacle in obstacles]
        rows.append(Row(tuple(cells), tuple(own if found else ())))
    return rows


def comparison(ours: dict | None, paper: float | None, digits: int, comparable: bool) -> tuple[str, str, str]:
    """Ours over its seeds, the paper's value and the difference."""
    difference = DASH
    if ours and paper is not None and comparable:
        difference = f"{round(ours['mean'] - paper, digits) + 0:+.{digits}f}"
    spread = f" ± {ours['std']:.{digits}f}" if ours and ours["std"] is not None else ""
    return (
        f"{ours['mean']:.{digits}f}{spread}" if ours else DASH,
        f"{paper:.{digits}f}" if paper is not None else DASH,
        difference,
    )


def aggregation_notes(key: tuple[str, str] | None, result: dict | None) -> tuple[list[str], list[str]]:
    """What is to be said of all rows of an encoder, and why its numbers are not those that the paper measured."""
    if result is None:
        return [], []
    notes, obstacles = [], []
    source, images = result["encoder"]["source"], result["images"] or result["localization"]["images"]
    if key is None:
        notes.append("not in the paper's table")
    elif source not in CATALOGUE:
        notes.append(f"weights from {source}, of the family and architecture of the paper's encoder; nothing shows "
                     "that they are the same")  # fmt: skip
    if result["random_weights"]:
        notes.append("random weights")
    if images != VAL_IMAGES:
        obstacles.append(f"other images than the {VAL_IMAGES:,} of ImageNet-1k's validation set")
    if result["input_size"] != 224:
        obstacles.append(f"images of {result['input_size']} pixels, the paper's have 224")
    if result.get("localization", {}).get("transform", "resize") != "resize":
        obstacles.append("central crops, the paper's reference takes the whole image")
    if (tested := (result.get("probes") or {}).get("n_test", VAL_IMAGES)) != VAL_IMAGES:
        obstacles.append(f"probes tested on {tested:,} images")
    return notes, obstacles


def encoder_name(result: dict) -> str:
    return result["encoder"]["source"] or "random weights"


TABLES = {
    "3": Table(
        "Table 3: aggregation entropy in nats, mean over heads, images and blocks",
        ("encoder", "ViT", "patches", "images", "entropy", "paper", "difference"),
        rows_of_table_3,
    ),
    "6": Table(
        "Table 6: aggregation rules, top-1 (%) of a probe and entropy of the vector (nats), mean ± std over seeds",
        ("encoder", "ViT", "rule", "top-1", "paper", "difference", "entropy", "paper", "difference"),
        functools.partial(aggregation_rows, "6", ("top1", "aggregation_entropy"), True),
        load_aggregation,
    ),
    "8": Table(
        "Table 8: MaxBoxAccV2 (%), mean ± std over seeds",
        ("encoder", "ViT", "map", "MaxBoxAccV2", "paper", "difference"),
        functools.partial(aggregation_rows, "8", ("maxboxaccv2",), False),
        load_aggregation,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# formats
# ---------------------------------------------------------------------------------------------------------------------


def numbered(rows: Sequence[Row]) -> tuple[list[str], list[tuple[int, ...]]]:
    """The different notes, in their order, and the numbers (from 1) of each row's."""
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    return notes, [tuple(notes.index(note) + 1 for note in row.notes) for row in rows]


def markdown(table: Table, rows: Sequence[Row]) -> str:
    notes, marks = numbered(rows)
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.columns)} |", "|---" * len(table.columns) + "|"]
    for row, mark in zip(rows, marks, strict=True):
        raised = f" <sup>{', '.join(map(str, mark))}</sup>" if mark else ""
        cells = [cell.replace("|", "\\|") for cell in row.cells]
        lines.append(f"| {cells[0]}{raised} | {' | '.join(cells[1:])} |")
    lines += ["", *(f"<sup>{number}</sup> {note}  " for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def latex(table: Table, rows: Sequence[Row]) -> str:
    def safe(text: str) -> str:
        special = {"\\": r"\textbackslash{}", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        letters = [special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text]
        return "{}" * text.startswith("[") + "".join(letters)  # a line's end takes [ for its argument

    notes, marks = numbered(rows)
    lines = [f"% {table.title}", f"\\begin{{tabular}}{{ll{'r' * (len(table.columns) - 2)}}}", r"\toprule",
             " & ".join(map(safe, table.columns)) + r" \\", r"\midrule"]  # fmt: skip
    for row, mark in zip(rows, marks, strict=True):
        raised = f"$^{{{','.join(map(str, mark))}}}$" if mark else ""
        lines.append(" & ".join([safe(row.cells[0]) + raised, *map(safe, row.cells[1:])]) + r" \\")
    lines.append(r"\bottomrule")
    for number, note in enumerate(notes, 1):
        text = f"\\footnotesize $^{{{number}}}$ {safe(note)}"
        lines.append(f"\\multicolumn{{{len(table.columns)}}}{{l}}{{{text}}} \\\\")
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def comma_separated(table: Table, rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*table.columns, "notes"])
    writer.writerows([*row.cells, "; ".join(row.notes)] for row in rows)
    return stream.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def main(args: argparse.Namespace) -> None:
    paper = json.loads(PAPER.read_text())
    table = TABLES[args.table]
    text = FORMATS[args.format](table, table.rows([table.load(path) for path in args.results], paper))
    print(text, end="")
    if args.output:
        try:
            write_atomically(args.output, text.encode())
        except OSError as error:
            raise ValueError(f"{args.output} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="attention.json or aggregation.json")
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument("--format", default="markdown", choices=FORMATS)
    parser.add_argument("--output", type=Path, default=None, help="also write it here")
    run_main(main, parser.parse_args())
