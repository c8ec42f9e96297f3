"""The paper's tables beside what was measured: python scripts/make_tables.py --table 3 RESULT.json ... [--output FILE]

Table 3: results are the attention.json of main_analyze_attention.py. Each encoder stands beside the paper's value for
its family and architecture (results/paper_numbers.json). Notes say which rows cannot be compared, and why; they have no
difference. ImageNet's validation set is told by its 50,000 images. What the paper has and nobody measured is a dash.
"""

import argparse
import csv
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


TABLES = {
    "3": Table(
        "Table 3: aggregation entropy in nats, mean over heads, images and blocks",
        ("encoder", "ViT", "patches", "images", "entropy", "paper", "difference"),
        rows_of_table_3,
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
    text = FORMATS[args.format](table, table.rows([load_attention(path) for path in args.results], paper))
    print(text, end="")
    if args.output:
        try:
            write_atomically(args.output, text.encode())
        except OSError as error:
            raise ValueError(f"{args.output} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="for Table 3: attention.json")
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument("--format", default="markdown", choices=FORMATS)
    parser.add_argument("--output", type=Path, default=None, help="also write it here")
    run_main(main, parser.parse_args())
