"""What a report says about any run: state, data, warnings, arguments, provenance."""

import argparse
import importlib
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cli.arguments import plain
from probing.results import metric_label as short_label
from report.figures import photo
from report.page import DASH, NONE, Cell, Group, Table, Text, badge, code, join, number, pairs
from report.runs import Record, Run, args_of
from util.files import sha256

PICTURES = 24  # shown per folder
REDRAWN = ("attention.png", "park.png", "heads.png", "spectra.png", "kl.png")  # the report draws these from the records
NOTES = {  # about a run: how they stand out, and what the top of the page says
    "random weights": ("loud", "Some encoders have RANDOM WEIGHTS: their numbers say nothing about a method."),
    "uncommitted code": ("loud", "Some runs used UNCOMMITTED CODE: their commit alone does not reproduce them."),
    "commit unknown": ("loud", "Some records do not say which commit of the code wrote them."),
    "several commits": ("loud", "Some runs were continued with another commit of the code than they began with."),
    "a subset is allowed": ("loud", "Some runs used --allow_subset: their images may be a part of the data set."),
    "demo": ("soft", "demo: the encoder or the images are this repository's demo, which says nothing about ImageNet."),
    "from scratch": ("soft", "from scratch: fine-tuning began with random weights."),
}


@dataclass(frozen=True)
class RunReport:
    run: Run
    data: Any  # the result of Section.read
    anchor: str  # of its card


def real(value: object) -> float:
    """A number of a record; null, which stands for NaN and infinities, is NaN. TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"expected a number, got {value!r}")
    return math.nan if value is None else float(value)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of a sample (n - 1; None for one value); NaN if any value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def group_by(items: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def metric_label(score: str) -> str:
    """Column heading of a score, with its unit."""
    counts = {"loss": "loss", "n": "images", "classes": "classes with a positive image"}
    return counts.get(score) or f"{short_label(score).replace('_', ' ')} (%)"


def score_cell(score: str, value: float, spread: float | None = None) -> Cell:
    return number(value, {"loss": 4, "n": 0, "classes": 0}.get(score, 2), spread)


def count_cell(value: int | None) -> Cell:
    return NONE if value is None else number(real(value), 0)


def format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_argument(value: object) -> str:
    """As on a command line; a dash if it is not set."""
    if isinstance(value, list | tuple):
        return " ".join(map(format_argument, value)) or DASH
    return DASH if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# state, data, weights
# ---------------------------------------------------------------------------------------------------------------------


def state(run: Run) -> tuple[bool, Markup]:
    """Whether a run is finished, and a badge that says so."""
    if run.kind.trains:
        total = run.args.get("epochs")
        done, unit = run.epochs[-1]["epoch"] + 1 if run.epochs else 0, "epochs"
        finished = bool(run.results) or (done == total and weights_file(run) is not None)
    else:
        encoders = run.started.get("encoders")
        total = len(encoders) if isinstance(encoders, list) else max(1, len(run.results))
        done, unit = len(run.results), "results"
        finished = done == total
    badges = badge("finished", "good"), badge(f"not finished: {done} of {total} {unit}", "loud")
    return finished, badges[0] if finished else badges[1]


def weights_file(run: Run) -> Path | None:
    """The encoder that a training run wrote."""
    paths = (run.folder / f"{run.prefix}{name}" for name in ("encoder.safetensors", "safetensors"))
    return next((path for path in paths if path.is_file()), None)


def data_words(record: Record, images: float | None = None) -> str:
    """Data set, numbers of images and classes; images: of an analysis."""
    args, splits = args_of(record), {"n_train": "training", "n_val": "held-out", "n_test": "test"}
    known = {name: record[name] for name in (*splits, "classes") if isinstance(record.get(name), int) and record[name]}
    counts = [f"{known[name]:,} {split}" for name, split in splits.items() if name in known]
    counts = counts if images is None else [f"{images:,.0f}"]
    words = f"{args.get('dataset')} in {args['data_path']}" if args.get("data_path") else "data set not recorded"
    words += f": {', '.join(counts)} images" if counts else ": number of images not recorded"
    return words + (f", {known['classes']} classes" if "classes" in known else "")


def data_key(record: Record) -> str:
    """Equal for records whose numbers may share a table: the same images (those held out to choose rates count as
    training images), classes and headline score."""
    args = args_of(record)
    trained = sum(record[name] for name in ("n_train", "n_val") if isinstance(record.get(name), int))
    subset = args.get("seed") if args.get("num_images") else None
    names = ("train_images", "test_images", "n_test", "images", "classes", "headline")
    return repr([args.get("dataset"), args.get("data_path"), trained, subset, *map(record.get, names)])


def same_data(reports: Iterable[RunReport]) -> list[list[RunReport]]:
    return group_by(reports, lambda report: data_key(report.run.record))


def image_count(run: Run) -> float | None:
    """Images that an analysis used; None if its encoders differ in this."""
    results = run.results if not run.kind.trains else []
    counts = {result.get("images") or (result.get("localization") or {}).get("images") for result in results}
    return counts.pop() if len(counts) == 1 else None


def encoders(run: Run) -> list[Record]:
    """The distinct records of the encoders that a run used."""
    several = run.started.get("encoders")
    records = several if isinstance(several, list) else [run.started.get("encoder")]
    known = [one for one in (*records, *(result.get("encoder") for result in run.results)) if isinstance(one, dict)]
    return [one for i, one in enumerate(known) if one not in known[:i]]


def weights_words(run: Run) -> str:
    if run.program == "main_pretrain":
        return f"{run.args.get('model', 'encoder')}, trained from random weights"
    words = (f"{one.get('model')}, {one.get('source') or 'RANDOM WEIGHTS'}" for one in encoders(run))
    return "; ".join(words) or "not recorded"


def notes(run: Run) -> list[str]:
    """The NOTES about a run: what to know before reading any of its numbers."""
    records = [record for record in (run.started, *run.results) if record]
    # the probes that an aggregation analysis read have a commit of their own
    dirty = [made.get("dirty") for record in records for made in (record, record.get("probes") or {})]
    random = any(not one.get("source") for one in encoders(run))
    models = [str(one.get("model")) for one in (*encoders(run), run.args)]
    holds = {
        "random weights": random and run.program not in ("main_pretrain", "main_finetune"),
        "uncommitted code": any(value not in (None, False) for value in dirty),
        "commit unknown": any(not record.get("commit") or record.get("dirty") is None for record in records),
        "several commits": len({str(record.get("commit")) for record in records}) > 1,
        "a subset is allowed": run.args.get("allow_subset"),
        "demo": run.args.get("dataset") == "demo" or any(model.startswith("vit_demo") for model in models),
        "from scratch": random and run.program == "main_finetune",
    }
    return [note for note in NOTES if holds[note]]


def note_badges(run: Run, styles: Sequence[str] = ("loud", "soft")) -> Markup:
    return join(badge(note, NOTES[note][0]) for note in notes(run) if NOTES[note][0] in styles)


def link(report: RunReport) -> Markup:
    return Markup('<a href="#{}">{}</a> ').format(report.anchor, report.run.name)


def run_cell(report: RunReport) -> Markup:
    """A link to the run's card, with what makes its numbers doubtful."""
    finished, words = state(report.run)
    return join([link(report), "" if finished else words, note_badges(report.run, ["loud"])])


def time_cell(run: Run) -> Cell:
    """Wall time, over all encoders of an analysis."""
    seconds = [real(result.get("seconds")) for result in run.results]
    if not seconds or not math.isfinite(sum(seconds)):
        return NONE
    return Cell(timedelta(seconds=round(sum(seconds))), sum(seconds))


# ---------------------------------------------------------------------------------------------------------------------
# arguments and provenance
# ---------------------------------------------------------------------------------------------------------------------


def default_arguments(program: str) -> Record:
    """The defaults of a program's arguments as a record holds them; {} if this code has no such program."""
    try:
        parser = importlib.import_module(f"cli.{program.removeprefix('main_')}").get_args_parser()
    except ModuleNotFoundError:
        return {}
    return plain(argparse.Namespace(**{action.dest: action.default for action in parser._actions}))


def configuration(run: Run) -> list[object]:
    """Arguments that differ from the defaults, and all of them, folded."""
    defaults, differing, arguments = default_arguments(run.program), {}, {}
    for name, value in run.args.items():
        arguments[name] = code(format_argument(value))
        if name not in defaults or defaults[name] != value:
            default = format_argument(defaults[name]) if name in defaults else "unknown today"
            differing[name] = arguments[name] + ("" if default == DASH else f" (default: {default})")
    return [
        Text("Arguments that differ from the defaults" if arguments else "Arguments are not recorded."),
        pairs(differing),
        Group("details", [pairs(arguments)], f"All {len(arguments)} arguments"),
    ]


def differences(reports: Sequence[RunReport]) -> Group | None:
    """The arguments in which runs of one table differ."""
    names = dict.fromkeys(name for report in reports for name in report.run.args)
    rows = [[name, *(format_argument(report.run.args.get(name)) for report in reports)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("output_dir", "log_dir")]
    differing = Table(["argument", *map(link, reports)], rows)
    return Group("details", [differing], "Arguments that differ between these runs") if rows else None


def provenance(run: Run) -> Table:
    """Command, commits, versions, hardware, weights, data and time."""
    record, words = run.record, {True: badge("uncommitted changes", "loud"), False: "no uncommitted changes"}
    commits = [
        join([code(one.get("commit")), " ", words.get(one.get("dirty"), badge("state unknown", "loud"))])
        for one in (run.started, *run.results)
        if one
    ]
    facts: dict[str, object] = {
        "command": code(record.get("command")),
        "commit": Markup(", then ").join(dict.fromkeys(commits)),
        "versions": format_fields(record.get("versions")),
        "hardware": format_fields({name: record.get(name) for name in ("device", "processes", "threads")}),
        "weights": Markup("; ").join(code(format_fields(encoder)) for encoder in encoders(run)) or DASH,
        "oracle": code(format_fields(record.get("oracle"))),
        "data": data_words(record, image_count(run)),
        "fingerprint of the test images": code(record.get("test_images")),
        "encoder written": f"{path.name}, sha256 {sha256(path)}" if (path := weights_file(run)) else DASH,
        "wall time": time_cell(run).text,
        "records": join([code(f"{run.folder}/{run.prefix}"), f", newest of {format_time(run.written)}"]),
    }
    return pairs(facts)


def format_fields(fields: object) -> str:
    known = fields.items() if isinstance(fields, dict) else ()
    return ", ".join(f"{name} {format_argument(value)}" for name, value in known) or DASH


def photos(paths: Sequence[Path], folder: Path | None = None) -> list[object]:
    """Figures of PNG files; a warning for each that is damaged."""
    shown: list[object] = []
    for path in paths[:PICTURES]:
        try:
            shown.append(photo(path, str(path.relative_to(folder)) if folder else path.name))
        except ValueError as error:
            shown.append(Text(str(error), "loud"))
    return [*shown, Text(f"{PICTURES} of {len(paths)} pictures are shown.") if len(paths) > PICTURES else None]


def card(report: RunReport, *blocks: object) -> Group:
    """Everything about one run: state, data, its own blocks, figures, arguments, provenance."""
    run = report.run
    facts = f"{run.program}.py on {data_words(run.record, image_count(run))}. Encoder: {weights_words(run)}."
    pictures = [path for path in run.figures() if path.name not in REDRAWN]
    details = Group("details", [*configuration(run), provenance(run)], "Configuration and provenance")
    warnings = [Text(line, "loud") for line in run.trouble]
    gallery = Group("gallery", photos(pictures, run.folder))
    title = join([f"{run.name} ", state(run)[1], note_badges(run)])
    return Group("card", [Text(facts), *warnings, *blocks, gallery, details], title, report.anchor)
