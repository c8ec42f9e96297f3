"""Markdown tables of single runs, straight from the files that the programs wrote."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from paper.tables import DASH, PROTOCOL, RULES
from probing.results import metric_label, seeds_note

Row = dict[str, list[float]]  # {head: scores, one per seed}
WEIGHTS = {"pos": "uniform (`pos`)", **RULES}


def read_runs(names: Sequence[str]) -> dict[str, list[dict]]:
    """{label: its results.json} from [LABEL=]RUN; runs of one label are those of several --seed.

    ValueError for an unfinished run, for runs of one label that differ in more than the seed, and for runs that were
    tested on different images or by different scores.
    """
    runs: dict[str, list[dict]] = {}
    for name in names:
        label, _, folder = name.rpartition("=")
        path = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give the --output_dir of a finished main_linprobe.py")
        try:
            runs.setdefault(label or Path(folder).name, []).append(run := json.loads(path.read_text()))
            run["path"], run["seeds"] = path, {probe["seed"] for probe in run["probes"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a results.json of main_linprobe.py: {error!r}") from error
    every = [run for same in runs.values() for run in same]
    for what in ("test_images", "headline"):
        if other := [run["path"] for run in every if run.get(what) != every[0].get(what)]:
            difference = "test images" if what == "test_images" else "scores"
            raise ValueError(f"{every[0]['path']} and {other[0]} have different {difference}: make a table of each")
    for same in runs.values():
        for run in same[1:]:
            if differing := [name for name, value in protocol(run).items() if value != protocol(same[0])[name]]:
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


def rows_of(label: str, runs: Sequence[dict], epoch: str) -> dict[str, Row]:
    """{label, block, optimizer and rate: scores}, each named where the runs have several.

    Where held-out images chose optimizer and rate, the chosen probes only: a row per block.
    """
    probes = [probe for run in runs for probe in run["probes"].values() if probe.get("chosen", True)]
    headline = runs[0].get("headline", "top1")

    def setting(probe: dict) -> list[str]:
        rate = f"lr {probe['lr']:g}" if probe.get("lr") is not None else f"blr {probe['blr']:g}"
        return [f"block {probe['block']}", *([] if "chosen" in probe else [probe.get("optimizer", "lars"), rate])]

    differ = [len(set(column)) > 1 for column in zip(*map(setting, probes), strict=True)]
    rows: dict[str, Row] = {}
    for probe in probes:
        parts = [part for part, named in zip(setting(probe), differ, strict=True) if named]
        scores = rows.setdefault(", ".join([label, *parts]), {}).setdefault(probe["head"], [])
        lost = probe["diverged_at"] is not None or probe[epoch][headline] is None
        scores.append(float("nan") if lost else probe[epoch][headline])
    return rows


def runs_table(names: Sequence[str], epoch: str = "last") -> str:
    """Encoder (and block, optimizer, rate) x head: the run's own score, mean and standard deviation over seeds."""
    labelled = read_runs(names)
    runs = [run for same in labelled.values() for run in same]
    probes = [probe for run in runs for probe in run["probes"].values()]
    if epoch == "best" and any("val" in probe for probe in probes):
        raise ValueError("--report best is the best epoch on the test set: a run with --val_fraction has none")
    rows = {name: row for label, same in labelled.items() for name, row in rows_of(label, same, epoch).items()}
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = ["| encoder | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(mean_std(row.get(head, [])) for head in heads) + " |")
    several = [len(scores) for row in rows.values() for scores in row.values() if len(scores) > 1]
    spread = f", mean ± std over {alternatives(several)} seeds" if several else ""
    epochs, n_train = alternatives(run["args"]["epochs"] for run in runs), alternatives(run["n_train"] for run in runs)
    note = f"{metric_label(runs[0].get('headline', 'top1'))} (%), {epoch} epoch{spread}; {n_train} training and "
    note += f"{runs[0]['n_test']} test images, {epochs} epoch{'s' * (epochs != '1')}"
    if chose := [run["n_val"] for run in runs if any("chosen" in probe for probe in run["probes"].values())]:
        note += f"; rates chosen on {alternatives(chose)} held-out images"
    notes = [note, *({seeds_note(run): None for run in runs} if several else ())]
    fewest = min(probe[epoch].get("n", run["n_test"]) for run in runs for probe in run["probes"].values())
    if fewest < runs[0]["n_test"]:
        notes.append(f"measured on {fewest} of {runs[0]['n_test']} test images")
    if any(probe["diverged_at"] is not None for probe in probes):
        notes.append("diverged: at least one seed diverged, so there is no mean")
    if nothing := dict.fromkeys(probe["head"] for probe in probes if probe.get("learned_nothing")):
        notes.append(
            f"no better than guessing, so no conclusion (learned_nothing in results.json): {', '.join(nothing)}"
        )
    shown = ("n_train", "n_val", "epochs", "encoder", "seeds vary", "versions")  # otherwise, or in the rows
    for name in protocol(runs[0]):
        values = {label: protocol(same[0]).get(name) for label, same in labelled.items()}
        if name not in shown and len({json.dumps(value) for value in values.values()}) > 1:
            texts = (f"{value} ({label})" for label, value in values.items())
            notes.append(f"runs differ in {name}: {', '.join(texts)}")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip() + "\n"


def rules_table(path: Path) -> str:
    """Weights x (accuracy of their probes, entropy, MaxBoxAccV2), over seeds, of an aggregation.json."""
    columns = {
        "top1": ("top-1, %", 1),
        "aggregation_entropy": ("entropy, nats", 2),
        "maxboxaccv2": ("MaxBoxAccV2, %", 1),
    }
    lines = [f"| weights | {' | '.join(title for title, _ in columns.values())} |", "|---" * (len(columns) + 1) + "|"]

    def text(score: dict | None, digits: int) -> str:
        spread = f" ± {score['std']:.{digits}f}" if score and score["std"] is not None else ""
        return f"{score['mean']:.{digits}f}{spread}" if score else DASH

    try:
        result = json.loads(path.read_text())
        for head, title in WEIGHTS.items():
            if scores := result["over_seeds"].get(head):
                cells = (text(scores.get(quantity), digits) for quantity, (_, digits) in columns.items())
                lines.append(f"| {title} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"mean ± std over seeds; {seeds_note(result['probes'])}"]) + "\n"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an aggregation.json with probes and boxes: {error!r}") from error


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    if any(value != value for value in values):
        return "diverged"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else DASH


def alternatives(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))
