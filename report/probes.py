"""Linear probes: a table of means over seeds, a table of every probe, curves over the epochs, k-NN."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from report import facts
from report.facts import RunReport, count_cell, mean_std, metric_label, real, score_cell
from report.figures import Line, draw_curves, drawing
from report.page import DASH, NONE, Cell, Group, Table, Text, number, table
from report.runs import Record, Run

Key = tuple[str, str]  # the evaluation ("test" or one of EVALUATIONS) and the score
COUNTS = ("n", "classes")  # scores that are numbers of images and classes
EVALUATIONS = {
    "held-out": "on training images that no probe was trained on; they choose rate and optimizer",
    "best": "at the epoch that is best on the test images themselves, hence optimistic",
}


@dataclass(frozen=True)
class Probe:
    name: str
    head: str
    block: int | None  # from 0
    optimizer: str
    rate: Cell
    seed: int | None
    parameters: int | None
    diverged: int | None  # epoch from 1
    chosen: bool | None  # by held-out images; None: there are none
    scores: dict[Key, float]
    best_epoch: int | None  # from 1

    @property
    def setting(self) -> tuple:
        return self.head, self.block, self.optimizer, self.rate


@dataclass(frozen=True)
class Bank:
    headline: str
    probes: list[Probe]
    curves: dict[str, list[Line]]
    knn: dict[str, dict[str, dict[Key, float]]]  # {vector: {neighbours: scores}}


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


def read_bank(run: Run) -> Bank:
    """The probes of results.json; of a run without one, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    headline = run.record.get("headline") or ("per_class" if run.args.get("per_class") else "top1")
    result = run.results[0] if run.results else {"probes": unfinished_probes(run, watched)}
    probes = [read_probe(name, record) for name, record in result["probes"].items()]
    vectors = result.get("knn", {}).items()
    knn = {vector: {k: scores_of(scores) for k, scores in by_k.items()} for vector, by_k in vectors}
    return Bank(headline, probes, read_curves(run, probes, watched, headline), knn)


def scores_of(record: dict[str, Any], evaluation: str = "test") -> dict[Key, float]:
    return {(evaluation, name): real(value) for name, value in record.items() if name != "epoch"}


def read_probe(name: str, record: dict[str, Any]) -> Probe:
    rate = next((key for key in ("lr", "blr") if record.get(key) is not None), None)
    best, diverged = record.get("best") or {}, record["diverged_at"]
    scores = scores_of(record["last"]) | scores_of(best, "best")
    return Probe(
        name,
        record["head"],
        record["block"],
        record.get("optimizer") or "lars",
        NONE if rate is None else Cell(f"{rate} {real(record[rate]):g}", real(record[rate])),
        record["seed"],
        record.get("parameters"),
        None if diverged is None else diverged["epoch"] + 1,
        record.get("chosen"),
        scores | (scores_of(record["val"]["last"], "held-out") if "val" in record else {}),
        best["epoch"] + 1 if best else None,
    )


def unfinished_probes(run: Run, watched: str) -> dict[str, dict[str, Any]]:
    """{name: record as in results.json}, from names such as abmilp:depth=2/block11/sgd/blr0.1/seed0 and log.txt."""
    newest = next((record[watched] for record in reversed(run.epochs) if isinstance(record.get(watched), dict)), {})
    names = list(run.started["lr"]) if isinstance(run.started.get("lr"), dict) else list(newest)
    probes = {}
    for i, name in enumerate(names):
        parts = re.fullmatch(r"(.+)/block(\d+)/(?:(\w+)/)?(blr|lr)([^/]+)/seed(-?\d+)", name)
        head, block, optimizer, kind, rate, seed = parts.groups() if parts else (name, None, None, "blr", None, None)
        losses = [(r["epoch"], real(r["train_loss"][i])) for r in run.epochs if "train_loss" in r]
        lost = next(({"epoch": epoch} for epoch, loss in losses if not math.isfinite(loss)), None)
        scores = newest.get(name, {})
        probes[name] = {"head": head, "block": block and int(block), "optimizer": optimizer, "seed": seed and int(seed)}
        probes[name] |= {kind: rate and float(rate), "diverged_at": lost, "last": scores if watched == "test" else {}}
        probes[name] |= {"val": {"last": scores}} if watched == "val" else {}
    return probes


def read_curves(run: Run, probes: Sequence[Probe], watched: str, headline: str) -> dict[str, list[Line]]:
    """{label: curves} of the training loss and the headline score. ValueError if log.txt has other probes."""
    names = [probe.name for probe in probes]
    losses = {r["epoch"] + 1: dict(zip(names, r["train_loss"], strict=True)) for r in run.epochs if "train_loss" in r}
    evaluations = {r["epoch"] + 1: r[watched] for r in run.epochs if isinstance(r.get(watched), dict)}
    if any(scores.keys() != set(names) for scores in evaluations.values()):
        raise ValueError("log.txt is of other probes")
    scores = {x: {name: by_name[name].get(headline) for name in names} for x, by_name in evaluations.items()}
    labels = setting_labels(probes)
    curves = {
        "training loss": losses,
        f"{'held-out' if watched == 'val' else watched} {metric_label(headline)}": scores,
    }
    return {
        label: [Line(labels[name], list(values), [real(y[name]) for y in values.values()]) for name in names]
        for label, values in curves.items()
        if len(values) > 1
    }


# ---------------------------------------------------------------------------------------------------------------------
# showing
# ---------------------------------------------------------------------------------------------------------------------


def setting_labels(probes: Sequence[Probe]) -> dict[str, str]:
    """{probe: its head, and those of block, optimizer and rate that are not the same for all}."""
    parts = [(probe.head, f"block {probe.block}", probe.optimizer, str(probe.rate.text)) for probe in probes]
    differs = [i == 0 or len(set(column)) > 1 for i, column in enumerate(zip(*parts, strict=True))]
    return {
        probe.name: ", ".join(part for part, shown in zip(of_probe, differs, strict=True) if shown)
        for probe, of_probe in zip(probes, parts, strict=True)
    }


def by_setting(probes: Sequence[Probe]) -> list[list[Probe]]:
    return facts.group_by(probes, lambda probe: probe.setting)


def score_columns(probes: Sequence[Probe], headline: str) -> list[Key]:
    """Scores that were measured, the headline first; of the best epoch, the headline alone. Accuracy per class is left
    out where it equals the accuracy, as it does with equally many images of each class."""

    def shown(probe: Probe, key: Key) -> bool:
        same = key[1] == "per_class" and probe.scores[key] == probe.scores.get((key[0], "top1"))
        return key[1] == headline or (key[0] != "best" and not same)

    keys = dict.fromkeys(key for probe in probes for key in probe.scores if shown(probe, key))
    order = ("test", *EVALUATIONS)
    return sorted(keys, key=lambda key: (order.index(key[0]), key[1] in COUNTS, key[1] != headline))


def diverged(probes: Sequence[Probe]) -> int:
    return sum(probe.diverged is not None for probe in probes)


def seed_mean(probes: Sequence[Probe], key: Key) -> Cell:
    """Mean and standard deviation over the seeds of a setting; no mean where a seed diverged or has no such number."""
    n, values = len(probes), [probe.scores[key] for probe in probes if key in probe.scores]
    if not values:
        return NONE
    lost = sum(not math.isfinite(value) for value in values)
    for count, problem in ((diverged(probes), "diverged"), (lost, "not finite"), (n - len(values), "missing")):
        if count:
            return Cell(f"{problem} in {count} of {n}" if n > 1 else problem, math.nan)
    return score_cell(key[1], *mean_std(values))


def choice(probes: Sequence[Probe]) -> str:
    chosen = sum(bool(probe.chosen) for probe in probes)
    return DASH if not chosen else "chosen" if chosen == len(probes) else f"chosen in {chosen} of {len(probes)}"


def show_banks(reports: Sequence[RunReport]) -> list[object]:
    tables = [block for group in facts.same_data(reports) for block in seed_table(group)]
    return [*tables, *map(bank_card, reports)]


def seed_table(reports: Sequence[RunReport]) -> list[object]:
    """Runs on the same images: a row per setting, means over its seeds."""
    probes = [probe for report in reports for probe in report.data.probes]
    columns = [key for key in score_columns(probes, reports[0].data.headline) if key[1] not in COUNTS]
    rows = [
        {
            "run": facts.run_cell(report),
            "head": group[0].head,
            **{column_name(key): seed_mean(group, key) for key in columns},
            "seeds": count_cell(len(group)),
            "diverged": DASH if (lost := diverged(group)) == 0 else f"{lost} of {len(group)}",
            "choice": choice(group),
            **setting_cells(group[0]),
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
        table(rows, "Averaged over seeds") if rows else Text("No probe is known yet."),
        facts.differences(reports),
    ]


def remarks(report: RunReport) -> list[Text]:
    """What varies between the seeds of a run, and why its scores may mislead."""
    probes, record, name = report.data.probes, report.run.record, report.run.name
    settings = by_setting(probes)
    scored = {f"{p.scores['test', 'n']:,.0f}" for p in probes if ("test", "n") in p.scores}
    found = [Text(f"{name}: {seeds_note(record)}.")] if len(settings) < len(probes) else []
    if len(settings) > len({(p.head, p.block) for p in probes}) and all(p.chosen is None for p in probes):
        line = "several rates or optimizers, no held-out images: the best row is chosen on the test images."
        found.append(Text(f"{name}: {line}", "loud"))
    if scored and "n_test" in record and scored != {f"{record['n_test']:,}"}:
        found.append(
            Text(f"{name}: only {' or '.join(scored)} of {record['n_test']:,} test images were scored.", "loud")
        )
    return found


def seeds_note(record: Record) -> str:
    if record.get("seeds_vary", ["weights"]) == ["weights"]:
        return "seeds vary initial weights only: narrower than independent runs"
    return "seeds vary initial weights, data order and augmentation"


def bank_card(report: RunReport) -> Group:
    bank: Bank = report.data
    columns = score_columns(bank.probes, bank.headline)
    rows = [
        {
            "probe": probe.name,
            "head": probe.head,
            "seed": count_cell(probe.seed),
            "diverged": DASH if probe.diverged is None else f"in epoch {probe.diverged}",
            **{column_name(key): score_cell(key[1], probe.scores[key]) for key in columns if key in probe.scores},
            "best epoch (from 1)": count_cell(probe.best_epoch),
            "choice": choice([probe]),
            **setting_cells(probe),
        }
        for probe in bank.probes
    ]
    figures = [
        drawing(functools.partial(draw_curves, lines, label), f"{label} of {report.run.name}")
        for label, lines in bank.curves.items()
    ]
    probes = Group("details", [table(rows)], f"Every probe ({len(rows)})") if rows else None
    return facts.card(report, Group("grid", figures) if figures else None, knn_table(bank), probes)


def setting_cells(probe: Probe) -> dict[str, object]:
    return {
        "block (from 0)": count_cell(probe.block),
        "optimizer": probe.optimizer,
        "rate": probe.rate,
        "parameters": count_cell(probe.parameters),
    }


def column_name(key: Key) -> str:
    return f"{key[0]} {metric_label(key[1])}"


def knn_table(bank: Bank) -> Table | None:
    rows = [
        {
            "vector": vector,
            "neighbours": Cell(k, float(k)),
            **{column_name(key): score_cell(key[1], scores[key]) for key in scores},
        }
        for vector, by_k in bank.knn.items()
        for k, scores in by_k.items()
    ]
    return table(rows, "k-nearest-neighbour classification") if rows else None


def bank_result(bank: Bank) -> str:
    """The headline score of each setting; only of those that held-out images chose, where they did."""
    key = "test" if any(("test", bank.headline) in probe.scores for probe in bank.probes) else "held-out", bank.headline
    probes = [probe for probe in bank.probes if probe.chosen is not False]
    cells = {group[0].name: seed_mean(group, key) for group in by_setting(probes)}
    labels, parts = setting_labels(probes), []
    for name, cell in cells.items():
        parts.append(f"{labels[name]}: {number(cell.value).text if math.isfinite(cell.value) else cell.text}")
    if all(cell == NONE for cell in cells.values()):
        return "no score yet"
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    return f"{column_name(key)} – {'; '.join(parts[:6])}{more}"
