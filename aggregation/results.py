"""aggregation.json: the results of an aggregation analysis with their provenance; and the table in the log."""

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
    "args", "effective_batch", "bn_group", "n_train", "n_val", "n_test", "train_images", "test_images", "command",
    "commit", "dirty", "seeds_vary",
)  # fmt: skip


def describe(
    rules: Sequence[Rule], encoder: Encoder, size: int, run: ProbeRun | None, vectors: VectorStats | None
) -> dict:
    """The rules with their vectors' statistics and their probes' scores, and the matrices of pairs of rules."""
    patches = math.prod(encoder.backbone.grid_of(size, size))
    scores = run.scores() if run is not None else {}
    rows = []
    for rule in rules:
        row = {"name": rule.name, "head": rule.head, "block": rule.block, "probe": rule.probe, "seed": rule.seed}
        if rule.probe is not None:
            probes = [rule.probe]
        else:
            probes = [
                name
                for name in scores
                if all(run.results["probes"][name][key] == row[key] for key in ("head", "block"))
            ]
        diverged = [at for name in probes if rule.probe is not None and (at := scores[name]["diverged_at"])]
        notes = [f"diverged in epoch {at['epoch']}, step {at['step']}: its weights are those before" for at in diverged]
        rows.append({**row, "notes": [*rule.notes, *notes], "scores": {name: scores[name] for name in probes}})
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
    everything: Sequence[Rule], heads: Sequence[Rule], found: Localization, levels: np.ndarray, source: Path,
    step: float,
) -> dict:  # fmt: skip
    """MaxBoxAccV2 of every map. ValueError if no image has a box left."""
    total = found.tally
    if not total.images:
        raise ValueError(f"{source}: all boxes lie outside the central crops: use --loc_transform resize")
    maps = {}
    for number, (rule, without_map) in enumerate(zip(everything, found.without_map.tolist(), strict=True)):
        maps[rule.name] = summary(total, number, levels) | {"images_without_map": without_map}
    whole = (100 * total.found_whole / total.images).tolist()
    result = {
        "images": total.images, "boxes": str(source), "transform": "crop" if found.crop else "resize", "step": step,
        "levels": levels.tolist(), "ious": list(IOUS), "images_left_out": found.left_out,
        "boxes_left_out": found.boxes_out,
        "whole_image": {"maxboxaccv2": sum(whole) / len(whole), "boxaccv2": whole}, "maps": maps,
    }  # fmt: skip
    if heads:  # chosen on these images
        result["best_head"] = max((rule.name for rule in heads), key=lambda name: maps[name]["maxboxaccv2"])
    return result


def over_seeds(result: dict) -> dict[str, dict]:
    """{rule without its seed: {quantity: mean, n and std (of a sample; null for n = 1)}}.

    Accuracies are averaged over probes, other quantities over vectors. No accuracy for a fixed rule whose probes differ
    in more than the seed.
    """
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
    """One line per rule, mean ± std over seeds; then what the numbers leave out."""
    shown = {"aggregation_entropy": "entropy", "top1": "top-1", "maxboxaccv2": "MaxBoxAccV2", "maxboxacc": "V1"}
    boxes = result.get("localization")
    lines = [
        f"{result['images'] or boxes['images']:,} images; uniform weights have {result['uniform_entropy']:.3f} nats",
        f"  {'':32}" + "".join(f"{title:>16}" for title in shown.values()),
    ]
    for name, quantities in result["over_seeds"].items():
        cells = []
        for quantity in shown:
            value = quantities.get(quantity)
            spread = f" ± {value['std']:.2f}" if value and value["std"] is not None else ""
            cells.append(f"{value['mean']:.2f}{spread}" if value else "–")
        lines.append(f"  {name:32}" + "".join(f"{cell:>16}" for cell in cells))
    if boxes:
        lines.append(f"  {'the whole image as the box':32}{'':32}{boxes['whole_image']['maxboxaccv2']:>16.2f}")
        if best := boxes.get("best_head"):
            lines.append(f"  {best + ', the best on these images':64}{boxes['maps'][best]['maxboxaccv2']:>16.2f}")
    return "\n".join([*lines, *(f"  {line}" for line in caveats(result))])


def caveats(result: dict) -> list[str]:
    """What a reader of the table has to know about its numbers."""
    lines, boxes, probes = [], result.get("localization"), result["probes"]
    for rule in result["rules"]:
        images = rule.get("entropy", {}).get("images", result["images"])
        if images < result["images"]:
            lines.append(f"{rule['name']}: no finite weights in {result['images'] - images:,} images, left out")
        lines += [f"{rule['name']}: {note}" for note in rule["notes"] if note.startswith("diverged")]
    if (
        probes
        and any(rule["scores"] for rule in result["rules"])
        and (
            probes["test_images"] != result["test_images"] or probes["n_test"] != (result["images"] or boxes["images"])
        )
    ):
        lines.append(f"top-1 is of the {probes['n_test']:,} test images of {probes['folder']}, not of these images")
    if boxes:
        if boxes["images_left_out"]:
            lines.append(f"MaxBoxAcc is over the {boxes['images']:,} images with a box inside the central crop")
        for name, one in boxes["maps"].items():
            if one["images_without_map"]:
                lines.append(f"{name}: no finite map in {one['images_without_map']:,} images, counted as not found")
    infinite = infinite_pairs(result)
    if infinite:
        lines.append(f"without a floor, KL is infinite: {'; '.join(infinite[:5])}{' ...' * (len(infinite) > 5)}")
    return lines


def infinite_pairs(result: dict) -> list[str]:
    """The pairs of rules whose divergence is infinite in some images, in words."""
    if "matrices" not in result:
        return []
    exact, names = result["matrices"]["kl_exact"]["infinite"], [rule["name"] for rule in result["rules"]]
    return [
        f"{names[row]}, {names[column]} in {count:,} images"
        for row, line in enumerate(exact)
        for column, count in enumerate(line)
        if count
    ]
