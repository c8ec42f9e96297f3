"""The catalogue of published encoders: python scripts/list_encoders.py [WORD ...] [--markdown]

WORD: only the names that hold all of them. --write and --check keep a Markdown page's table equal to the catalogue.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from util.files import keep_table

COMMAND = "python scripts/list_encoders.py --write"


def plain(names: list[str]) -> str:
    rows = [("name", "--model", "--family", "licence", "arXiv", "top-1 on ImageNet-1k, %")]
    for name in names:
        entry = CATALOGUE[name]
        paper = PUBLICATIONS[entry.publication]
        figures = "; ".join(map(str, entry.figures)) or "-"
        rows.append((name, entry.model, entry.family, paper.licence, paper.arxiv, figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) + "\n"


def markdown(names: list[str]) -> str:
    lines = ["| name | `--model` | weights | licence | top-1, % |", "|---|---|---|---|---|"]
    for name in names:
        entry = CATALOGUE[name]
        paper = PUBLICATIONS[entry.publication]
        weights = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        weights += f", [by hand]({entry.page})" if entry.url is None else f", [file]({entry.url})"
        figures = "; ".join(map(str, entry.figures)) or "–"
        lines.append(f"| `{name}` | `{entry.model}` | {weights} | {paper.licence} | {figures} |")
    return "\n".join(lines) + "\n"


def main(args: Namespace) -> None:
    names = [name for name in CATALOGUE if all(word in name for word in args.words)]
    path = args.write or args.check
    if path is None:
        if not names:
            raise ValueError(f"no encoder's name holds {' and '.join(args.words)}: without words, all are listed")
        print(markdown(names) if args.markdown else plain(names), end="")
        return
    keep_table(path, "encoders", COMMAND, markdown(list(CATALOGUE)), write=args.write is not None)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of the names to list (default: all)")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's table is another")
    run_main(main, parser.parse_args())
