"""aggregation.json: what an aggregation analysis has found, with what each number is of; and its table."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aggregation.divergence import VectorStats
from aggregation.localization import IOUS, summary
from aggregation.rules import Localization, Rule
from encoders.load import Encoder
from probing.finished_run import ProbeRun

KEPT_OF_PROBES = (
    "args", "effective_batch", "bn_group", "n_train", "n_val", "n_test", "train_images", "command", "commit",
    "seeds_vary",
)  # fmt: skip


def describe(
    rules: Sequence[Rule], encoder: Encoder, size: int, run: ProbeRun | None, vectors: VectorStats | None
) -> dict:
    """What each rule is, what was measured of it and of each pair, and what its probes score."""
    patches = math.prod(encoder.backbone.grid_of(size, size))
    scores = run.scores() if run is not None else {}
    settings = {name: run.results["probes"][name] for name in scores}
    rows = []
    for rule in rules:
        same = [name for name, probe in settings.items() if (probe["head"], probe["block"]) == (rule.head, rule.block)]
        mine = [rule.probe] if rule.probe is not None else same
        notes = [
            f"diverged in epoch {at['epoch']}, step {at['step']}, and stayed as it was before"
            for at in (scores[name]["diverged_at"] for name in mine if rule.probe is not None) if at
        ]  # fmt: skip
        rows.append({
            "name": rule.name, "head": rule.head, "block": rule.block, "probe": rule.probe, "seed": rule.seed,
            "notes": [*rule.notes, *notes], "scores": {name: scores[name] for name in mine},
        })  # fmt: skip
    result = {
        "encoder": encoder.record, "random_weights": encoder.record["source"] is None, "input_size": size,
        "patches": patches, "images": vectors.images if vectors else 0, "uniform_entropy": math.log(patches),
        "probes": run and {
            "folder": str(run.folder), "epochs": run.args.epochs,
            **{name: run.results.get(name) for name in KEPT_OF_PROBES},
        },
        "rules": rows,
    }  # fmt: skip
    if vectors and vectors.images:
        entropies, result["matrices"] = vectors.results()
        for row, entropy in zip(rows, entropies, strict=True):
            row["entropy"] = entropy
    return result


def describe_boxes(
    everything: Sequence[Rule],
    heads: Sequence[Rule],
    found: Localization,
    levels: np.ndarray,
    source: Path,
    step: float,
) -> dict:
    """MaxBoxAccV2 of every map. ValueError where no image has a box left."""
    total = found.tally
    if not total.images:
        raise ValueError("--loc_transform crop: all boxes lie outside of the crops")
    maps = {rule.name: summary(total, number, levels) for number, rule in enumerate(everything)}
    whole = (100 * total.found_whole / total.images).tolist()
    best = {}
    if heads:
        names = [rule.name for rule in heads]
        best = {"best_head": max(names, key=lambda name: maps[name]["maxboxaccv2"])}  # chosen on these images
    return {
        "images": total.images, "boxes": str(source), "transform": "crop" if found.crop else "resize", "step": step,
        "levels": levels.tolist(), "ious": list(IOUS), "images_left_out": found.left_out,
        "boxes_left_out": found.boxes_out,
        "whole_image": {"maxboxaccv2": sum(whole) / len(whole), "boxaccv2": whole}, "maps": maps, **best,
    }  # fmt: skip


def over_seeds(result: dict) -> dict[str, dict]:
    """{rule without its seed: {quantity: mean, std (of a sample) and n}}: over probes for accuracies, over vectors for
    the rest; std is null for one. No accuracy where the probes of a fixed rule differ in more than the seed."""
    groups: dict[str, dict[str, list[float]]] = {}
    located = result.get("localization", {}).get("maps", {})
    for rule in result["rules"]:
        name = rule["name"].removesuffix(f"/seed{rule['seed']}")
        values = groups.setdefault(name, {"top1": [], "aggregation_entropy": [], "maxboxaccv2": [], "maxboxacc": []})
        if len({(score["blr"], score["optimizer"]) for score in rule["scores"].values()}) == 1:
            values["top1"] += [score["top1"] for score in rule["scores"].values() if score.get("top1") is not None]
        if "entropy" in rule and math.isfinite(rule["entropy"]["mean"]):
            values["aggregation_entropy"].append(rule["entropy"]["mean"])
        for quantity in ("maxboxaccv2", "maxboxacc"):
            values[quantity] += [located[rule["name"]][quantity]] if located else []
    return {
        name: {
            quantity: {"mean": statistics.mean(values), "n": len(values),
                       "std": statistics.stdev(values) if len(values) > 1 else None}
            for quantity, values in quantities.items() if values
        }
        for name, quantities in groups.items()
    }  # fmt: skip


def table(result: dict) -> str:
    """A line for each rule: mean and deviation over seeds."""
    shown = {"aggregation_entropy": "entropy", "top1": "top-1", "maxboxaccv2": "MaxBoxAccV2", "maxboxacc": "V1"}
    images = result["images"] or result["localization"]["images"]
    lines = [
        f"{images:,} images; uniform weights have {result['uniform_entropy']:.3f} nats",
        f"  {'':32}" + "".join(f"{title:>16}" for title in shown.values()),
    ]
    for name, quantities in result["over_seeds"].items():
        cells = []
        for quantity in shown:
            one = quantities.get(quantity)
            spread = f" ± {one['std']:.2f}" if one and one["std"] is not None else ""
            cells.append(f"{one['mean']:.2f}{spread}" if one else "–")
        lines.append(f"  {name:32}" + "".join(f"{cell:>16}" for cell in cells))
    if "localization" in result:
        found = result["localization"]
        lines.append(f"  {'the whole image as the box':32}{'':32}{found['whole_image']['maxboxaccv2']:>16.2f}")
        if "best_head" in found:
            best = found["maps"][found["best_head"]]["maxboxaccv2"]
            lines.append(f"  {found['best_head'] + ', the best on these images':64}{best:>16.2f}")
    infinite = infinite_pairs(result)
    if infinite:
        lines.append(f"  without a floor, KL is infinite: {'; '.join(infinite[:5])}{' ...' * (len(infinite) > 5)}")
    return "\n".join(lines)


def infinite_pairs(result: dict) -> list[str]:
    """The pairs whose divergence is infinite in some images, in words."""
    if "matrices" not in result:
        return []
    exact, names = result["matrices"]["kl_exact"], [rule["name"] for rule in result["rules"]]
    return [
        f"{row}, {column} in {count:,} images"
        for row, line in zip(names, exact["infinite"], strict=True)
        for column, count in zip(names, line, strict=True) if count
    ]  # fmt: skip
