"""Leaderboard: encoders x heads on each set of test images, from the results.json of main_linprobe.py alone."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from models_vit import ARCHITECTURES, build_vit
from paper.shown import GOLDEN
from report.runs import Record, Run, data_key, find_runs
from report.tables import Cell, Mean, group_by, mean_of, stem
from util.files import reading
from util.intervals import UNKNOWN, Interval, student

BY_IMAGE = {"top1": "top-1 (%)", "any_match": "any match (%)"}  # scores that are a mean over images


class Entry(NamedTuple):
    """A head on an encoder, with all its seeds. Scores in percent."""

    run: Run
    name: str  # of the probe, without its seed
    probe: Record  # of the first seed
    by_seed: dict[int | None, float]

    @property
    def path(self) -> Path:
        return self.run.folder / f"{self.run.prefix}results.json"

    @property
    def encoder(self) -> str:
        return Path(str(self.run.record["encoder"]["source"] or "random weights")).stem

    @property
    def scores(self) -> Mean:
        return mean_of(list(self.by_seed.values()))

    @property
    def over_images(self) -> float:
        """Half the width of the 95 % interval over images, at most: as if all seeds missed the same images."""
        return 1.96 * math.sqrt(self.scores.mean * (100 - self.scores.mean) / self.run.record["n_test"])


def read_entries(results: Path) -> list[Entry]:
    """Of the rates that were tried, those that held-out images chose; without goldens and diverged probes. ValueError
    names a file that main_linprobe.py did not write."""
    entries = []
    for run in find_runs([str(results)])[0]:
        if run.program == "main_linprobe" and run.results and run.folder.name != GOLDEN:
            path = run.folder / f"{run.prefix}results.json"
            with reading(path, "a record"):
                probes, score = run.record["probes"], run.record["headline"]
                chosen = [name for name in probes if probes[name].get("chosen") is not False and score in BY_IMAGE]
                for same in ([(name, probes[name]) for name in names] for names in group_by(chosen, stem)):
                    if all(probe["diverged_at"] is None for _, probe in same):
                        by_seed = {probe["seed"]: float(probe["last"][score]) for _, probe in same}
                        entries.append(Entry(run, stem(same[0][0]), same[0][1], by_seed))
    return entries


def problems(results: Path) -> list[str]:
    """Why rows cannot be trusted, for scripts/make_tables.py --check."""
    faults = []
    for entry in read_entries(results):
        if entry.run.record["dirty"] is not False or not entry.run.record["commit"]:
            faults.append(f"{entry.path} was not made by clean, known code")
        if not all(0 <= value <= 100 for value in entry.by_seed.values()):
            faults.append(f"{entry.path}: the scores of {entry.name} are not percentages")
    return list(dict.fromkeys(faults))


def boards(results: Path) -> list[list[Entry]]:
    """For each set of images, the entries in the order of their scores."""
    groups = group_by(read_entries(results), lambda entry: data_key(entry.run.record))
    return [sorted(same, key=lambda entry: -entry.scores.mean) for same in groups]


@functools.cache
def encoder_parameters(model: str) -> int | None:
    """None for an architecture of another library."""
    if model not in ARCHITECTURES:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_vit(model).parameters())


def over_seeds(scores: Sequence[float]) -> Interval:
    """95 % interval of the mean; unknown for fewer than three."""
    return student(np.array(scores), fewest=3)


def difference(entry: Entry, base: Entry | None) -> Cell | None:
    """The difference of two rows and whether it is real: its 95 % interval over images excludes 0, and so does the one
    over the seeds that both have, where they are three or more.

    The interval over images is that of scripts/compare_probes.py if X.comparison.json lies beside X.results.json, which
    is narrower than that of independent errors.
    """
    if base is None or base is entry:
        return None
    value, half = entry.scores.mean - base.scores.mean, math.hypot(entry.over_images, base.over_images)
    path = entry.path.with_name(entry.path.name.replace("results.json", "comparison.json"))
    low, high = value - half, value + half
    if path.exists() and entry.run is base.run:
        with reading(path, "of scripts/compare_probes.py --output"):
            paired = json.loads(path.read_text(encoding="utf-8"))
            intervals = {row["name"]: row["difference_over_images"] for row in paired["probes"]}
            if paired["baseline"] == base.name and entry.name in intervals:
                low, high = map(float, intervals[entry.name])
    seeds = over_seeds([entry.by_seed[seed] - base.by_seed[seed] for seed in entry.by_seed if seed in base.by_seed])
    shown = not low <= 0 <= high and not seeds.low <= 0 <= seeds.high
    verdict = "not shown" if not shown else "real for these seeds" if seeds is UNKNOWN else "real"
    text = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return Cell(text, value, badges=[("good" if verdict == "real" else "", verdict)])
