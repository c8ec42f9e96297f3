"""Keep results as records: python scripts/record.py RUN ... [--results FOLDER]

RUN is the --output_dir of main_linprobe.py, main_analyze_attention.py or main_analyze_aggregation.py. Its results are
copied into FOLDER/<dataset>/, with six digits; scripts/make_tables.py makes the tables of them.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from paper.cells import by_cell, cells_of
from paper.shown import ROOT, shortened
from util.files import save, to_json
from util.progress import log, setup_logging

PROGRAMS = ("results.json", "attention.json", "aggregation.json")


def results_of(run: Path) -> list[Path]:
    """The results in a run folder: one file per encoder of an analysis of several."""
    paths = [path for name in PROGRAMS for path in (run / name, *sorted(run.glob(f"*/{name}"))) if path.is_file()]
    if not paths:
        raise ValueError(f"{run} has none of {', '.join(PROGRAMS)}: give the --output_dir of a finished run")
    return paths


def main(args: argparse.Namespace) -> None:
    setup_logging()
    records, new = {}, []
    for path in {path.resolve(): path for run in args.runs for path in results_of(run)}.values():
        cells = cells_of(path)
        if not cells:
            raise ValueError(f"{path}: nothing to record: no table has a cell of these results")
        new += cells
        record, first = shortened(json.loads(path.read_text())), cells[0].cell
        digest = hashlib.sha256(to_json(record).encode()).hexdigest()[:8]
        records[args.results / first.dataset / f"{first.encoder}.{path.stem}.{digest}.json"] = record, len(cells)
    measured = by_cell(new)
    older = {path for folder in {target.parent for target in records} for path in folder.glob("*.json")}
    for path in sorted(older - records.keys()):
        if both := [cell for cell in by_cell(cells_of(path)) if cell in measured]:
            if not args.replace:
                raise ValueError(f"{path} has {both[0]}, which {measured[both[0]].path} measured: use --replace")
            path.unlink()
            log.info("%s: replaced", path)
    for target, (record, count) in records.items():
        save(target, to_json(record, indent=2) + "\n")
        log.info("%s: %d cells", target, count)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a program")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
    parser.add_argument("--replace", action="store_true", help="replace records that measured the same cells")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
