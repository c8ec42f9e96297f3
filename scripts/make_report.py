"""One page about any runs: python scripts/make_report.py [LABEL=]RUN ... --output report.html

A RUN is the --output_dir of a main, finished or not; a folder of such folders; one record of a run; or a folder of PNG
figures. The page is a single HTML file that loads nothing from elsewhere. It shows what the records hold and measures
nothing; the same records give the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from report import facts
from report.facts import RunReport
from report.page import Group, Text, render, table
from report.runs import Findings, Run, find_runs
from report.sections import SECTIONS
from util.files import write_atomically

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # raised for malformed records
Shown = list[tuple[RunReport, dict[str, object]]]  # runs, and their rows in the overview


def overview_row(report: RunReport) -> dict[str, object]:
    run, section = report.run, SECTIONS[report.run.program]
    return {
        "run": facts.link(report),
        "program": section.title,
        "state": facts.state(run)[1] + facts.note_badges(run),
        "result": section.result(report.data),
        "measured on": facts.data_words(run.record, facts.image_count(run)),
        "weights": facts.weights_words(run),
        "wall time": facts.time_cell(run),
        "written": facts.format_time(run.written),
    }


def show(runs: Sequence[tuple[int, Run]], trouble: list[str]) -> tuple[list[object], Shown]:
    """The blocks of a section, and the runs of one program that they show. A damaged run is left out with a
    line in `trouble`, and the others are then shown one by one."""
    section = SECTIONS[runs[0][1].program]
    try:
        reports = [RunReport(run, section.read(run), f"run-{i}") for i, run in runs]
        return section.show(reports), [(report, overview_row(report)) for report in reports]
    except DAMAGED as error:
        if len(runs) > 1:
            parts = [show([run], trouble) for run in runs]
            return [block for blocks, _ in parts for block in blocks], [row for _, shown in parts for row in shown]
        run, reason = runs[0][1], f"{type(error).__name__}: {' '.join(str(error).split())}"
        trouble.append(f"{run.folder}/{run.prefix}: not a record as {run.program}.py writes it ({reason})")
        return [], []


def make_report(findings: Findings, title: str) -> tuple[str, list[str]]:
    """The page, and a line for each file or run that is left out."""
    trouble, sections, shown = list(dict.fromkeys(findings.trouble)), [], []
    for program, section in SECTIONS.items():
        if runs := [(i, run) for i, run in enumerate(findings.runs, 1) if run.program == program]:
            blocks, of_program = show(runs, trouble)
            shown += of_program
            sections += [{"title": section.title, "anchor": program, "blocks": blocks}] if of_program else []
    if findings.figures:
        galleries = [Group("gallery", facts.photos(paths), name) for name, paths in findings.figures.items()]
        sections.append({"title": "Figures", "anchor": "figures", "blocks": galleries})
    notes = {note for report, _ in shown for note in facts.notes(report.run)}
    warnings = [Text(text, style) for note, (style, text) in facts.NOTES.items() if note in notes]
    summary = f"{len(shown)} run{'s' * (len(shown) != 1)}"
    newest = max((report.run.written for report, _ in shown), default=None)
    summary += "" if newest is None else f"; the newest record is of {facts.format_time(newest)}"
    left_out = [Text(f"Left out: {line}", "loud") for line in trouble]
    overview = table([row for _, row in shown]) if shown else None
    page = render(title, summary=summary, warnings=[*warnings, *left_out], overview=overview, sections=sections)
    return page, trouble


def main(args: argparse.Namespace) -> None:
    findings = find_runs(args.runs, {program: section.kind for program, section in SECTIONS.items()})
    if not (findings.runs or findings.figures):
        raise ValueError(f"nothing to report: {'; '.join(findings.trouble)}")
    page, trouble = make_report(findings, args.title)
    data = page.encode()
    try:
        write_atomically(args.output, data)
    except OSError as error:
        raise ValueError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"{args.output}: {len(data) / 1e6:.1f} MB", *(f"left out: {line}" for line in trouble), sep="\n")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of runs, of figures, or records")
    parser.add_argument("--output", default=Path("report.html"), type=Path, metavar="FILE", help="HTML file to write")
    parser.add_argument("--title", default="Report of runs", help="heading of the page")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
