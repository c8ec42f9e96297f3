"""Linear probes in a report: every probe of results.json, averages over seeds, curves by epoch."""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from probing.results import metric_label
from report.facts import Reported, card, column_of, link, real, scores_of, shown, together, whole
from report.figures import Line, draw_curves, drawing
from report.html import DASH, NONE, Cell, Html, element, filled, folded, grid, table
from report.runs import Run


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


class Bank(NamedTuple):
    headline: str
    probes: list[Probe]
    curves: dict[str, list[Line]]
    knn: dict[str, dict[str, dict[str, float]]]


def read_bank(run: Run) -> Bank:
    """Probes of results.json; of a run that has none yet, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    if not run.results:
        headline, probes = headline_of(run), unfinished_probes(run, watched)
        return Bank(headline, probes, curves_of(run, probes, watched, headline), {})
    result = run.results[0]
    probes = []
    for name, probe in result["probes"].items():
        scores = {"test": scores_of(probe["last"])}
        if "best" in probe:
            scores["best"] = scores_of(probe["best"])
        if "val" in probe:
            scores["held-out"] = scores_of(probe["val"]["last"])
        best = (probe.get("best") or {}).get("epoch")
        at = probe.get("diverged_at")
        probes.append(Probe(
            name, probe["head"], probe["block"], probe.get("optimizer") or "lars", rate_of(probe), probe["seed"],
            probe.get("parameters"), f"epoch {at['epoch'] + 1}" if at else "no", probe.get("chosen"), scores,
            None if best is None else best + 1,
        ))  # fmt: skip
    knn = {vector: {k: scores_of(found) for k, found in of_k.items()} for vector, of_k in result.get("knn", {}).items()}
    headline = result.get("headline", "top1")
    return Bank(headline, probes, curves_of(run, probes, watched, headline), knn)


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
            Cell(f"{kind} {float(rate):g}", float(rate)) if rate else NONE, None if seed is None else int(seed),
            None, f"epoch {lost}" if lost else "no", None, scores, None,
        ))  # fmt: skip
    return probes


def told_apart(probes: Sequence[Probe]) -> dict[str, str]:
    """{probe: its setting in words}: the head, and of block, optimizer and rate what is not alike for all."""
    parts = [(probe.head, f"block {probe.block}", probe.optimizer, str(probe.rate.shown)) for probe in probes]
    several = [place == 0 or len(set(column)) > 1 for place, column in enumerate(zip(*parts, strict=True))]
    return {
        probe.name: ", ".join(word for word, told in zip(words, several, strict=True) if told)
        for probe, words in zip(probes, parts, strict=True)
    }


def by_setting(probes: Iterable[Probe]) -> list[list[Probe]]:
    groups: dict[tuple, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.setting, []).append(probe)
    return list(groups.values())


def score_columns(probes: Sequence[Probe], headline: str) -> list[tuple[str, str]]:
    """(of what, score) of all that was measured; what counts comes first. Of the best epoch, that alone; accuracy per
    class not where the classes have as many images each, so that it is the same."""
    found = dict.fromkeys(
        (of, score) for probe in probes for of, scores in probe.scores.items() for score, value in scores.items()
        if score == headline or (of != "best" and (score != "per_class" or value != scores.get("top1")))
    )  # fmt: skip
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
            cell = shown(score, *together(values)) if values else NONE
            if lost and len(values) > 1:
                cell = Cell(f"not finite in {lost} of {len(values)}", math.nan)
            cells.append(cell)
        diverged = sum(probe.diverged != "no" for probe in group)
        rows.append([
            first.head, *cells, whole(first.block), first.optimizer, first.rate, whole(len(group)), choice_of(first),
            whole(first.parameters), f"{diverged} of {len(group)}" if diverged else "none",
        ])  # fmt: skip
    return rows


def show_banks(reported: Sequence[Reported]) -> Html:
    everything = [probe for one in reported for probe in one.data.probes]
    headline = reported[0].data.headline
    columns = [key for key in score_columns(everything, headline) if key[1] != "n"]
    rows = [[link(one), *row] for one in reported for row in settings_rows(one.data, columns)]
    names = ["run", "head", *(heading(*key) for key in columns), "block (from 0)", "optimizer", "rate", "seeds",
             "choice", "parameters", "diverged"]  # fmt: skip
    told = [
        "test: of the last epoch, or of the newest where a run is not finished; mean ± standard deviation over the "
        "seeds of the probe (of a sample)."
    ]
    if any("best" in probe.scores for probe in everything):
        told.append("best: of the epoch that is best on the test set itself, hence flattering.")
    if any("held-out" in probe.scores for probe in everything):
        told.append("held-out: of training images that no probe was trained on; they choose rate and optimizer.")
    if any(unchosen(one.data.probes) for one in reported):
        told.append("Several rates or optimizers of a head, and no held-out images: whoever takes the one that is best "
                    "here has chosen it on the test set.")  # fmt: skip
    summary = table(*filled(names, rows), "Averaged over seeds") if rows else element("p", "No probe is known yet.")
    return Html(element("p", " ".join(told), class_="soft") + summary + "".join(map(bank_card, reported)))


def unchosen(probes: Sequence[Probe]) -> bool:
    """Whether a head of a block has several rates or optimizers of which nothing chooses one."""
    places = {(probe.head, probe.block) for probe in probes}
    return len(by_setting(probes)) > len(places) and all(probe.chosen is None for probe in probes)


def bank_card(one: Reported) -> Html:
    bank: Bank = one.data
    columns = score_columns(bank.probes, bank.headline)
    rows = []
    for probe in bank.probes:
        cells = [shown(s, probe.scores[of][s]) if s in probe.scores.get(of, {}) else NONE for of, s in columns]
        rows.append([probe.name, probe.head, whole(probe.block), probe.rate, probe.optimizer, whole(probe.seed), *cells,
                     whole(probe.best_epoch), choice_of(probe), whole(probe.parameters), probe.diverged])  # fmt: skip
    names = ["probe", "head", "block (from 0)", "rate", "optimizer", "seed", *(heading(*key) for key in columns),
             "best epoch (from 1)", "choice", "parameters", "diverged"]  # fmt: skip
    probes = folded(f"Every probe ({len(rows)})", table(*filled(names, rows))) if rows else None
    figures = [
        drawing(functools.partial(draw_curves, lines, ylabel), f"{ylabel} of {one.run.name}")
        for ylabel, lines in bank.curves.items()
    ]
    return card(one, grid(figures), knn_table(bank), probes)


def choice_of(probe: Probe) -> str:
    return "chosen" if probe.chosen else DASH


def curves_of(run: Run, probes: Sequence[Probe], watched: str, headline: str) -> dict[str, list[Line]]:
    """{what it is: curves}: training loss and the score that counts, by epoch from 1, as far as they are logged."""
    groups, curves = told_apart(probes), {}
    losses = [record for record in run.epochs if isinstance(record.get("train_loss"), list)]
    if losses:
        x = [record["epoch"] + 1 for record in losses]
        curves["training loss"] = [
            Line(groups[probe.name], x, [real(record["train_loss"][place]) for record in losses])
            for place, probe in enumerate(probes)
        ]
    tested = [record for record in run.epochs if isinstance(record.get(watched), dict)]
    if tested:
        x = [record["epoch"] + 1 for record in tested]
        curves[f"{metric_label(headline)} ({'held-out' if watched == 'val' else 'test'} images, %)"] = [
            Line(groups[probe.name], x, [real(r[watched].get(probe.name, {}).get(headline)) for r in tested])
            for probe in probes
        ]
    return {what: lines for what, lines in curves.items() if any(len(line.x) > 1 for line in lines)}  # else no curve


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
    """The score that counts, setting by setting: of those that held-out images have chosen, where they have."""
    words = []
    of = "test" if any("test" in probe.scores for probe in bank.probes) else "held-out"
    probes = [probe for probe in bank.probes if probe.chosen is not False and of in probe.scores]
    names, groups = told_apart(probes), by_setting(probes)
    for group in groups[:6]:
        mean, _ = together([probe.scores[of].get(bank.headline, math.nan) for probe in group])
        words.append(f"{names[group[0].name]}: {mean:.1f}" if math.isfinite(mean) else f"{names[group[0].name]}: NaN")
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return f"{of} {metric_label(bank.headline)} (%) – {'; '.join(words)}{more}" if words else "no score yet"
