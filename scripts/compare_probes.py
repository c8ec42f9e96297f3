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
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from cli.console import Parser, inner_share, positive_int, run_main
from paper.runs import markdown
from probing.predictions import BY_IMAGE, Predictions, guessing, read_predictions, score
from probing.results import seeds_note
from util.choices import instead_of
from util.files import save, write_json
from util.intervals import UNKNOWN, Interval, student
from util.progress import progress

FEWEST_SEEDS = 3  # for an interval; with two seeds, Student's at 95 % is the mean -+ 9 standard deviations


@dataclass
class Row:
    """A probe with all its seeds. Scores in percent; NaN: not known."""

    name: str
    chosen: bool | None  # by held-out images; None without any
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


Outputs = dict[tuple, Tensor]  # of a row, by seed: a run's number among those of its label, and the probe's own seed


def labelled(arguments: list[str]) -> list[tuple[str, Predictions]]:
    """Predictions of [LABEL=]RUN arguments. ValueError if their test images or scores differ."""
    if twice := [argument for argument in arguments if arguments.count(argument) > 1]:
        raise ValueError(f"{twice[0]} is named twice: its seeds would count twice")
    runs = []
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        runs.append((label or Path(path).name, read_predictions(Path(path))))
        run, first = runs[-1][1], runs[0][1]
        if run.facts["test_images"] != first.facts["test_images"] or not torch.equal(run.index, first.index):
            raise ValueError(f"{argument} was tested on other images than {arguments[0]}: compare runs of one test set")
        if run.facts["headline"] != first.facts["headline"]:
            raise ValueError(f"{argument} counts {run.facts['headline']}, {arguments[0]} {first.facts['headline']}")
    return runs


def grouped(runs: list[tuple[str, Predictions]], everything: bool) -> dict[str, tuple[Row, Outputs]]:
    """Rows by name; those that held-out images did not choose only with `everything`."""
    several, rows, number = len({label for label, _ in runs}) > 1, {}, Counter()
    for label, run in runs:
        for probe, outputs in run.outputs.items():
            facts = run.facts["probes"][probe]
            if facts.get("chosen") is not False or everything:
                name = f"{label}: " * several + probe.rpartition("/seed")[0]
                row, of_seeds = rows.setdefault(name, (Row(name, facts.get("chosen")), {}))
                of_seeds[number[label], facts["seed"]] = outputs
                row.learned_nothing = row.learned_nothing or facts.get("learned_nothing")
        number[label] += 1
    return rows


def compare(
    rows: dict[str, tuple[Row, Outputs]],
    baseline: str,
    labels: Tensor,
    headline: str,
    confidence: float,
    resamples: int,
) -> None:
    """Fill in the scores of the rows and their differences to the baseline; see the module's docstring."""
    samples: dict[str, list | np.ndarray] = {name: [] for name in rows}
    if measure := BY_IMAGE.get(headline):
        interval = functools.partial(student, confidence=confidence)
        for name, (_, outputs) in rows.items():
            samples[name] = np.mean([100 * measure(each, labels).numpy() for each in outputs.values()], axis=0)
    else:
        interval, random = functools.partial(percentiles, confidence=confidence), np.random.default_rng(0)
        for _ in progress(range(resamples), "bootstrap", resamples, unit="resample"):
            drawing = torch.from_numpy(random.integers(0, len(labels), len(labels)))
            for name, (_, outputs) in rows.items():
                scores = [score(each[drawing], labels[drawing], headline) for each in outputs.values()]
                samples[name].append(np.mean(scores))
    for name, (row, outputs) in rows.items():
        row.each = [score(each, labels, headline) for each in outputs.values()]
        row.over_images = interval(np.array(samples[name]))
        row.over_seeds = student(np.array(row.each), confidence, FEWEST_SEEDS)
        reasons = (guessing(each, labels.numpy(), headline) for each in row.each)
        row.learned_nothing = row.learned_nothing or next(filter(None, reasons), None)
    base, base_outputs = rows[baseline]
    for name, (row, outputs) in rows.items():
        if row is base or row.learned_nothing or base.learned_nothing:
            continue
        row.difference = row.mean - base.mean
        row.difference_over_images = interval(np.array(samples[name]) - np.array(samples[baseline]))
        if outputs.keys() == base_outputs.keys():
            paired = dict(zip(base_outputs, base.each, strict=True))
            pairs = [each - paired[seed] for seed, each in zip(outputs, row.each, strict=True)]
            row.difference_over_seeds = student(np.array(pairs), confidence, FEWEST_SEEDS)


def percentiles(values: np.ndarray, confidence: float) -> Interval:
    return Interval(*map(float, np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])))


def table(rows: list[Row], headline: str, baseline: str, confidence: float, n: int, seeds: str) -> str:
    """Markdown. seeds: what they vary, for the line below."""
    intervals = [f"{100 * confidence:g} %, images", f"{100 * confidence:g} %, seeds"]
    cells = {}
    for row in rows:
        name = row.name + " (chosen)" * bool(row.chosen) + " (learned nothing)" * bool(row.learned_nothing)
        std = f"{np.std(row.each, ddof=1):.2f}" if len(row.each) > 1 else "–"
        difference = "–" if np.isnan(row.difference) else f"{row.difference:+.2f}"
        of_difference = [difference, row.difference_over_images, row.difference_over_seeds]
        values = [len(row.each), f"{row.mean:.2f}", std, row.over_images, row.over_seeds, *of_difference]
        cells[name] = list(map(str, values))
    notes = [f"{headline} in percent on {n:,} test images; differences to {baseline}"]
    if any(row.chosen for row in rows):
        notes.append("chosen: best optimizer and rate for its head and block on held-out images")
    fewest, most = (choose(len(row.each) for row in rows) for choose in (min, max))
    if seeds and most > 1:
        notes.append(seeds)
    if fewest == 1:
        notes.append("a single seed has no deviation and no interval over seeds")
    elif fewest < FEWEST_SEEDS:
        notes.append("two seeds say little about the deviation; an interval over seeds needs three")
    notes += [f"no conclusion about {row.name}: {row.learned_nothing}" for row in rows if row.learned_nothing]
    columns = ["seeds", headline, "std", *intervals, "difference", *intervals]
    return markdown("probe", columns, cells, ["; ".join(notes)])


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
    baseline, headline, n = args.baseline or next(iter(rows)), first.facts["headline"], len(first.labels)
    if baseline not in rows:
        raise ValueError(f"--baseline {baseline}: {instead_of(baseline, rows)}")
    compare(rows, baseline, first.labels, headline, args.confidence, args.resamples)
    seeds = " or ".join(dict.fromkeys(seeds_note(run.facts) for _, run in runs))
    shown = [row for row, _ in rows.values()]
    text = table(shown, headline, baseline, args.confidence, n, seeds)
    print(text)
    if args.output is not None and args.output.suffix == ".json":
        record = {"metric": headline, "baseline": baseline, "confidence": args.confidence, "n": n, "seeds": seeds}
        write_json(args.output, {**record, "probes": [asdict(row) for row in shown]})
    elif args.output is not None:
        save(args.output, text)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
