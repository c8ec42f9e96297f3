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


def read_runs(names: Sequence[str]) -> dict[str, list[dict]]:
    """{label: its results.json} from [LABEL=]RUN; runs of one label are those of several --seed.

    ValueError for an unfinished run, for runs of one label that differ in more than the seed, and for runs that were
    tested on different images or by different scores.
    """
    runs: dict[str, list[dict]] = {}
    for name in names:
        label, _, folder = name.rpartition("=")
        path = Path(folder) if folder.endswith(".json") else Path(folder, "results.json")
        run = read_results(path)
        run |= {"path": path, "seeds": {probe["seed"] for probe in run["probes"].values()}}
        runs.setdefault(label or Path(folder).name, []).append(run)
    first, *others = [run for same in runs.values() for run in same]
    for key, what in (("test_images", "test images"), ("headline", "scores")):
        if other := [run["path"] for run in others if run.get(key) != first.get(key)]:
            raise ValueError(f"{first['path']} and {other[0]} have different {what}: make a table of each")
    for same in runs.values():
        expected = protocol(same[0])
        for run in same[1:]:
            if differing := [name for name, value in protocol(run).items() if value != expected[name]]:
                raise ValueError(
                    f"{same[0]['path']} and {run['path']} have one label and differ in {', '.join(differing)}: "
                    "give each a label of its own"
                )
        seeds = [seed for run in same for seed in run["seeds"]]
        if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise ValueError(f"{same[-1]['path']}: seed {repeated[0]} of its label would count twice")
    return runs


def protocol(run: dict) -> dict[str, object]:
    """The settings of a run that its table must mention where runs differ in them."""
    args = run["args"]
    settings = {name: run.get(name, args.get(name)) for name in PROTOCOL if name in args or name in run}
    settings |= {name: run.get(name) for name in ("n_train", "n_val", "train_images")}
    settings |= {"encoder": run["encoder"], "versions": run["versions"].get("torch"), "commit": run["commit"]}
    return {**settings, "seeds vary": run.get("seeds_vary", ["weights"])}


def rows_of(label: str, runs: Sequence[dict]) -> dict[str, dict[str, list[float]]]:
    """{label, block, optimizer and rate: {head: scores}}, each named where the runs have several.

    Where held-out images chose optimizer and rate, the chosen probes only: a row per block.
    """
    probes = [probe for run in runs for probe in run["probes"].values() if probe.get("chosen", True)]
    headline = runs[0].get("headline", "top1")

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
    runs = [run for same in labelled.values() for run in same]
    probes, n_test = [probe for run in runs for probe in run["probes"].values()], runs[0]["n_test"]
    rows = {name: row for label, same in labelled.items() for name, row in rows_of(label, same).items()}
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    cells = {name: [over_seeds(row.get(head, [])) for head in heads] for name, row in rows.items()}
    several = [len(scores) for row in rows.values() for scores in row.values() if len(scores) > 1]
    spread = f", mean ± std over {alternatives(several)} seeds" if several else ""
    epochs = alternatives(run["args"]["epochs"] for run in runs)
    note = f"{metric_label(runs[0].get('headline', 'top1'))} (%), last epoch{spread}; "
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
    settings = {label: protocol(same[0]) for label, same in labelled.items()}
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
