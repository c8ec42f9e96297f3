"""Table of probing runs: python scripts/probe_table.py LABEL=RUN ... [--output table.md]

One row per run (its results.json), one column per head; top-1 on the test set, mean +- standard deviation over seeds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import Parser, run_main
from util.files import write_atomically


def labelled_runs(words: list[str]) -> dict[str, dict]:
    """{label: results.json} of LABEL=FOLDER words; ValueError for a run that has not ended."""
    runs = {}
    for word in words:
        label, _, folder = word.rpartition("=")
        path = Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no results.json: is it the --output_dir of a finished main_linprobe.py?")
        runs[label or Path(folder).name] = json.loads(path.read_text())
    return runs


def scores(run: dict, epoch: str = "last") -> dict[str, list[float]]:
    """{head: top-1 of each seed}. ValueError where a head has several blocks or rates: they are not seeds."""
    found: dict[str, dict[tuple, list[float]]] = {}
    for probe in run["probes"].values():
        setting = probe["block"], probe["blr"], probe.get("optimizer", "lars")
        found.setdefault(probe["head"], {}).setdefault(setting, []).append(probe[epoch]["top1"])
    for head, settings in found.items():
        if len(settings) > 1:
            raise ValueError(
                f"{head} was probed at several (block, blr, optimizer): {list(settings)}; this table averages seeds"
            )
    return {head: next(iter(settings.values())) for head, settings in found.items()}


def table(runs: dict[str, dict]) -> str:
    """Markdown: encoder x head."""
    rows = {label: scores(run) for label, run in runs.items()}
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = ["| encoder | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label, row in rows.items():
        cells = []
        for head in heads:
            values = row.get(head, [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    run = next(iter(runs.values()))
    seeds = max(len(values) for row in rows.values() for values in row.values())
    lines += ["", f"top-1 (%), last epoch, mean ± std over {seeds} seeds of the probe; {run['n_train']} training and "
              f"{run['n_test']} test images, {run['args']['epochs']} epochs"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    text = table(labelled_runs(args.runs))
    print(text)
    if args.output:
        write_atomically(args.output, text.encode())


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--output", type=Path)
    run_main(main, parser.parse_args())
