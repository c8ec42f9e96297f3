"""What main_analyze_aggregation.py takes: flags and help in analyze_aggregation.toml; how they fit together here."""

import argparse

from aggregation import DEFAULT_RULES
from aggregation.boxes import BOX_SOURCES
from cli.arguments import program_parser
from cli.console import Parser


def get_args_parser() -> Parser:
    sources = "; ".join(source.description for source in BOX_SOURCES.values())
    tables = {"default_rules": DEFAULT_RULES, "box_sources": sources, "box_formats": BOX_SOURCES}
    return program_parser("analyze_aggregation", **tables)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    if args.probe_heads is not None and args.probes is None:
        raise ValueError("--probe_heads selects probes of a run: name it with --probes")
    if args.boxes is None:
        needing = {"--boxes_only": args.boxes_only, "--box_format": args.box_format}
        needing |= {"--draw_threshold": args.draw_threshold is not None}
        needing |= {"--loc_map_heads best": args.loc_map_heads == "best"}
        if given := [flag for flag, value in needing.items() if value]:
            raise ValueError(f"{given[0]} needs true boxes: name them with --boxes")
    elif not args.boxes.exists():
        raise ValueError(f"--boxes {args.boxes}: no such file or folder")
