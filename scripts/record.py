"""Keep results as records: python scripts/record.py RUN ... [--results FOLDER]

RUN is the --output_dir of main_linprobe.py, main_analyze_attention.py or main_analyze_aggregation.py. Its results are
copied into FOLDER/<dataset>/, with six digits; scripts/make_tables.py makes the tables of them. Results that differ in
their --seed alone, such as those of a sweep, measure a cell together.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from paper.cells import Measurement, cells_of, join, read_cells
from paper.shown import ROOT, shortened
from util.files import to_json, write_json
from util.progress import log, setup_logging

PROGRAMS = ("results.json", "attention.json", "aggregation.json")


def results_of(run: Path) -> list[Path]:
    """The results in a run folder: one file per encoder of an analysis of several."""
    paths = [path for name in PROGRAMS for path in (run / name, *sorted(run.glob(f"*/{name}"))) if path.is_file()]
    if not paths:
        raise ValueError(f"{run} has none of {', '.join(PROGRAMS)}: give the --output_dir of a finished run")
    return paths


def conflict(old: Sequence[Measurement], new: Sequence[Measurement]) -> str:
    """Why two results cannot stand side by side: they measured a cell with the same seed or other settings."""
    for measured in new:
        try:
            for other in old:
                if other.cell == measured.cell:
                    join(measured.cell, [other, measured])
        except ValueError as error:
            return str(error)
    return ""


def main(args: argparse.Namespace) -> None:
    setup_logging()
    paths = list({path.resolve(): path for run in args.runs for path in results_of(run)}.values())
    read_cells(paths)  # together, they must measure each cell once
    for path, cells in [(path, cells_of(path)) for path in paths]:
        if not cells:
            raise ValueError(f"{path}: nothing to record: no table has a cell of these results")
        record, first = shortened(json.loads(path.read_text())), cells[0].cell
        digest = hashlib.sha256(to_json(record).encode()).hexdigest()[:8]
        target = args.results / first.dataset / f"{first.model}.{first.arch}.{path.stem}.{digest}.json"
        for older in sorted(set(target.parent.glob("*.json")) - {target}):
            if problem := conflict(cells_of(older), cells):
                if not args.replace:
                    raise ValueError(f"{problem}, or use --replace")
                older.unlink()
                log.info("%s: replaced", older)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, record)
        except OSError as error:
            raise ValueError(f"{target} cannot be written: {error.strerror}") from error
        log.info("%s: %d cells", target, len(cells))


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a program")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--replace", action="store_true", help="replace records that measured the same cells")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
