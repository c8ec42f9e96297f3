"""Summarise, select and log probe results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from util.files import reading, require
from util.progress import log

if TYPE_CHECKING:
    from probing.bank import ProbeBank, ProbeSpec

LABELS = {"top1": "top-1", "top5": "top-5", "per_class": "top-1 per class", "map": "mAP"}
SEEDS_VARY = {"weights": "initial weights", "order": "data order", "views": "augmentation"}
SCORE = (int, float, type(None))  # null: not finite
PROBE = {
    "head": str, "block": range(1000), "seed": int, "blr": (int, float), "lr?": (int, float), "optimizer?": str,
    "parameters": int, "diverged_at": (dict, type(None)), "chosen?": bool, "learned_nothing?": str,
    "last": {"epoch": int, "n?": int},
}  # fmt: skip
RESULTS = {  # what the readers of results.json need of it
    "args": {"epochs": int}, "encoder": dict, "versions": dict, "commit": (str, type(None)), "n_train": int,
    "n_val": int, "n_test": int, "headline": str, "seeds_vary?": [set(SEEDS_VARY)], "probes": {str: PROBE},
}  # fmt: skip


def read_results(path: Path) -> dict:
    """The results.json of main_linprobe.py. ValueError for anything else."""
    with reading(path, "a results.json of main_linprobe.py"):
        run = json.loads(Path(path).read_text("utf-8"))
        require(run, RESULTS)
        for name, probe in run["probes"].items():
            require(probe["last"], {run["headline"]: SCORE}, f"its content/probes/{name}/last")
        if not run["probes"]:
            raise ValueError("it has no probes")
    return run


def metric_label(headline: str) -> str:
    """How a score is called in text and figures."""
    return LABELS.get(headline, headline)


def seeds_note(run: dict) -> str:
    """What differs between the seeds of a run, for the line under a number. run: its results.json."""
    vary = run.get("seeds_vary") or ["weights"]  # of runs older than the field
    if vary == ["weights"]:
        return "seeds vary initial weights only: narrower than independent runs"
    *names, last = (SEEDS_VARY[name] for name in vary)
    return f"seeds vary {', '.join(names)} and {last}"


def comparable(scores: dict, headline: str) -> float:
    """A score to rank by: that of a diverged probe is below any other."""
    return -math.inf if math.isnan(scores[headline]) else scores[headline]


def best_probe(scores: dict[str, dict] | None, headline: str, watched: str) -> str:
    """Log text on the best probe of an evaluation, empty without one. watched: "test" or "val" images."""
    if scores is None:
        return ""
    best = max(scores, key=lambda name: comparable(scores[name], headline))
    images = "held-out " if watched == "val" else ""
    return f"{images}{metric_label(headline)} up to {scores[best][headline]:.2f} ({best}), "


def summary(
    bank: ProbeBank,
    history: list[dict],
    diverged: dict[str, dict | None],
    watched: str,
    headline: str,
    final: dict[str, dict],
) -> dict[str, dict]:
    """{probe name: its settings and its test scores at the last epoch (`final`)}.

    history: scores of the evaluated epochs on the watched images, "test" or "val" (held out). With "test", the result
    includes the scores of the epoch that is best on the test set; with "val", the last and best held-out scores and
    whether they choose the probe's rate and optimizer for its head and block.
    """
    results = {}
    for spec, probe in zip(bank.specs, bank.probes, strict=True):
        scores = [{"epoch": entry["epoch"], **entry[watched][spec.name]} for entry in history]
        last, best = scores[-1], max(scores, key=lambda entry: comparable(entry, headline))
        results[spec.name] = {
            **{key: getattr(spec, key) for key in ("aggregation", "head", "block", "blr", "lr", "seed", "optimizer")},
            "parameters": sum(p.numel() for p in probe.parameters()),
            "diverged_at": diverged[spec.name],
            "last": {"epoch": last["epoch"], **final[spec.name]},
            **({"best": best} if watched == "test" else {"val": {"last": last, "best": best}}),
        }
    if watched == "val":
        held_out = {name: comparable(result["val"]["last"], headline) for name, result in results.items()}
        chosen = choose(held_out, bank.specs)
        for name, result in results.items():
            result["chosen"] = name in chosen
    return results


def choose(held_out: dict[str, float], specs: Sequence[ProbeSpec]) -> set[str]:
    """Names of the probes with the best optimizer and rate for their head and block.

    Best by held-out scores averaged over seeds; of equal ones the first.
    """
    settings: dict[tuple, dict[tuple, list[str]]] = {}
    for spec in specs:
        setting = spec.optimizer, spec.blr, spec.lr
        settings.setdefault((spec.head, spec.block), {}).setdefault(setting, []).append(spec.name)
    return {
        name
        for candidates in settings.values()
        for name in max(candidates.values(), key=lambda names: sum(held_out[name] for name in names) / len(names))
    }


def warn_of_choices(specs: Sequence[ProbeSpec], held_out: bool) -> None:
    """Warn if rates could only be chosen by test scores."""
    if len({(spec.head, spec.block, spec.seed) for spec in specs}) < len(specs) and not held_out:
        log.warning("several rates or optimizers: choosing one by its test scores is biased; use --val_fraction")


def warn_of_edges(results: dict[str, dict]) -> None:
    """Warn if the chosen rate is the smallest or largest of those tried."""
    tried: dict[tuple, set[float]] = {}
    for result in results.values():
        tried.setdefault((result["head"], result["block"], result["optimizer"]), set()).add(result["blr"])
    edges = {}  # without values, in order
    for result in results.values():
        rates = tried[result["head"], result["block"], result["optimizer"]]
        if result.get("chosen") and len(rates) > 1 and result["blr"] in (min(rates), max(rates)):
            edges[f"{result['head']} of block {result['block']} ({result['blr']:g})"] = None
    if edges:
        log.warning("the chosen --blr is at the edge of those tried; a better one may lie beyond: %s", ", ".join(edges))


def log_start(run: dict, bank: ProbeBank) -> None:
    """Log what a run trains. run: its record."""
    text, counts = "%d probes on %s, %s; %d training images and %d held out", (run["n_train"], run["n_val"])
    how = "fitted to convergence"
    if any(spec.optimizer != "logreg" for spec in bank.specs):
        rates = ", ".join(f"{lr:g}" for lr in sorted(set(run["lr"].values())))
        steps, size = run["steps_per_epoch"], run["effective_batch"]
        how = f"lr {rates}; {steps} steps of {size} per epoch, normalised in groups of {run['bn_group']}"
    log.info(text, len(bank.specs), run["encoder"]["model"], how, *counts)


def log_summary(results: dict[str, dict], headline: str, epoch: str) -> None:
    """Log a summary by the scores of the "last" or "best" epoch."""
    label = metric_label(headline)
    for name, result in results.items():
        last, detail = result["last"][headline], ""
        if "converged" not in result and "best" in result:
            best = result["best"]
            detail = f" ({epoch} epoch; last {last:.2f}, best {best[headline]:.2f} at epoch {best['epoch']})"
            last = result[epoch][headline]
        elif "converged" not in result:
            if not result["chosen"]:
                continue
            detail = f", chosen with {result['val']['last'][headline]:.2f} on held-out images"
        log.info("%s: %s %.2f%s", name, label, last, detail)


def log_scores(evaluation: dict[str, dict]) -> None:
    """Log an evaluation: {probe: scores}."""
    for name, scores in evaluation.items():
        percents = list(scores)[: list(scores).index("loss")]
        text = ", ".join(f"{metric_label(key)} {scores[key]:.2f}" for key in percents)
        log.info("%s: %s, loss %.4f on %d images", name, text, scores["loss"], scores["n"])


def log_neighbours(results: dict[str, dict]) -> None:
    """Log {vector: {k: k-NN scores}}, a line for each k; of a learned head, the range over its probes."""
    heads: dict[str, list[dict]] = {}
    for vector, scores in results.items():
        heads.setdefault("/".join(vector.split("/")[:2]), []).append(scores)
    for k in next(iter(results.values()), {}):
        texts = []
        for head, probes in heads.items():
            top1 = sorted(scores[k]["top1"] for scores in probes)
            texts.append(f"{head} {top1[0]:.2f}" + f" to {top1[-1]:.2f} ({len(top1)} probes)" * (len(top1) > 1))
        log.info("k-NN, k = %s: top-1 %s", k, ", ".join(texts))
