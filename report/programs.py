"""What the records of each program hold, as tables and curves that runs on the same images share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attention.figures import entries, model_name, title
from attention.metrics import metric_names
from probing.results import metric_label as short_label
from probing.results import seeds_note
from report.facts import badges, data_key, describe_data, image_count, notes_of, run_cell
from report.plots import Axes, Line
from report.runs import Record, Run
from report.tables import Cell, Cells, Mean, Row, cell_of, fold, group_by, mean_cell, mean_of, real, stem

AGGREGATION = {
    "top1": "top-1 (%)",
    "aggregation_entropy": "entropy (nats)",
    "maxboxaccv2": "MaxBoxAccV2 (%)",
    "maxboxacc": "MaxBoxAcc (%)",
}
TRAINING = {
    "loss": "training loss",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "share of time waiting for data",
    "memory_gib": "memory (GiB)",
}
POINTS = 100  # drawn of a spectrum


@dataclass(frozen=True)
class Content:
    """Measurements on one set of images; contents of equal `key` share tables and plots."""

    key: str
    data: str  # the images
    rows: Sequence[Row | Cells]  # of the main table
    result: list[str]  # the main numbers, a few words each
    curves: Mapping[str, Mapping[Axes, Sequence[Line]]] = field(default_factory=dict)  # by title; "" is not folded
    record: Record = field(default_factory=dict)  # for the tables of page.html
    neighbours: list[Row] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)  # about numbers in the main table: (style, text)
    notes: Sequence[str] = ()  # of report.facts.NOTES


# ---------------------------------------------------------------------------------------------------------------------
# linear probes
# ---------------------------------------------------------------------------------------------------------------------


def read_probes(run: Run) -> list[Content]:
    """The probes of results.json; of a run without one, those of its newest evaluation."""
    watched = "val" if any("val" in record for record in run.epochs) else "test"
    headline = run.record.get("headline") or "top1"
    probes = run.results[0]["probes"] if run.results else unfinished_probes(run, watched)
    shown = score_names([probe["last"] for probe in probes.values()], headline)
    rows = fold([probe_row(run, shown, name, probe) for name, probe in probes.items()])
    settings, labels = group_by(probes, stem), short_names(probes)
    result, notes, lines = [], [], remarks(run, probes)
    for i, names in enumerate(settings):
        cells = rows[i].cells
        score = cells.get(f"test {metric_label(headline)}") or cells.get(f"held-out {metric_label(headline)}")
        if score is not None and cells.get("choice") != "tried":
            result.append(f"{labels[names[0]]}: {score.text if isinstance(score, Cell) else f'{score.mean:.2f}'}")
        if nothing := [probes[name]["learned_nothing"] for name in names if probes[name].get("learned_nothing")]:
            notes = ["learned nothing"]
            lines.append(("loud", f"{run.name}, {labels[names[0]]}: {nothing[0]}."))
            rows[i] = Row({**cells, "head": Cell(str(cells["head"]), badges=badges(notes))}, rows[i].children)
    neighbours = [
        {"run": run_cell(run), "name": name, "vector": stem(name), "neighbours": int(k)}
        | scores_of("test", scores, ["top1", "top5"])
        | {"seeds": seed_of(name)}
        for name, by_k in (run.record.get("knn") or {}).items()
        for k, scores in by_k.items()
    ]
    return [
        Content(
            key=data_key(run.record),
            data=describe_data(run.record),
            rows=rows,
            result=result,
            curves={"": epoch_curves(run, probes, watched, headline) | score_by_size(run, rows, labels, headline)},
            neighbours=fold(neighbours),
            remarks=lines,
            notes=notes,
        )
    ]


def metric_label(score: str) -> str:
    """Column heading of a score, with its unit."""
    counts = {"loss": "loss", "classes": "classes with a positive image"}
    return counts.get(score) or f"{short_label(score).replace('_', ' ')} (%)"


def scores_of(evaluation: str, scores: Record, names: Sequence[str]) -> dict[str, object]:
    """Columns of an evaluation."""
    values = {name: scores[name] if name == "classes" else real(scores[name]) for name in names if name in scores}
    return {f"{evaluation} {metric_label(name)}": values.get(name) for name in names}


def score_names(evaluations: Sequence[Record], headline: str) -> list[str]:
    """Scores to show, the headline first. Accuracy per class is left out where it always equals the accuracy, as it
    does with equally many images of each class."""
    names = dict.fromkeys(name for scores in evaluations for name in scores if name not in ("epoch", "n"))
    pairs = [(real(s["top1"]), real(s["per_class"])) for s in evaluations if {"top1", "per_class"} <= s.keys()]
    if headline != "per_class" and all(math.isclose(*pair) or pair[0] != pair[0] for pair in pairs):
        names.pop("per_class", None)
    return [headline, *(name for name in names if name != headline)]


def seed_of(name: str) -> str | None:
    return f"seed {name.rpartition('/seed')[2]}" if stem(name) != name else None


def probe_row(run: Run, shown: Sequence[str], name: str, probe: Record) -> dict[str, object]:
    rate = next((key for key in ("lr", "blr") if probe.get(key) is not None), None)
    held_out, best = (probe.get("val") or {}).get("last") or {}, probe.get("best")
    lost = probe["diverged_at"]
    return {
        "run": run_cell(run),
        "name": name,
        "head": probe["head"],
        **scores_of("test", probe["last"], shown),
        **scores_of("held-out", held_out, shown),
        **scores_of("best", best or {}, shown[:1]),
        "seeds": seed_of(name),
        **({} if lost is None else {"diverged": f"in epoch {lost['epoch'] + 1}"}),
        "choice": {True: "chosen", False: "tried"}.get(probe.get("chosen")),
        "block (from 0)": probe["block"],
        "optimizer": probe["optimizer"],
        "rate": f"{rate} {real(probe[rate]):g}" if rate else None,
        "parameters": probe["parameters"],
        "best epoch (from 1)": best["epoch"] + 1 if best else None,
    }


def unfinished_probes(run: Run, watched: str) -> dict[str, Record]:
    """{name: record as in results.json} from args.json and log.txt."""
    newest = next((r[watched] for r in reversed(run.epochs) if isinstance(r.get(watched), dict)), {})
    unknown = dict.fromkeys(("block", "optimizer", "parameters", "diverged_at"))
    probes = {}
    for i, name in enumerate(run.started.get("lr") or newest):
        last, test = newest.get(name, {}), watched == "test"
        probes[name] = {
            **unknown,
            "head": stem(name),
            "last": last if test else {},
            "val": {"last": {} if test else last},
        }
        lost = [r for r in run.epochs if not math.isfinite(real(r.get("train_loss", {i: 0.0})[i]))]
        if lost:
            probes[name]["diverged_at"] = {"epoch": lost[0]["epoch"]}
    return probes


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{probe: its head, and what else of its name, without the seed, is not the same for all}."""
    split = {name: stem(name).split("/") for name in names}
    columns = list(zip(*split.values(), strict=False))
    return {
        name: ", ".join(part for i, part in enumerate(parts) if i == 0 or i >= len(columns) or len({*columns[i]}) > 1)
        for name, parts in split.items()
    }


def epoch_curves(run: Run, probes: Iterable[str], watched: str, headline: str) -> dict[Axes, list[Line]]:
    """Training loss and headline score: the mean over the seeds of each setting, in a band of one standard deviation.
    ValueError if log.txt has other probes."""
    labels = short_names(probes)
    label = f"{'held-out' if watched == 'val' else watched} {metric_label(headline)}"
    measured: dict[str, dict[int, Mapping[str, float]]] = {"training loss": {}, label: {}}
    for record in run.epochs:
        epoch = record["epoch"] + 1
        if "train_loss" in record:
            measured["training loss"][epoch] = dict(zip(labels, map(real, record["train_loss"]), strict=True))
        if isinstance(record.get(watched), dict):
            measured[label][epoch] = {name: real(s.get(headline)) for name, s in record[watched].items()}
    curves: dict[Axes, list[Line]] = {}
    for name, by_epoch in measured.items():
        if any(values.keys() != labels.keys() for values in by_epoch.values()):
            raise ValueError("log.txt is of other probes")
        for names in group_by(labels, stem) if len(by_epoch) > 1 else []:
            means = [mean_of([values[probe] for probe in names]) for values in by_epoch.values()]
            spread = [mean.std or 0.0 for mean in means] if len(names) > 1 else []
            line = Line(f"{run.name}: {labels[names[0]]}", list(by_epoch), [mean.mean for mean in means], spread)
            curves.setdefault(Axes(name, "epoch (from 1)", name), []).append(line)
    return curves


def score_by_size(run: Run, rows: Sequence[Row], labels: Mapping[str, str], headline: str) -> dict[Axes, list[Line]]:
    """A point for each setting: parameters of the head (log10) and the mean score with its deviation over seeds."""
    label, names = f"test {metric_label(headline)}", dict.fromkeys(labels.values())
    points = [
        Line(f"{run.name}: {name}", [math.log10(row.cells["parameters"])], [score.mean], [score.std or 0.0])
        for row, name in zip(rows, names, strict=False)
        if isinstance(score := row.cells.get(label), Mean) and row.cells.get("parameters")
    ]
    return {Axes(f"{label} against parameters", "parameters of the head, log10", label): points} if points else {}


def remarks(run: Run, probes: Mapping[str, Record]) -> list[tuple[str, str]]:
    """What varies between the seeds of a run, and why its scores may mislead."""
    settings, lines = len({stem(name) for name in probes}), []
    if settings < len(probes):
        lines.append(("soft", f"{run.name}: {seeds_note(run.record)}."))
    heads = {(probe["head"], probe["block"]) for probe in probes.values()}
    if settings > len(heads) and all(probe.get("chosen") is None for probe in probes.values()):
        text = "several rates or optimizers, no held-out images: the best row is chosen on the test images."
        lines.append(("loud", f"{run.name}: {text}"))
    scored = {int(probe["last"]["n"]) for probe in probes.values() if "n" in probe["last"]}
    n_test = run.record.get("n_test")
    if scored and n_test is not None and scored != {n_test}:
        counts = " or ".join(f"{n:,}" for n in sorted(scored))
        lines.append(("loud", f"{run.name}: only {counts} of {int(n_test):,} test images were scored."))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# analyses
# ---------------------------------------------------------------------------------------------------------------------


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
    curves: dict[str, dict[Axes, list[Line]]] = {"": {}, "Other measurements over the blocks": {}, "Spectra": {}}
    for name, m in drawn.items():
        unit, shown = str(m.get("unit")), "" if name in first else "Other measurements over the blocks"
        curves[shown][Axes(title(name), "block (from 0)", unit)] = block_curves(label, m)
        if m.get("axis") in ("frequency", "rank"):
            curves["Spectra"][Axes(f"{title(name)}, {label}", m["axis"], unit)] = profiles(m, result["patches"])
    encoder = Cell(label, link=f"#{run.anchor}", badges=badges(notes_of(run), ["loud"]))
    row = {"encoder": encoder, "run": run.name, "ViT": f"{model_name(result)}, {result['input_size']} px"}
    return Content(
        key=data_key(record),
        data=describe_data(record, real(result["images"])),
        rows=[row | {f"{title(name)} ({drawn[name].get('unit')}), mean of blocks": means[name] for name in first}],
        result=[f"{label}: {title(name)} {means[name]:.4g}" for name in first[:1]],
        curves=curves,
        record={**result, "run": run.name, "means": means, "shown": first},
    )


def block_curves(label: str, metric: Record) -> list[Line]:
    depths, measured = entries(metric)
    lines = [Line(label, depths, *([real(entry.get(key)) for entry in measured] for key in ("mean", "std")))]
    if uniform := metric.get("uniform"):
        level = [real(uniform["value"])] * len(depths)
        lines.append(Line(f"uniform attention, {uniform['name']} = {level[0]:.4g}", depths, level, reference=True))
    return lines


def profiles(metric: Record, patches: int) -> list[Line]:
    """A line per depth, over rank or over frequency: that of the grid's diagonal, as a share of pi."""
    lines = []
    for depth, entry in zip(*entries(metric), strict=True):
        values = [real(value) for value in entry[f"mean_per_{metric['axis']}"]]
        step, unit = max(1, len(values) // POINTS), 2 / math.isqrt(patches) if metric["axis"] == "frequency" else 1
        lines.append(Line(f"block {depth}", [i * unit for i in range(len(values))][::step], values[::step]))
    return lines


def read_aggregation(run: Run) -> list[Content]:
    """aggregation.json; nothing before the end. ValueError for a matrix without a row and a column per rule."""
    contents = []
    for result in run.results:
        rules, over_seeds = result["rules"], result["over_seeds"]
        if any(
            [len(line) for line in m["mean"]] != [len(rules)] * len(rules) for m in result.get("matrices", {}).values()
        ):
            raise ValueError(f"a matrix does not have a row and a column for each of {len(rules)} rules")
        quantity = next(
            (q for q in ("aggregation_entropy", "maxboxaccv2") if any(q in s for s in over_seeds.values())), ""
        )
        means = {name: real(s[quantity]["mean"]) for name, s in over_seeds.items() if quantity in s}
        contents.append(
            Content(
                key=data_key(run.record),
                data=describe_data(run.record, image_count(run)),
                rows=[rule_row(run, name, summaries, result) for name, summaries in over_seeds.items()],
                result=[f"{name}: {mean:.2f} {AGGREGATION[quantity]}" for name, mean in means.items()],
                record={**result, "run": run_cell(run)},
            )
        )
    return contents


def rule_row(run: Run, name: str, summaries: Record, result: Record) -> Row:
    """A rule, with those of single seeds under it; no mean where the probe of a seed diverged."""
    rules = [rule for rule in result["rules"] if stem(rule["name"]) == name]
    lost = [bool(score.get("diverged_at")) for rule in rules for score in rule["scores"].values()]
    cells: dict[str, object] = {"run": run_cell(run), "rule": name}
    seeds = max((summary["n"] for summary in summaries.values()), default=None)
    for quantity, heading in AGGREGATION.items():
        cells[heading] = None
        if summary := summaries.get(quantity):
            cells[heading] = mean = cell_of(heading, Mean(real(summary["mean"]), summary["std"], summary["n"]))
            if any(lost) and (quantity == "top1" or any(rule.get("probe") for rule in rules)):
                cells[heading] = mean_cell([0.0] * len(lost), sum(lost))
            elif summary["n"] != seeds:
                cells[heading] = mean._replace(text=f"{mean.text} (n = {summary['n']})")
    cells["seeds"] = seeds
    maps, children = (result.get("localization") or {}).get("maps", {}), []
    for rule in rules:
        entropy, boxes, scores = rule.get("entropy") or {}, maps.get(rule["name"], {}), rule["scores"].values()
        children.append(
            {"run": rule["name"], "rule": rule["head"]}
            | ({AGGREGATION["top1"]: mean_of([real(score.get("top1")) for score in scores])} if scores else {})
            | ({AGGREGATION["aggregation_entropy"]: Mean(real(entropy["mean"]), entropy["std"], 1)} if entropy else {})
            | {AGGREGATION[quantity]: real(value) for quantity, value in boxes.items() if quantity in AGGREGATION}
            | {"seeds": None if rule["seed"] is None else f"seed {rule['seed']}", "block (from 0)": rule["block"]}
            | {"finite in images": entropy.get("images"), "notes": "; ".join(rule["notes"]) or None}
        )
    return Row(cells, children)


# ---------------------------------------------------------------------------------------------------------------------
# pretraining and fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def read_training(run: Run) -> list[Content]:
    """log.txt; without it, the last epoch of results.json."""
    values: dict[str, dict[int, float]] = {}  # {quantity: {epoch from 1: value}}
    for record in run.epochs or [result["last"] for result in run.results]:
        scores = {
            f"test {metric_label(name)}": v for name, v in record.get("test", {}).items() if name not in ("n", "epoch")
        }
        named = {TRAINING.get(name, name): v for name, v in record.items() if name not in ("epoch", "test")}
        for name, value in {**named, **scores}.items():
            values.setdefault(name, {})[record["epoch"] + 1] = real(value)
    last = {name: [*by_epoch.values()][-1] for name, by_epoch in values.items()}
    best = [value for value in values.get("test top-1 (%)", {}).values() if math.isfinite(value)]
    epochs = max((max(by_epoch) for by_epoch in values.values()), default=None)
    row = {"run": run_cell(run), "epochs": epochs, **last, "best test top-1 (%)": max(best, default=None)}
    curves = {
        Axes(name, "epoch (from 1)", name): [Line(run.name, list(by_epoch), list(by_epoch.values()))]
        for name, by_epoch in values.items()
        if name.startswith("test") or name in (TRAINING["loss"], TRAINING["lr"])
    }
    result = [f"{name} {last[name]:.4g}" for name in ("test top-1 (%)", TRAINING["loss"]) if name in last]
    return [Content(data_key(run.record), describe_data(run.record), [row], result, {"": curves})]


READERS = {  # by program; they raise a KeyError, TypeError, ... for a damaged record
    "main_linprobe": read_probes,
    "main_analyze_attention": read_attention,
    "main_analyze_aggregation": read_aggregation,
    "main_finetune": read_training,
    "main_pretrain": read_training,
}
