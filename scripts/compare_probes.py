"""Compare probes on the same test images: python scripts/compare_probes.py [LABEL=]RUN ... [--baseline PROBE]

RUN is the --output_dir of main_linprobe.py --save_predictions. A row is a probe with all its seeds: the mean score, the
standard deviation over seeds, and two confidence intervals of the mean: over test images and, from three seeds on, over
seeds. Runs with the same label, such as those of several --seed, pool their seeds. Then the difference to the baseline,
paired by image and by seed. If held-out images chose the rates, only the chosen probes; --all shows the others too.

Intervals are Student's, paired for differences. For scores that are not a mean over images (map, per_class), intervals
over images are percentiles of a bootstrap that resamples the images, identically for all probes.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cli.console import Parser, run_main
from probing.predictions import Predictions, read_predictions
from probing.results import seeds_note
from util.choices import instead_of
from util.files import write_atomically, write_json
from util.progress import progress
from util.scores import average_precision

FEWEST_SEEDS = 3  # for an interval; with two seeds, Student's at 95 % is the mean -+ 9 standard deviations


class Interval(NamedTuple):
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if np.isnan(self.low) else f"{self.low:.2f} to {self.high:.2f}"


class Row(NamedTuple):
    """A probe with all its seeds. Scores in percent."""

    name: str
    each: list[float]  # of each seed
    chosen: bool | None  # by held-out images; None without any
    over_images: Interval
    over_seeds: Interval
    difference: float = 0.0  # to the baseline
    difference_over_images: Interval = Interval(np.nan, np.nan)
    difference_over_seeds: Interval = Interval(np.nan, np.nan)  # if both have the same seeds

    @property
    def mean(self) -> float:
        return float(np.mean(self.each))


def top1(outputs: Tensor, labels: Tensor) -> Tensor:
    """(n,) 1 for a hit, else 0."""
    return (outputs[:, 0] == labels).double()


def any_match(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels.gather(1, outputs.argmax(1, keepdim=True))[:, 0].double()


def label_accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs > 0) == (labels > 0)).double().mean(1)


def mean_average_precision(outputs: Tensor, labels: Tensor) -> float:
    return average_precision(outputs, labels)[(labels > 0).any(0)].mean().item()


def per_class(outputs: Tensor, labels: Tensor) -> float:
    hits, counts = (torch.bincount(labels, weights=weights) for weights in (top1(outputs, labels), None))
    return (hits / counts)[counts > 0].mean().item()


BY_IMAGE = {"top1": top1, "any_match": any_match, "label_accuracy": label_accuracy}  # scores that are means over images
OF_ALL = {"map": mean_average_precision, "per_class": per_class}


def student(values: np.ndarray, confidence: float, fewest: int = 2) -> Interval:
    """Confidence interval of the mean of values (k,); NaN for fewer than `fewest`."""
    if len(values) < fewest:
        return Interval(np.nan, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean() - half), float(values.mean() + half))


def labelled(arguments: list[str]) -> list[tuple[str, Predictions]]:
    """Predictions of [LABEL=]RUN arguments. ValueError if their test images or scores differ."""
    if twice := [argument for argument in arguments if arguments.count(argument) > 1]:
        raise ValueError(f"{twice[0]} is named twice: its seeds would count twice")
    runs = []
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        runs.append((label or Path(path).name, read_predictions(Path(path))))
    first = runs[0][1]
    for argument, (_, run) in zip(arguments, runs, strict=True):
        if run.facts["test_images"] != first.facts["test_images"] or not torch.equal(run.index, first.index):
            raise ValueError(f"{argument} was tested on other images than {arguments[0]}: compare runs of one test set")
        if run.facts["headline"] != first.facts["headline"]:
            raise ValueError(f"{argument} counts {run.facts['headline']}, {arguments[0]} {first.facts['headline']}")
    return runs


def grouped(
    runs: list[tuple[str, Predictions]], everything: bool
) -> tuple[dict[str, dict[tuple, Tensor]], dict[str, bool | None]]:  # fmt: skip
    """{row: {seed: outputs}}, and whether held-out images chose each row; rows not chosen only with `everything`.

    A seed is a run's number among those of its label, and the probe's own seed.
    """
    several, rows, number, chosen = len({label for label, _ in runs}) > 1, {}, {}, {}
    for label, run in runs:
        number[label] = number.get(label, -1) + 1
        for name, outputs in run.outputs.items():
            mark = run.facts["probes"][name].get("chosen")
            if mark is False and not everything:
                continue
            row = f"{label}: " * several + name.rpartition("/seed")[0]
            rows.setdefault(row, {})[number[label], run.facts["probes"][name]["seed"]] = outputs
            chosen[row] = mark
    return rows, chosen


def same_rate(name: str, row: str) -> bool:
    """Whether two names differ only in how their rate is written: blr30 and blr30.0."""

    def plain(name: str) -> str:
        return re.sub(r"lr([\d.e+-]+)", lambda match: f"lr{float(match[1])!r}", name)

    try:
        return plain(name) == plain(row)
    except ValueError:
        return False


def compare(
    rows: dict[str, dict[tuple, Tensor]],
    chosen: dict[str, bool | None],
    labels: Tensor,
    headline: str,
    baseline: str,
    confidence: float,
    resamples: int,
) -> list[Row]:
    """A Row for each probe; see the module's docstring."""
    if headline in BY_IMAGE:
        hits = {
            n: {s: 100 * BY_IMAGE[headline](t, labels).numpy() for s, t in seeds.items()} for n, seeds in rows.items()
        }
        each = {name: {seed: float(values.mean()) for seed, values in seeds.items()} for name, seeds in hits.items()}
        by_image = {name: np.mean(list(seeds.values()), axis=0) for name, seeds in hits.items()}

        def over_images(name: str, less: str | None = None) -> Interval:
            return student(by_image[name] - (by_image[less] if less else 0), confidence)
    else:
        score: Callable[[Tensor, Tensor], float] = OF_ALL[headline]
        each = {
            name: {seed: 100 * score(outputs, labels) for seed, outputs in seeds.items()}
            for name, seeds in rows.items()
        }
        random, drawn = np.random.default_rng(0), {name: [] for name in rows}
        for _ in progress(range(resamples), "bootstrap", resamples, unit="resample"):
            drawing = torch.from_numpy(random.integers(0, len(labels), len(labels)))
            for name, seeds in rows.items():
                scores = [100 * score(outputs[drawing], labels[drawing]) for outputs in seeds.values()]
                drawn[name].append(np.mean(scores))

        def over_images(name: str, less: str | None = None) -> Interval:
            values = np.array(drawn[name]) - (np.array(drawn[less]) if less else 0)
            return Interval(*(float(v) for v in np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])))

    result = []
    for name, scores in each.items():
        values, base = np.array(list(scores.values())), each[baseline]
        row = Row(name, values.tolist(), chosen[name], over_images(name), student(values, confidence, FEWEST_SEEDS))
        if name != baseline:
            pairs = (
                np.array([scores[seed] - base[seed] for seed in scores]) if scores.keys() == base.keys() else values[:0]
            )
            row = row._replace(
                difference=row.mean - float(np.mean(list(base.values()))),
                difference_over_images=over_images(name, baseline),
                difference_over_seeds=student(pairs, confidence, FEWEST_SEEDS),
            )  # fmt: skip
        result.append(row)
    return result


def table(rows: list[Row], headline: str, baseline: str, confidence: float, n: int, seeds: str = "") -> str:
    """Markdown. seeds: what they vary, for the line below."""
    share = f"{100 * confidence:g} %"
    lines = [
        f"| probe | seeds | {headline} | std | {share}, images | {share}, seeds | difference | {share}, images | "
        f"{share}, seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        std = f"{np.std(row.each, ddof=1):.2f}" if len(row.each) > 1 else "–"
        name = row.name + " (chosen)" * bool(row.chosen)
        cells = [name, str(len(row.each)), f"{row.mean:.2f}", std, str(row.over_images), str(row.over_seeds)]
        is_base = row.name == baseline
        cells += ["–" if is_base else f"{row.difference:+.2f}", str(row.difference_over_images)]
        lines.append("| " + " | ".join([*cells, str(row.difference_over_seeds)]) + " |")
    notes = [f"{headline} in percent on {n:,} test images; differences to {baseline}"]
    if any(row.chosen for row in rows):
        notes.append("chosen: best optimizer and rate for its head and block on held-out images")
    if seeds and any(len(row.each) > 1 for row in rows):
        notes.append(seeds)
    if fewest := min((len(row.each) for row in rows if len(row.each) < FEWEST_SEEDS), default=0):
        notes.append("a single seed has no deviation and no interval over seeds" if fewest == 1 else
                     "two seeds say little about the deviation; an interval over seeds needs three")  # fmt: skip
    return "\n".join([*lines, "", "; ".join(notes), ""])


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of main_linprobe.py --save_predictions")
    parser.add_argument(
        "--baseline", default=None, metavar="PROBE", help="row that differences refer to (default: the first)"
    )
    parser.add_argument("--all", action="store_true", help="include rates that held-out images did not choose")
    parser.add_argument("--confidence", default=0.95, type=float, help="confidence level of the intervals")
    parser.add_argument("--resamples", default=1000, type=int, help="number of bootstrap resamples")
    parser.add_argument(
        "--output", default=None, type=Path, metavar="FILE", help="also write the table there (.json: as JSON)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if not 0 < args.confidence < 1 or args.resamples < 1:
        raise ValueError(
            f"--confidence must lie between 0 and 1, got {args.confidence}; --resamples must be >= 1, got "
            f"{args.resamples}"
        )
    runs = labelled(args.runs)
    first, (rows, chosen) = runs[0][1], grouped(runs, args.all)
    baseline = next((row for row in rows if args.baseline in (None, row) or same_rate(args.baseline, row)), None)
    if baseline is None:
        raise ValueError(f"--baseline {args.baseline}: {instead_of(args.baseline, rows)}")
    headline = first.facts["headline"]
    result = compare(rows, chosen, first.labels, headline, baseline, args.confidence, args.resamples)
    seeds = " or ".join(dict.fromkeys(seeds_note(run.facts) for _, run in runs))
    text = table(result, headline, baseline, args.confidence, len(first.labels), seeds)
    print(text)
    if args.output is not None and args.output.suffix == ".json":
        record = {"metric": headline, "baseline": baseline, "confidence": args.confidence, "n": len(first.labels)}
        write_json(args.output, {**record, "seeds": seeds, "probes": [row._asdict() for row in result]})
    elif args.output is not None:
        write_atomically(args.output, text.encode())


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
