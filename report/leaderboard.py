"""Leaderboard: encoders x heads on each set of test images, from the results.json of main_linprobe.py alone."""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from scipy import stats

from models_vit import ARCHITECTURES, build_vit
from paper.shown import GOLDEN
from report.facts import badges, data_key, describe_data, format_argument, notes_of
from report.runs import Record, Run, find_runs
from report.tables import Cell, group_by, mean_of, stem

BY_IMAGE = {"top1": "top-1 (%)", "any_match": "any match (%)"}  # scores that are a mean over images
PROTOCOL = ("epochs", "effective_batch", "crop", "input_size", "amp", "n_train", "n_val", "seeds_vary")
NORMAL = 1.96  # 95 %


class Entry(NamedTuple):
    """A head on an encoder, with all its seeds. Scores in percent."""

    run: Run
    name: str  # of the probe, without its seed
    probe: Record  # of the first seed
    values: dict[int | None, float]  # by seed

    @property
    def path(self) -> Path:
        return self.run.folder / f"{self.run.prefix}results.json"

    @property
    def mean(self) -> float:
        return mean_of(list(self.values.values())).mean

    @property
    def error(self) -> float:
        """Standard error over images of the mean over seeds, at most: as if all seeds missed the same images."""
        return math.sqrt(self.mean * (100 - self.mean) / self.run.record["n_test"])


def read_entries(results: Path) -> list[Entry]:
    """Of the rates that were tried, those that held-out images chose; without goldens and diverged probes."""
    entries = []
    for run in find_runs([str(results)])[0]:
        record = run.record
        if run.program != "main_linprobe" or not run.results or run.folder.name == GOLDEN:
            continue
        if record["headline"] in BY_IMAGE:
            probes = {n: p for n, p in record["probes"].items() if p.get("chosen") is not False}
            for names in group_by(probes, stem):
                same = [probes[name] for name in names]
                if all(probe["diverged_at"] is None for probe in same):
                    values = {probe["seed"]: float(probe["last"][record["headline"]]) for probe in same}
                    entries.append(Entry(run, stem(names[0]), same[0], values))
    return entries


def problems(results: Path) -> list[str]:
    """Why rows cannot be trusted, for scripts/make_tables.py --check."""
    faults = []
    for entry in read_entries(results):
        if entry.run.record["dirty"] is not False or not entry.run.record["commit"]:
            faults.append(f"{entry.path} was not made by clean, known code")
        if not all(0 <= value <= 100 for value in entry.values.values()):
            faults.append(f"{entry.path}: the scores of {entry.name} are not percentages")
    return list(dict.fromkeys(faults))


def boards(results: Path, page: Path) -> list[dict[str, Any]]:
    """For each set of images, rows in the order of their scores. page: the file that links to the records."""
    return [
        board(sorted(same, key=lambda entry: -entry.mean), page.parent)
        for same in group_by(read_entries(results), lambda entry: data_key(entry.run.record))
    ]


def board(entries: Sequence[Entry], folder: Path) -> dict[str, Any]:
    rows, protocols = [], {}
    for entry in entries:
        record, encoder = entry.run.record, entry.run.record["encoder"]
        same = [e for e in entries if e.run is entry.run and e.probe["head"] == "cls"]
        cls = next((e for e in same if e.probe["block"] == entry.probe["block"]), None)
        source = Path(str(encoder["source"] or "random weights")).stem
        rows.append(
            {
                "encoder": Cell(source, badges=badges(notes_of(entry.run))),
                "ViT": encoder["model"],
                "head": entry.probe["head"],
                "block": entry.probe["block"],
                BY_IMAGE[record["headline"]]: mean_of(list(entry.values.values())),
                "95 %, images": interval(entry.mean, NORMAL * entry.error),
                "95 %, seeds": interval(entry.mean, student(list(entry.values.values()))),
                "seeds": len(entry.values),
                "against [cls]": difference(entry, cls),
                "against the best": difference(entry, entries[0]),
                "parameters of head": entry.probe["parameters"],
                "of encoder": encoder_parameters(encoder["model"]),
                "run (s)": round(record["seconds"]),
                "record": Cell("record", link=quote(os.path.relpath(entry.path, folder))),
            }
        )
        settings = {**entry.run.args, **record}
        protocols[entry.run.anchor] = {
            "encoder": f"{source}: {format_argument(encoder)}",
            "protocol": ", ".join(f"{name} {format_argument(settings.get(name))}" for name in PROTOCOL),
            "command": record["command"],
            "commit": record["commit"] + " with UNCOMMITTED CHANGES" * bool(record["dirty"]),
            "device": record["device"],
        }
    return {"title": describe_data(entries[0].run.record), "rows": rows, "protocols": list(protocols.values())}


@functools.cache
def encoder_parameters(model: str) -> int | None:
    """None for an architecture of another library."""
    if model not in ARCHITECTURES:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_vit(model).parameters())


def student(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean; NaN for fewer than three values."""
    if len(values) < 3:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * mean_of(values).std / math.sqrt(len(values))


def interval(mean: float, half: float) -> str | None:
    return None if math.isnan(half) else f"{mean - half:.1f} to {mean + half:.1f}"


def difference(entry: Entry, base: Entry | None) -> Cell | None:
    """The difference of two rows and whether it is real: its 95 % interval over images excludes 0, and so does the one
    over the seeds that both have, where they are three or more."""
    if base is None or base is entry:
        return None
    value, half = entry.mean - base.mean, NORMAL * math.hypot(entry.error, base.error)
    low, high = paired_by_image(entry, base) or (value - half, value + half)
    seeds = student([entry.values[seed] - base.values[seed] for seed in entry.values if seed in base.values])
    shown = not low <= 0 <= high and not abs(value) <= seeds
    verdict = "not shown" if not shown else "real for these seeds" if math.isnan(seeds) else "real"
    text = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return Cell(text, value, badges=[("good" if verdict == "real" else "", verdict)])


def paired_by_image(entry: Entry, base: Entry) -> tuple[float, float] | None:
    """The interval of scripts/compare_probes.py, if X.comparison.json lies beside X.results.json; it is narrower than
    that of independent errors."""
    path = entry.path.with_name(entry.path.name.replace("results.json", "comparison.json"))
    comparison = json.loads(path.read_text(encoding="utf-8")) if path.exists() and entry.run is base.run else {}
    if comparison.get("baseline") != base.name:
        return None
    intervals = {row["name"]: row["difference_over_images"] for row in comparison["probes"]}
    return tuple(intervals[entry.name]) if entry.name in intervals else None
