"""Linear probes: a table of means over seeds, a table of every probe, curves over the epochs, k-NN."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from probing.results import seeds_note
from report import facts
from report.facts import RunReport, count_cell, mean_std, metric_label, real, score_cell
from report.figures import Line, draw_curves, drawing
from report.page import DASH, NONE, Cell, Group, Text, table
from report.runs import Record, Run

Key = tuple[str, str]  # the evaluation ("test" or one of EVALUATIONS) and the score
COUNTS = ("n", "classes")  # scores that are numbers of images and classes
EVALUATIONS = {
    "held-out": "on training images that no probe was trained on; they choose rate and optimizer",
    "best": "at the epoch that is best on the test images themselves, hence optimistic",
}


class Probe(NamedTuple):
    name: str
    setting: dict[str, object]  # head, block, optimizer, rate, parameters: everything but the seed
    seed: Cell
    diverged: int | None  # epoch from 1
    chosen: bool | None  # by held-out images; None: there are none
    scores: dict[Key, float]
    best_epoch: Cell


class Bank(NamedTuple):
    headline: str
    probes: list[Probe]
    curves: dict[str, list[Line]]
    knn: dict[str, dict[str, Record]]  # {vector: {neighbours: scores}}


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


def read_bank(run: Run) -> Bank:
    """The probes of results.json; of a run without one, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    headline = run.record.get("headline") or "top1"
    records = run.results[0]["probes"] if run.results else unfinished_probes(run, watched)
    probes = [read_probe(name, record) for name, record in records.items()]
    return Bank(headline, probes, read_curves(run, probes, watched, headline), run.record.get("knn", {}))


def read_probe(name: str, record: Record) -> Probe:
    rate = next((key for key in ("lr", "blr") if record.get(key) is not None), None)
    evaluations = {"test": record["last"], "best": record.get("best"), "held-out": record.get("val", {}).get("last")}
    scores = {(e, s): real(v) for e, values in evaluations.items() for s, v in (values or {}).items() if s != "epoch"}
    setting = {
        "head": record["head"],
        "block (from 0)": count_cell(record["block"]),
        "optimizer": record["optimizer"] or DASH,
        "rate": Cell(f"{rate} {real(record[rate]):g}", real(record[rate])) if rate else NONE,
        "parameters": count_cell(record["parameters"]),
    }
    diverged, best = record["diverged_at"], record.get("best")
    lost = None if diverged is None else diverged["epoch"] + 1
    best_epoch = count_cell(best["epoch"] + 1 if best else None)
    return Probe(name, setting, count_cell(record["seed"]), lost, record.get("chosen"), scores, best_epoch)


def unfinished_probes(run: Run, watched: str) -> dict[str, Record]:
    """{name: record as in results.json} from args.json and log.txt; the setting is the name without its seed."""
    newest = next((r[watched] for r in reversed(run.epochs) if isinstance(r.get(watched), dict)), {})
    unknown = dict.fromkeys(("block", "optimizer", "parameters", "diverged_at"), None)
    probes = {}
    for i, name in enumerate(run.started.get("lr") or newest):
        setting, _, seed = name.rpartition("/seed")
        probes[name] = {**unknown, "head": setting or name, "seed": int(seed) if setting else None, "last": {}}
        probes[name] |= {"val": {"last": newest.get(name, {})}} if watched == "val" else {"last": newest.get(name, {})}
        for record in run.epochs:
            if "train_loss" in record and not math.isfinite(real(record["train_loss"][i])):
                probes[name]["diverged_at"] = probes[name]["diverged_at"] or {"epoch": record["epoch"]}
    return probes


def read_curves(run: Run, probes: Sequence[Probe], watched: str, headline: str) -> dict[str, list[Line]]:
    """{label: curves} of the training loss and the headline score. ValueError if log.txt has other probes."""
    names, labels = [probe.name for probe in probes], setting_labels(probes)
    losses, scores = {}, {}
    for record in run.epochs:
        if "train_loss" in record:
            losses[record["epoch"] + 1] = dict(zip(names, record["train_loss"], strict=True))
        if isinstance(record.get(watched), dict):
            scores[record["epoch"] + 1] = {name: of_name.get(headline) for name, of_name in record[watched].items()}
    if any(by_name.keys() != set(names) for by_name in scores.values()):
        raise ValueError("log.txt is of other probes")
    evaluation = "held-out" if watched == "val" else watched
    return {
        label: [Line(labels[name], list(values), [real(y[name]) for y in values.values()]) for name in names]
        for label, values in (("training loss", losses), (column_name((evaluation, headline)), scores))
        if len(values) > 1
    }


# ---------------------------------------------------------------------------------------------------------------------
# showing
# ---------------------------------------------------------------------------------------------------------------------


def setting_labels(probes: Sequence[Probe]) -> dict[str, str]:
    """{probe: its head, and what else of its setting is not the same for all}."""
    texts = [{key: str(getattr(value, "text", value)) for key, value in probe.setting.items()} for probe in probes]
    several = ["head", *(key for key in ("block (from 0)", "optimizer", "rate") if len({t[key] for t in texts}) > 1)]
    words = [[f"block {t[key]}" if key == "block (from 0)" else t[key] for key in several] for t in texts]
    return {probe.name: ", ".join(parts) for probe, parts in zip(probes, words, strict=True)}


def by_setting(probes: Iterable[Probe]) -> list[list[Probe]]:
    return facts.group_by(probes, lambda probe: tuple(probe.setting.values()))


def score_columns(probes: Sequence[Probe], headline: str) -> list[Key]:
    """Scores that were measured, the headline first; of the best epoch, the headline alone. Accuracy per class is left
    out where it equals the accuracy, as it does with equally many images of each class."""
    keys = dict.fromkeys(key for probe in probes for key in probe.scores if key[0] != "best" or key[1] == headline)
    same = [
        key
        for key in keys
        if key[1] == "per_class" and all(p.scores.get(key) == p.scores.get((key[0], "top1")) for p in probes)
    ]
    shown = [key for key in keys if key not in same or key[1] == headline]
    order = ("test", *EVALUATIONS)
    return sorted(shown, key=lambda key: (order.index(key[0]), key[1] in COUNTS, key[1] != headline))


def column_name(key: Key) -> str:
    return f"{key[0]} {metric_label(key[1])}"


def seed_mean(probes: Sequence[Probe], key: Key) -> Cell:
    """Mean and standard deviation over the seeds of a setting; no mean where a seed diverged or has no such number."""
    n, values = len(probes), [probe.scores[key] for probe in probes if key in probe.scores]
    problems = {
        "diverged": sum(probe.diverged is not None for probe in probes),
        "not finite": sum(not math.isfinite(value) for value in values),
        "missing": n - len(values),
    }
    for problem, count in problems.items():
        if count and values:
            return Cell(f"{problem} in {count} of {n}" if n > 1 else problem, math.nan)
    return score_cell(key[1], *mean_std(values)) if values else NONE


def choice(probes: Sequence[Probe]) -> str:
    chosen = sum(bool(probe.chosen) for probe in probes)
    return DASH if not chosen else "chosen" if chosen == len(probes) else f"chosen in {chosen} of {len(probes)}"


def bank_result(bank: Bank) -> str:
    """The headline score of each setting; only of those that held-out images chose, where they did."""
    key = "test" if any(("test", bank.headline) in probe.scores for probe in bank.probes) else "held-out", bank.headline
    probes = [probe for probe in bank.probes if probe.chosen is not False]
    cells = {group[0].name: seed_mean(group, key) for group in by_setting(probes)}
    if all(cell == NONE for cell in cells.values()):
        return "no score yet"
    labels, more = setting_labels(probes), f" and {len(cells) - 6} more" if len(cells) > 6 else ""
    texts = [f"{labels[name]}: {cell.text.partition(' ±')[0]}" for name, cell in cells.items()]
    return f"{column_name(key)} – {'; '.join(texts[:6])}{more}"


def show_banks(reports: Sequence[RunReport]) -> list[object]:
    tables = [block for group in facts.same_data(reports) for block in seed_table(group)]
    return [*tables, *map(bank_card, reports)]


def seed_table(reports: Sequence[RunReport]) -> list[object]:
    """Runs on the same images: a row per setting, means over its seeds."""
    columns = score_columns([probe for report in reports for probe in report.data.probes], reports[0].data.headline)
    rows = [
        {
            "run": facts.run_cell(report),
            "head": group[0].setting["head"],
            **{column_name(key): seed_mean(group, key) for key in columns if key[1] not in COUNTS},
            "seeds": count_cell(len(group)),
            "choice": choice(group),
            **group[0].setting,
        }
        for report in reports
        for group in by_setting(report.data.probes)
    ]
    explanation = "Mean ± standard deviation (n - 1) over the seeds; test: at the last epoch, or the newest evaluation."
    for name, meaning in EVALUATIONS.items():
        explanation += f" {name}: {meaning}." * any(key[0] == name for key in columns)
    return [
        Text(f"On {facts.data_words(reports[0].run.record)}", "heading"),
        Text(explanation),
        *(remark for report in reports for remark in remarks(report)),
        table(rows, "Averaged over seeds"),
        facts.differences(reports),
    ]


def remarks(report: RunReport) -> list[Text]:
    """What varies between the seeds of a run, and why its scores may mislead."""
    probes, record, name = report.data.probes, report.run.record, report.run.name
    settings = by_setting(probes)
    scored = {f"{p.scores['test', 'n']:,.0f}" for p in probes if ("test", "n") in p.scores}
    found = [Text(f"{name}: {seeds_note(record)}.")] if len(settings) < len(probes) else []
    heads = {(probe.setting["head"], probe.setting["block (from 0)"]) for probe in probes}
    if len(settings) > len(heads) and all(probe.chosen is None for probe in probes):
        line = "several rates or optimizers, no held-out images: the best row is chosen on the test images."
        found.append(Text(f"{name}: {line}", "loud"))
    if scored and "n_test" in record and scored != {f"{record['n_test']:,}"}:
        line = f"only {' or '.join(scored)} of {record['n_test']:,} test images were scored."
        found.append(Text(f"{name}: {line}", "loud"))
    return found


def bank_card(report: RunReport) -> Group:
    bank: Bank = report.data
    columns = score_columns(bank.probes, bank.headline)
    rows = [
        {
            "probe": probe.name,
            "head": probe.setting["head"],
            "seed": probe.seed,
            "diverged": DASH if probe.diverged is None else f"in epoch {probe.diverged}",
            **{column_name(key): score_cell(key[1], probe.scores[key]) for key in columns if key in probe.scores},
            "best epoch (from 1)": probe.best_epoch,
            "choice": choice([probe]),
            **probe.setting,
        }
        for probe in bank.probes
    ]
    knn = [
        {"vector": vector, "neighbours": Cell(k, float(k))}
        | {column_name(("test", score)): score_cell(score, real(value)) for score, value in scores.items()}
        for vector, by_k in bank.knn.items()
        for k, scores in by_k.items()
    ]
    figures = [
        drawing(functools.partial(draw_curves, lines, label), f"{label} of {report.run.name}")
        for label, lines in bank.curves.items()
    ]
    every = Group("details", [table(rows)], f"Every probe ({len(rows)})")
    neighbours = Group("details", [table(knn)], "k-nearest-neighbour classification") if knn else None
    return facts.card(report, Group("grid", figures), neighbours, every)
