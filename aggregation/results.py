"""aggregation.json: the results of an aggregation analysis with their provenance; and the table in the log."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from aggregation.divergence import VectorStats
from aggregation.localization import IOUS, Tally, summary
from aggregation.rules import Rule
from encoders.load import Encoder
from probing.finished_run import ProbeRun

SETTINGS = ("args", "effective_batch", "bn_group", "n_train", "n_val", "n_test", "train_images", "test_images")
KEPT_OF_PROBES = (*SETTINGS, "command", "commit", "dirty", "seeds_vary")
QUANTITIES = {"aggregation_entropy": "entropy", "top1": "top-1", "maxboxaccv2": "MaxBoxAccV2", "maxboxacc": "V1"}


def describe(
    rules: Sequence[Rule], encoder: Encoder, size: int, run: ProbeRun | None, vectors: VectorStats | None
) -> dict:
    """The rules with their vectors' statistics and their probes' scores, and the matrices of pairs of rules."""
    patches = math.prod(encoder.backbone.grid_of(size, size))
    result = {"encoder": encoder.record, "random_weights": encoder.record["source"] is None, "input_size": size}
    result |= {"patches": patches, "uniform_entropy": math.log(patches), "images": vectors.images if vectors else 0}
    result |= {"probes": None, "rules": [describe_rule(rule, run) for rule in rules]}
    if run is not None:
        kept = {name: run.results.get(name) for name in KEPT_OF_PROBES}
        result["probes"] = {"folder": str(run.folder), "epochs": run.args.epochs, **kept}
    if vectors and vectors.images:
        entropies, result["matrices"] = vectors.results()
        for row, entropy in zip(result["rules"], entropies, strict=True):
            row["entropy"] = entropy
    return result


def describe_rule(rule: Rule, run: ProbeRun | None) -> dict:
    """A rule and the scores of its probe; a rule without parameters has those of all probes of its head and block."""
    row = {"name": rule.name, "head": rule.head, "block": rule.block, "probe": rule.probe, "seed": rule.seed}
    probes, scores = (run.results["probes"], run.scores()) if run is not None else ({}, {})

    def trained(name: str) -> bool:
        if rule.probe is not None:
            return name == rule.probe
        return (probes[name]["head"], probes[name]["block"]) == (rule.head, rule.block)

    scores, notes = {name: score for name, score in scores.items() if trained(name)}, list(rule.notes)
    if rule.probe is not None and (at := scores[rule.probe]["diverged_at"]):
        notes.append(f"diverged in epoch {at['epoch']}, step {at['step']}: its weights are those before")
    return {**row, "notes": notes, "scores": scores}


def describe_boxes(
    everything: Sequence[Rule], heads: Sequence[Rule], total: Tally, levels: np.ndarray, settings: dict
) -> dict:
    """MaxBoxAccV2 of every map. ValueError if no image has a box left."""
    if not total.images:
        raise ValueError(f"{settings['boxes']}: all boxes lie outside the central crops: use --loc_transform resize")
    maps = {rule.name: summary(total, number, levels) for number, rule in enumerate(everything)}
    whole = (100 * total.found_whole / total.images).tolist()
    result = settings | {name: getattr(total, name) for name in ("images", "images_left_out", "boxes_left_out")}
    result |= {"levels": levels.tolist(), "ious": list(IOUS)}
    result |= {"whole_image": {"maxboxaccv2": statistics.mean(whole), "boxaccv2": whole}, "maps": maps}
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
        scores, name = rule["scores"].values(), rule["name"].removesuffix(f"/seed{rule['seed']}")
        values = groups.setdefault(name, {quantity: [] for quantity in QUANTITIES})
        if len({(score["blr"], score["optimizer"]) for score in scores}) == 1:
            values["top1"] += [score["top1"] for score in scores if score.get("top1") is not None]
        if "entropy" in rule and math.isfinite(rule["entropy"]["mean"]):
            values["aggregation_entropy"].append(rule["entropy"]["mean"])
        for quantity in ("maxboxaccv2", "maxboxacc") if located else ():
            values[quantity].append(located[rule["name"]][quantity])
    return {
        name: {quantity: mean_and_std(values) for quantity, values in quantities.items() if values}
        for name, quantities in groups.items()
    }


def mean_and_std(values: Sequence[float]) -> dict:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "n": len(values), "std": std}


def table(result: dict) -> str:
    """One line per rule, mean ± std over seeds; then what the numbers leave out."""
    boxes, cells = result.get("localization"), {"": list(QUANTITIES.values())}
    for name, quantities in result["over_seeds"].items():
        values = (quantities.get(quantity) for quantity in QUANTITIES)
        cells[name] = ["–" if value is None else formatted(value) for value in values]
    lines = [
        f"{result['images'] or boxes['images']:,} images; uniform weights have {result['uniform_entropy']:.3f} nats"
    ]
    lines += [f"  {name:32}" + "".join(f"{cell:>16}" for cell in row) for name, row in cells.items()]
    if boxes:
        lines.append(f"  {'the whole image as the box':64}{boxes['whole_image']['maxboxaccv2']:>16.2f}")
        if best := boxes.get("best_head"):
            lines.append(f"  {best + ', the best on these images':64}{boxes['maps'][best]['maxboxaccv2']:>16.2f}")
    return "\n".join([*lines, *(f"  {line}" for line in caveats(result))])


def formatted(value: dict) -> str:
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def caveats(result: dict) -> list[str]:
    """What a reader of the table has to know about its numbers."""
    lines, boxes, probes = [], result.get("localization"), result["probes"]
    for rule in result["rules"]:
        images = rule.get("entropy", {}).get("images", result["images"])
        if images < result["images"]:
            lines.append(f"{rule['name']}: no finite weights in {result['images'] - images:,} images, left out")
        lines += [f"{rule['name']}: {note}" for note in rule["notes"] if note.startswith("diverged")]
    if probes and any(rule["scores"] for rule in result["rules"]):
        tested = probes["test_images"], probes["n_test"]
        if tested != (result["test_images"], result["images"] or boxes["images"]):
            lines.append(f"top-1 is of the {tested[1]:,} test images of {probes['folder']}, not of these images")
    if boxes:
        if boxes["images_left_out"]:
            lines.append(f"MaxBoxAcc is over the {boxes['images']:,} images with a box inside the central crop")
        missing = {name: values["images_without_map"] for name, values in boxes["maps"].items()}
        lines += [f"{name}: no finite map in {n:,} images, counted as not found" for name, n in missing.items() if n]
    return lines
