"""Print a table of this project in Markdown: python scripts/list.py encoders [WORD ...] [--write PAGE | --check PAGE]

encoders: the published files by name. heads: of probes. metrics: of the attention analysis.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention.metrics import GROUPS, METRICS
from cli.console import Parser, run_main
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from probing.heads import AGGREGATIONS, build_head, canonical_head
from probing.pooling import Tokens
from util.files import keep_table

VIT_BASE, DEPTH = Tokens(768, (14, 14), 1, pooled={"map": 768, "projected": 512}), 12


def table(*rows: tuple) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def encoders() -> str:
    rows = [("name", "`--model`", "weights", "licence", "top-1, %")]
    for name, entry in CATALOGUE.items():
        paper = PUBLICATIONS[entry.publication]
        file = f"[file]({entry.url})" if entry.url else f"[by hand]({entry.page})"
        weights = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {file}"
        figures = "; ".join(map(str, entry.figures)) or "–"
        rows.append((f"`{name}`", f"`{entry.model}`", weights, paper.licence, figures))
    return table(*rows)


def heads() -> str:
    rows = [("head", "vector", "options", "parameters")]
    options: dict[tuple[str, str, str], list[str]] = {}
    for name, entry in AGGREGATIONS.items():
        pooling = build_head(canonical_head(name, {}, DEPTH), DEPTH - 1, VIT_BASE)
        parameters = sum(parameter.numel() for parameter in pooling.parameters())
        number = entry.options[entry.number].default if entry.number else ""
        keys = ", ".join(f"`{key}`" for key in entry.options)
        rows.append((f"`{name}{number}`", entry.description, keys, f"{parameters:,}"))
        for key, option in entry.options.items():
            whole = isinstance(option.allowed, int)
            values = f"{option.default}; whole numbers >= {option.allowed}" if whole else ", ".join(option.allowed)
            options.setdefault((key, option.help, values), []).append(f"`{name}`")
    meanings = [(f"`{key}`", ", ".join(names), text, values) for (key, text, values), names in options.items()]
    return table(*rows) + "\n" + table(("option", "of", "meaning", "values (default first)"), *meanings)


def metrics() -> str:
    rows = [("metric", "groups", "unit", "definition", "from, to; uniform", "per", "source")]
    for name, metric in METRICS.items():
        groups = ", ".join(group for group, names in GROUPS.items() if name in names and group != "all")
        bounds = f"{metric.lower or '–'}, {metric.upper or '–'}; {metric.uniform or '–'}"
        definition = metric.definition.replace("|", "\\|")
        rows.append((f"`{name}`", groups, metric.unit, definition, bounds, metric.axis or "–", metric.source))
    return table(*rows)


TABLES = {"encoders": encoders, "heads": heads, "metrics": metrics}


def main(args: Namespace) -> None:
    text = TABLES[args.table]()
    if page := args.write or args.check:
        keep_table(page, args.table, f"python scripts/list.py {args.table} --write", text, write=bool(args.write))
        return
    head, rows = text.splitlines()[:2], text.splitlines()[2:]
    rows = [row for row in rows if all(word in row.split(" | ")[0] for word in args.words)]
    if not rows:
        raise ValueError(f"no name in the table of {args.table} contains {' and '.join(args.words)}")
    print("\n".join([*head, *rows]))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES), help="the table to print")
    parser.add_argument("words", nargs="*", metavar="WORD", help="print only the rows whose names contain all words")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail if the page has another table")
    run_main(main, parser.parse_args())
