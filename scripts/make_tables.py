"""The paper's tables, each measured value beside the paper's: python scripts/make_tables.py [--dataset demo]

Numbers come from the records in results/<dataset>/ (scripts/record.py adds them). Each table is written to
`<results>/<dataset>/tableN.md`. Its notes say on what a value was measured, and why it cannot be
compared with the paper's; then there is no difference. What was not measured is a dash.

--runs, --rules: a table of single runs instead: of probes, one row per encoder; of aggregation rules.
--check: are all written tables, and those in README.md and docs/, what the records say? And are the records that these
pages show of clean, known code, with goldens (paper/shown.py)? With --computed, do short runs repeat the goldens?
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from data_sets.table import DATASETS
from paper.cells import NAMED, recorded
from paper.runs import rules_table, runs_table
from paper.shown import ROOT, golden_problems, origin_problems, shown_records
from paper.tables import PAPER_DATASET, TABLES, Row, datasets_of, rows_of, table_of
from report import leaderboard
from util.files import keep_table, save

PAPER = ROOT / "results" / "paper_numbers.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPT = "python scripts/make_tables.py"


# ---- tables


def text_of(name: str, dataset: str, rows: Sequence[Row]) -> str:
    """Markdown: cells with the numbers of their notes, then the notes, those on all numbers first."""
    table = table_of(name, dataset)
    entries = [entry for row in rows for entry in row.entries if entry]
    filled = [set(entry.notes) for entry in entries if entry.ours]
    shared = set.intersection(*filled) if len(filled) > 1 else set()
    every = dict.fromkeys(note for entry in entries for note in entry.notes)
    common, notes = [note for note in every if note in shared], [note for note in every if note not in shared]
    beside = {(i, entry.paper) for row in rows for i, entry in enumerate(row.entries) if entry}
    compared = [any(value is not None for at, value in beside if at == i) for i in range(len(table.columns))]
    named = 3 if table.line_title else 2
    header = ["encoder", "ViT", table.line_title][:named]
    for column, has_paper in zip(table.columns, compared, strict=True):
        header += [column, *(["paper", "difference"] if has_paper else [])]
    suffix = f", {dataset}" if dataset != PAPER_DATASET else ""
    spread = "; mean ± std over seeds" if any(entry.std is not None for entry in entries) else ""
    lines = [f"**{table.title}{suffix}{spread}**", "", line_of(header), "|---" * len(header) + "|"]
    for row in rows:
        cells = [row.encoder, row.vit, row.line][:named]
        for entry, has_paper in zip(row.entries, compared, strict=True):
            texts = list(entry.texts()) if entry else ["", "", ""]
            marks = [str(number) for number, note in enumerate(notes, 1) if entry and note in entry.notes]
            if marks:
                texts[not entry.ours] += f" <sup>{', '.join(marks)}</sup>"
            cells += texts[: 3 if has_paper else 1]
        lines.append(line_of(cells))
    lines += ["", *(f"{note}  " for note in common)]
    lines += [f"<sup>{number}</sup> {note}  " for number, note in enumerate(notes, 1)]
    return "\n".join(lines).rstrip() + "\n"


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def read_rows(name: str, dataset: str, results: Path) -> list[Row]:
    """ValueError names a file that is not a record."""
    records = recorded(results, datasets_of(table_of(name, dataset), dataset))
    return rows_of(name, dataset, records, json.loads(PAPER.read_text()))


def path_of(name: str, dataset: str, results: Path) -> Path:
    return results / dataset / f"{'figure1' if name == 'fig1' else f'table{name}'}.md"


def has_records(rows: Sequence[Row]) -> bool:
    return any(entry and entry.ours for row in rows for entry in row.entries)


def table_for(args: argparse.Namespace) -> tuple[str, str, str]:
    """The one table that the arguments name: its name and its command in a page, and its text."""
    if names := args.runs or args.rules:
        root = ROOT if args.write else Path()  # commands in pages are of the repository
        paths = [f"{label}{equals}{root / path}" for label, equals, path in (name.rpartition("=") for name in names)]
        flag, text = ("runs", runs_table(paths)) if args.runs else ("rules", rules_table(Path(*paths)))
        return flag, f"--{flag} {' '.join(names)}", text
    (name,) = args.table
    title = f"{path_of(name, args.dataset, args.results).stem.replace('figure', 'fig')} of {args.dataset}"
    command = f"--table {name} --dataset {args.dataset}"
    return title, command, text_of(name, args.dataset, read_rows(name, args.dataset, args.results))


def keep(args: argparse.Namespace, write: bool) -> str:
    """Write the table between the marks of a page, or raise ValueError where the page has another; its text."""
    name, command, text = table_for(args)
    keep_table(args.write, name, f"{SCRIPT} {command} --write", text, write)
    return text


# ---- check


def check(results: Path, pages: Sequence[Path], computed: Path | None = None) -> None:
    """ValueError names every table that is not what the records say, and every shown record that cannot be trusted."""
    if not results.is_dir():
        raise ValueError(f"--results {results} does not exist")
    stale = stale_tables(results) + [name for page in pages for name in stale_in_page(page, results)]
    problems = [f"not what the records say: {', '.join(stale)}; write them with {SCRIPT}"] if stale else []
    for path, record in {path: r for page in pages for path, r in shown_records(page).items()}.items():
        problems += origin_problems(path, record)
    problems += leaderboard.problems(results)
    if computed is not None:
        problems += golden_problems(results, computed)
    if problems:
        raise ValueError("; ".join(problems))


def stale_tables(results: Path) -> list[str]:
    """Files of tables that are not what the records say, including missing ones and those of no table or data set."""
    stale, known = [], set()
    for dataset, name in itertools.product(DATASETS, TABLES):
        path = path_of(name, dataset, results)
        known.add(path)
        if path.parent.is_dir():
            rows = read_rows(name, dataset, results)
            if (path.exists() or has_records(rows)) and read_page(path) != text_of(name, dataset, rows):
                stale.append(str(path))
    written = [path for kind in ("table", "figure") for path in sorted(results.glob(f"*/{kind}*.md"))]
    return stale + [str(path) for path in written if path not in known]


def stale_in_page(page: Path, results: Path) -> list[str]:
    """Names of the tables between the marks of a page that are not what the records say."""
    if (text := read_page(page)) is None:
        raise ValueError(f"{page} cannot be read: give a page of this repository")
    stale = []
    for name, command in re.findall(r"<!-- ((?:table\w+|fig1) of \w+|runs|rules): (.*) -->", text):
        words = command.removeprefix(SCRIPT).partition(" --write")[0].split()
        words += ["--results", str(results), "--write", str(page)]
        try:
            keep(get_args_parser().parse_args(words), write=False)
        except (ValueError, TypeError, SystemExit):
            stale.append(f"{name} in {page}")
    return stale


def read_page(path: Path) -> str | None:
    """None for a file that does not exist, or is not text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return


# ---- program


def main(args: argparse.Namespace) -> None:
    if args.dataset not in NAMED:
        raise ValueError(f"--dataset {args.dataset} has no tables: choose one of {', '.join(NAMED)}")
    if args.check:
        if args.table:
            raise ValueError("--check checks every written table: leave out --table")
        check(args.results, [args.write] if args.write else PAGES, args.computed)
        return
    of_runs = args.runs or args.rules
    if (args.output or args.write) and not of_runs and len(args.table or []) != 1:
        raise ValueError("--output and --write are for one table: name it with --table")
    if of_runs or args.write:
        text = keep(args, write=True) if args.write else table_for(args)[2]
        print(text)
        if args.output:
            save(args.output, text)
        return
    tables = {name: read_rows(name, args.dataset, args.results) for name in args.table or TABLES}
    shown = {name: rows for name, rows in tables.items() if args.table or has_records(rows)}
    if not shown:
        raise ValueError(f"{args.results / args.dataset} has no records: add them with scripts/record.py")
    for name, rows in shown.items():
        text = text_of(name, args.dataset, rows)
        print(text)
        save(args.output or path_of(name, args.dataset, args.results), text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--table", nargs="+", choices=TABLES, help="default: all that have a record")
    add("--dataset", default=PAPER_DATASET, help=f"{PAPER_DATASET} (the paper's tables), demo, or another")
    add("--results", type=Path, default=ROOT / "results", help="folder of the records")
    add("--output", type=Path, help="write the table to this file")
    add("--write", type=Path, metavar="PAGE", help="write the table into a page, between its marks")
    add("--runs", nargs="+", metavar="[LABEL=]RUN", help="table of these runs of main_linprobe.py")
    add("--rules", nargs=1, metavar="FILE", help="table of an aggregation.json")
    add("--check", action="store_true", help="write nothing; fail where a table or record is stale")
    add("--computed", type=Path, metavar="FOLDER", help="short runs, which --check compares with the goldens")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
