"""Pretraining and fine-tuning: values of the last epoch and curves over the epochs."""

import functools
import math
from collections.abc import Sequence

from report import facts
from report.facts import RunReport, metric_label, real, score_cell
from report.figures import Line, draw_curves, drawing
from report.page import NONE, Cell, Group, Text, number, table
from report.runs import Run

Values = dict[str, dict[int, float]]  # {quantity: {epoch from 1: value}}; scores are named "test top1" and so on
LABELS = {
    "loss": "training loss",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "waiting for data (%)",
    "memory_gib": "memory (GiB)",
}
CURVES = ("loss", "lr", "test top1", "test top5", "test loss", "test per_class")


def read_training(run: Run) -> Values:
    """log.txt; without it, the last epoch of results.json."""
    values: Values = {}
    for record in run.epochs or [result["last"] for result in run.results]:
        scores = {f"test {name}": value for name, value in record.get("test", {}).items()}
        for name, value in {**record, **scores}.items():
            if name not in ("epoch", "test"):
                values.setdefault(name, {})[record["epoch"] + 1] = real(value)
    return values


def label(name: str) -> str:
    return LABELS.get(name) or f"test {metric_label(name.removeprefix('test '))}"


def value_cell(name: str, value: float) -> Cell:
    if name == "lr":
        return Cell(f"{value:.3g}", value)
    if name in LABELS:
        return number(100 * value if name == "data_wait" else value, 4 if name == "loss" else 1)
    return score_cell(name.removeprefix("test "), value)


def training_result(values: Values) -> str:
    last = {name: [*values[name].values()][-1] for name in ("test top1", "loss") if name in values}
    return ", ".join(f"{label(name)} {value_cell(name, value).text}" for name, value in last.items()) or "no epoch yet"


def show_trainings(reports: Sequence[RunReport]) -> list[object]:
    return [*(block for group in facts.same_data(reports) for block in comparison(group)), *map(facts.card, reports)]


def comparison(reports: Sequence[RunReport]) -> list[object]:
    """Runs on the same images: values of the last epoch, and curves."""
    rows, figures = [], []
    for report in reports:
        top1 = [value for value in report.data.get("test top1", {}).values() if math.isfinite(value)]
        last = {label(name): value_cell(name, [*values.values()][-1]) for name, values in report.data.items()}
        epochs = max((max(values) for values in report.data.values()), default=None)
        row = {"run": facts.run_cell(report), "epochs": facts.count_cell(epochs), **last}
        rows.append({**row, "best test top-1 (%)": number(max(top1), 2) if top1 else NONE})
    for name in CURVES:
        lines = [Line(r.run.name, [*r.data[name]], [*r.data[name].values()]) for r in reports if name in r.data]
        if lines:
            figures.append(drawing(functools.partial(draw_curves, lines, label(name)), label(name)))
    return [
        Text(f"On {facts.data_words(reports[0].run.record)}", "heading"),
        Text("Values of the last epoch. best: on the test images themselves, hence optimistic."),
        table(rows),
        facts.differences(reports),
        Group("grid", figures),
    ]
