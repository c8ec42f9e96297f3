"""What the attention analysis measures: python scripts/list_metrics.py [--write PAGE | --check PAGE]

Prints METRICS as a Markdown table; --write and --check keep a page's table equal to it.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention.metrics import GROUPS, METRICS
from cli.console import Parser, run_main
from util.files import keep_table

COMMAND = "python scripts/list_metrics.py --write"


def markdown() -> str:
    lines = [
        "| metric | groups | unit | definition | from, to; uniform | per | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, metric in METRICS.items():
        groups = ", ".join(group for group, names in GROUPS.items() if name in names and group != "all")
        bounds = f"{metric.lower or '–'}, {metric.upper or '–'}; {metric.uniform or '–'}"
        definition = metric.definition.replace("|", "\\|")
        cells = (f"`{name}`", groups, metric.unit, definition, bounds, metric.axis or "–", metric.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(args: Namespace) -> None:
    page = args.write or args.check
    if page is None:
        print(markdown(), end="")
    else:
        keep_table(page, "metrics", COMMAND, markdown(), write=args.write is not None)


if __name__ == "__main__":
    parser = Parser(__doc__)
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's table is another")
    run_main(main, parser.parse_args())
