"""Tables of plain values: means over seeds with the seeds folded under them, and how numbers are written."""

import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

DASH = "–"
UNITS = {"(%)": ",.2f", "(nats)": ".3f", "loss": ",.4f"}  # decimals by the unit in the column's name; else four digits
Cells = Mapping[str, object]  # {column: text, number, Mean, Cell or None}; a column with _ is not shown


class Mean(NamedTuple):
    """Mean and standard deviation of a sample (n - 1; None for one value)."""

    mean: float
    std: float | None
    n: int


class Cell(NamedTuple):
    """What the page shows; in a sorted column, numbers that are not finite come last."""

    text: str
    value: float | None = None  # None: the cell is text
    std: float | None = None
    link: str = ""
    badges: Sequence[tuple[str, str]] = ()  # (style, text)

    @property
    def data(self) -> float | str:
        """What is sorted by and downloaded."""
        return self.value if self.value is not None and math.isfinite(self.value) else ""


class Row(NamedTuple):
    cells: Cells
    children: Sequence[Cells] = ()  # rows folded under this row


class Table(NamedTuple):
    caption: str
    columns: list[tuple[str, bool]]  # name, and whether all its cells are numbers
    rows: list[tuple[int, tuple[Cell, ...]]]  # depth, 1 for a folded row
    scale: tuple[float, float] | None  # smallest number and width of the range, where cells are coloured by size


def real(value: object) -> float:
    """A number of a record; null, which stands for NaN and infinities, is NaN. TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"expected a number, got {value!r}")
    return math.nan if value is None else float(value)


def mean_of(values: Sequence[float]) -> Mean:
    """NaN if any value is not finite."""
    if not all(map(math.isfinite, values)):
        return Mean(math.nan, None, len(values))
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def group_by(items: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def stem(name: str) -> str:
    """The name of a probe or rule without its seed."""
    return re.sub(r"/seed-?\d+$", "", name)


def fold(rows: Sequence[Cells]) -> list[Row]:
    """Rows of single seeds under a row for all; "_name" distinguishes them, and names a seed's row in the column "run".

    Decimal numbers are averaged, unless a row has diverged or lacks the number; other cells are shown where all agree.
    """
    folded = []
    for same in group_by(rows, lambda row: (stem(row["_name"]), row.get("neighbours"))):
        mean: dict[str, object] = {}
        for column in dict.fromkeys(column for row in same for column in row):
            values = [row.get(column) for row in same]
            if any(isinstance(value, float) for value in values):
                mean[column] = mean_cell(values, sum("diverged" in row for row in same))
            elif all(value == values[0] for value in values):
                mean[column] = values[0]
        shared = [column for column, value in mean.items() if value == same[0].get(column)]
        children = [{c: v for c, v in row.items() if c not in shared} | {"run": row["_name"]} for row in same]
        mean |= {"_name": stem(same[0]["_name"]), "seeds": len(same)}
        folded.append(Row(mean, children if len(same) > 1 else ()))
    return folded


def mean_cell(values: Sequence[float | None], diverged: int) -> Mean | Cell:
    numbers = [value for value in values if value is not None]
    infinite = sum(not math.isfinite(value) for value in numbers)
    for problem, count in [("diverged", diverged), ("not finite", infinite), ("missing", len(values) - len(numbers))]:
        if count:
            return Cell(f"{problem} in {count} of {len(values)}" if len(values) > 1 else problem, math.nan)
    return mean_of(numbers)


def table(rows: Iterable[Row | Cells], caption: str = "", shade: bool = False) -> Table:
    """Without the columns in which every cell is a dash. shade: colour the numbers by their size."""
    folded = [row if isinstance(row, Row) else Row(row) for row in rows]
    entries = [
        (depth, cells) for row in folded for depth, part in ((0, [row.cells]), (1, row.children)) for cells in part
    ]
    columns = {
        name: [cell_of(name, cells.get(name)) for _, cells in entries]
        for name in dict.fromkeys(name for _, cells in entries for name in cells)
        if not name.startswith("_")
    }
    columns = {name: cells for name, cells in columns.items() if any(c.text != DASH or c.badges for c in cells)}
    finite = [cell.data for cells in columns.values() for cell in cells if cell.data != ""] if shade else []
    return Table(
        caption,
        [(name, all(cell.value is not None for cell in cells)) for name, cells in columns.items()],
        list(zip([depth for depth, _ in entries], zip(*columns.values(), strict=True), strict=True)),
        (min(finite), max(finite) - min(finite) or 1.0) if finite else None,
    )


def cell_of(column: str, value: object) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(DASH, -math.inf)
    if isinstance(value, bool) or not isinstance(value, int | float | Mean):
        return Cell(str(value))
    mean, std = value[:2] if isinstance(value, Mean) else (value, None)
    if not math.isfinite(mean):
        return Cell("not finite", math.nan)
    form = next((form for unit, form in UNITS.items() if unit in column), ".4g")
    form = ",d" if isinstance(mean, int) else ",.0f" if form == UNITS["loss"] and mean >= 100 else form
    return Cell(f"{mean:{form}}" + (f" ±\N{NO-BREAK SPACE}{std:{form}}" if std is not None else ""), float(mean), std)
