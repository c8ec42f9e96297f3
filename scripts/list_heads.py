"""The heads of probes: python scripts/list_heads.py [--write PAGE | --check PAGE]

Prints AGGREGATIONS as a Markdown table; --write and --check keep a page's table equal to it.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from probing.heads import AGGREGATIONS, build_head, canonical_head
from probing.pooling import Tokens
from util.files import keep_table

COMMAND = "python scripts/list_heads.py --write"
VIT_BASE = Tokens(768, (14, 14), 1, pooled={"map": 768, "projected": 512})
DEPTH = 12


def markdown() -> str:
    lines = ["| head | vector | options | parameters |", "|---|---|---|---|"]
    options: dict[tuple[str, str, str], list[str]] = {}
    for name, entry in AGGREGATIONS.items():
        pooling = build_head(canonical_head(name, {}, DEPTH), DEPTH - 1, VIT_BASE)
        parameters = sum(parameter.numel() for parameter in pooling.parameters())
        number = entry.options[entry.number].default if entry.number else ""
        keys = ", ".join(f"`{key}`" for key in entry.options)
        lines.append(f"| `{name}{number}` | {entry.description} | {keys} | {parameters:,} |")
        for key, option in entry.options.items():
            whole = isinstance(option.allowed, int)
            values = f"{option.default}; whole numbers >= {option.allowed}" if whole else ", ".join(option.allowed)
            options.setdefault((key, option.help, values), []).append(f"`{name}`")
    lines += ["", "| option | of | meaning | values (default first) |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {', '.join(heads)} | {text} | {values} |" for (key, text, values), heads in options.items()]
    return "\n".join(lines) + "\n"


def main(args: Namespace) -> None:
    page = args.write or args.check
    if page is None:
        print(markdown(), end="")
    else:
        keep_table(page, "heads", COMMAND, markdown(), write=args.write is not None)


if __name__ == "__main__":
    parser = Parser(__doc__)
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's table is another")
    run_main(main, parser.parse_args())
