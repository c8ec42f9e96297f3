"""Aggregation: means over seeds, divergences of each pair of rules, entropies, localisation."""

import math
from collections.abc import Sequence

import numpy as np

from aggregation.figures import draw_divergences
from report import facts
from report.facts import RunReport, count_cell, real
from report.figures import drawing
from report.page import DASH, NONE, Cell, Group, Table, Text, number, table
from report.runs import Record, Run

QUANTITIES = {
    "top1": "top-1 (%)",
    "aggregation_entropy": "entropy (nats)",
    "maxboxaccv2": "MaxBoxAccV2 (%)",
    "maxboxacc": "MaxBoxAcc (%)",
}


def read_aggregation(run: Run) -> Record:
    """aggregation.json; {} before the end."""
    return run.results[0] if run.results else {}


def aggregation_result(result: Record) -> str:
    """The entropies; of a run that measured boxes alone, their scores."""
    for quantity in ("aggregation_entropy", "maxboxaccv2"):
        of_rules = {
            name: summary[quantity] for name, summary in result.get("over_seeds", {}).items() if quantity in summary
        }
        parts = [f"{name} {number(real(summary['mean']), 2).text}" for name, summary in of_rules.items()]
        if parts:
            more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
            return f"{QUANTITIES[quantity]}: {', '.join(parts[:6])}{more}"
    return "no result yet"


def show_aggregation(reports: Sequence[RunReport]) -> list[object]:
    blocks: list[object] = []
    for group in facts.same_data([report for report in reports if report.data]):
        words = facts.data_words(group[0].run.record, facts.image_count(group[0].run))
        rows = [row for report in group for row in seed_rows(report)]
        means = table(rows, "Averaged over seeds, mean ± standard deviation (n - 1)")
        blocks += [Text(f"On {words}", "heading"), means, facts.differences(group)]
    return [*blocks, *(facts.card(report, *(blocks_of(report.data) if report.data else [])) for report in reports)]


def seed_rows(report: RunReport) -> list[dict[str, object]]:
    """A row per rule; no mean where the probe of a seed diverged."""
    rows = []
    for name, summaries in report.data["over_seeds"].items():
        rules = [r for r in report.data["rules"] if r["name"].removesuffix(f"/seed{r['seed']}") == name]
        diverged = [bool(score.get("diverged_at")) for rule in rules for score in rule["scores"].values()]
        seeds = max(summary["n"] for summary in summaries.values()) if summaries else None
        cells: dict[str, object] = {"run": facts.run_cell(report), "rule": name}
        for quantity, heading in QUANTITIES.items():
            if (summary := summaries.get(quantity)) is None:
                continue
            cell = number(real(summary["mean"]), 2, summary["std"])
            if any(diverged) and (quantity == "top1" or any(rule.get("probe") for rule in rules)):
                cell = Cell(f"diverged in {sum(diverged)} of {len(diverged)}", math.nan)
            elif summary["n"] != seeds:
                cell = Cell(f"{cell.text} (n = {summary['n']})", cell.value)
            cells[heading] = cell
        rows.append({**cells, "seeds": count_cell(seeds)})
    return rows


def blocks_of(result: Record) -> list[object]:
    blocks = divergences(result) if "matrices" in result else []
    return [*blocks, rules_table(result), boxes_table(result["localization"]) if "localization" in result else None]


def divergences(result: Record) -> list[object]:
    """ValueError for matrices that do not have a row and a column per rule."""
    names, matrix = [rule["name"] for rule in result["rules"]], result["matrices"]["kl"]
    values = np.array(matrix["mean"], dtype=float)  # null: NaN
    if values.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} rules, but divergences of shape {values.shape}")
    images = np.array(matrix.get("images", result["images"]))
    caption = f"{matrix['definition']}; mean over {images.max():,.0f} images."
    caption += f" Some pairs are finite in {images.min():,.0f} of them." * bool(images.min() < images.max())
    rows = [[name, *(number(value, 3) for value in line)] for name, line in zip(names, values, strict=True)]
    return [
        drawing(lambda path: draw_divergences(result, [path]), "Divergence of each pair of rules", caption, wide=True),
        Group("details", [Table(["row, column", *names], rows)], "The divergences as a table"),
    ]


def rules_table(result: Record) -> Table:
    rows = []
    for rule in result["rules"]:
        entropy = rule.get("entropy", {})
        images = entropy.get("images", result["images"])
        top1 = [number(score["top1"], 2).text for score in rule["scores"].values() if "top1" in score]
        rows.append(
            {
                "rule": rule["name"],
                "head": rule["head"],
                "block (from 0)": count_cell(rule["block"]),
                "seed": count_cell(rule["seed"]),
                "entropy (nats)": number(entropy["mean"], 3) if entropy else NONE,
                "its std over images": number(entropy["std"], 3) if entropy else NONE,
                "finite in images": DASH if images == result["images"] else count_cell(images),
                "top-1 of its probes (%)": ", ".join(top1) or DASH,
                "notes": "; ".join(rule["notes"]) or DASH,
            }
        )
    return table(rows, f"Entropy of each rule's weights; uniform weights have {result['uniform_entropy']:.3f} nats")


def boxes_table(boxes: Record) -> Table:
    """MaxBoxAccV2 of each map, and its parts."""
    whole = boxes["whole_image"] | {"boxaccv2": [{"max": value} for value in boxes["whole_image"]["boxaccv2"]]}
    rows = [
        {
            "map": name,
            QUANTITIES["maxboxaccv2"]: number(scores["maxboxaccv2"], 2),
            **{
                f"IoU {iou:g} (%)": number(p["max"], 2)
                for iou, p in zip(boxes["ious"], scores["boxaccv2"], strict=True)
            },
            QUANTITIES["maxboxacc"]: number(scores["maxboxacc"], 2) if "maxboxacc" in scores else NONE,
        }
        for name, scores in [*boxes["maps"].items(), ("(the whole image as the box)", whole)]
    ]
    best = f"; the best head, chosen on these images: {boxes['best_head']}" if "best_head" in boxes else ""
    return table(rows, f"Localisation on {boxes['images']:,} images, boxes of {boxes['boxes']}{best}")
