"""What comes out of a bank of probes: scores of each, which settings held-out images choose, and how that is told."""

import math
from collections.abc import Sequence

from probing.bank import ProbeBank, ProbeSpec
from util.progress import log


def spoken(headline: str) -> str:
    return {"top1": "top-1", "top5": "top-5", "per_class": "top-1 per class", "map": "mAP"}.get(headline, headline)


def value(scores: dict, headline: str) -> float:
    """A score to be compared: that of a diverged probe is less than any other."""
    return -math.inf if math.isnan(scores[headline]) else scores[headline]


def leader(scores: dict[str, dict] | None, headline: str, watched: str) -> str:
    """The best probe of an evaluation in words, if there was one; watched: on which images."""
    if scores is None:
        return ""
    best = max(scores, key=lambda name: value(scores[name], headline))
    on = "held-out " if watched == "val" else ""
    return f"{on}{spoken(headline)} up to {scores[best][headline]:.2f} ({best}), "


def summary(
    bank: ProbeBank, history: list[dict], diverged: dict[str, dict | None], watched: str, headline: str,
    final: dict[str, dict],
) -> dict[str, dict]:  # fmt: skip
    """{probe name: what it is, and its test scores at the last epoch, final}.

    history: the scores of the epochs on the images that were watched, "test" or "val" (held out).
    Where the test set was watched, also those of the epoch that is best on it; else the last and the best scores on the
    held-out images, and whether they choose the probe's rate and optimizer for its head and block.
    """
    results = {}
    for spec, probe in zip(bank.specs, bank.probes, strict=True):
        scores = [{"epoch": entry["epoch"], **entry[watched][spec.name]} for entry in history]
        last, best = scores[-1], max(scores, key=lambda one: value(one, headline))
        results[spec.name] = {
            "aggregation": spec.aggregation, "head": spec.head, "block": spec.block, "blr": spec.blr, "lr": spec.lr,
            "seed": spec.seed, "optimizer": spec.optimizer, "parameters": sum(p.numel() for p in probe.parameters()),
            "diverged_at": diverged[spec.name], "last": {"epoch": last["epoch"], **final[spec.name]},
            **({"best": best} if watched == "test" else {"val": {"last": last, "best": best}}),
        }  # fmt: skip
    if watched == "val":
        held_out = {name: value(result["val"]["last"], headline) for name, result in results.items()}
        chosen = choice(held_out, bank.specs)
        for spec in bank.specs:
            results[spec.name]["chosen"] = spec.name in chosen
    return results


def choice(held_out: dict[str, float], specs: Sequence[ProbeSpec]) -> set[str]:
    """Names of the probes whose optimizer and rate are best for their head and block: by the mean over seeds of their
    held-out scores, of equal ones the first."""
    settings: dict[tuple, dict[tuple, list[str]]] = {}
    for spec in specs:
        setting = spec.optimizer, spec.blr, spec.lr
        settings.setdefault((spec.head, spec.block), {}).setdefault(setting, []).append(spec.name)
    return {
        name
        for found in settings.values()
        for name in max(found.values(), key=lambda names: sum(held_out[name] for name in names) / len(names))
    }


def warn_of_choices(specs: Sequence[ProbeSpec], held_out: bool) -> None:
    """Say it where a rate could only be chosen by test scores."""
    if len({(spec.head, spec.block, spec.seed) for spec in specs}) < len(specs) and not held_out:
        log.warning("several rates or optimizers: choosing one by its test scores flatters it; see --val_fraction")


def warn_of_edges(results: dict[str, dict]) -> None:
    """Say it where the rate that held-out images chose is the smallest or the largest that was tried."""
    tried: dict[tuple, set[float]] = {}
    for result in results.values():
        tried.setdefault((result["head"], result["block"], result["optimizer"]), set()).add(result["blr"])
    edges = dict.fromkeys(
        f"{place[0]} of block {place[1]} ({rate:g})"
        for result in results.values()
        if result.get("chosen")
        for place, rate in [((result["head"], result["block"], result["optimizer"]), result["blr"])]
        if len(tried[place]) > 1 and rate in (min(tried[place]), max(tried[place]))
    )
    if edges:
        log.warning("the best --blr is at the edge of those tried, perhaps not the best there is: %s", ", ".join(edges))


def tell(results: dict[str, dict], headline: str, epoch: str) -> None:
    """A summary to the log, by the scores of its "last" or "best" epoch."""
    for name, result in results.items():
        last = f"last {result['last'][headline]:.2f}"
        if "best" in result:
            best = result["best"]
            words = f"({epoch} epoch; {last}, best {best[headline]:.2f} at epoch {best['epoch']})"
            log.info("%s: %s %.2f %s", name, spoken(headline), result[epoch][headline], words)
        elif result["chosen"]:
            log.info("%s: %s %.2f, chosen with %.2f on held-out images", name, spoken(headline),
                     result["last"][headline], result["val"]["last"][headline])  # fmt: skip


def tell_scores(scores: dict[str, dict]) -> None:
    """An evaluation to the log."""
    for name, one in scores.items():
        rates = list(one)[: list(one).index("loss")]  # in percent
        percents = ", ".join(f"{spoken(rate)} {one[rate]:.2f}" for rate in rates)
        log.info("%s: %s, loss %.4f on %d images", name, percents, one["loss"], one["n"])


def tell_neighbours(found: dict[str, dict]) -> None:
    """{vector: {k: its scores}} to the log, a line for each k; of a head that learns, the range over its probes."""
    for k in next(iter(found.values()), {}):
        places: dict[str, list[float]] = {}
        for vector, scores in found.items():
            places.setdefault("/".join(vector.split("/")[:2]), []).append(scores[k]["top1"])
        words = (
            f"{place} {min(top1):.2f}" + f" to {max(top1):.2f} ({len(top1)} probes)" * (len(top1) > 1)
            for place, top1 in places.items()
        )
        log.info("k-NN, k = %s: top-1 %s", k, ", ".join(words))


def seeds_note(run: dict) -> str:
    """What the seeds of a run vary, for the line under a table; run: any dict that may have its "seeds_vary"."""
    varied = run.get("seeds_vary") or ["weights"]  # of runs that are older than the field
    if varied == ["weights"]:
        return "seeds vary initial weights only: narrower than independent runs"
    names = {"weights": "initial weights", "order": "data order", "views": "augmentation"}
    *most, last = [names[what] for what in varied]
    return f"seeds vary {', '.join(most)} and {last}"
