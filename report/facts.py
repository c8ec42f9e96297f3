"""What a report says of any run: how far it came, on what it was measured, what was asked, where it comes from."""

import argparse
import functools
import importlib
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from cli.arguments import plain
from encoders.load import safetensors_metadata
from probing.results import metric_label
from report.figures import photo
from report.html import DASH, NONE, Cell, Html, badge, element, folded, gallery, number, pairs, warning
from report.runs import Run, is_json
from util.files import sha256

RANDOM, DIRTY, DEMO = "random weights", "uncommitted code", "demo"  # badges
PICTURES = 24  # of a folder
REDRAWN = ("attention.png", "park.png", "heads.png", "spectra.png", "kl.png")  # from their records, by the report


class Reported(NamedTuple):
    """A run of the report, and what its section has read of its records."""

    run: Run
    data: Any
    anchor: str  # of its card


def real(value: object) -> float:
    """A number of a record: null, which stands for what is not finite, is NaN. TypeError for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# in words
# ---------------------------------------------------------------------------------------------------------------------


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: object) -> str:
    """Of a run, as far as it recorded one."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "not recorded"
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.1f} s"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def state(run: Run) -> tuple[bool, str]:
    """Whether a run is finished, and that in words."""
    if run.kind.trains:
        done, total = len(run.epochs) and run.epochs[-1]["epoch"] + 1, run.args.get("epochs")
        encoder = weights_file(run) is not None  # what came out, too: a record may have been kept without the result
        if run.results or (encoder and (done == total or not is_json(run.kind))):
            return True, "finished"
        lacking = f", but there is no {run.kind.result}" if done == total else ""
        return False, f"not finished: {done} of {total or 'an unknown number of'} epochs are logged{lacking}"
    if run.kind.several:
        asked = run.asked.get("encoders")
        total = len(asked) if isinstance(asked, list) else len(run.results)
        if run.results and len(run.results) >= total:
            return True, "finished"
        return False, f"not finished: {len(run.results)} of {total} encoders have results"
    return (True, "finished") if run.results else (False, f"not finished: there is no {run.kind.result} yet")


def state_badge(run: Run) -> Html:
    ended, words = state(run)
    return badge(words, "good" if ended else "loud")


def weights_file(run: Run) -> Path | None:
    """The encoder that a training left."""
    names = (run.file("encoder.safetensors"), run.file("safetensors"))
    return next((path for path in names if path.is_file()), None)


def data_words(run: Run, images: float | None = None) -> str:
    """Data set and number of images; images: of an analysis, whose record of the run has none."""
    kind, path = run.args.get("dataset"), run.args.get("data_path")
    counts = [f"{run.asked[key]:,} {word}" for key, word in
              (("n_train", "training"), ("n_val", "held-out"), ("n_test", "test"))
              if isinstance(run.asked.get(key), int) and (run.asked[key] or key != "n_val")]  # fmt: skip
    words = f"{', '.join(counts)} images" if counts else "number of images not recorded"
    if images is not None:
        words = f"{images:,.0f} images"
    where = f"{kind} in {path}" if kind and path else "data set not recorded"
    classes = f", {run.asked['classes']} classes" if isinstance(run.asked.get("classes"), int) else ""
    return f"{where}: {words}{classes}"


def encoders(run: Run) -> list[dict[str, Any]]:
    """The records of the encoders whose weights a run took."""
    several = run.asked.get("encoders")
    found = several if isinstance(several, list) else [run.asked.get("encoder")]
    found = [*found, *(result.get("encoder") for result in run.results)]
    known = [one for one in found if isinstance(one, dict)]
    return [one for place, one in enumerate(known) if one not in known[:place]]


def weights_words(run: Run) -> str:
    if run.program == "main_pretrain":
        return f"{run.args.get('model', 'encoder')}, trained from random weights"
    words = [f"{one.get('model')}, {one.get('source') or 'RANDOM WEIGHTS'}" for one in encoders(run)]
    return "; ".join(words) or "not recorded"


def notes(run: Run) -> list[Html]:
    """Badges: what a reader has to know before any number."""
    found = []
    if run.program != "main_pretrain" and any(not one.get("source") for one in encoders(run)):
        found.append(badge(RANDOM, "loud"))
    dirty = run.asked.get("dirty")
    if dirty is None:
        found.append(badge("commit unknown", "loud"))
    elif dirty:
        found.append(badge(DIRTY, "loud"))
    path = run.args.get("data_path")
    if any(str(one.get("model")).startswith("vit_demo") for one in [*encoders(run), run.args]) or (
        path and (Path(str(path)) / "demo.json").exists()
    ):
        found.append(badge(DEMO))
    if run.args.get("allow_subset"):
        found.append(badge("a subset is allowed"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what was asked, and where it comes from
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def defaults(program: str) -> dict[str, Any] | None:
    """Of the arguments of a program, as a record holds them; None for a program that this checkout does not have."""
    try:
        module = importlib.import_module(program)
    except ModuleNotFoundError as error:
        if error.name != program:
            raise
        return None
    parser = module.get_args_parser()
    known = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    return plain(argparse.Namespace(**known))


def configuration(run: Run) -> Html:
    """Arguments that differ from the defaults, and all of them folded away."""
    if not run.args:
        return element("p", "Its arguments are not recorded here.", class_="soft")
    everything = {name: element("code", spelled(value)) for name, value in run.args.items()}
    known = defaults(run.program)
    if known is None:
        told = f"{run.program}.py is not part of this code, so that its defaults are not known."
        return Html(element("p", told, class_="soft") + folded("All arguments", pairs(everything)))
    differing = {
        name: [element("code", spelled(value)),
               element("span", " (unknown today)" if name not in known else
                       "" if spelled(known[name]) == DASH else f" (default: {spelled(known[name])})", class_="soft")]
        for name, value in run.args.items() if name not in known or known[name] != value
    }  # fmt: skip
    title = f"All {len(everything)} arguments"
    return Html(element("h4", "Arguments that differ from the defaults") + pairs(differing)
                + folded(title, pairs(everything)))  # fmt: skip


def spelled(value: object) -> str:
    """An argument as a command line has it; a dash where it is not set."""
    if isinstance(value, list | tuple):
        return " ".join(map(spelled, value)) or DASH
    return DASH if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def provenance(run: Run) -> Html:
    """Command, commit, versions, hardware, weights, data and time."""
    asked, dirty = run.asked, run.asked.get("dirty")
    told = {True: badge("with changes that no commit has", "loud"), False: "unchanged", None: "state unknown"}
    facts: dict[str, object] = {
        "command": element("code", asked.get("command") or "not recorded"),
        "commit": [element("code", asked.get("commit") or "unknown"), " ",
                   told.get(dirty, "state unknown") if isinstance(dirty, bool | None) else "state unknown"],
    }  # fmt: skip
    versions = asked.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["hardware"] = (f"{asked.get('device', 'not recorded')}; processes: {asked.get('processes', 'not recorded')}, "
                         f"threads: {asked.get('threads', 'not recorded')}")  # fmt: skip
    for one in encoders(run):
        source = one.get("source") or badge(RANDOM, "loud")
        words = f", family {one.get('family')}, sha256 " if one.get("source") else ""
        key = "weights" if "weights" not in facts else f"weights ({len(facts)})"
        facts[key] = [f"{one.get('model')}, ", source, words, element("code", one.get("sha256") or "none")]
    if isinstance(asked.get("oracle"), dict):
        facts["oracle"] = [f"{asked['oracle'].get('source')}, sha256 ", element("code", asked["oracle"].get("sha256"))]
    facts["data"] = data_words(run, images_of(run))
    if asked.get("test_images"):
        facts["fingerprint of the test images"] = element("code", asked["test_images"])
    if (path := weights_file(run)) is not None:
        facts["encoder that it made"] = trained_weights(path)
    facts["wall time"] = duration(wall_time(run))
    facts["records"] = [element("code", f"{run.folder}/{run.prefix}"), f", newest of {moment(run.written)}"]
    return Html(element("h4", "Where it comes from") + pairs(facts))


def images_of(run: Run) -> float | None:
    """Of an analysis."""
    if run.kind.trains:
        return None
    found = [result.get("images") or (result.get("localization") or {}).get("images") for result in run.results]
    counts = set(found) - {None, 0}
    return counts.pop() if len(counts) == 1 else None


def wall_time(run: Run) -> float | None:
    """Seconds, of all encoders of an analysis; None where a record of them is missing."""
    seconds = [result.get("seconds") for result in run.results]
    known = [one for one in seconds if isinstance(one, int | float)]
    return sum(known) if known and len(known) == len(seconds) else None


def trained_weights(path: Path) -> object:
    try:
        facts = ", ".join(f"{name} {value}" for name, value in sorted(safetensors_metadata(path).items()))
    except (OSError, SafetensorError) as error:
        return badge(f"{path.name} cannot be read: {error}", "loud")
    return [f"{path.name} ({facts or 'no metadata'}), sha256 ", element("code", sha256(path))]


# ---------------------------------------------------------------------------------------------------------------------
# cells of tables
# ---------------------------------------------------------------------------------------------------------------------


def column_of(score: str) -> str:
    """Heading of a score, with its unit."""
    return "loss" if score == "loss" else "images" if score == "n" else f"{metric_label(score)} (%)"


def shown(score: str, value: float, spread: float | None = None) -> Cell:
    return number(value, {"loss": 4, "n": 0}.get(score, 2), spread)


def scores_of(record: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation, without its epoch."""
    return {name: real(value) for name, value in record.items() if name != "epoch"}


def whole(value: int | None) -> Cell:
    """A count, as recorded."""
    return NONE if value is None else Cell(f"{value:,}" if isinstance(value, int) else value, real(value))


def small(value: float) -> Cell:
    """A number of any size, to four digits."""
    return Cell(f"{value:.4g}", value) if math.isfinite(value) else Cell("not finite", math.nan)


def together(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (of a sample); NaN where one of the values is."""
    if not all(map(math.isfinite, values)):
        return math.nan, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def link(one: Reported) -> Html:
    return element("a", one.run.name, href=f"#{one.anchor}")


# ---------------------------------------------------------------------------------------------------------------------
# a card
# ---------------------------------------------------------------------------------------------------------------------


def photos(paths: Iterable[Path], folder: Path | None = None) -> list[Html]:
    """Figures of files, and what cannot be shown of them in words."""
    paths, shown = list(paths), []
    for path in paths[:PICTURES]:
        try:
            shown.append(photo(path, str(path.relative_to(folder)) if folder else path.name))
        except ValueError as error:
            shown.append(warning(str(error)))
    if len(paths) > PICTURES:
        shown.append(element("p", f"{PICTURES} of {len(paths)} pictures are shown.", class_="soft"))
    return shown


def card(one: Reported, *content: object) -> Html:
    """All of one run: state, what it was measured on, its content and figures, arguments, provenance."""
    run = one.run
    title = element("h3", run.name, " ", state_badge(run), [[" ", note] for note in notes(run)])
    facts = element("p", f"{run.program}.py on {data_words(run, images_of(run))}. Encoder: {weights_words(run)}.",
                    class_="soft")  # fmt: skip
    figures = photos([path for path in run.figures() if path.name not in REDRAWN], run.folder)
    details = folded("Configuration and provenance", configuration(run), provenance(run))
    return element("section", title, facts, [warning(line) for line in run.trouble], content, gallery(figures), details,
                   class_="card", id=one.anchor)  # fmt: skip
