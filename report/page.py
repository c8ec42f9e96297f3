"""The page of a report: the contents of runs, grouped by program and images, rendered by page.html."""

import argparse
import base64
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, TemplateError
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cli.arguments import plain
from report.maps import read_maps
from report.programs import READERS, Content, Curve
from report.runs import KINDS, NOTES, Record, Run, badges
from report.tables import DASH, Cell, Row, group_by, real, table
from util.files import sha256

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError, TemplateError)
PICTURES = 24  # shown per folder
REDRAWN = ("attention.png", "park.png", "heads.png", "spectra.png", "kl.png")  # the page has them as tables and plots
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # not allowed in HTML or UTF-8


def make_report(
    runs: Sequence[Run], figures: Mapping[str, Sequence[Path]], trouble: Sequence[str], title: str
) -> tuple[str, list[str]]:
    """The page, and a line for each file or run that is left out."""
    shown: list[tuple[Run, list[Content]]] = []
    left_out = list(trouble)
    for run in runs:
        try:
            contents = READERS[run.program](run)
            render(title, [(run, contents)])
            shown.append((run, contents))
        except DAMAGED as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if type(error) is KeyError:
                reason = f"it has no {error}"
            left_out.append(f"{run.path}: not a complete record of {run.program}.py ({reason})")
    return render(title, shown, {name: pictures(paths) for name, paths in figures.items()}, left_out), left_out


def render(
    title: str,
    reads: Sequence[tuple[Run, list[Content]]] = (),
    figures: Mapping[str, Any] | None = None,
    left_out: Sequence[str] = (),
    **leaderboard: Any,
) -> str:
    """leaderboard: `boards` of report.leaderboard, whose functions are `lb`, and `link` of a record's path."""
    sections = {}
    for program in READERS:
        of_program = [(run, contents) for run, contents in reads if run.program == program]
        same = group_by([(run, c) for run, contents in of_program for c in contents], lambda pair: pair[1].key)
        if of_program:
            sections[program] = {"groups": [compare(pairs) for pairs in same], "reads": of_program}
    notes = {note for run, contents in reads for of_run in (run, *contents) for note in of_run.notes}
    warnings = [note for name, note in NOTES.items() if name in notes]
    page = TEMPLATES.get_template("page.html").render(
        leaderboard,
        title=title,
        reads=reads,
        sections=sections,
        figures=figures or {},
        maps=read_maps([path for run, _ in reads for path in run.files("examples.safetensors")]),
        warnings=[*warnings, *(("loud", f"Left out: {line}") for line in left_out)],
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page.lstrip())


def compare(same: Sequence[tuple[Run, Content]]) -> dict[str, Any]:
    """Contents of equal key, their main table, and plots by heading, each with the lines of all contents."""
    drawn: dict[tuple, list[Curve]] = {}
    for run, content in same:
        for curve in content.curves:
            lines = drawn.setdefault((curve.heading, *curve[:3]), [])
            if curve.name not in [line.name for line in lines]:
                lines.append(curve)
            elif not curve.reference:
                lines.append(curve._replace(name=f"{curve.name} ({run.name})"))
    plots: dict[str, list] = {}
    for (heading, *_), lines in drawn.items():
        plots.setdefault(heading, []).append(plot(lines))
    return {
        "contents": [content for _, content in same],
        "table": table([row for _, content in same for row in content.rows]),
        "runs": list({run.anchor: run for run, _ in same}.values()),
        "plots": plots,
    }


def plot(lines: Sequence[Curve]) -> dict[str, Any] | None:
    """Lines of one plot, in the units of their data, which SVG scales to the page; None without a finite value."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    shown = sorted((line for line in lines if line.points), key=lambda line: line.reference)
    x, y = [x for x, _, _ in points], [y + side * s for _, y, s in points for side in (-1, 1)]
    return {
        "axes": lines[0],
        "lines": shown,
        "x": ticks(x, all(float(value).is_integer() for value in x)),
        "y": ticks(y),
    }


def ticks(values: Sequence[float], counts: bool = False) -> list[float]:
    """Round numbers, of counts whole ones, that enclose the values."""
    low, high = min(values), max(values)
    margin = (abs(low) or 1) * (low == high)
    return MaxNLocator(5, integer=counts).tick_values(low - margin, high + margin).tolist()


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


def format_argument(value: object) -> str:
    """As on a command line; a dash if it is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_argument(inner)}" for name, inner in value.items()) or DASH
    if isinstance(value, list | tuple):
        return " ".join(map(format_argument, value)) or DASH
    return DASH if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def wall_time(run: Run) -> Cell | None:
    """Over all encoders of an analysis."""
    total = sum(real(result.get("seconds")) for result in run.results)
    finite = run.results and math.isfinite(total)
    return Cell(str(timedelta(seconds=round(total))), total) if finite else None


def format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def default_arguments(program: str) -> Record:
    """The defaults of a program's arguments as a record holds them."""
    parser = importlib.import_module(f"cli.{program.removeprefix('main_')}").get_args_parser()
    return plain(argparse.Namespace(**{action.dest: action.default for action in parser._actions}))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=ChainableUndefined,  # what a record lacks is left out
    trim_blocks=True,
    extensions=["jinja2.ext.do"],
)
TEMPLATES.globals |= {"kinds": KINDS, "Cell": Cell, "Row": Row}
for function in (badges, default_arguments, format_argument, format_time, own_pictures, real, sha256, table, wall_time):
    TEMPLATES.globals[function.__name__] = function
