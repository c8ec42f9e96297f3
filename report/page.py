"""The page of a report: tables, figures and texts as plain data, rendered by template.html with autoescape."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

DASH = "–"
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # not allowed in HTML or UTF-8
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class Cell(NamedTuple):
    """A table cell; `value` sorts numeric columns, values that are not finite come last."""

    text: object
    value: float | None = None

    @property
    def sort_key(self) -> str:
        return repr(float(self.value)) if math.isfinite(self.value) else ""


NONE = Cell(DASH, -math.inf)  # no number here


@dataclass(frozen=True)
class Text:
    text: object
    style: str = "soft"  # or "loud", a warning


@dataclass(frozen=True)
class Table:
    """Rows of texts, markup or Cells. ValueError for a row that does not have one cell per column."""

    columns: Sequence[object]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    sortable: bool = True

    def __post_init__(self):
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"a row of {len(wrong[0])} cells in a table of {len(self.columns)} columns")
        rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]
        object.__setattr__(self, "rows", rows)

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its cells have a number."""
        return [all(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]


def table(rows: Sequence[dict[str, object]], caption: str = "") -> Table:
    """A Table of {column: cell} rows, without the columns in which every cell is a dash."""
    names = dict.fromkeys(name for row in rows for name in row)
    cells = {name: [row.get(name, NONE) for row in rows] for name in names}
    cells = {name: column for name, column in cells.items() if any(cell not in (NONE, DASH) for cell in column)}
    return Table(list(cells), list(zip(*cells.values(), strict=True)), caption)


@dataclass(frozen=True)
class Figure:
    source: str  # a data: URI
    alt: str
    caption: object = None
    kind: str = "photo"  # or "drawing", whose colours are inverted on dark pages
    size: tuple[int, int] | None = None  # width and height in pixels
    wide: bool = False  # scrolls on a phone instead of shrinking


@dataclass(frozen=True)
class Group:
    """Blocks shown together."""

    kind: str  # "grid": columns of one width; "gallery": figures at their own size; "details": folded; "card": framed
    blocks: Sequence[object]  # Text, Table, Figure or Group; None is left out
    title: object = None
    anchor: str | None = None


def badge(text: str, style: str = "") -> Markup:
    """A coloured label; styles: good, loud."""
    return Markup('<span class="badge {}">{}</span> ').format(style, text)


def code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(DASH if text is None else text)


def number(value: float | None, digits: int = 1, spread: float | None = None) -> Cell:
    """A number with its standard deviation, if any; "not finite" for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return Cell("not finite", math.nan)
    return Cell(f"{value:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else ""), value)


def pairs(facts: dict[str, object]) -> Table:
    return Table(("name", "value"), [[name, value] for name, value in facts.items()], sortable=False)


def join(parts: Iterable[object]) -> Markup:
    return Markup("").join(parts)


def render(title: str, **content: object) -> str:
    page = TEMPLATES.get_template("template.html").render(title=title, **content)
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)
