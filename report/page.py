"""The page of a report: the contents of runs, grouped by program and images, rendered by page.html."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, TemplateError
from PIL import Image

from report import facts
from report.maps import read_maps
from report.plots import Axes, Line, plot
from report.programs import READERS, Content
from report.runs import KINDS, Run
from report.tables import Cell, Row, group_by, real, table
from util.files import sha256

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError, TemplateError)
PICTURES = 24  # shown per folder
REDRAWN = ("attention.png", "park.png", "heads.png", "spectra.png", "kl.png")  # the page has them as tables and plots
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # not allowed in HTML or UTF-8
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=ChainableUndefined,  # what a record lacks is left out
    trim_blocks=True,
    extensions=["jinja2.ext.do"],
)
Read = tuple[Run, list[Content]]


def make_report(
    runs: Sequence[Run], figures: Mapping[str, Sequence[Path]], trouble: Sequence[str], title: str
) -> tuple[bytes, list[str]]:
    """The page, and a line for each file or run that is left out."""
    shown: list[Read] = []
    left_out = list(trouble)
    for run in runs:
        try:
            read = run, READERS[run.program](run)
            render(title, [read])
            shown.append(read)
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if type(error) is KeyError:
                reason = f"it has no {error}"
            record = run.folder / run.prefix.rstrip(".")
            left_out.append(f"{record}: not a complete record of {run.program}.py ({reason})")
    return render(title, shown, {name: pictures(paths) for name, paths in figures.items()}, left_out), left_out


def render(
    title: str,
    reads: Sequence[Read] = (),
    figures: Mapping[str, Any] | None = None,
    left_out: Sequence[str] = (),
    boards: Sequence[Sequence[Any]] = (),
    tools: Mapping[str, Any] | None = None,
) -> bytes:
    """boards: of report.leaderboard, whose functions are among the tools."""
    sections = {}
    for program in READERS:
        of_program = [(run, contents) for run, contents in reads if run.program == program]
        same = group_by([(run, c) for run, contents in of_program for c in contents], lambda pair: pair[1].key)
        if of_program:
            sections[program] = {"groups": [compare(pairs) for pairs in same], "reads": of_program}
    notes = {
        note for run, contents in reads for note in (*facts.notes_of(run), *(n for c in contents for n in c.notes))
    }
    maps = read_maps([path for run, _ in reads for path in run.files("examples.safetensors")])
    warnings = [note for name, note in facts.NOTES.items() if name in notes]
    page = TEMPLATES.get_template("page.html").render(
        **{
            "title": title,
            "reads": reads,
            "sections": sections,
            "figures": figures or {},
            "boards": boards,
            "maps": maps,
        },
        warnings=[*warnings, *(("loud", f"Left out: {line}") for line in left_out)],
        **{
            "facts": facts,
            "kinds": KINDS,
            "own_pictures": own_pictures,
            "real": real,
            "sha256": sha256,
            "table": table,
        },
        **{"Cell": Cell, "Row": Row, "lb": tools},
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page.lstrip()).encode()


def compare(same: Sequence[tuple[Run, Content]]) -> dict[str, Any]:
    """Contents of equal key, their main table, and plots by title, each with the lines of all contents."""
    contents = [content for _, content in same]
    merged: dict[str, dict[Axes, list[Line]]] = {}
    for run, content in same:
        for title, curves in content.curves.items():
            for axes, lines in curves.items():
                known = merged.setdefault(title, {}).setdefault(axes, [])
                names = [line.name for line in known]
                known += [line for line in lines if line.name not in names]  # of reference lines one is enough
                known += [
                    line._replace(name=f"{line.name} ({run.name})")
                    for line in lines
                    if line.name in names and not line.reference
                ]
    return {
        "contents": contents,
        "table": table([row for content in contents for row in content.rows]),
        "runs": list({run.anchor: run for run, _ in same}.values()),
        "plots": {title: [plot(*item) for item in plots.items()] for title, plots in merged.items()},
    }


def own_pictures(run: Run) -> list[dict[str, Any]]:
    return pictures([path for path in run.files("*.png") if path.name not in REDRAWN], run.folder)


def pictures(paths: Sequence[Path], folder: Path | None = None) -> list[dict[str, Any]]:
    """PNG files at their own size; a warning for each that is damaged."""
    shown: list[dict[str, Any]] = []
    for path in paths[:PICTURES]:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
            data = base64.b64encode(path.read_bytes()).decode()
            name = str(path.relative_to(folder)) if folder else path.name
            shown.append({"data": data, "width": image.width, "height": image.height, "name": name})
        except Exception as error:  # Pillow's decoders raise many types
            shown.append({"warning": f"{path} cannot be shown: {' '.join(str(error).split())}"})
    return shown + ([{"warning": f"{PICTURES} of {len(paths)} pictures are shown."}] if len(paths) > PICTURES else [])
