"""HTML of pages that open anywhere: one file, no request to anything outside of it, complete without its script.

What is not `Html` is text, and is escaped. Tables sort on a click or a key on their headings; colours follow the
reader's setting; what is too wide for the screen scrolls in a box of its own.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

DASH = "–"
VOID = ("br", "img", "meta")  # elements that have no end
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # which no HTML and no UTF-8 can hold


class Html(str):
    """Markup, which goes into a page as it is."""


class Cell(NamedTuple):
    """A cell of a table: what it shows, and its number, where it is one; what is not finite comes after all others."""

    shown: Any
    value: float | None = None


def markup(content: object) -> Html:
    """Markup of anything: text is escaped, sequences are joined, None is nothing."""
    if isinstance(content, Html):
        return content
    if content is None:
        return Html()
    if isinstance(content, Iterable) and not isinstance(content, str):
        return Html("".join(map(markup, content)))
    return Html(escaped(content))


def escaped(value: object) -> str:
    return html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """<name attributes>content</name>; `class_` is the attribute class, None and False leave an attribute out.

    ValueError for an address outside of the page.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if key in ("src", "href") and not str(value).startswith(("data:", "#")):
            raise ValueError(f"{key}={value}: a page that opens anywhere points to nothing outside of itself")
        if value is not None and value is not False:
            words.append(key if value is True else f'{key}="{escaped(value)}"')
    begin = f"<{' '.join(words)}>"
    return Html(begin if name in VOID else f"{begin}{markup(content)}</{name}>")


def identifier(text: str) -> str:
    """A name that an address can end with."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def folded(title: object, *content: object, opened: bool = False) -> Html:
    return element("details", element("summary", title), content, open=opened)


def badge(text: str, kind: str = "") -> Html:
    """A word in a coloured box; kinds: good, loud."""
    return element("span", text, class_=f"badge {kind}".strip())


def warning(*content: object) -> Html:
    return element("p", content, class_="loud")


NONE = Cell(DASH, -math.inf)  # where a number could be


def number(value: float | None, digits: int = 1, spread: float | None = None, unit: str = "") -> Cell:
    """A number in a cell, and its standard deviation where there is one. None, NaN and infinities: not finite."""
    if value is None or not math.isfinite(value):
        return Cell("not finite", math.nan)
    words = f"{value:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
    return Cell(words + unit, value)


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], caption: object = None) -> Html:
    """A table that sorts, in a box that scrolls. Rows hold texts, markup or Cells, one per column; ValueError for
    others."""
    rows = [tuple(row) for row in rows]
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise ValueError(f"a row of {len(wrong[0])} cells in a table of {len(columns)} columns")
    numeric = [all(isinstance(cell, Cell) for cell in cells) for cells in zip(*rows, strict=True)]
    head = [
        element("th", column, scope="col", aria_sort="none", class_="number" if right else None)
        for column, right in zip(columns, numeric or [False] * len(columns), strict=True)
    ]
    body = element("tbody", [element("tr", [as_cell(cell) for cell in row]) for row in rows])
    content = element("table", element("thead", element("tr", head)), body, class_="sortable")
    label = "table" if caption is None else re.sub("<[^>]*>", "", markup(caption))
    box = element("div", content, class_="wide", tabindex="0", role="region", aria_label=html.unescape(label))
    return box if caption is None else Html(element("p", caption, class_="caption") + box)


def filled(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> tuple[list[object], list[list[object]]]:
    """The columns that say something in any of the rows."""
    kept = [place for place in range(len(columns)) if any(row[place] not in (NONE, DASH) for row in rows)]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def as_cell(content: object) -> Html:
    if not isinstance(content, Cell):
        return element("td", content)
    if content.value is None:
        return element("td", content.shown)
    known = repr(float(content.value)) if math.isfinite(content.value) else ""
    return element("td", content.shown, class_="number", data_sort=known)


def pairs(facts: dict[str, object]) -> Html:
    """Names and values, a line each."""
    rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in facts.items()]
    return element("div", element("table", element("tbody", rows), class_="pairs"), class_="wide")


def picture(
    data: bytes, kind: str, alt: str, caption: object = None, size: tuple[int, int] | None = None, broad: bool = False
) -> Html:
    """A figure inside of the page. Kinds: "svg", a drawing whose light and dark change places on dark pages, and "png",
    which is shown as it is; size: its width and height in pixels. broad: on a phone, it scrolls in its box rather than
    become small."""
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    width, height = size or (None, None)
    image = element(
        "img", src=f"data:{mime};base64,{base64.b64encode(data).decode()}", alt=alt, width=width, height=height,
        class_=("drawing" if kind == "svg" else "photo") + " broad" * broad,
    )  # fmt: skip
    box = element("div", image, class_="wide")
    return element("figure", box, element("figcaption", caption) if caption is not None else None)


def grid(figures: Iterable[Html]) -> Html:
    """Figures beside each other of one width, beside each other as far as there is room."""
    return element("div", figures, class_="grid")


def gallery(figures: Iterable[Html]) -> Html:
    """Figures in their own sizes, as many in a line as it takes."""
    return element("div", figures, class_="gallery")


def page(title: str, *content: object) -> Html:
    """A whole document. Its policy allows its own style and script, by their hashes, images in it, and nothing else."""
    policy = f"default-src 'none'; img-src data:; style-src '{seal(STYLE)}'; script-src '{seal(SCRIPT)}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("main", content), element("script", Html(SCRIPT)))
    return Html("<!DOCTYPE html>\n" + element("html", head, "\n", body, lang="en") + "\n")


def seal(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


STYLE = """
:root {
  --ground: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #5d6670; --line: #dfe2e6; --link: #0b5cad;
  --stripe: #f4f5f6; --good: #0b6b3a; --good-ground: #e2f3e9; --loud: #96210f; --loud-ground: #fde9e4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4ae; --line: #343a41; --link: #7db8f5;
    --stripe: #22272c; --good: #8fdcb0; --good-ground: #12351f; --loud: #ffb4a4; --loud-ground: #45180f;
  }
  img.drawing { filter: invert(0.89) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 0.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 0.5rem; }
h4 { font-size: 0.95rem; margin: 1.25rem 0 0.25rem; }
p { margin: 0.5rem 0; max-width: 65rem; }
a { color: var(--link); }
nav ul { list-style: none; margin: 1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
.soft, figcaption, .caption { color: var(--soft); font-size: 0.875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.badge { display: inline-block; padding: 0 0.5em; border-radius: 1em; font-size: 0.8125rem;
  font-weight: 400; background: var(--stripe); border: 1px solid var(--line); }
.badge.good { color: var(--good); background: var(--good-ground); border-color: transparent; }
.badge.loud { color: var(--loud); background: var(--loud-ground); border-color: transparent; font-weight: 600; }
p.loud { color: var(--loud); background: var(--loud-ground); border-left: 4px solid var(--loud);
  padding: 0.5rem 0.75rem; border-radius: 4px; }
.wide { overflow-x: auto; max-width: 100%; }
.words { white-space: normal; overflow-wrap: anywhere; min-width: 15rem; max-width: 22rem; }
.short.words { min-width: 7rem; max-width: 12rem; }
td a { display: inline-block; white-space: normal; overflow-wrap: break-word; max-width: 18rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: flex-end; }
.gallery figure { max-width: 100%; }
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal; margin: 0.5rem 0; }
.caption { margin: 1rem 0 0; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
table.sortable td { white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); font-weight: 600; white-space: nowrap; }
tbody tr:hover { background: var(--stripe); }
th.number { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
table.pairs { width: 100%; }
table.pairs th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; }
table.pairs td { overflow-wrap: anywhere; min-width: 12rem; }
th button { all: unset; cursor: pointer; display: inline-flex; gap: 0.35em; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 2px; }
th button::after { content: "↕"; color: var(--soft); font-weight: 400; opacity: 0.5; }
th[aria-sort="ascending"] button::after { content: "↑"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "↓"; opacity: 1; }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--link); }
figure { margin: 0.75rem 0; }
figcaption { margin-top: 0.25rem; }
img { display: block; height: auto; }
img.drawing { max-width: 100%; }
img.photo { max-width: 100%; background: #fff; border-radius: 4px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 0.5rem 1.5rem;
  align-items: end; }
.grid img { width: 100%; }
@media (max-width: 40rem) {
  main { padding: 1rem 0.9rem 3rem; }
  .card { padding: 0.75rem; }
  td a { max-width: 8.5rem; overflow-wrap: anywhere; min-width: 7rem; }
  th, td { padding: 0.3rem 0.45rem; }
  table.sortable td:not(.number) { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
  .wide > img.broad { max-width: none; width: max(100%, 34rem); }
  table.pairs, table.pairs tbody, table.pairs tr, table.pairs th, table.pairs td { display: block; width: auto; }
  table.pairs th { border: 0; padding-bottom: 0; white-space: normal; }
}
@media print { .card { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.sort;
    if (value === undefined) return cell.textContent.trim();
    return value === "" ? null : Number(value);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [key(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);  // what has no number stays below
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
"""
