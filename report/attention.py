"""Attention flow and aggregation in a report: curves over blocks, heads, spectra, divergences, localisation."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attention.figures import FIGURES
from attention.metrics import METRICS, metric_names
from report.facts import Reported, card, data_words, link, real, small, together, whole
from report.figures import draw_matrix, drawing
from report.html import DASH, NONE, Html, element, filled, folded, grid, number, table
from report.runs import Run
from util.plotting import entries, model_name, title

# ---------------------------------------------------------------------------------------------------------------------
# attention flow
# ---------------------------------------------------------------------------------------------------------------------


def read_attention(run: Run) -> list[dict[str, Any]]:
    """The encoders' results, in the order that was asked for, with means that are numbers."""
    for result in run.results:
        real(result["images"]), result["encoder"]["model"].strip(), result["label"].strip()
        for metric in result["metrics"].values():
            for entry in entries(metric)[1]:
                real(entry["mean"]), real(entry["std"])
    order = run.args.get("label") or []
    return sorted(run.results, key=lambda one: order.index(one["label"]) if one["label"] in order else len(order))


def show_attention(reported: Sequence[Reported]) -> Html:
    groups: dict[tuple, list[tuple[Reported, dict]]] = {}
    for one in reported:
        for result in one.data:
            key = one.run.args.get("dataset"), one.run.args.get("data_path"), result["images"]
            groups.setdefault(key, []).append((one, result))
    parts = []
    for members in groups.values():
        parts.append(element("h3", f"On {data_words(members[0][0].run, members[0][1]['images'])}"))
        parts.append(attention_of(members))
    return Html("".join(parts) + "".join(map(card, reported)))


def attention_of(members: Sequence[tuple[Reported, dict]]) -> Html:
    """Encoders that were measured on the same images: curves over the blocks, heads, spectra and tables."""
    labels = [result["label"] for _, result in members]
    named = [
        label if labels.count(label) == 1 else f"{label} ({one.run.name})"
        for label, (one, _) in zip(labels, members, strict=True)
    ]
    results = [{**result, "label": drawn(label)} for label, (_, result) in zip(named, members, strict=True)]
    names = [name for name in dict.fromkeys(name for result in results for name in result["metrics"])
             if any(math.isfinite(real(entry["mean"])) for result in results if name in result["metrics"]
                    for entry in entries(result["metrics"][name])[1])]  # fmt: skip
    first = [name for name in metric_names(["paper"]) if name in names] or names[:4]
    others = [name for name in names if name not in first]
    axes = {name: metric.get("axis") for result in results for name, metric in result["metrics"].items()}

    def figures(kind: str, chosen: Sequence[str]) -> Html:
        draw = FIGURES[kind].draw
        return grid(
            drawing(functools.partial(draw, [one for one in results if kind == "attention" or name in one["metrics"]],
                                      [name]), f"{title(name)}, {kind}") for name in chosen
        )  # fmt: skip

    parts = [figures("attention", first)]
    told = "Lines: means over images and heads; bands: one standard deviation over images. Blocks are counted from 0."
    parts.append(element("p", told, class_="soft"))
    parts.append(attention_table(named, [result for _, result in members]))
    if others:
        parts.append(folded(f"Other measurements over the blocks ({len(others)})", figures("attention", others)))
    if by_head := [name for name in first if axes[name] == "head"]:
        parts.append(folded("Head by head", figures("heads", by_head)))
    if spectra := [name for name in names if axes[name] in ("frequency", "rank")]:
        parts.append(folded("Spectra", figures("spectra", spectra)))
    return Html("".join(parts))


def drawn(label: str) -> str:
    """A label as matplotlib draws it: no formula, no second line."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return (words if len(words) <= 40 else f"{words[:39]}…").replace("$", r"\$") or "(no label)"


def attention_table(labels: Sequence[str], results: Sequence[dict]) -> Html:
    """A row for each encoder and metric: where the encoder begins and ends, and the mean over its blocks."""
    rows, by_block = [], []
    depth = max(len(metric["blocks"]) for result in results for metric in result["metrics"].values())
    for label, result in zip(labels, results, strict=True):
        for name, metric in result["metrics"].items():
            means = [real(block["mean"]) for block in metric["blocks"]]
            uniform = (metric.get("uniform") or {}).get("value")
            about = [label, Html(element("span", name, title=metric.get("definition"))), metric.get("unit")]
            middle = len(means) // 2
            rows.append([label, model_name(result), *about[1:], *(small(means[at]) for at in (0, middle, -1)),
                         small(together(means)[0]), NONE if uniform is None else small(real(uniform))])  # fmt: skip
            by_block.append([*about, *map(small, means), *[NONE] * (depth - len(means))])
    head = ["encoder", "ViT", "measurement", "unit"]
    summary = table([*head, "first block", "middle block", "last block", "mean of blocks", "uniform attention"], rows)
    full = table([head[0], *head[2:], *(f"block {block}" for block in range(depth))], by_block)
    return Html(folded("Table of all measurements", summary) + folded("Block by block", full))


def attention_result(results: Sequence[dict]) -> str:
    words = []
    for result in results:
        metric = result["metrics"].get("cls_patch_entropy")
        mean = together([real(block["mean"]) for block in metric["blocks"]])[0] if metric else math.nan
        words.append(f"{result['label']} {mean:.2f}" if math.isfinite(mean) else f"{result['label']} {DASH}")
    name = f"{title('cls_patch_entropy')} ({METRICS['cls_patch_entropy'].unit}, mean of blocks)"
    return f"{name}: {', '.join(words)}" if words else "no encoder yet"


# ---------------------------------------------------------------------------------------------------------------------
# aggregation
# ---------------------------------------------------------------------------------------------------------------------


def read_aggregation(run: Run) -> dict[str, Any]:
    """aggregation.json, whose numbers are numbers; {} where there is none yet."""
    if not run.results:
        return {}
    result = run.results[0]
    for rule in result["rules"]:
        str(rule["name"]).strip(), str(rule["head"]).strip()
        if "entropy" in rule:
            real(rule["entropy"]["mean"]), real(rule["entropy"]["std"])
    if "matrices" in result:
        matrix_of(result)
    for found in result.get("localization", {}).get("maps", {}).values():
        real(found["maxboxaccv2"]), real(found["maxboxacc"])
        for one in found["boxaccv2"]:
            real(one["max"]), real(one["iou"])
    for quantities in result["over_seeds"].values():
        for one in quantities.values():
            real(one["mean"]), real(one["std"])
    real(result["uniform_entropy"])
    return result


def matrix_of(result: dict[str, Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the rules, their mean divergences, and where these are infinite in some image but for a floor.
    ValueError where these do not fit together."""
    names, matrices = [rule["name"] for rule in result["rules"]], result["matrices"]
    values = np.array([[real(value) for value in row] for row in matrices["kl"]["mean"]], dtype=float)
    infinite = np.array([[real(value) for value in row] for row in matrices["kl_exact"]["infinite"]]) > 0
    if values.shape != (len(names), len(names)) or infinite.shape != values.shape:
        raise ValueError(f"{len(names)} rules, but divergences of shape {values.shape}")
    return names, values, infinite & ~np.eye(len(names), dtype=bool)


SEED_COLUMNS = {"top1": "top-1 (%)", "aggregation_entropy": "entropy (nats)", "maxboxaccv2": "MaxBoxAccV2 (%)",
                "maxboxacc": "MaxBoxAcc (%)"}  # fmt: skip


def show_aggregation(reported: Sequence[Reported]) -> Html:
    rows = []
    for one in reported:
        for name, quantities in one.data.get("over_seeds", {}).items():
            cells = [number(quantities[q]["mean"], 2, quantities[q]["std"]) if q in quantities else NONE
                     for q in SEED_COLUMNS]  # fmt: skip
            probes = max((found["n"] for found in quantities.values()), default=None)
            rows.append([link(one), name, *cells, whole(probes)])
    columns = ["run", "rule", *SEED_COLUMNS.values(), "seeds"]
    summary = table(columns, rows, "Averaged over seeds, mean ± standard deviation (of a sample)") if rows else None
    return Html(("" if summary is None else summary) + "".join(map(aggregation_card, reported)))


def aggregation_card(one: Reported) -> Html:
    result = one.data
    if not result:
        return card(one)
    parts = []
    if "matrices" in result:
        names, values, infinite = matrix_of(result)
        floor = " *: infinite in some images, where weights are not raised to a floor." * bool(infinite.any())
        matrix = result["matrices"]["kl"]
        parts.append(drawing(
            functools.partial(draw_matrix, names, values, infinite, f"{matrix.get('unit', 'nats')}"),
            "Divergence of each pair of rules",
            f"{matrix.get('definition', '')}; mean over {result['images']:,} images.{floor}", broad=True,
        ))  # fmt: skip
        rows = [[name, *(number(value, 3) for value in line)] for name, line in zip(names, values, strict=True)]
        parts.append(folded("The divergences as a table", table(["row, column", *names], rows)))
    parts.append(rules_table(result))
    if "localization" in result:
        parts.append(boxes_table(result["localization"]))
    return card(one, parts)


def rules_table(result: dict[str, Any]) -> Html:
    """A row for each rule and seed."""
    rows = []
    for rule in result["rules"]:
        entropy = rule.get("entropy")
        cells = [NONE, NONE] if entropy is None else [number(real(entropy[key]), 3) for key in ("mean", "std")]
        found = {name: real(scores.get("top1")) for name, scores in (rule.get("scores") or {}).items()}
        top = ", ".join(f"{value:.2f}" for value in found.values() if math.isfinite(value)) or DASH
        rows.append([rule["name"], rule["head"], whole(rule.get("block")), whole(rule.get("seed")), *cells, top,
                     "; ".join(map(str, rule.get("notes") or [])) or DASH])  # fmt: skip
    columns = ["rule", "head", "block (from 0)", "seed", "entropy (nats)", "its std over images",
               "top-1 of its probes (%)", "notes"]  # fmt: skip
    told = f"Entropy of each rule's weights; uniform weights have {real(result['uniform_entropy']):.3f} nats"
    return table(*filled(columns, rows), told)


def boxes_table(found: dict[str, Any]) -> Html:
    """MaxBoxAccV2 of each map, and its parts."""
    ious = [f"IoU {iou:g} (%)" for iou in found["ious"]]
    rows = []
    for name, one in found["maps"].items():
        cells = [number(real(part["max"]), 2) for part in one["boxaccv2"]]
        rows.append([name, number(real(one["maxboxaccv2"]), 2), *cells, number(real(one["maxboxacc"]), 2)])
    whole_image = found["whole_image"]
    rows.append(["(the whole image as the box)", number(real(whole_image["maxboxaccv2"]), 2),
                 *(number(real(value), 2) for value in whole_image["boxaccv2"]), NONE])  # fmt: skip
    told = f"Localisation on {found['images']:,} images, boxes of {found['boxes']}"
    if found.get("best_head"):
        told += f"; the best head on these very images: {found['best_head']}"
    return table(["map", "MaxBoxAccV2 (%)", *ious, "MaxBoxAcc (%)"], rows, told)


QUANTITIES = {"aggregation_entropy": "entropy of weights (nats)", "maxboxaccv2": "MaxBoxAccV2 (%)"}


def aggregation_result(result: dict[str, Any]) -> str:
    """The entropies; of a run that measured boxes alone, what they score."""
    for quantity, heading in QUANTITIES.items():
        found = {name: quantities.get(quantity) for name, quantities in result.get("over_seeds", {}).items()}
        words = [f"{name} {one['mean']:.2f}" for name, one in found.items() if one is not None]
        if words:
            return f"{heading}: {', '.join(words[:6])}" + (f" and {len(words) - 6} more" if len(words) > 6 else "")
    return "no result yet"
