"""Attention flow: curves over the blocks, heads, spectra and tables of encoders measured on the same images."""

import functools
import math
from collections.abc import Sequence

from markupsafe import Markup

from attention.figures import FIGURES, entries, model_name, title
from attention.metrics import METRICS, metric_names
from report import facts
from report.facts import RunReport, mean_std, real
from report.figures import drawing, shorten
from report.page import NONE, Cell, Group, Text, join, table
from report.runs import Record, Run

Measured = tuple[RunReport, Record]  # a run, and the attention.json of one of its encoders
EXPLANATION = "Lines: mean over images and heads; bands: one standard deviation over images. Blocks are counted from 0."


def read_attention(run: Run) -> list[Record]:
    """The results of the encoders in the order of --label."""
    order = run.args.get("label") or []
    return sorted(run.results, key=lambda one: order.index(one["label"]) if one["label"] in order else len(order))


def attention_result(results: Sequence[Record]) -> str:
    parts = []
    for result in results:
        metric = result["metrics"].get("cls_patch_entropy")
        cell = small_cell(mean_std([real(block["mean"]) for block in metric["blocks"]])[0]) if metric else NONE
        parts.append(f"{result['label']} {cell.text}")
    heading = f"{title('cls_patch_entropy')} ({METRICS['cls_patch_entropy'].unit}, mean of blocks)"
    return f"{heading}: {', '.join(parts)}" if parts else "no encoder yet"


def show_attention(reports: Sequence[RunReport]) -> list[object]:
    measured = [(report, result) for report in reports for result in report.data]
    blocks: list[object] = []
    for group in facts.group_by(measured, lambda one: facts.data_key({"args": one[0].run.args, **one[1]})):
        record = {"args": group[0][0].run.args, **group[0][1]}
        blocks += [Text(f"On {facts.data_words(record, record['images'])}", "heading"), *comparison(group)]
    return [*blocks, *map(facts.card, reports)]


def comparison(group: Sequence[Measured]) -> list[object]:
    labels = [result["label"] for _, result in group]
    labels = [
        label if labels.count(label) == 1 else f"{label} ({report.run.name})"
        for label, (report, _) in zip(labels, group, strict=True)
    ]
    results = [{**result, "label": drawable(label)} for label, (_, result) in zip(labels, group, strict=True)]
    measured = [item for result in results for item in result["metrics"].items()]
    axes = {name: m.get("axis") for name, m in measured if any(math.isfinite(real(e["mean"])) for e in entries(m)[1])}
    first = [name for name in metric_names(["paper"]) if name in axes] or list(axes)[:4]

    def figures(kind: str, names: Sequence[str]) -> Group:
        having = {name: [result for result in results if name in result["metrics"]] for name in names}
        draw = FIGURES[kind].draw
        return Group("grid", [drawing(functools.partial(draw, having[n], [n]), f"{title(n)}, {kind}") for n in names])

    folded = {
        "Other measurements over the blocks": figures("attention", [name for name in axes if name not in first]),
        "Head by head": figures("heads", [name for name in first if axes[name] == "head"]),
        "Spectra": figures("spectra", [name for name, axis in axes.items() if axis in ("frequency", "rank")]),
        "Table of all measurements": table([row for item in zip(labels, group, strict=True) for row in rows_of(*item)]),
    }
    details = [Group("details", [part], heading) for heading, part in folded.items()]
    return [figures("attention", first), Text(EXPLANATION), *details]


def drawable(label: str) -> str:
    """A label for matplotlib: no formula, one line."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return shorten(text, 40).replace("$", r"\$") or "(no label)"


def rows_of(label: str, measured: Measured) -> list[dict[str, object]]:
    """A row per metric: its mean over blocks, and every block."""
    report, result = measured
    rows = []
    for name, metric in result["metrics"].items():
        means = [real(block["mean"]) for block in metric["blocks"]]
        uniform = (metric.get("uniform") or {}).get("value")
        rows.append(
            {
                "encoder": join([f"{label} ", facts.note_badges(report.run, ["loud"])]),
                "ViT": f"{model_name(result)}, {result['input_size']} px",
                "measurement": Markup('<span title="{}">{}</span>').format(metric.get("definition"), name),
                "unit": metric.get("unit"),
                "uniform attention": NONE if uniform is None else small_cell(real(uniform)),
                "mean of blocks": small_cell(mean_std(means)[0]),
                **{f"block {block}": small_cell(mean) for block, mean in enumerate(means)},
            }
        )
    return rows


def small_cell(value: float) -> Cell:
    """A number of any size, to four digits."""
    return Cell(f"{value:.4g}", value) if math.isfinite(value) else Cell("not finite", math.nan)
