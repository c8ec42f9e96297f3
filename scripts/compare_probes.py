"""Compare probes on the same test images: python scripts/compare_probes.py [LABEL=]RUN ... [--baseline PROBE]

RUN is the --output_dir of main_linprobe.py --save_predictions. A row is a probe with all its seeds: the mean score, the
standard deviation over seeds, and two confidence intervals of the mean: over test images and, from three seeds on, over
seeds. Runs with the same label, such as those of several --seed, pool their seeds. Then the difference to the baseline,
paired by image and by seed. If held-out images chose the rates, only the chosen probes; --all shows the others too.
Probes that learned nothing are compared with nothing.

Intervals are Student's, paired for differences. For scores that are not a mean over images (map, per_class), intervals
over images are percentiles of a bootstrap that resamples the images, identically for all probes.
"""

import argparse
import functools
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from cli.console import Parser, inner_share, positive_int, run_main
from probing.predictions import BY_IMAGE, Predictions, read_predictions, score
from probing.results import seeds_note
from probing.untrained import guessing
from util.choices import instead_of
from util.files import write_atomically, write_json
from util.intervals import UNKNOWN, Interval, student
from util.progress import progress

FEWEST_SEEDS = 3  # for an interval; with two seeds, Student's at 95 % is the mean -+ 9 standard deviations


@dataclass
class Row:
    """A probe with all its seeds. Scores in percent; NaN: not known."""

    name: str
    chosen: bool | None  # by held-out images; None without any
    outputs: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # of each seed
    learned_nothing: str | None = None  # the reason, of a seed
    each: list[float] = field(default_factory=list)  # of each seed
    over_images: Interval = UNKNOWN
    over_seeds: Interval = UNKNOWN
    difference: float = np.nan  # to the baseline
    difference_over_images: Interval = UNKNOWN
    difference_over_seeds: Interval = UNKNOWN  # if both have the same seeds

    @property
    def mean(self) -> float:
        return float(np.mean(self.each))

    def record(self) -> dict:
        """The row as plain data, without the outputs."""
        return {key: value for key, value in asdict(self).items() if key != "outputs"}


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


def grouped(runs: list[tuple[str, Predictions]], everything: bool) -> dict[str, Row]:
    """Rows with the outputs of their seeds, by name; those that held-out images did not choose only with `everything`.

    A seed is a run's number among those of its label, and the probe's own seed.
    """
    several, rows, number = len({label for label, _ in runs}) > 1, {}, {}
    for label, run in runs:
        number[label] = number.get(label, -1) + 1
        for probe, outputs in run.outputs.items():
            facts = run.facts["probes"][probe]
            if facts.get("chosen") is False and not everything:
                continue
            name = f"{label}: " * several + probe.rpartition("/seed")[0]
            row = rows.setdefault(name, Row(name, facts.get("chosen")))
            row.outputs[number[label], facts["seed"]] = outputs
            row.learned_nothing = row.learned_nothing or facts.get("learned_nothing")
    return rows


def compare(rows: list[Row], base: Row, labels: Tensor, headline: str, confidence: float, resamples: int) -> None:
    """Fill in the scores of the rows and their differences to `base`; see the module's docstring."""
    if headline in BY_IMAGE:
        interval = functools.partial(student, confidence=confidence)
        measure = BY_IMAGE[headline]
        samples = {
            row.name: np.mean([100 * measure(t, labels).numpy() for t in row.outputs.values()], axis=0) for row in rows
        }
    else:
        interval, samples = functools.partial(percentiles, confidence=confidence), {row.name: [] for row in rows}
        random = np.random.default_rng(0)
        for _ in progress(range(resamples), "bootstrap", resamples, unit="resample"):
            drawing = torch.from_numpy(random.integers(0, len(labels), len(labels)))
            for row in rows:
                scores = [score(outputs[drawing], labels[drawing], headline) for outputs in row.outputs.values()]
                samples[row.name].append(np.mean(scores))
    for row in rows:
        row.each = [score(outputs, labels, headline) for outputs in row.outputs.values()]
        row.over_images = interval(np.array(samples[row.name]))
        row.over_seeds = student(np.array(row.each), confidence, FEWEST_SEEDS)
        for each in row.each:
            row.learned_nothing = row.learned_nothing or guessing(each, labels.numpy(), headline)
    for row in rows:
        if row is base or row.learned_nothing or base.learned_nothing:
            continue
        row.difference = row.mean - base.mean
        row.difference_over_images = interval(np.array(samples[row.name]) - np.array(samples[base.name]))
        if row.outputs.keys() == base.outputs.keys():
            paired = dict(zip(base.outputs, base.each, strict=True))
            pairs = [each - paired[seed] for seed, each in zip(row.outputs, row.each, strict=True)]
            row.difference_over_seeds = student(np.array(pairs), confidence, FEWEST_SEEDS)


def percentiles(values: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def table(rows: list[Row], headline: str, baseline: str, confidence: float, n: int, seeds: str = "") -> str:
    """Markdown. seeds: what they vary, for the line below."""
    share = f"{100 * confidence:g} %"
    columns = ["probe", "seeds", headline, "std", *2 * [f"{share}, images", f"{share}, seeds", "difference"]][:-1]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        std = f"{np.std(row.each, ddof=1):.2f}" if len(row.each) > 1 else "–"
        name = row.name + " (chosen)" * bool(row.chosen) + " (learned nothing)" * bool(row.learned_nothing)
        cells = [name, str(len(row.each)), f"{row.mean:.2f}", std, str(row.over_images), str(row.over_seeds)]
        cells.append("–" if np.isnan(row.difference) else f"{row.difference:+.2f}")
        cells += [str(row.difference_over_images), str(row.difference_over_seeds)]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{headline} in percent on {n:,} test images; differences to {baseline}"]
    if any(row.chosen for row in rows):
        notes.append("chosen: best optimizer and rate for its head and block on held-out images")
    if seeds and any(len(row.each) > 1 for row in rows):
        notes.append(seeds)
    if fewest := min((len(row.each) for row in rows if len(row.each) < FEWEST_SEEDS), default=0):
        notes.append(
            "a single seed has no deviation and no interval over seeds"
            if fewest == 1
            else "two seeds say little about the deviation; an interval over seeds needs three"
        )
    notes += [f"no conclusion about {row.name}: {row.learned_nothing}" for row in rows if row.learned_nothing]
    return "\n".join([*lines, "", "; ".join(notes), ""])


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="[LABEL=]RUN", help="folders of main_linprobe.py --save_predictions")
    add("--baseline", metavar="PROBE", help="row that differences refer to (default: the first)")
    add("--all", action="store_true", help="include rates that held-out images did not choose")
    add("--confidence", default=0.95, type=inner_share, help="confidence level of the intervals")
    add("--resamples", default=1000, type=positive_int, help="number of bootstrap resamples")
    add("--output", type=Path, metavar="FILE", help="also write the table there (.json: as JSON)")
    return parser


def main(args: argparse.Namespace) -> None:
    runs = labelled(args.runs)
    first, rows = runs[0][1], grouped(runs, args.all)
    baseline = args.baseline or next(iter(rows))
    if baseline not in rows:
        raise ValueError(f"--baseline {baseline}: {instead_of(baseline, rows)}")
    headline, rows, base = first.facts["headline"], list(rows.values()), rows[baseline]
    compare(rows, base, first.labels, headline, args.confidence, args.resamples)
    seeds = " or ".join(dict.fromkeys(seeds_note(run.facts) for _, run in runs))
    text = table(rows, headline, baseline, args.confidence, len(first.labels), seeds)
    print(text)
    if args.output is not None and args.output.suffix == ".json":
        record = {"metric": headline, "baseline": baseline, "confidence": args.confidence, "n": len(first.labels)}
        write_json(args.output, {**record, "seeds": seeds, "probes": [row.record() for row in rows]})
    elif args.output is not None:
        write_atomically(args.output, text.encode())


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
