"""One page about any runs: python scripts/make_report.py [LABEL=]RUN ... --output report.html

A run is a folder that main_linprobe.py, main_analyze_attention.py, main_analyze_aggregation.py, main_finetune.py or
main_pretrain.py has written, finished or not; a folder that holds such folders, or one record of theirs; or a folder of
PNG figures. The page is one file that asks for nothing else: it opens from a disk, and may be sent to a colleague. It
says what the records say and measures nothing; the same records give the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from report.facts import (
    DEMO,
    DIRTY,
    RANDOM,
    Reported,
    data_words,
    duration,
    images_of,
    link,
    moment,
    notes,
    photos,
    state_badge,
    wall_time,
    weights_words,
)
from report.html import Html, badge, element, gallery, identifier, page, table, warning
from report.runs import Found, Run, find_runs
from report.sections import SECTIONS
from util.files import write_atomically

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what a wrong record raises


OVERVIEW = ("run", "program", "state", "result", "measured on", "weights", "wall time", "written")


def overview_row(reported: Reported) -> list[object]:
    run, section = reported.run, SECTIONS[reported.run.program]
    said = [state_badge(run), *notes(run)]
    return [
        link(reported), section.title, element("div", [[one, " "] for one in said], class_="short words"),
        element("div", section.result(reported.data), class_="words"),
        element("div", data_words(run, images_of(run)), class_="words"),
        element("div", weights_words(run), class_="words"), duration(wall_time(run)), moment(run.written),
    ]  # fmt: skip


def take_over(runs: Sequence[Run]) -> tuple[list[Reported], list[str]]:
    """The runs as SECTIONS read them, and those whose records are damaged, a line each."""
    reported, trouble = [], []
    for place, run in enumerate(runs, 1):
        try:
            one = Reported(run, SECTIONS[run.program].read(run), f"run-{place}")
            overview_row(one)
            reported.append(one)
        except MALFORMED as error:
            trouble.append(damaged(run, error))
    return reported, trouble


def damaged(run: Run, error: Exception) -> str:
    return (f"{run.folder}/{run.prefix}: its records are not as {run.program}.py writes them "
            f"({type(error).__name__}: {' '.join(str(error).split())})")  # fmt: skip


def show(program: str, reported: Sequence[Reported]) -> tuple[Html, list[Reported], list[str]]:
    """What a section says of its runs; the runs of which it does; and the others, a line each."""
    try:
        return SECTIONS[program].show(reported), list(reported), []
    except MALFORMED:
        kept, trouble = [], []
        for one in reported:  # each for itself: those that can be shown are
            try:
                SECTIONS[program].show([one])
                kept.append(one)
            except MALFORMED as error:
                trouble.append(damaged(one.run, error))
        if len(kept) == len(reported):
            raise
        return SECTIONS[program].show(kept) if kept else Html(), kept, trouble


def report(found: Found, heading: str) -> tuple[Html, list[str]]:
    """The whole page, and what is left out of it, a line each."""
    everything, lines = take_over(found.runs)
    trouble, reported, sections = list(dict.fromkeys([*found.trouble, *lines])), [], {}
    for program, section in SECTIONS.items():
        if of_program := [one for one in everything if one.run.program == program]:
            content, kept, lines = show(program, of_program)
            reported += kept
            trouble += lines
            if kept:
                sections[section.title] = content
    if found.figures:
        sections["Figures"] = Html("".join(
            element("section", element("h3", name), gallery(photos(paths)), class_="card")
            for name, paths in found.figures.items()
        ))  # fmt: skip
    runs = [one.run for one in reported]
    told = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    told += f"; the newest record was written {moment(max(run.written for run in runs))}" if runs else ""
    contents = [element("li", element("a", title, href=f"#{identifier(title)}")) for title in sections]
    badges = "".join(note for run in runs for note in notes(run))
    page_of = page(
        heading,
        element("h1", heading),
        element("p", f"{told}. Every number is one that these runs have recorded; nothing was measured for this page."),
        [warning(words) for sign, words in WARNINGS.items() if sign in badges],
        element(
            "p",
            badge(DEMO),
            " runs have an encoder or images of this repository's demo: they say how things work "
            "there, and nothing about ImageNet.",
            class_="soft",
        )
        if badge(DEMO) in badges
        else None,
        [warning("Left out: ", line) for line in trouble],
        table(OVERVIEW, map(overview_row, reported)) if reported else None,
        element("nav", element("ul", contents), aria_label="sections"),
        [
            element("section", element("h2", title, id=identifier(title)), content)
            for title, content in sections.items()
        ],
    )
    return page_of, trouble


WARNINGS = {  # by the badges of runs
    RANDOM: "Some of these encoders have RANDOM WEIGHTS: their numbers are those of an untrained network, and say "
    "nothing about a method.",
    DIRTY: "Some of these runs used CODE THAT NO COMMIT HAS: their commit alone does not repeat them.",
}


def main(args: argparse.Namespace) -> None:
    found = find_runs(args.runs, {program: section.kind for program, section in SECTIONS.items()})
    if not (found.runs or found.figures):
        raise ValueError(f"nothing to report: {'; '.join(found.trouble)}")
    text, trouble = report(found, args.title)
    data = text.encode()
    try:
        write_atomically(args.output, data)
    except OSError as error:
        raise ValueError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"{args.output}: {len(data) / 1e6:.1f} MB")
    for line in trouble:
        print(f"left out: {line}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of runs, of figures, or records")
    parser.add_argument("--output", default=Path("report.html"), type=Path, metavar="FILE", help="where to write it")
    parser.add_argument("--title", default="Report of runs", help="heading of the page")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
