"""The paper's tables, with what was measured beside what the paper has: python scripts/make_tables.py [--dataset demo]

Numbers come from the records of the ledger alone (paper/ledger.py; scripts/record.py makes them). Each table is written
to `<results>/<dataset>/tableN.md`, or as LaTeX or CSV. Notes say what was measured on what, and why a cell cannot be
compared with the paper's; it has no difference then. What nobody measured is a dash.
--check: whether all tables that are there, and those between the marks of README.md, are what the records say.
"""

import argparse
import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from data_sets.loader import DATASETS
from paper.ledger import Cell, read_ledger, recorded_datasets
from paper.tables import PAPER_DATASET, TABLES, Row, datasets_of, rows_of, table_of
from scripts import probe_table
from util.files import keep_table, write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "results" / "paper_numbers.json"
KEPT = (PAPER_DATASET, "demo")  # whose tables have to be there


# ---------------------------------------------------------------------------------------------------------------------
# formats
# ---------------------------------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A table in words: notes of all its numbers, and numbered ones of some."""

    title: str
    header: list[str]
    left: int  # columns of words
    rows: list[list[tuple[str, list[int]]]]  # texts, and numbers of their notes
    common: list[str]
    notes: list[str]


def page_of(name: str, dataset: str, rows: Sequence[Row]) -> Page:
    table = table_of(name, dataset)
    entries = [entry for row in rows for entry in row.entries if entry]
    filled = [set(entry.notes) for entry in entries if entry.ours]
    shared = set.intersection(*filled) if len(filled) > 1 else set()
    every = list(dict.fromkeys(note for entry in entries for note in entry.notes))
    common, notes = [note for note in every if note in shared], [note for note in every if note not in shared]
    columns = zip(*(row.entries for row in rows), strict=True) if rows else ((),) * len(table.columns)
    compared = [any(entry and entry.paper is not None for entry in column) for column in columns]
    header = ["encoder", "ViT", *([table.line_title] if table.line_title else [])]
    left = len(header)
    for column, has_paper in zip(table.columns, compared, strict=True):
        header += [column, *(["paper", "difference"] if has_paper else [])]
    lines = []
    for row in rows:
        line = [(words, []) for words in (row.encoder, row.vit, row.line)[:left]]
        for entry, has_paper in zip(row.entries, compared, strict=True):
            texts = entry.texts() if entry else ("", "", "")
            marks = sorted(notes.index(note) + 1 for note in entry.notes if note in notes) if entry else []
            cells = [(texts[0], marks if entry and entry.ours else []), (texts[1], []), (texts[2], [])]
            if entry and not entry.ours and marks:
                cells[1] = (texts[1], marks)
            line += cells if has_paper else cells[:1]
        lines.append(line)
    where = f", {dataset}" if dataset != PAPER_DATASET else ""
    spread = "; mean ± std over seeds" if any(entry.std is not None for entry in entries) else ""
    return Page(f"{table.title}{where}{spread}", header, left, lines, common, notes)


def markdown(page: Page) -> str:
    def cell(text: str, marks: list[int]) -> str:
        return text.replace("|", "\\|") + (f" <sup>{', '.join(map(str, marks))}</sup>" if marks else "")

    lines = [f"**{page.title}**", "", f"| {' | '.join(page.header)} |", "|---" * len(page.header) + "|"]
    lines += [f"| {' | '.join(cell(*one) for one in row)} |" for row in page.rows]
    lines += ["", *(f"{note}  " for note in page.common)]
    lines += [f"<sup>{number}</sup> {note}  " for number, note in enumerate(page.notes, 1)]
    return "\n".join(lines).rstrip() + "\n"


def latex(page: Page) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "–": "--",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        **{letter: f"${letter}$" for letter in "<>|"},  # other letters in the font that LaTeX begins with
    }

    def safe(text: str) -> str:
        letters = [special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text]
        return "{}" * text.startswith("[") + "".join(letters)  # a line's end takes [ for its argument

    def cell(text: str, marks: list[int]) -> str:
        return safe(text) + (f"$^{{{','.join(map(str, marks))}}}$" if marks else "")

    width = len(page.header)
    lines = [f"% {page.title}", r"% \usepackage{booktabs}",
             f"\\begin{{tabular}}{{{'l' * page.left}{'r' * (width - page.left)}}}", r"\toprule",
             " & ".join(map(safe, page.header)) + r" \\", r"\midrule"]  # fmt: skip
    lines += [" & ".join(cell(*one) for one in row) + r" \\" for row in page.rows]
    lines.append(r"\bottomrule")
    numbered = [("", note) for note in page.common] + [(f"$^{{{i}}}$ ", note) for i, note in enumerate(page.notes, 1)]
    lines += [f"\\multicolumn{{{width}}}{{l}}{{\\footnotesize {mark}{safe(note)}}} \\\\" for mark, note in numbered]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def comma_separated(rows: Sequence[Row], records: dict[Cell, dict]) -> str:
    """A line for each cell, numbers as they are, and what was measured on what."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["encoder", "vit", "line", "column", *Cell._fields, "ours", "ours_196", "std", "n", "paper",
                     "difference", "difference_196", "unit", "train_images", "test_images", "weights", "commit",
                     "notes"])  # fmt: skip
    for row in rows:
        for entry in filter(None, row.entries):
            ours, differences = [*entry.ours, None, None][:2], [*entry.differences, None, None][:2]
            numbers = [*ours, entry.std, entry.n or None, entry.paper, *differences]
            words = ["" if number is None else repr(number) for number in numbers]
            origin = [""] * 5
            if record := records.get(entry.cell):
                data, weights = record["data"], record["weights"]
                origin = [record["unit"], data["n_train"], data["n_test"], weights["source"], record["commit"]]
            notes = "; ".join(entry.notes)
            writer.writerow([row.encoder, row.vit, row.line, entry.column, *entry.cell, *words, *origin, notes])
    return stream.getvalue()


FORMATS = {"markdown": "md", "latex": "tex", "csv": "csv"}


def text_of(name: str, dataset: str, form: str, results: Path) -> str:
    """ValueError for a record that is none."""
    records = read_ledger(results, sorted(datasets_of(table_of(name, dataset), dataset)))
    rows = rows_of(name, dataset, records, json.loads(PAPER.read_text()))
    if form == "csv":
        return comma_separated(rows, records)
    return {"markdown": markdown, "latex": latex}[form](page_of(name, dataset, rows))


# ---------------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------------


def place_of(name: str, dataset: str, form: str, results: Path) -> Path:
    return results / dataset / f"{'figure1' if name == 'fig1' else f'table{name}'}.{FORMATS[form]}"


def has_records(name: str, dataset: str, results: Path) -> bool:
    table = table_of(name, dataset)
    records = read_ledger(results, sorted(datasets_of(table, dataset)))
    return any(entry and entry.ours for row in rows_of(name, dataset, records, ()) for entry in row.entries)


def check(results: Path, page: Path) -> None:
    """ValueError names every table that is not what the records say, and those that are missing."""
    if not results.is_dir():
        raise ValueError(f"--results {results}: there is no such folder")
    refuse_strays(results)
    odd, known = [], set()
    for dataset in dict.fromkeys([*recorded_datasets(results), PAPER_DATASET]):
        for name in TABLES:
            for form in FORMATS:
                path = place_of(name, dataset, form, results)
                known.add(path)
                expected = form == "markdown" and dataset in KEPT and has_records(name, dataset, results)
                if (path.exists() or expected) and read_page(path) != text_of(name, dataset, form, results):
                    odd.append(str(path))
    # a table of no data set or of another number has no records
    odd += [str(path) for word in ("table", "figure") for form in FORMATS.values()
            for path in sorted(Path(results).glob(f"*/{word}*.{form}")) if path not in known]  # fmt: skip
    text = read_page(page)
    if text is None:
        raise ValueError(f"{page} cannot be read: name a page of this repository")
    for name, dataset in re.findall(r"<!-- (table\w+|fig1) of (\w+): ", text):
        number = name.removeprefix("table")
        try:
            if number not in TABLES or dataset not in DATASETS:
                raise ValueError(f"there is no {name} of {dataset}")
            keep(page, number, dataset, results, write=False)
        except ValueError:
            odd.append(f"{name} of {dataset} in {page}")
    for name, words in re.findall(r"<!-- (\w+): python scripts/probe_table.py (.*) --write ", text):
        try:
            runs = [f"{label}={ROOT / path}" for label, _, path in (word.rpartition("=") for word in words.split())]
            probe_table.keep(page, name, words.split(), probe_table.table(probe_table.labelled_runs(runs)), write=False)
        except ValueError:
            odd.append(f"{name} in {page}")
    if odd:
        raise ValueError(f"not what the records say: {', '.join(odd)}; scripts/make_tables.py writes them")


def read_page(path: Path) -> str | None:
    """None where it is not there, or no text."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def refuse_strays(results: Path) -> None:
    """ValueError for records where no table looks for them."""
    strays = []
    for path in sorted(Path(results).rglob("*.json")):
        if path.parent.parent == Path(results) and path.parent.name in DATASETS:
            continue  # which tables read
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(read_page(path) or "")
            if isinstance(record, dict) and "seal" in record:
                strays.append(str(path))
    if strays:
        raise ValueError(f"records that no table looks for: {', '.join(strays)}; remove them, or bring them back")


def keep(page: Path, name: str, dataset: str, results: Path, write: bool) -> None:
    title = name if name == "fig1" else f"table{name}"
    command = f"python scripts/make_tables.py --table {name} --dataset {dataset} --write"
    keep_table(page, f"{title} of {dataset}", command, text_of(name, dataset, "markdown", results), write)


def main(args: argparse.Namespace) -> None:
    if args.dataset not in DATASETS or args.dataset == "image_folder":
        raise ValueError(f"--dataset {args.dataset}: choose one of {', '.join(DATASETS)} that has a name of its own")
    if args.check and args.table:
        raise ValueError("--check looks at every table that is written: leave out --table")
    if args.check:
        check(args.results, args.write or ROOT / "README.md")
        return
    names = args.table or [name for name in TABLES if has_records(name, args.dataset, args.results)]
    if not names:
        raise ValueError(f"{args.results / args.dataset} holds no records: scripts/record.py makes them of runs")
    if (args.output or args.write) and len(names) != 1:
        raise ValueError("--output and --write are for one table: name it with --table")
    for name in names:
        if args.write:
            keep(args.write, name, args.dataset, args.results, write=True)
            continue
        text = text_of(name, args.dataset, args.format, args.results)
        print(text)
        path = args.output or place_of(name, args.dataset, args.format, args.results)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--table", nargs="+", default=None, choices=TABLES, help="default: all that have a record")
    parser.add_argument(
        "--dataset", default=PAPER_DATASET, help=f"{PAPER_DATASET} (the paper's tables), demo, or other"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--format", default="markdown", choices=FORMATS)
    parser.add_argument("--output", type=Path, default=None, help="write it here")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="into a page, between its marks")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
