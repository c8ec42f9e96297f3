"""Markdown tables of single runs, straight from the files that the programs wrote."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from paper.tables import DASH, PROTOCOL, RULES
from probing.results import metric_label, read_results, seeds_note
from util.files import reading

WEIGHTS = {"pos": "uniform (`pos`)", **RULES}
QUANTITIES = {"top-1, %": "top1", "entropy, nats": "aggregation_entropy", "MaxBoxAccV2, %": "maxboxaccv2"}


def read_runs(names: Sequence[str]) -> dict[str, dict]:
    """{label: its results.json} from [LABEL=]RUN.

    ValueError for an unfinished run, a label given twice, and runs tested on different images or by different scores.
    """
    runs: dict[str, dict] = {}
    for name in names:
        label, _, folder = name.rpartition("=")
        path, label = Path(folder), label or Path(folder).name
        path = path if path.suffix == ".json" else path / "results.json"
        run = {**read_results(path), "path": path}
        if label in runs:
            raise ValueError(f"{runs[label]['path']} and {path} are both called {label}: write LABEL=RUN")
        first = next(iter(runs.values()), run)
        for key, what in (("test_images", "test images"), ("headline", "scores")):
            if run.get(key) != first.get(key):
                raise ValueError(f"{first['path']} and {path} have different {what}: make a table of each")
        runs[label] = run
    return runs


def protocol(run: dict) -> dict[str, object]:
    """The settings of a run that its table must mention where runs differ in them."""
    args = run["args"]
    settings = {name: run.get(name, args.get(name)) for name in PROTOCOL if name in args or name in run}
    settings |= {name: run.get(name) for name in ("n_train", "n_val", "train_images")}
    settings |= {"encoder": run["encoder"], "versions": run["versions"].get("torch"), "commit": run["commit"]}
    return {**settings, "seeds vary": run.get("seeds_vary", ["weights"])}


def rows_of(label: str, run: dict) -> dict[str, dict[str, list[float]]]:
    """{label, block, optimizer and rate: {head: scores}}, each named where the run has several.

    Where held-out images chose optimizer and rate, the chosen probes only: a row per block.
    """
    probes, headline = [probe for probe in run["probes"].values() if probe.get("chosen", True)], run["headline"]

    def setting(probe: dict) -> list[str]:
        rate = f"lr {probe['lr']:g}" if probe.get("lr") is not None else f"blr {probe['blr']:g}"
        return [f"block {probe['block']}", *([] if "chosen" in probe else [probe.get("optimizer") or "lars", rate])]

    differ = [len(set(column)) > 1 for column in zip(*map(setting, probes), strict=True)]
    rows: dict[str, dict[str, list[float]]] = {}
    for probe in probes:
        parts = [part for part, named in zip(setting(probe), differ, strict=True) if named]
        lost = probe["diverged_at"] is not None or probe["last"][headline] is None
        scores = rows.setdefault(", ".join([label, *parts]), {}).setdefault(probe["head"], [])
        scores.append(math.nan if lost else probe["last"][headline])
    return rows


def runs_table(names: Sequence[str]) -> str:
    """Encoder (and block, optimizer, rate) x head: the run's own score, mean and standard deviation over seeds."""
    labelled = read_runs(names)
    runs = list(labelled.values())
    probes, n_test = [probe for run in runs for probe in run["probes"].values()], runs[0]["n_test"]
    rows = {name: row for label, run in labelled.items() for name, row in rows_of(label, run).items()}
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    cells = {name: [over_seeds(row.get(head, [])) for head in heads] for name, row in rows.items()}
    several = [len(scores) for row in rows.values() for scores in row.values() if len(scores) > 1]
    spread = f", mean ± std over {alternatives(several)} seeds" if several else ""
    epochs = alternatives(run["args"]["epochs"] for run in runs)
    note = f"{metric_label(runs[0]['headline'])} (%), last epoch{spread}; "
    note += f"{alternatives(run['n_train'] for run in runs)} training and {n_test} test images, "
    note += f"{epochs} epoch{'s' * (epochs != '1')}"
    if chose := [run["n_val"] for run in runs if any("chosen" in probe for probe in run["probes"].values())]:
        note += f"; rates chosen on {alternatives(chose)} held-out images"
    notes = [note, *({seeds_note(run): None for run in runs} if several else ())]
    fewest = min(probe["last"].get("n") or n_test for probe in probes)
    if fewest < n_test:
        notes.append(f"measured on {fewest} of {n_test} test images")
    if any(probe["diverged_at"] is not None for probe in probes):
        notes.append("diverged: at least one seed diverged, so there is no mean")
    if nothing := dict.fromkeys(probe["head"] for probe in probes if probe.get("learned_nothing")):
        reason = "no better than guessing, so no conclusion (learned_nothing in results.json)"
        notes.append(f"{reason}: {', '.join(nothing)}")
    settings = {label: protocol(run) for label, run in labelled.items()}
    shown = ("n_train", "n_val", "epochs", "encoder", "seeds vary", "versions")  # elsewhere, or in the rows
    for name in protocol(runs[0]):
        values = {label: of_label.get(name) for label, of_label in settings.items()}
        if name not in shown and len({json.dumps(value) for value in values.values()}) > 1:
            texts = (f"{value} ({label})" for label, value in values.items())
            notes.append(f"runs differ in {name}: {', '.join(texts)}")
    return markdown("encoder", heads, cells, notes)


def rules_table(path: Path) -> str:
    """Weights x (accuracy of their probes, entropy, MaxBoxAccV2), over seeds, of an aggregation.json."""

    rows = {}
    with reading(path, "an aggregation.json with probes and boxes"):
        result = json.loads(path.read_text())
        for head, title in WEIGHTS.items():
            if scores := result["over_seeds"].get(head):
                rows[title] = [
                    mean_and_std(scores.get(name), 1 + ("nats" in unit)) for unit, name in QUANTITIES.items()
                ]
        notes = [f"mean ± std over seeds; {seeds_note(result['probes'])}"]
    return markdown("weights", list(QUANTITIES), rows, notes)


def markdown(corner: str, columns: Sequence[str], rows: dict[str, list[str]], notes: Sequence[str] = ()) -> str:
    lines = [f"| {' | '.join([corner, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip() + "\n"


def mean_and_std(score: dict | None, digits: int = 1) -> str:
    """score: "mean" and "std", which is None for a single seed; None: nothing was measured."""
    if score is None:
        return DASH
    spread = f" ± {score['std']:.{digits}f}" if score["std"] is not None else ""
    return f"{score['mean']:.{digits}f}{spread}"


def over_seeds(scores: Sequence[float]) -> str:
    if any(map(math.isnan, scores)):
        return "diverged"
    std = statistics.stdev(scores) if len(scores) > 1 else None
    return mean_and_std({"mean": statistics.mean(scores), "std": std} if scores else None)


def alternatives(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))
