"""Table of probing runs: python scripts/probe_table.py LABEL=RUN ... [--output table.md | --write PAGE]

One column per head, one row per run (its results.json), and per block, optimizer and rate where it has several; the
score that the run counts on the test set, mean +- standard deviation over seeds. Where held-out images have chosen the
rates, these alone.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from probing.results import metric_label
from util.files import keep_table, write_atomically


def labelled_runs(words: list[str]) -> dict[str, dict]:
    """{label: results.json} of LABEL=FOLDER words; runs of one label join their probes, as those of several --seed do.

    ValueError for a run that has not ended, and for one that is named twice.
    """
    if twice := [word for word in words if words.count(word) > 1]:
        raise ValueError(f"{twice[0]} is named twice: its seeds would count twice")
    runs = {}
    for word in words:
        label, _, folder = word.rpartition("=")
        path = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"{path} is not there: is it of the --output_dir of a finished main_linprobe.py?")
        try:
            run, name = json.loads(path.read_text()), label or Path(folder).name
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error
        if name in runs:
            probes = {f"{path}: {probe}": found for probe, found in run["probes"].items()}
            run = {**runs[name], "probes": {**runs[name]["probes"], **probes}}
        runs[name] = run
    return runs


def settings(run: dict, epoch: str) -> dict[str, dict[str, list[float]]]:
    """{block, optimizer and rate, where the run has several: {head: score of each seed}}.

    Where held-out images have chosen optimizer and rate for each head, those alone, in one row for each block.
    """
    probes = [probe for probe in run["probes"].values() if probe.get("chosen", True)]

    def words(probe: dict) -> list[str]:
        rate = f"lr {probe['lr']:g}" if probe.get("lr") is not None else f"blr {probe['blr']:g}"
        rules = [] if "chosen" in probe else [probe.get("optimizer", "lars"), rate]
        return [f"block {probe['block']}", *rules]

    several = [len(set(column)) > 1 for column in zip(*map(words, probes), strict=True)]
    found: dict[str, dict[str, list[float]]] = {}
    for probe in probes:
        name = ", ".join(word for word, told in zip(words(probe), several, strict=True) if told)
        score = probe[epoch][run.get("headline", "top1")]
        found.setdefault(name, {}).setdefault(probe["head"], []).append(math.nan if score is None else score)
    return found


def table(runs: dict[str, dict], epoch: str = "last") -> str:
    """Markdown: encoder (and block, optimizer, rate) x head. ValueError for runs that do not count the same."""
    headlines = {run.get("headline", "top1") for run in runs.values()}
    if len(headlines) > 1:
        raise ValueError(f"these runs count different scores: {', '.join(sorted(headlines))}; make a table of each")
    if epoch == "best" and any("val" in probe for run in runs.values() for probe in run["probes"].values()):
        raise ValueError("--report best is the epoch that is best on the test set: a run with --val_fraction has none")
    rows = {
        f"{label}, {name}" if name else label: row
        for label, run in runs.items()
        for name, row in settings(run, epoch).items()
    }
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = ["| encoder | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label, row in rows.items():
        cells = []
        for head in heads:
            values = row.get(head, [])
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    seeds = alternatives(len(values) for row in rows.values() for values in row.values() if len(values) > 1)
    over = f", mean ± std over {seeds} seeds of the probe" if seeds else ""
    trained, tested = (alternatives(run[count] for run in runs.values()) for count in ("n_train", "n_test"))
    epochs = alternatives(run["args"]["epochs"] for run in runs.values())
    chose = [run for run in runs.values() if any("chosen" in probe for probe in run["probes"].values())]
    held_out = f"; rates chosen on {alternatives(run['n_val'] for run in chose)} held-out images" if chose else ""
    label = metric_label(headlines.pop())
    lines += ["", f"{label} (%), {epoch} epoch{over}; {trained} training and {tested} test images, "
              f"{epochs} epoch{'s' * (epochs != '1')}{held_out}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def alternatives(values: Iterable[int]) -> str:
    """The different ones in words, where not all runs are alike."""
    return " or ".join(map(str, sorted(set(values))))


def keep(page: Path, name: str, runs: list[str], text: str, write: bool) -> None:
    """The table between the marks of a page, which scripts/make_tables.py --check looks at."""
    keep_table(page, name, f"python scripts/probe_table.py {' '.join(runs)} --write", text, write)


def main(args: argparse.Namespace) -> None:
    text = table(labelled_runs(args.runs), args.report)
    print(text)
    if args.output:
        write_atomically(args.output, text.encode())
    if args.write:
        keep(args.write, "quickstart", args.runs, text, write=True)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="folders of main_linprobe.py, or their results")
    parser.add_argument("--report", choices=["last", "best"], default="last", help="epoch whose scores are shown")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="into a page, between its marks <!-- quickstart: -->"
    )
    run_main(main, parser.parse_args())
