"""What a report says about any run: state, data, warnings, arguments."""

import argparse
import importlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cli.arguments import plain
from report.runs import Record, Run, args_of
from report.tables import DASH, Cell, real

NOTES = {  # about a run: how they stand out, and what the top of the page says
    "random weights": ("loud", "Some encoders have RANDOM WEIGHTS: their numbers say nothing about a method."),
    "learned nothing": ("loud", "Some probes LEARNED NOTHING: they score as chance does."),
    "uncommitted code": ("loud", "Some runs used UNCOMMITTED CODE: their commit alone does not reproduce them."),
    "commit unknown": ("loud", "Some records do not say which commit of the code wrote them."),
    "several commits": ("loud", "Some runs were continued with another commit of the code than they began with."),
    "a subset is allowed": ("loud", "Some runs used --allow_subset: their images may be a part of the data set."),
    "demo": ("soft", "demo: the encoder or the images are this repository's demo, which says nothing about ImageNet."),
    "from scratch": ("soft", "from scratch: fine-tuning began with random weights."),
}


def badges(notes: Sequence[str], styles: Sequence[str] = ("loud", "soft")) -> list[tuple[str, str]]:
    return [(style, note) for note, (style, _) in NOTES.items() if note in notes and style in styles]


def format_argument(value: object) -> str:
    """As on a command line; a dash if it is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_argument(inner)}" for name, inner in value.items()) or DASH
    if isinstance(value, list | tuple):
        return " ".join(map(format_argument, value)) or DASH
    return DASH if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def state(run: Run) -> tuple[str, str]:
    """A badge that says whether a run is finished: (style, text)."""
    if run.kind.trains:
        total = run.args.get("epochs")
        done, unit = run.epochs[-1]["epoch"] + 1 if run.epochs else 0, "epochs"
        finished = bool(run.results) or (done == total and weights_file(run) is not None)
    else:
        started = run.started.get("encoders")
        total = len(started) if isinstance(started, list) else max(1, len(run.results))
        done, unit = len(run.results), "results"
        finished = done == total
    return ("good", "finished") if finished else ("loud", f"not finished: {done} of {total} {unit}")


def weights_file(run: Run) -> Path | None:
    """The encoder that a training run wrote."""
    paths = (run.folder / f"{run.prefix}{name}" for name in ("encoder.safetensors", "safetensors"))
    return next((path for path in paths if path.is_file()), None)


def data_key(record: Record) -> str:
    """Equal for records whose numbers may share a table: the same images (those held out to choose rates count as
    training images), classes and headline score."""
    args = args_of(record)
    trained = sum(record[name] for name in ("n_train", "n_val") if isinstance(record.get(name), int))
    subset = args.get("seed") if args.get("num_images") else None
    names = ("train_images", "test_images", "n_test", "images", "classes", "headline")
    return repr([args.get("dataset"), args.get("data_path"), trained, subset, *map(record.get, names)])


def image_count(run: Run) -> float | None:
    """Images that an analysis used; None if its encoders differ in this."""
    results = run.results if not run.kind.trains else []
    counts = {result.get("images") or (result.get("localization") or {}).get("images") for result in results}
    return counts.pop() if len(counts) == 1 else None


def encoders(run: Run) -> list[Record]:
    """The distinct records of the encoders that a run used."""
    several = run.started.get("encoders")
    records = several if isinstance(several, list) else [run.started.get("encoder")]
    known = [e for e in (*records, *(result.get("encoder") for result in run.results)) if isinstance(e, dict)]
    return [encoder for i, encoder in enumerate(known) if encoder not in known[:i]]


def describe_weights(run: Run) -> str:
    if run.program == "main_pretrain":
        return f"{run.args.get('model', 'encoder')}, trained from random weights"
    return "; ".join(f"{e.get('model')}, {e.get('source') or 'RANDOM WEIGHTS'}" for e in encoders(run)) or DASH


def notes_of(run: Run) -> list[str]:
    """The NOTES about a run: what to know before reading any of its numbers."""
    records = [record for record in (run.started, *run.results) if record]
    # the probes that an aggregation analysis read have a commit of their own
    dirty = [made.get("dirty") for record in records for made in (record, record.get("probes") or {})]
    random = any(not encoder.get("source") for encoder in encoders(run))
    models = [str(encoder.get("model")) for encoder in (*encoders(run), run.args)]
    holds = {
        "random weights": random and run.program not in ("main_pretrain", "main_finetune"),
        "uncommitted code": any(value not in (None, False) for value in dirty),
        "commit unknown": any(not record.get("commit") or record.get("dirty") is None for record in records),
        "several commits": len({str(record.get("commit")) for record in records}) > 1,
        "a subset is allowed": run.args.get("allow_subset"),
        "demo": run.args.get("dataset") == "demo" or any(model.startswith("vit_demo") for model in models),
        "from scratch": random and run.program == "main_finetune",
    }
    return [note for note, true in holds.items() if true]


def run_cell(run: Run) -> Cell:
    """A link to the run's card, with what makes its numbers doubtful."""
    unfinished = [badge for badge in [state(run)] if badge[0] == "loud"]
    return Cell(run.name, link=f"#{run.anchor}", badges=[*unfinished, *badges(notes_of(run), ["loud"])])


def wall_time(run: Run) -> Cell | None:
    """Over all encoders of an analysis."""
    seconds = [real(result.get("seconds")) for result in run.results]
    total = sum(seconds)
    return Cell(str(timedelta(seconds=round(total))), total) if seconds and total == total else None


def format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def default_arguments(program: str) -> Record:
    """The defaults of a program's arguments as a record holds them."""
    parser = importlib.import_module(f"cli.{program.removeprefix('main_')}").get_args_parser()
    return plain(argparse.Namespace(**{action.dest: action.default for action in parser._actions}))
