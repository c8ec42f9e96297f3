"""The paper's tables, each measured value beside the paper's: python scripts/make_tables.py [--dataset demo]

Numbers come from the records in results/<dataset>/ (scripts/record.py adds them). Each table is written to
`<results>/<dataset>/tableN.md`, or as LaTeX. Its notes say on what a value was measured, and why it cannot be
compared with the paper's; then there is no difference. What was not measured is a dash.

--runs, --rules: a table of single runs instead: of probes, one row per encoder; of aggregation rules.
--check: are all written tables, and those in README.md and docs/, what the records say? And are the records that these
pages show of clean, known code, with goldens (paper/shown.py)? With --computed, do short runs repeat the goldens?
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from data_sets.table import DATASETS
from paper.cells import recorded
from paper.runs import rules_table, runs_table
from paper.shown import golden_problems, history_gap, origin_problems, shown_records
from paper.tables import PAPER_DATASET, TABLES, Row, datasets_of, rows_of, table_of
from report import leaderboard
from util.files import keep_table, write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "results" / "paper_numbers.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


class Page(NamedTuple):
    title: str
    header: list[str]
    left: int  # columns of text
    rows: list[list[tuple[str, list[int]]]]  # texts, and numbers of their notes
    common: list[str]  # notes on all numbers
    notes: list[str]  # numbered notes


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
        line = [(text, []) for text in (row.encoder, row.vit, row.line)[:left]]
        for entry, has_paper in zip(row.entries, compared, strict=True):
            ours, paper, difference = entry.texts() if entry else ("", "", "")
            marks = sorted(notes.index(note) + 1 for note in entry.notes if note in notes) if entry else []
            measured = bool(entry and entry.ours)
            cells = [(ours, marks if measured else []), (paper, [] if measured else marks), (difference, [])]
            line += cells if has_paper else cells[:1]
        lines.append(line)
    suffix = f", {dataset}" if dataset != PAPER_DATASET else ""
    spread = "; mean ± std over seeds" if any(entry.std is not None for entry in entries) else ""
    return Page(f"{table.title}{suffix}{spread}", header, left, lines, common, notes)


def markdown(page: Page) -> str:
    def cell(text: str, marks: list[int]) -> str:
        return text.replace("|", "\\|") + (f" <sup>{', '.join(map(str, marks))}</sup>" if marks else "")

    lines = [f"**{page.title}**", "", f"| {' | '.join(page.header)} |", "|---" * len(page.header) + "|"]
    lines += [f"| {' | '.join(cell(*content) for content in row)} |" for row in page.rows]
    lines += ["", *(f"{note}  " for note in page.common)]
    lines += [f"<sup>{number}</sup> {note}  " for number, note in enumerate(page.notes, 1)]
    return "\n".join(lines).rstrip() + "\n"


LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"${letter}$" for letter in "<>|"},  # other letters in LaTeX's default font
    **{"\\": r"\textbackslash{}", "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
}


def latex(page: Page) -> str:
    def safe(text: str) -> str:
        return "{}" * text.startswith("[") + "".join(
            LATEX.get(letter, letter) for letter in text
        )  # \\[ has an argument

    def cell(text: str, marks: list[int]) -> str:
        return safe(text) + (f"$^{{{','.join(map(str, marks))}}}$" if marks else "")

    width = len(page.header)
    lines = [f"% {page.title}", r"% \usepackage{booktabs}"]
    lines += [f"\\begin{{tabular}}{{{'l' * page.left}{'r' * (width - page.left)}}}", r"\toprule"]
    lines += [" & ".join(map(safe, page.header)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(*content) for content in row) + r" \\" for row in page.rows]
    lines.append(r"\bottomrule")
    numbered = [("", note) for note in page.common] + [(f"$^{{{i}}}$ ", note) for i, note in enumerate(page.notes, 1)]
    lines += [f"\\multicolumn{{{width}}}{{l}}{{\\footnotesize {mark}{safe(note)}}} \\\\" for mark, note in numbered]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


FORMATS = {"markdown": "md", "latex": "tex"}


def text_of(name: str, dataset: str, form: str, results: Path) -> str:
    """ValueError names a file that is not a record."""
    records = recorded(results, sorted(datasets_of(table_of(name, dataset), dataset)))
    rows = rows_of(name, dataset, records, json.loads(PAPER.read_text()))
    return {"markdown": markdown, "latex": latex}[form](page_of(name, dataset, rows))


def path_of(name: str, dataset: str, form: str, results: Path) -> Path:
    return results / dataset / f"{'figure1' if name == 'fig1' else f'table{name}'}.{FORMATS[form]}"


def has_records(name: str, dataset: str, results: Path) -> bool:
    records = recorded(results, sorted(datasets_of(table_of(name, dataset), dataset)))
    return any(entry and entry.ours for row in rows_of(name, dataset, records, ()) for entry in row.entries)


SCRIPT = "python scripts/make_tables.py"


def keep(page: Path, name: str, dataset: str, results: Path, write: bool) -> None:
    title = f"{name if name == 'fig1' else f'table{name}'} of {dataset}"
    command = f"{SCRIPT} --table {name} --dataset {dataset} --write"
    keep_table(page, title, command, text_of(name, dataset, "markdown", results), write)


def check(results: Path, pages: Sequence[Path], computed: Path | None = None) -> None:
    """ValueError names every table that is not what the records say, and every shown record that cannot be trusted."""
    if not results.is_dir():
        raise ValueError(f"--results {results} does not exist")
    stale = stale_tables(results) + [name for page in pages for name in stale_in_page(page, results)]
    problems = [f"not what the records say: {', '.join(stale)}; write them with {SCRIPT}"] if stale else []
    gap = history_gap()
    for path, record in {path: r for page in pages for path, r in shown_records(page).items()}.items():
        problems += origin_problems(path, record, known_history=not gap)
    if gap:
        print(f"the commits of the records were not checked: {gap}")
    problems += leaderboard.problems(results)
    if computed is not None:
        problems += golden_problems(results, computed)
    if problems:
        raise ValueError("; ".join(problems))


def stale_tables(results: Path) -> list[str]:
    """Files of tables that are not what the records say, including missing ones and those of no table or data set."""
    stale, known = [], set()
    for dataset in (name for name in DATASETS if (results / name).is_dir()):
        for name in TABLES:
            for form in FORMATS:
                path = path_of(name, dataset, form, results)
                known.add(path)
                required = form == "markdown" and has_records(name, dataset, results)
                if (path.exists() or required) and read_page(path) != text_of(name, dataset, form, results):
                    stale.append(str(path))
    patterns = [f"*/{kind}*.{suffix}" for kind in ("table", "figure") for suffix in FORMATS.values()]
    return stale + [str(path) for p in patterns for path in sorted(results.glob(p)) if path not in known]


def stale_in_page(page: Path, results: Path) -> list[str]:
    """Names of the tables between the marks of a page that are not what the records say."""
    if (text := read_page(page)) is None:
        raise ValueError(f"{page} cannot be read: give a page of this repository")
    stale = []
    for name, command in re.findall(r"<!-- ((?:table\w+|fig1) of \w+|runs|rules): (.*) -->", text):
        try:
            args = get_args_parser().parse_args(command.removeprefix(SCRIPT).partition(" --write")[0].split())
            if args.runs or args.rules:
                write_runs(args, page, write=False)
            else:
                (table,) = args.table
                keep(page, table, args.dataset, results, write=False)
        except (ValueError, TypeError, SystemExit):
            stale.append(f"{name} in {page}")
    return stale


def read_page(path: Path) -> str | None:
    """None for a file that does not exist, or is not text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def write_runs(args: argparse.Namespace, page: Path | None, write: bool = True) -> str:
    """The table of --runs or --rules, also between the marks of a page; paths are relative to the repository."""
    names = args.runs or [args.rules]
    if page is None:
        return runs_table(names, args.report) if args.runs else rules_table(Path(args.rules))
    absolute = [f"{label}{equals}{ROOT / path}" for label, equals, path in (name.rpartition("=") for name in names)]
    text = runs_table(absolute, args.report) if args.runs else rules_table(Path(absolute[0]))
    flag = "runs" if args.runs else "rules"
    keep_table(page, flag, f"{SCRIPT} --{flag} {' '.join(names)} --write", text, write)
    return text


def save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def main(args: argparse.Namespace) -> None:
    if args.dataset not in DATASETS or args.dataset == "image_folder":
        names = ", ".join(name for name in DATASETS if name != "image_folder")
        raise ValueError(f"--dataset {args.dataset} has no tables: choose one of {names}")
    if args.check:
        if args.table:
            raise ValueError("--check checks every written table: leave out --table")
        check(args.results, [args.write] if args.write else PAGES, args.computed)
    elif args.runs or args.rules:
        text = write_runs(args, args.write)
        print(text)
        if args.output:
            save(args.output, text)
    else:
        names = args.table or [name for name in TABLES if has_records(name, args.dataset, args.results)]
        if not names:
            raise ValueError(f"{args.results / args.dataset} has no records: add them with scripts/record.py")
        if (args.output or args.write) and len(names) != 1:
            raise ValueError("--output and --write are for one table: name it with --table")
        for name in names:
            if args.write:
                keep(args.write, name, args.dataset, args.results, write=True)
                continue
            text = text_of(name, args.dataset, args.format, args.results)
            print(text)
            save(args.output or path_of(name, args.dataset, args.format, args.results), text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--table", nargs="+", default=None, choices=TABLES, help="default: all that have a record")
    parser.add_argument(
        "--dataset", default=PAPER_DATASET, help=f"{PAPER_DATASET} (the paper's tables), demo, or another"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--format", default="markdown", choices=FORMATS)
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    parser.add_argument(
        "--write", type=Path, default=None, metavar="PAGE", help="write it into a page, between its marks"
    )
    parser.add_argument("--runs", nargs="+", metavar="[LABEL=]RUN", help="table of these runs of main_linprobe.py")
    parser.add_argument("--report", choices=["last", "best"], default="last", help="epoch that --runs shows")
    parser.add_argument("--rules", metavar="FILE", help="table of an aggregation.json")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table or record is stale")
    parser.add_argument("--computed", type=Path, metavar="FOLDER", help="of short runs, for --check to compare")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
