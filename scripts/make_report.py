"""One page about any runs: python scripts/make_report.py [LABEL=]RUN ... --output report.html

A run is a folder that main_linprobe.py, main_analyze_attention.py, main_analyze_aggregation.py, main_finetune.py or
main_pretrain.py has written, finished or not; a folder that holds such folders, or one record of theirs; or a folder of
PNG figures. The page is one file that asks for nothing else: it opens from a disk, and may be sent to a colleague. It
says what the records say and measures nothing; the same records give the same bytes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import Parser, run_main
from util.files import write_atomically
from util.html import Html, element, grid, identifier, page, table, warning
from util.report_facts import (
    Reported,
    data_words,
    duration,
    images_of,
    moment,
    notes,
    photos,
    state,
    wall_time,
    weights_words,
)
from util.report_runs import Found, Run, find_runs
from util.report_sections import SECTIONS

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what a wrong record makes `read` raise


def take_over(found: Found) -> tuple[dict[str, list[Reported]], list[str]]:
    """{program: its runs, as SECTIONS read them}, and what cannot be read, a line each."""
    reported, trouble = {}, list(found.trouble)
    for place, run in enumerate(found.runs, 1):
        try:
            one = Reported(run, SECTIONS[run.program].read(run), f"run-{place}")
            SECTIONS[run.program].result(one.data)
        except MALFORMED as error:
            trouble.append(f"{run.folder}/{run.prefix}: its records are not as {run.program}.py writes them "
                           f"({type(error).__name__}: {error})")  # fmt: skip
            continue
        reported.setdefault(run.program, []).append(one)
    return {program: reported[program] for program in SECTIONS if program in reported}, trouble


def overview(reported: dict[str, list[Reported]]) -> Html:
    """A line for each run."""
    rows = []
    for program, runs in reported.items():
        for one in runs:
            run, (_, words) = one.run, state(one.run)
            rows.append([
                element("a", run.name, href=f"#{one.anchor}"), SECTIONS[program].title, words,
                element("div", SECTIONS[program].result(one.data), class_="words"),
                element("div", data_words(run, images_of(run)), class_="words"),
                element("div", weights_words(run), class_="words"), [[note, " "] for note in notes(run)],
                duration(wall_time(run)), moment(run.written),
            ])  # fmt: skip
    columns = ["run", "program", "state", "result", "measured on", "weights", "note", "wall time", "written"]
    return table(columns, rows)


def report(found: Found, heading: str) -> Html:
    """The whole page."""
    reported, trouble = take_over(found)
    runs: list[Run] = [one.run for section in reported.values() for one in section]
    loud = {str(note) for run in runs for note in notes(run) if "loud" in note}
    counted = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    newest = f"; the newest record is of {moment(max(run.written for run in runs))}" if runs else ""
    told = f"{counted}{newest}. Every number is one that these runs have recorded; nothing was measured for this page."
    titles = {SECTIONS[program].title: program for program in reported}
    contents = [element("li", element("a", title, href=f"#{identifier(title)}"))
                for title in [*titles, *(["Figures"] if found.figures else [])]]  # fmt: skip
    parts = [element("h1", heading), element("p", told), element("nav", element("ul", contents), aria_label="sections")]
    if any("random weights" in note for note in loud):
        parts.append(warning("Some of these encoders have RANDOM WEIGHTS: their numbers say what an untrained network "
                             "does, and nothing about a method."))  # fmt: skip
    if any("uncommitted" in note for note in loud):
        parts.append(warning("Some of these runs used CODE THAT NO COMMIT HAS: they cannot be repeated from their "
                             "commit alone."))  # fmt: skip
    parts += [warning(line) for line in trouble]
    if runs:
        parts.append(overview(reported))
    for title, program in titles.items():
        content = SECTIONS[program].show(reported[program])
        parts.append(element("section", element("h2", title, id=identifier(title)), content))
    if found.figures:
        parts.append(element("h2", "Figures", id="figures"))
        for name, paths in found.figures.items():
            parts.append(element("section", element("h3", name), grid(photos(paths)), class_="card"))
    return page(heading, *parts)


def main(args: argparse.Namespace) -> None:
    found = find_runs(args.runs)
    if not (found.runs or found.figures):
        raise ValueError(f"nothing to report: {'; '.join(found.trouble)}")
    data = report(found, args.title).encode()
    try:
        write_atomically(args.output, data)
    except OSError as error:
        raise ValueError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"{args.output}: {len(found.runs)} runs, {len(data) / 1e6:.1f} MB")
    for line in take_over(found)[1]:
        print(f"left out: {line}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of runs, of figures, or records")
    parser.add_argument("--output", default=Path("report.html"), type=Path, metavar="FILE", help="where to write it")
    parser.add_argument("--title", default="Report of runs", help="heading of the page")
    run_main(main, parser.parse_args())
