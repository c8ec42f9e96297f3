"""Test the statements of claims.toml on the recorded measurements of any set of encoders.

A claim compares a quantity of single encoders (the accuracy of a head, also under perturbations, a metric of attention,
a property of a rule's weights, or the difference of two of these) with what the paper expects. Intervals of accuracies
are Student's over runs that differ in data order, augmentation and initial weights, and a claim must hold for every
encoder; those of quantities without runs, such as metrics of attention, are Student's over encoders, that is over
pretraining.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from attention.metrics import METRICS
from probing.results import read_results
from util.files import reading
from util.intervals import UNKNOWN, Interval, student

CLAIMS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["claim"]
CONFIRMED, REFUTED, UNDECIDED, UNTESTED = "confirmed", "refuted", "undecided", "not testable"


@dataclass(frozen=True)
class Encoder:
    """Recorded results of one encoder, and what encoders.toml says of it."""

    label: str
    results: tuple[dict, ...]
    kinds: Sequence[str]
    weight: float | None = None  # of the contrastive loss
    origin: str | None = None  # label of the encoder that was fine-tuned


class Effect(NamedTuple):
    value: float
    interval: Interval
    over: str
    each: dict[str, float]  # value of each encoder


class Tested(NamedTuple):
    claim: dict[str, Any]
    verdict: str
    effect: Effect | None
    attack: Effect | None  # the same claim with other data, another block or another rate
    reason: str = ""  # why it was not tested


class Missing(ValueError): ...  # the records lack what a claim measures


def read_record(path: Path) -> dict:
    with reading(path, "a result of this version's programs"):
        result = json.loads(path.read_text("utf-8"))
        return read_results(path) if "headline" in result else result


def read_encoders(folder: Path) -> dict[str, Encoder]:
    """Encoders of FOLDER/encoders.toml that have records; paths in the file are relative to FOLDER."""
    path, encoders = folder / "encoders.toml", {}
    with reading(path, "a list of encoders, their kinds and their records"):
        for label, entry in tomllib.loads(path.read_text("utf-8")).items():
            paths = [path for pattern in entry.pop("records") for path in sorted(folder.glob(pattern))]
            if results := tuple(read_record(path) for path in paths):
                encoders[label] = Encoder(label, results, **entry)
    if not encoders:
        raise ValueError(f"{path} names no encoder that has records: scripts/study_measure.sh makes them")
    return encoders


# Quantities of an encoder: arrays with one value per independent run, or a single value.


def blocks_of(result: Mapping[str, Any]) -> list[int]:
    """Blocks that a results.json probed; none of other results."""
    return sorted({probe["block"] for probe in result["probes"].values()}) if "headline" in result else []


def probes_of(encoder: Encoder, head: str, block: int | None, rate: float | None) -> tuple[dict, list[dict]]:
    """(results.json, its probes of a head in the order of the seeds), at the chosen rate unless one is given.

    block: None for the last block, preferably of a run that probed no other; else of a run that probed several.
    """
    for result in sorted(encoder.results, key=lambda result: len(blocks_of(result))):
        blocks = blocks_of(result)
        if len(blocks) > (block is not None):
            key = head, blocks[-1 if block is None else block]
            probes = [probe for probe in result["probes"].values() if (probe["head"], probe["block"]) == key]
            probes = [
                probe for probe in probes if (probe.get("chosen", True) if rate is None else probe["blr"] == rate)
            ]
            if probes:
                return result, sorted(probes, key=lambda probe: probe["seed"])
    raise Missing(f"{encoder.label} has no probe {head}")


def heads_of(encoder: Encoder) -> list[str]:
    """Of the runs that probed one block."""
    probes = [probe for result in encoder.results if len(blocks_of(result)) == 1 for probe in result["probes"].values()]
    return list(dict.fromkeys(probe["head"] for probe in probes))


def accuracy(encoder: Encoder, head: str | Sequence[str], block: int | None = None, rate: float | None = None):
    """Test accuracy, %, of each independent run; of several heads, of the one that is best on held-out images."""
    if not isinstance(head, str):
        held_out = {}
        for name in head:
            _, probes = probes_of(encoder, name, block, rate)
            if any("val" not in probe for probe in probes):
                raise Missing(f"{encoder.label} has no held-out images to choose among {', '.join(head)}")
            held_out[name] = np.mean([probe["val"]["last"]["top1"] for probe in probes])
        head = max(held_out, key=held_out.get)
    result, probes = probes_of(encoder, head, block, rate)
    scores = np.array([probe["last"][result["headline"]] for probe in probes], dtype=float)
    return scores if "order" in result.get("seeds_vary", []) else scores.mean(keepdims=True)


def reached(encoder: Encoder, head: str) -> np.ndarray:
    """First block whose accuracy is 90 % of the best block's, in each run, as a share of the depth."""
    if (depth := max(len(blocks_of(result)) for result in encoder.results)) < 2:
        raise Missing(f"{encoder.label} was probed at its last block only")
    scores = np.stack([accuracy(encoder, head, block) for block in range(depth)])
    return (scores >= 0.9 * scores.max(0)).argmax(0) / (depth - 1)


def metric(encoder: Encoder, name: str, blocks: Sequence[int] | None = None, trend: bool = False) -> np.ndarray:
    """Mean over blocks of a metric of attention.json, or its slope per block."""
    for result in encoder.results:
        if name in result.get("metrics", {}):
            means = np.array([block["mean"] for block in result["metrics"][name]["blocks"]])
            chosen = np.arange(len(means))[blocks if blocks is not None else slice(None)]
            return np.array([stats.linregress(chosen, means[chosen]).slope if trend else means[chosen].mean()])
    raise Missing(f"{encoder.label} has no metric {name}")


def rules_of(encoder: Encoder, *heads: str) -> tuple[dict, list[list[int]]]:
    """(aggregation.json, indices of the rules of each head at the last block)."""
    for result in encoder.results:
        keys = [(rule["block"], rule["head"]) for rule in result.get("rules", [])]
        last = max(keys, default=(0,))[0]
        indices = [[i for i, key in enumerate(keys) if key == (last, head)] for head in heads]
        if all(indices):
            return result, indices
    raise Missing(f"{encoder.label} has no weights of {', '.join(heads)}")


def entropy(encoder: Encoder, rule: str) -> np.ndarray:
    result, (indices,) = rules_of(encoder, rule)
    return np.array([result["rules"][index]["entropy"]["mean"] for index in indices])


def localization(encoder: Encoder, rule: str) -> np.ndarray:
    """MaxBoxAccV2, %."""
    result, (indices,) = rules_of(encoder, rule)
    maps = result["localization"]["maps"]
    return np.array([maps[result["rules"][index]["name"]]["maxboxaccv2"] for index in indices])


def divergence(encoder: Encoder, rules: Sequence[str]) -> np.ndarray:
    """KL(first || second), mean over images, nats."""
    result, (rows, columns) = rules_of(encoder, *rules)
    return np.array([np.mean([result["matrices"]["kl"]["mean"][i][j] for j in columns]) for i in rows])


def evaluated(encoder: Encoder, head: str, score: str, under: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(score, %, of evaluate_probe.py under a perturbation, the same without one), of each run."""
    for result in encoder.results:
        parts = {"": result["probes"], **result.get("perturbed", {})} if "run" in result else {}
        names = [name for name in parts.get("", {}) if name.startswith(f"{head}/")]
        if names and under in parts and score in parts[under][names[0]]:
            pair = [np.array([parts[part][name][score] for name in names], dtype=float) for part in (under, "")]
            return pair[0], pair[1]
    raise Missing(f"{encoder.label} has no {score} of {head} {under}")


def shape_bias(encoder: Encoder, head: str) -> np.ndarray:
    """Of the answers that name the class of either cue, where the cues conflict, the share of the shape's, %."""
    return evaluated(encoder, head, "shape bias")[0]


def kept(encoder: Encoder, head: str, under: str) -> np.ndarray:
    """Accuracy on perturbed test images, as a share of that on the images as they are."""
    perturbed, plain = evaluated(encoder, head, "top-1", under)
    return perturbed / plain


QUANTITIES = {
    "accuracy": (accuracy, "points"),
    "reached": (reached, "of the depth"),
    "metric": (metric, ""),
    "entropy": (entropy, "nats"),
    "localization": (localization, "points"),
    "divergence": (divergence, "nats"),
    "shape_bias": (shape_bias, "points"),
    "kept": (kept, "of the accuracy"),
}


def measure(encoder: Encoder, quantity: Mapping[str, Any]) -> np.ndarray:
    """{KIND = what, option = ...}, less `minus`, divided by `share_of`, which are quantities, too."""
    options = dict(quantity)
    minus, share_of = options.pop("minus", None), options.pop("share_of", None)
    kind = next(iter(options))
    values = QUANTITIES[kind][0](encoder, options.pop(kind), **options)
    if minus is not None:
        values = values - measure(encoder, minus)
    return values if share_of is None else values / measure(encoder, share_of)


def unit_of(claim: Mapping[str, Any]) -> str:
    if "share_of" in claim["measure"] or "with" in claim:
        return "1"
    kind = next(iter(claim["measure"]))
    return METRICS[claim["measure"][kind]].unit if kind == "metric" else QUANTITIES[kind][1]


# Effects over encoders.


def runs_of(encoders: Mapping[str, Encoder], kind: str, quantity: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Values of the encoders of a kind; those without records of the quantity are left out."""
    runs, problem = {}, f"no encoder of the kind {kind}"
    for label, encoder in encoders.items():
        if kind in encoder.kinds:
            try:
                runs[label] = measure(encoder, quantity)
            except Missing as error:
                problem = str(error)
    if not runs:
        raise Missing(problem)
    return runs


def interval_of(runs: Mapping[str, np.ndarray]) -> tuple[Interval, str]:
    """Of encoders with several runs, the hull of their intervals over runs: it excludes 0 if each of them does.

    Of encoders with a single value, Student's interval over encoders.
    """
    if all(len(values) > 1 for values in runs.values()):
        intervals = [student(values) for values in runs.values()]
        hull = Interval(min(low for low, _ in intervals), max(high for _, high in intervals))
        return hull, f"runs, in each of {len(runs)}"
    return student(np.array([values.mean() for values in runs.values()])), f"{len(runs)} encoders"


def less(runs: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> tuple[Interval, str]:
    """Of the difference of two groups: that of all pairs of encoders, whose runs share order and views.

    Of single values, Student's with pooled variance.
    """
    if all(len(values) > 1 for values in (*runs.values(), *others.values())):
        return interval_of({f"{a} {b}": runs[a] - others[b] for a in runs for b in others})
    groups = [np.array([values.mean() for values in group.values()]) for group in (runs, others)]
    counts, freedom = [len(group) for group in groups], sum(len(group) for group in groups) - 2
    if not freedom:
        return UNKNOWN, "single encoders"
    variance = sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom
    half = stats.t.ppf(0.975, freedom) * (variance * sum(1 / count for count in counts)) ** 0.5
    mean = groups[0].mean() - groups[1].mean()
    return Interval(mean - half, mean + half), f"{counts[0]} and {counts[1]} encoders"


def effect_of(claim: Mapping[str, Any], encoders: Mapping[str, Encoder]) -> Effect:
    """The claim's quantity over the encoders of the kind `of`:

    less that of the kind `versus`; or its slope over the weight of the contrastive loss (`compare = "weight"`); or what
    fine-tuning changed (`compare = "origin"`); or its slope over the quantity `with`.
    """
    quantity, compare = claim["measure"], claim.get("compare")
    runs = runs_of(encoders, claim["of"], quantity)
    if compare == "origin":
        runs = {label: values - measure(encoders[encoders[label].origin], quantity) for label, values in runs.items()}
    each = {label: float(values.mean()) for label, values in runs.items()}
    values = np.array(list(each.values()))
    if compare == "weight" or "with" in claim:
        if len(values) < 4:
            raise Missing(f"a slope needs 4 encoders, there are {len(values)}")
        others = [
            measure(encoders[label], claim["with"]).mean() if "with" in claim else encoders[label].weight
            for label in runs
        ]
        fit = stats.linregress(others, values)
        half = stats.t.ppf(0.975, len(values) - 2) * fit.stderr
        return Effect(fit.slope, Interval(fit.slope - half, fit.slope + half), f"{len(each)} encoders", each)
    if "versus" in claim:
        others = runs_of(encoders, claim["versus"], quantity)
        means = {label: float(values.mean()) for label, values in others.items()}
        return Effect(values.mean() - np.mean(list(means.values())), *less(runs, others), each | means)
    return Effect(values.mean(), *interval_of(runs), each)


def beyond(effect: Effect, above: float, margin: float | None) -> Effect:
    """The effect less `above`; with a margin, how far its absolute value exceeds the margin.

    So a claim of no gain, or of no difference, is one of less than that, and its interval excludes the bound.
    """
    if margin is None:
        low, high = effect.interval
        return effect._replace(value=effect.value - above, interval=Interval(low - above, high - above))
    low, high = sorted(map(abs, effect.interval))
    low = 0.0 if effect.interval.low < 0 < effect.interval.high else low
    return effect._replace(value=abs(effect.value) - margin, interval=Interval(low - margin, high - margin))


def judge(claim: dict[str, Any], encoders: Mapping[str, Encoder]) -> Tested:
    """A verdict that an attack reverses is not kept: it becomes undecided."""
    if "needs" in claim:
        return Tested(claim, UNTESTED, None, None, claim["needs"])

    def tested(changes: Mapping[str, Any]) -> tuple[Effect, str]:
        changed = {**claim, **changes}
        effect = beyond(effect_of(changed, encoders), changed.get("above", 0.0), changed.get("margin"))
        low, high = effect.interval if changed["expect"] == ">" else (-effect.interval.high, -effect.interval.low)
        return effect, CONFIRMED if low > 0 else REFUTED if high < 0 else UNDECIDED  # NaN is neither

    try:
        effect, verdict = tested({})
    except Missing as error:
        return Tested(claim, UNTESTED, None, None, str(error))
    try:
        attack, other = tested(claim["attack"])
    except Missing:
        return Tested(claim, verdict, effect, None)
    return Tested(claim, UNDECIDED if {verdict, other} == {CONFIRMED, REFUTED} else verdict, effect, attack)
