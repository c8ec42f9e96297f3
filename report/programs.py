"""READERS: what the records of each program hold, as tables and curves that runs on the same images share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from attention.figures import entries, model_name, title
from attention.metrics import metric_names
from probing.results import metric_label as short_label
from probing.results import seeds_note
from report.runs import FACTS, Record, Run, badges, data_key
from report.tables import Cell, Row, cell_of, fold, group_by, mean_cell, mean_of, real, stem

AGGREGATION, TRAINING = FACTS["aggregation"], FACTS["training"]  # {quantity: column}
COUNTS = {"loss": "loss", "classes": "classes with a positive image"}
EPOCH = "epoch (from 1)"
BLOCK = "block (from 0)"
NOTHING = ("learned nothing",)
POINTS = 100  # drawn of a spectrum


class Curve(NamedTuple):
    """A line of the plot that has this title and these labels."""

    title: str
    x_label: str
    y_label: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()  # half the width of a band around it
    reference: bool = False  # thin and grey
    heading: str = ""  # under which the plot is folded

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """(x, y, spread) of the finite values."""
        spread = self.spread or [0.0] * len(self.y)
        return [(x, y, s) for x, y, s in zip(self.x, self.y, spread, strict=True) if math.isfinite(y + s)]


@dataclass(frozen=True)
class Content:
    """Measurements on one set of images; contents of equal `key` share tables and plots."""

    source: Record  # says which images
    images: float | None  # how many an analysis used
    rows: list[Row]  # of the main table
    headline: Sequence[str]  # the column that sums up a row, or the next one if that is empty
    curves: Sequence[Curve] = ()
    record: Record = field(default_factory=dict)  # for further tables of page.html
    neighbours: list[Row] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)  # about numbers in the main table: (style, text)
    notes: Sequence[str] = ()  # of report.runs.NOTES

    @property
    def key(self) -> str:
        return data_key(self.source)

    @property
    def result(self) -> list[str]:
        """The headline of each row; of tried rates, only of those that held-out images chose."""
        shown = [row.cells for row in self.rows if row.cells.get("choice") != "tried"]
        best = next((c for c in self.headline if any(cells.get(c) is not None for cells in shown)), "")
        scores = {cells["_name"]: cell_of(best, cells.get(best)).text.partition(" ±")[0] for cells in shown if best}
        return [f"{best}: " * (i == 0) + f"{name} {score}" for i, (name, score) in enumerate(scores.items())]


# ---- linear probes


def read_probes(run: Run) -> list[Content]:
    """The probes of results.json; of a run without one, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    headline = run.record.get("headline") or "top1"
    probes = run.results[0]["probes"] if run.results else unfinished_probes(run, watched)
    names = score_names([probe["last"] for probe in probes.values()], headline)
    nothing = {stem(name) for name, probe in probes.items() if probe.get("learned_nothing")}
    rows = fold([probe_row(run, names, name, probe, stem(name) in nothing) for name, probe in probes.items()])
    columns = [f"{part} {metric_label(headline)}" for part in ("test", "held-out")]
    neighbours = [
        {"run": run.cell, "_name": name, "vector": stem(name), "neighbours": int(k), **scores_of("test", scores)}
        for name, by_k in (run.record.get("knn") or {}).items()
        for k, scores in by_k.items()
    ]
    curves = epoch_curves(run, list(probes), watched, headline)
    about = {"neighbours": fold(neighbours), "remarks": remarks(run, probes), "notes": NOTHING if nothing else ()}
    return [Content(run.record, None, rows, columns, curves, **about)]


def metric_label(score: str) -> str:
    """Column heading of a score, with its unit."""
    return COUNTS.get(score) or f"{short_label(score).replace('_', ' ')} (%)"


def score_names(evaluations: Sequence[Record], headline: str) -> list[str]:
    """Scores to show, the headline first. Accuracy per class is left out where it always equals the accuracy, as it
    does with equally many images of each class."""
    names = dict.fromkeys([headline, *(name for scores in evaluations for name in scores)])
    pairs = [(real(s["top1"]), real(s["per_class"])) for s in evaluations if {"top1", "per_class"} <= s.keys()]
    same = headline != "per_class" and all(math.isclose(*pair) or pair[0] != pair[0] for pair in pairs)
    return [name for name in names if name not in ("epoch", "n", *(["per_class"] if same else []))]


def scores_of(evaluation: str, scores: Record, names: Iterable[str] | None = None) -> dict[str, object]:
    """Columns of an evaluation: None for names that it lacks."""
    names = scores if names is None else names
    values = {name: (int if name == "classes" else real)(scores[name]) for name in names if name in scores}
    return {f"{evaluation} {metric_label(name)}": values.get(name) for name in names}


def probe_row(run: Run, names: Sequence[str], name: str, probe: Record, nothing: bool) -> dict[str, object]:
    rate = next((key for key in ("lr", "blr") if probe.get(key)), None)
    best, lost = probe.get("best"), probe["diverged_at"]
    return {
        "run": run.cell,
        "_name": name,
        "head": Cell(str(probe["head"]), badges=badges(NOTHING)) if nothing else probe["head"],
        **scores_of("test", probe["last"], names),
        **scores_of("held-out", (probe.get("val") or {}).get("last") or {}, names),
        **scores_of("best", best or {}, names[:1]),
        **({} if lost is None else {"diverged": f"in epoch {lost['epoch'] + 1}"}),
        "choice": {True: "chosen", False: "tried"}.get(probe.get("chosen")),
        BLOCK: probe["block"],
        "optimizer": probe["optimizer"],
        "rate": f"{rate} {real(probe[rate]):g}" if rate else None,
        "parameters": probe["parameters"],
        "best epoch (from 1)": best["epoch"] + 1 if best else None,
        "doubt": probe.get("learned_nothing"),
    }


def unfinished_probes(run: Run, watched: str) -> dict[str, Record]:
    """{name: record as in results.json} from args.json and log.txt."""
    newest = next((r[watched] for r in reversed(run.epochs) if isinstance(r.get(watched), dict)), {})
    probes = {}
    for i, name in enumerate(run.started.get("lr") or newest):
        lost = next((r for r in run.epochs if not math.isfinite(real(r.get("train_loss", {i: 0.0})[i]))), None)
        probes[name] = dict.fromkeys(("block", "optimizer", "parameters")) | {"head": stem(name), "last": {}}
        probes[name] |= {"diverged_at": lost and {"epoch": lost["epoch"]}}
        probes[name] |= {"val": {"last": newest.get(name)}} if watched == "val" else {"last": newest.get(name, {})}
    return probes


def epoch_curves(run: Run, probes: Sequence[str], watched: str, headline: str) -> list[Curve]:
    """Training loss and headline score: the mean over the seeds of each setting, in a band of one standard deviation.
    ValueError if log.txt has other probes."""
    losses = {r["epoch"] + 1: dict(zip(probes, r["train_loss"], strict=True)) for r in run.epochs if "train_loss" in r}
    evaluated = {r["epoch"] + 1: r[watched] for r in run.epochs if isinstance(r.get(watched), dict)}
    scores = {epoch: {name: s.get(headline) for name, s in of_all.items()} for epoch, of_all in evaluated.items()}
    label = f"{'held-out' if watched == 'val' else watched} {metric_label(headline)}"
    curves = []
    for name, by_epoch in {"training loss": losses, label: scores}.items():
        if any(values.keys() != set(probes) for values in by_epoch.values()):
            raise ValueError("log.txt is of other probes")
        for same in group_by(probes, stem) if len(by_epoch) > 1 else []:
            means = [mean_of([real(values[probe]) for probe in same]) for values in by_epoch.values()]
            spread = [mean.std or 0.0 for mean in means] if len(same) > 1 else []
            values, line = [mean.mean for mean in means], f"{run.name}: {stem(same[0])}"
            curves.append(Curve(name, EPOCH, name, line, list(by_epoch), values, spread))
    return curves


def remarks(run: Run, probes: Mapping[str, Record]) -> list[tuple[str, str]]:
    """What varies between the seeds of a run, and why its scores may mislead."""
    settings, lines = {stem(name) for name in probes}, []
    if len(settings) < len(probes):
        lines.append(("soft", f"{run.name}: {seeds_note(run.record)}."))
    heads = {(probe["head"], probe["block"]) for probe in probes.values()}
    if len(settings) > len(heads) and all(probe.get("chosen") is None for probe in probes.values()):
        text = "several rates or optimizers, no held-out images: the best row is chosen on the test images."
        lines.append(("loud", f"{run.name}: {text}"))
    scored, n_test = {int(p["last"]["n"]) for p in probes.values() if "n" in p["last"]}, run.record.get("n_test")
    if scored and n_test is not None and scored != {n_test}:
        counts = " or ".join(f"{n:,}" for n in sorted(scored))
        lines.append(("loud", f"{run.name}: only {counts} of {int(n_test):,} test images were scored."))
    return lines


# ---- analyses


def read_attention(run: Run) -> list[Content]:
    """The results of the encoders in the order of --label."""
    order = run.args.get("label") or []
    results = sorted(run.results, key=lambda r: order.index(r["label"]) if r["label"] in order else len(order))
    return [read_encoder(run, result) for result in results]


def read_encoder(run: Run, result: Record) -> Content:
    label, metrics, record = str(result["label"]), result["metrics"], {"args": run.args, **result}
    drawn = {name: m for name, m in metrics.items() if any(math.isfinite(real(e["mean"])) for e in entries(m)[1])}
    first = [name for name in metric_names(["paper"]) if name in drawn] or list(drawn)[:4]
    means = {name: mean_of([real(block["mean"]) for block in m["blocks"]]).mean for name, m in metrics.items()}
    curves: list[Curve] = []
    for name, m in drawn.items():
        heading = "" if name in first else "Other measurements over the blocks"
        curves += [curve._replace(heading=heading) for curve in block_curves((title(name), BLOCK), label, m)]
        if m.get("axis") in ("frequency", "rank"):
            curves += profiles(f"{title(name)}, {label}", m, result["patches"])
    columns = {f"{title(name)} ({drawn[name].get('unit')}), mean of blocks": means[name] for name in first}
    encoder = Cell(label, link=f"#{run.anchor}", badges=badges(run.notes, ["loud"]))
    vit = f"{model_name(result['encoder']['model'])}, {result['input_size']} px"
    row = {"encoder": encoder, "_name": label, "run": run.name, "ViT": vit, **columns}
    more = {"run": run.name, "means": means, "shown": first}
    return Content(record, real(result["images"]), [Row(row)], list(columns), curves, {**result, **more})


def block_curves(axes: tuple[str, str], label: str, metric: Record) -> list[Curve]:
    depths, measured = entries(metric)
    axes = *axes, str(metric.get("unit"))
    lines = [Curve(*axes, label, depths, *([real(entry.get(key)) for entry in measured] for key in ("mean", "std")))]
    if uniform := metric.get("uniform"):
        level = real(uniform["value"])
        name = f"uniform attention, {uniform['name']} = {level:.4g}"
        lines.append(Curve(*axes, name, depths, [level] * len(depths), reference=True))
    return lines


def profiles(name: str, metric: Record, patches: int) -> list[Curve]:
    """A line per depth, over rank or over frequency: that of the grid's diagonal, as a share of pi."""
    lines, axes = [], (name, metric["axis"], str(metric.get("unit")))
    for depth, entry in zip(*entries(metric), strict=True):
        values = [real(value) for value in entry[f"mean_per_{metric['axis']}"]]
        step, unit = max(1, len(values) // POINTS), 2 / math.isqrt(patches) if metric["axis"] == "frequency" else 1
        x = [i * unit for i in range(len(values))]
        lines.append(Curve(*axes, f"block {depth}", x[::step], values[::step], heading="Spectra"))
    return lines


def read_aggregation(run: Run) -> list[Content]:
    """aggregation.json; nothing before the end. ValueError for a matrix without a row and a column per rule."""
    contents = []
    for result in run.results:
        rules, matrices = result["rules"], result.get("matrices", {})
        if any([len(line) for line in m["mean"]] != [len(rules)] * len(rules) for m in matrices.values()):
            raise ValueError(f"a matrix does not have a row and a column for each of {len(rules)} rules")
        maps = (result.get("localization") or {}).get("maps", {})
        rows = fold([rule_row(run, rule, maps.get(rule["name"], {})) for rule in rules])
        columns, record = list(AGGREGATION.values())[1:3], {**result, "run": run.cell}
        contents.append(Content(run.record, run.images, rows, columns, record=record))
    return contents


def rule_row(run: Run, rule: Record, boxes: Record) -> dict[str, object]:
    """A rule of one seed, or one without parameters, whose accuracy is over all of its probes."""
    scores, entropy = list(rule["scores"].values()), rule.get("entropy") or {}
    top1, lost = [real(score.get("top1")) for score in scores], [bool(score.get("diverged_at")) for score in scores]
    measured = {quantity: real(value) for quantity, value in boxes.items() if quantity in AGGREGATION}
    measured |= {"aggregation_entropy": real(entropy["mean"])} if entropy else {}
    if rule.get("probe"):
        measured["top1"] = top1[0]
    elif len({(score["blr"], score["optimizer"]) for score in scores}) == 1:
        measured["top1"] = mean_cell(top1, sum(lost))
    return {
        "run": run.cell,
        "_name": rule["name"],
        "rule": stem(rule["name"]),
        **{heading: measured.get(quantity) for quantity, heading in AGGREGATION.items()},
        **({"diverged": "yes"} if rule.get("probe") and any(lost) else {}),
        BLOCK: rule["block"],
        "finite in images": entropy.get("images"),
        "notes": "; ".join(rule["notes"]) or None,
    }


# ---- pretraining and fine-tuning


def read_training(run: Run) -> list[Content]:
    """log.txt; without it, the last epoch of results.json."""
    values: dict[str, dict[int, float]] = {}  # {quantity: {epoch from 1: value}}
    for record in run.epochs or [result["last"] for result in run.results]:
        scores = scores_of("test", record.get("test", {}), score_names([record.get("test", {})], "top1"))
        measured = {name: value for name, value in scores.items() if value is not None}
        measured |= {TRAINING.get(name, name): v for name, v in record.items() if name not in ("epoch", "test")}
        for name, value in measured.items():
            values.setdefault(name, {})[record["epoch"] + 1] = real(value)
    best = [value for value in values.get("test top-1 (%)", {}).values() if math.isfinite(value)]
    row = {"run": run.cell, "_name": run.name, "epochs": max(map(max, values.values()), default=None)}
    row |= {name: [*by_epoch.values()][-1] for name, by_epoch in values.items()}
    curves = [
        Curve(name, EPOCH, name, run.name, list(by_epoch), list(by_epoch.values()))
        for name, by_epoch in values.items()
        if name.startswith("test") or name in (TRAINING["loss"], TRAINING["lr"])
    ]
    rows = [Row({**row, "best test top-1 (%)": max(best, default=None)})]
    return [Content(run.record, None, rows, ["test top-1 (%)", TRAINING["loss"]], curves)]


READERS = {  # by program; they raise a KeyError, TypeError, ... for a damaged record
    "main_linprobe": read_probes,
    "main_analyze_attention": read_attention,
    "main_analyze_aggregation": read_aggregation,
    "main_finetune": read_training,
    "main_pretrain": read_training,
}
