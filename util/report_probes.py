"""Linear probes in a report: every probe of results.json, averages over seeds, curves by epoch."""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from util.html import DASH, Cell, Html, element, folded, grid, table
from util.probe_results import spoken
from util.report_facts import Reported, card, column_of, link, real, scores_of, shown, together, whole
from util.report_figures import Line, draw_curves, drawing
from util.report_runs import Run


class Probe(NamedTuple):
    name: str
    head: str
    block: int | None  # from 0
    optimizer: str
    rate: Cell
    seed: int | None
    parameters: int | None
    diverged: str
    chosen: bool | None
    # by what they are of: "test" (last epoch), "best" (the epoch that is best on the test set), "held-out"
    scores: dict[str, dict[str, float]]
    best_epoch: int | None  # from 1

    @property
    def setting(self) -> tuple:
        return self.head, self.block, self.optimizer, self.rate

    @property
    def words(self) -> str:
        return self.name.rpartition("/seed")[0] or self.name


class Bank(NamedTuple):
    headline: str
    watched: str  # "test" or "val": on what the epochs were evaluated
    probes: list[Probe]
    knn: dict[str, dict[str, dict[str, float]]]


def read_bank(run: Run) -> Bank:
    """Probes of results.json; of a run that has none yet, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    if not run.results:
        return Bank(headline_of(run), watched, unfinished_probes(run, watched), {})
    result = run.results[0]
    probes = []
    for name, probe in result["probes"].items():
        scores = {"test": scores_of(probe["last"])}
        if "best" in probe:
            scores["best"] = scores_of(probe["best"])
        if "val" in probe:
            watched, scores["held-out"] = "val", scores_of(probe["val"]["last"])
        best = (probe.get("best") or {}).get("epoch")
        at = probe.get("diverged_at")
        probes.append(Probe(
            name, probe["head"], probe["block"], probe.get("optimizer") or "lars", rate_of(probe), probe["seed"],
            probe.get("parameters"), f"epoch {at['epoch'] + 1}" if at else "no", probe.get("chosen"), scores,
            None if best is None else best + 1,
        ))  # fmt: skip
    knn = {vector: {k: scores_of(found) for k, found in of_k.items()} for vector, of_k in result.get("knn", {}).items()}
    return Bank(result.get("headline", "top1"), watched, probes, knn)


def headline_of(run: Run) -> str:
    known = run.asked.get("headline")
    return known if isinstance(known, str) else "per_class" if run.args.get("per_class") else "top1"


def rate_of(probe: dict[str, Any]) -> Cell:
    key = "lr" if probe.get("lr") is not None else "blr"
    return Cell(f"{key} {real(probe[key]):g}", real(probe[key]))


def unfinished_probes(run: Run, watched: str) -> list[Probe]:
    """Named by args.json and log.txt: abmilp:depth=2/block11/sgd/blr0.1/seed0."""
    evaluated = [record for record in run.epochs if isinstance(record.get(watched), dict)]
    newest = evaluated[-1][watched] if evaluated else {}
    names = list(run.asked["lr"]) if isinstance(run.asked.get("lr"), dict) else list(newest)
    probes = []
    for place, name in enumerate(names):
        parts = re.fullmatch(r"(.+)/block(\d+)/(?:(\w+)/)?(blr|lr)([^/]+)/seed(-?\d+)", name)
        head, block, optimizer, kind, rate, seed = parts.groups() if parts else (name, None, None, None, None, None)
        losses = [real(record["train_loss"][place]) for record in run.epochs if "train_loss" in record]
        lost = next((epoch for epoch, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        scores = {"held-out" if watched == "val" else "test": scores_of(newest[name])} if name in newest else {}
        probes.append(Probe(
            name, head, None if block is None else int(block), optimizer or "lars",
            Cell(f"{kind} {float(rate):g}", float(rate)) if rate else Cell(DASH), None if seed is None else int(seed),
            None, f"epoch {lost}" if lost else "no", None, scores, None,
        ))  # fmt: skip
    return probes


def by_setting(probes: Iterable[Probe]) -> list[list[Probe]]:
    groups: dict[tuple, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.setting, []).append(probe)
    return list(groups.values())


def score_columns(probes: Sequence[Probe], headline: str) -> list[tuple[str, str]]:
    """(of what, score) of all that was measured; what counts comes first."""
    found = dict.fromkeys((of, score) for probe in probes for of, scores in probe.scores.items() for score in scores)
    order = {"test": 0, "held-out": 1, "best": 2}
    return sorted(found, key=lambda key: (order[key[0]], key[1] == "n", key[1] != headline))


def heading(of: str, score: str) -> str:
    return f"{of} {column_of(score)}"


def settings_rows(bank: Bank, columns: Sequence[tuple[str, str]]) -> list[list[object]]:
    """A row for each setting of a bank: means over its seeds."""
    rows = []
    for group in by_setting(bank.probes):
        first, cells = group[0], []
        for of, score in columns:
            values = [probe.scores[of][score] for probe in group if score in probe.scores.get(of, {})]
            lost = sum(not math.isfinite(value) for value in values)
            cell = shown(score, *together(values)) if values else DASH
            if lost and len(values) > 1:
                cell = Cell(f"not finite in {lost} of {len(values)}", math.nan)
            cells.append(cell)
        diverged = sum(probe.diverged != "no" for probe in group)
        chosen = {True: "chosen", False: DASH, None: DASH}[first.chosen]
        rows.append([
            first.head, whole(first.block), first.optimizer, first.rate, whole(len(group)), *cells, chosen,
            whole(first.parameters), f"{diverged} of {len(group)}" if diverged else "none",
        ])  # fmt: skip
    return rows


def show_banks(reported: Sequence[Reported]) -> Html:
    everything = [probe for one in reported for probe in one.data.probes]
    headline = reported[0].data.headline
    columns = [key for key in score_columns(everything, headline) if key[1] != "n"]
    rows = [[link(one), *row] for one in reported for row in settings_rows(one.data, columns)]
    names = ["run", "head", "block (from 0)", "optimizer", "rate", "seeds", *(heading(*key) for key in columns),
             "choice", "parameters", "diverged"]  # fmt: skip
    told = ["test: of the last epoch; mean ± standard deviation over the seeds of the probe (of a sample)."]
    if any("best" in probe.scores for probe in everything):
        told.append("best: of the epoch that is best on the test set itself, hence flattering.")
    if any("held-out" in probe.scores for probe in everything):
        told.append("held-out: of training images that no probe was trained on; they choose rate and optimizer.")
    summary = table(names, rows, "Averaged over seeds") if rows else element("p", "No probe is known yet.")
    return Html(element("p", " ".join(told), class_="soft") + summary + "".join(map(bank_card, reported)))


def bank_card(one: Reported) -> Html:
    bank: Bank = one.data
    columns = score_columns(bank.probes, bank.headline)
    rows = []
    for probe in bank.probes:
        cells = [shown(s, probe.scores[of][s]) if s in probe.scores.get(of, {}) else DASH for of, s in columns]
        chosen = {True: "chosen", False: DASH, None: DASH}[probe.chosen]
        rows.append([probe.name, probe.head, whole(probe.block), probe.rate, probe.optimizer, whole(probe.seed), *cells,
                     whole(probe.best_epoch), chosen, whole(probe.parameters), probe.diverged])  # fmt: skip
    names = ["probe", "head", "block (from 0)", "rate", "optimizer", "seed", *(heading(*key) for key in columns),
             "best epoch (from 1)", "choice", "parameters", "diverged"]  # fmt: skip
    probes = folded(f"Every probe ({len(rows)})", table(names, rows)) if rows else None
    return card(one, grid(bank_curves(one.run, bank)), knn_table(bank), probes)


def bank_curves(run: Run, bank: Bank) -> list[Html]:
    """Training loss and the score that counts, by epoch."""
    name, lines = f"{spoken(bank.headline)} ({'held-out' if bank.watched == 'val' else 'test'} images, %)", []
    figures = []
    losses = [record for record in run.epochs if isinstance(record.get("train_loss"), list)]
    if losses:
        lines = [
            Line(probe.words, [r["epoch"] + 1 for r in losses], [real(r["train_loss"][place]) for r in losses])
            for place, probe in enumerate(bank.probes)
        ]
        figures.append(drawing(functools.partial(draw_curves, lines, "training loss"), f"Training loss of {run.name}"))
    tested = [record for record in run.epochs if isinstance(record.get(bank.watched), dict)]
    if tested:
        x = [record["epoch"] + 1 for record in tested]
        lines = [
            Line(probe.words, x, [real(r[bank.watched].get(probe.name, {}).get(bank.headline)) for r in tested])
            for probe in bank.probes
        ]
        figures.append(drawing(functools.partial(draw_curves, lines, name), f"{name} of {run.name}"))
    return figures


def knn_table(bank: Bank) -> Html | None:
    if not bank.knn:
        return None
    names = list(dict.fromkeys(s for of_k in bank.knn.values() for found in of_k.values() for s in found))
    rows = [
        [vector, Cell(k, float(k)), *(shown(name, found.get(name, math.nan)) for name in names)]
        for vector, of_k in bank.knn.items() for k, found in of_k.items()
    ]  # fmt: skip
    return table(["vector", "neighbours", *map(column_of, names)], rows, "k-nearest-neighbour classification, test")


def bank_result(bank: Bank) -> str:
    """The score that counts, head by head; of several rates the held-out choice, or none."""
    words = []
    of = "test" if any("test" in probe.scores for probe in bank.probes) else "held-out"
    groups = by_setting(probe for probe in bank.probes if probe.chosen is not False and of in probe.scores)
    for group in groups[:6]:
        mean, _ = together([probe.scores[of].get(bank.headline, math.nan) for probe in group])
        words.append(f"{group[0].words} {mean:.1f}" if math.isfinite(mean) else f"{group[0].words} not finite")
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return f"{of} {spoken(bank.headline)}: {', '.join(words)}{more}" if words else "no score yet"
