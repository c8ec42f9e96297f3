"""SECTIONS of a report: per program, how its records are read and shown. Another program is another entry."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from report.attention import (
    aggregation_result,
    attention_result,
    read_aggregation,
    read_attention,
    show_aggregation,
    show_attention,
)
from report.facts import Reported, card, column_of, link, real, state, whole
from report.figures import Line, draw_curves, drawing
from report.html import NONE, Cell, Html, element, grid, number, table
from report.probes import bank_result, read_bank, show_banks
from report.runs import Kind, Run

# ---------------------------------------------------------------------------------------------------------------------
# pretraining and fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def read_training(run: Run) -> dict[str, list[tuple[int, float]]]:
    """{what is logged: (epoch from 1, value)}; scores on the test images are called "test top1" and so on."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in run.epochs:
        values = {name: value for name, value in record.items() if name not in ("epoch", "test")}
        values |= {f"test {name}": value for name, value in record.get("test", {}).items()}
        for name, value in values.items():
            found.setdefault(name, []).append((record["epoch"] + 1, real(value)))
    if not found and run.results:  # the log is not there
        last = run.results[0]["last"]
        for name, value in {**last, **{f"test {k}": v for k, v in last.get("test", {}).items()}}.items():
            if name not in ("epoch", "test"):
                found[name] = [(last["epoch"] + 1, real(value))]
    return found


def show_trainings(reported: Sequence[Reported]) -> Html:
    names = list(dict.fromkeys(name for one in reported for name in one.data))
    rows = []
    for one in reported:
        last = {name: values[-1][1] for name, values in one.data.items()}
        best = max((v for _, v in one.data.get("test top1", []) if math.isfinite(v)), default=None)
        epochs = max((values[-1][0] for values in one.data.values()), default=0)
        rows.append([link(one), state(one.run)[1], whole(epochs), *(logged(name, last.get(name)) for name in names),
                     NONE if best is None else number(best, 2)])  # fmt: skip
    columns = ["run", "state", "epochs", *map(logged_column, names), "best test top-1 (%)"]
    if "test top1" not in names:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    told = "Values of the last epoch." + " best: on the test set itself, hence flattering." * ("test top1" in names)
    curves = [name for name in names if name not in ("test n", "memory_gib", "data_wait", "images_per_second")]
    figures = []
    for name in curves:
        lines = [Line(one.run.name, *zip(*one.data[name], strict=True)) for one in reported if name in one.data]
        figures.append(drawing(functools.partial(draw_curves, lines, logged_column(name)), logged_column(name)))
    return Html(element("p", told, class_="soft") + table(columns, rows) + grid(figures) + "".join(map(card, reported)))


def logged_column(name: str) -> str:
    known = {"loss": "training loss", "lr": "learning rate", "images_per_second": "images/s", "test n": "test images",
             "data_wait": "waiting for data (%)", "memory_gib": "memory (GiB)"}  # fmt: skip
    of, _, score = name.partition(" ")
    return known.get(name) or (f"{of} {column_of(score)}" if score else name)


def logged(name: str, value: float | None) -> Cell:
    if value is None:
        return NONE
    if name == "lr":
        return Cell(f"{value:.3g}", value)
    if name == "data_wait":
        return number(100 * value)
    return number(value, {"test n": 0, "images_per_second": 0, "memory_gib": 1}.get(name, 2 if "top" in name else 4))


def training_result(found: dict[str, list[tuple[int, float]]]) -> str:
    words = [f"{logged_column(name)} {found[name][-1][1]:.{2 if 'top' in name else 4}f}"
             for name in ("test top1", "loss") if name in found]  # fmt: skip
    return ", ".join(words) or "no epoch yet"


# ---------------------------------------------------------------------------------------------------------------------
# the table
# ---------------------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """How the runs of a program are shown.

    read: takes over what is shown of a run, so that a damaged record is known before anything is drawn: it raises what
    a missing or wrong entry raises.
    """

    title: str
    kind: Kind
    read: Callable[[Run], Any]
    result: Callable[[Any], str]  # in a few words
    show: Callable[[Sequence[Reported]], Html]


SECTIONS = {
    "main_linprobe": Section(
        "Linear probes", Kind("cls_features", "results.json"), read_bank, bank_result, show_banks
    ),
    "main_analyze_attention": Section(
        "Attention flow", Kind("reduction", "attention.json", trains=False, several=True), read_attention,
        attention_result, show_attention,
    ),
    "main_analyze_aggregation": Section(
        "Aggregation", Kind("kl_direction", "aggregation.json", trains=False), read_aggregation, aggregation_result,
        show_aggregation,
    ),
    "main_finetune": Section(
        "Fine-tuning", Kind("layer_decay", "results.json"), read_training, training_result, show_trainings
    ),
    "main_pretrain": Section(
        "Pretraining", Kind("mask_ratio", "encoder.safetensors"), read_training, training_result, show_trainings
    ),
}  # fmt: skip
