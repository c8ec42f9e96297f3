"""Find runs on disk, read their records, and state what these say of any run: progress, data, weights, warnings."""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from paper.shown import GOLDEN
from report.tables import DASH, Cell
from runtime.provenance import SNAPSHOT_RECORD
from util.files import reading

DEPTH = 3  # levels of subfolders that are searched, as in quickstart/attention/MAE
Record = Mapping[str, Any]
FACTS = tomllib.loads(Path(__file__).with_name("programs.toml").read_text(encoding="utf-8"))
NOTES: dict[str, tuple[str, str]] = FACTS["notes"]


class Kind(NamedTuple):
    """How a report calls the runs of a program and recognises their records; programs.toml explains the fields."""

    title: str
    argument: str
    result: str
    explanation: str
    trains: bool = True
    several: bool = False


KINDS = {program: Kind(**facts) for program, facts in FACTS["programs"].items()}
RECORDS = list(dict.fromkeys(["args.json", "log.txt", *(kind.result for kind in KINDS.values())]))


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    prefix: str  # of its file names: "" or, as in MAE.results.json, "MAE."
    program: str
    started: Record  # args.json, or {}
    results: list[Record]
    epochs: list[Record]  # log.txt, sorted by epoch
    written: float  # modification time of the newest record
    trouble: list[str]  # records that could not be read
    anchor: str = ""  # of its card in the page

    @property
    def kind(self) -> Kind:
        return KINDS[self.program]

    @property
    def path(self) -> Path:
        """The folder, with the prefix of the run's files."""
        return self.folder / self.prefix.rstrip(".")

    @property
    def record(self) -> Record:
        """Arguments, data and provenance of the run; of several results, those at the start of the run."""
        result = self.results[0] if self.results else {}
        return {**result, **self.started} if self.kind.several else {**self.started, **result}

    @property
    def args(self) -> Record:
        return args_of(self.record)

    def files(self, pattern: str) -> list[Path]:
        below = self.folder.glob(f"*/{pattern}") if self.kind.several else []
        return sorted([*self.folder.glob(f"{self.prefix}{pattern}"), *below])

    @property
    def weights_file(self) -> Path | None:
        """The encoder that a training run wrote."""
        paths = (self.folder / f"{self.prefix}{name}" for name in ("encoder.safetensors", "safetensors"))
        return next((path for path in paths if path.is_file()), None)

    @property
    def state(self) -> tuple[str, str]:
        """A badge that states whether the run is finished: (style, text)."""
        if self.kind.trains:
            total, unit = self.args.get("epochs"), "epochs"
            done = self.epochs[-1]["epoch"] + 1 if self.epochs else 0
            finished = bool(self.results) or (done == total and self.weights_file is not None)
        else:
            started, unit, done = self.started.get("encoders"), "results", len(self.results)
            total = len(started) if isinstance(started, list) else max(1, done)
            finished = done == total
        return ("good", "finished") if finished else ("loud", f"not finished: {done} of {total} {unit}")

    @property
    def images(self) -> float | None:
        """Number of images that an analysis used; None if its encoders differ in this."""
        results = self.results if not self.kind.trains else []
        counts = {result.get("images") or (result.get("localization") or {}).get("images") for result in results}
        return counts.pop() if len(counts) == 1 else None

    @property
    def encoders(self) -> list[Record]:
        """The distinct records of the encoders that the run used."""
        several = self.started.get("encoders")
        records = several if isinstance(several, list) else [self.started.get("encoder")]
        known = [e for e in (*records, *(result.get("encoder") for result in self.results)) if isinstance(e, dict)]
        return [encoder for i, encoder in enumerate(known) if encoder not in known[:i]]

    @property
    def weights(self) -> str:
        if self.program == "main_pretrain":
            return f"{self.args.get('model', 'encoder')}, trained from random weights"
        return "; ".join(f"{e.get('model')}, {e.get('source') or 'RANDOM WEIGHTS'}" for e in self.encoders) or DASH

    @property
    def notes(self) -> list[str]:
        """The NOTES about the run: what to know before reading any of its numbers."""
        records = [record for record in (self.started, *self.results) if record]
        # the probes that an aggregation analysis read have a commit of their own
        dirty = [made.get("dirty") for record in records for made in (record, record.get("probes") or {})]
        random = any(not encoder.get("source") for encoder in self.encoders)
        models = [str(encoder.get("model")) for encoder in (*self.encoders, self.args)]
        holds = {
            "random weights": random and self.program not in ("main_pretrain", "main_finetune"),
            "uncommitted code": any(value not in (None, False) for value in dirty),
            "commit unknown": any(not record.get("commit") or record.get("dirty") is None for record in records),
            "several commits": len({str(record.get("commit")) for record in records}) > 1,
            "a subset is allowed": self.args.get("allow_subset"),
            "demo": self.args.get("dataset") == "demo" or any(model.startswith("vit_demo") for model in models),
            "from scratch": random and self.program == "main_finetune",
        }
        return [note for note, true in holds.items() if true]

    @property
    def cell(self) -> Cell:
        """A link to the run's card, with what makes its numbers doubtful."""
        unfinished = [badge for badge in [self.state] if badge[0] == "loud"]
        return Cell(self.name, link=f"#{self.anchor}", badges=[*unfinished, *badges(self.notes, ["loud"])])


def args_of(record: Record) -> Record:
    return record["args"] if isinstance(record.get("args"), dict) else {}


def badges(notes: Sequence[str], styles: Sequence[str] = ("loud", "soft")) -> list[tuple[str, str]]:
    return [(style, note) for note, (style, _) in NOTES.items() if note in notes and style in styles]


def data_key(record: Record) -> str:
    """Equal for records whose numbers may share a table: the same images (those held out to choose rates count as
    training images), classes and headline score."""
    args = args_of(record)
    trained = sum(record[name] for name in ("n_train", "n_val") if isinstance(record.get(name), int))
    subset = args.get("seed") if args.get("num_images") else None
    names = ("train_images", "test_images", "n_test", "images", "classes", "headline")
    return repr([args.get("dataset"), args.get("data_path"), trained, subset, *map(record.get, names)])


def find_runs(arguments: Iterable[str]) -> tuple[list[Run], dict[str, list[Path]], list[str]]:
    """Runs of [LABEL=]PATH arguments: folders of runs, folders that contain them, folders of figures, single records;
    {folder or label: PNG files that belong to no run}; and a line per file or folder that is left out.

    A run named twice is listed once. ValueError for a path that does not exist.
    """
    runs: dict[tuple, Run] = {}
    figures: dict[str, list[Path]] = {}
    trouble: list[str] = []
    for argument in arguments:
        label, _, name = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        path = Path(name)
        if not name or not path.exists():
            raise ValueError(f"{argument}: no such file or folder; give the --output_dir of runs, or LABEL=FOLDER")
        read, problems = read_runs(list_records(path, trouble))
        own = {picture for run in read for picture in run.files("*.png")}
        if pictures := sorted(set(path.glob("*.png")) - own):
            figures[label or str(path)] = pictures
        elif not read and not problems:
            problems = [f"{path}: no run and no figure; a run has one of {', '.join(RECORDS)}"]
        trouble += problems
        for run in read:
            parts = run.path.relative_to(path if path.is_dir() else path.parent).parts
            name = "/".join(filter(None, [label, *parts])) or path.resolve().name
            runs.setdefault((run.folder.resolve(), run.prefix, run.program), replace(run, name=name))
    names = Counter((run.name, run.program) for run in runs.values())
    named = []
    for number, run in enumerate(runs.values(), 1):
        name = run.name if names[run.name, run.program] == 1 else str(run.path)
        named.append(replace(run, name=name, anchor=f"run-{number}"))
    return named, figures, list(dict.fromkeys(trouble))


def list_records(top: Path, trouble: list[str]) -> list[Path]:
    """Records in a folder and its subfolders; hidden folders, goldens and code snapshots of SLURM jobs are skipped."""
    if top.is_file():
        return [top]
    files, errors = [], []
    for folder, subfolders, names in os.walk(top, onerror=errors.append, followlinks=True):
        if SNAPSHOT_RECORD in names or len(Path(folder).relative_to(top).parts) > DEPTH:
            subfolders.clear()
            continue
        goldens = {GOLDEN} if any(Path(folder, GOLDEN, name).exists() for name in names) else set()
        subfolders[:] = sorted(name for name in set(subfolders) - goldens if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if name.endswith(tuple(RECORDS))]
    trouble += [f"{error.filename} cannot be read: {error.strerror}" for error in errors]
    return files


def read_runs(files: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs whose records these are, and a line for each record that belongs to none."""
    pattern = re.compile(rf"(|.+\.)({'|'.join(map(re.escape, RECORDS))})")  # demo/mae.args.json is of the run mae
    records: dict[tuple[Path, str, str], dict[Path, Record]] = {}  # {(folder, prefix, program): {path: content}}
    logs: dict[tuple[Path, str], Path] = {}
    trouble: dict[tuple[Path, str], list[str]] = {}
    for path in files:
        match = pattern.fullmatch(path.name)
        if not match:
            return [], [f"{path} is not a record of a run: give its folder, or {', '.join(RECORDS)}"]
        above = [kind.several for kind in KINDS.values() if kind.result == match[2]] == [True]
        above = above and path.with_name("args.json").exists() < path.parent.with_name("args.json").exists()
        key = path.parent.parent if above else path.parent, match[1]
        if match[2] == "log.txt":
            logs[key] = path
            continue
        try:
            content = read_json(path)
            records.setdefault((*key, program_of(path, match[2], content)), {})[path] = content
        except ValueError as error:
            trouble.setdefault(key, []).append(str(error))
    runs = []
    for (folder, prefix, program), contents in records.items():
        log = logs.pop((folder, prefix), None) if KINDS[program].trains else None
        epochs, problems = read_log(log) if log else ([], [])
        problems += trouble.pop((folder, prefix), [])
        written = max(path.stat().st_mtime for path in [*contents, *([log] if log else [])])
        started = contents.pop(folder / f"{prefix}args.json", {})
        runs.append(Run("", folder, prefix, program, started, list(contents.values()), epochs, written, problems))
    for key, log in logs.items():
        trouble.setdefault(key, [f"{log}: no args.json or results.json beside it says which program wrote it"])
    return runs, [line for lines in trouble.values() for line in lines]


def read_json(path: Path) -> Record:
    """ValueError unless the file is a JSON object."""
    with reading(path, "a record of a run"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def program_of(path: Path, name: str, content: Record) -> str:
    """The program that wrote a record: by its arguments, else by a file name that only one program uses."""
    programs = [program for program, kind in KINDS.items() if kind.argument in args_of(content)]
    programs = programs or [program for program, kind in KINDS.items() if kind.result == name]
    if len(programs) != 1:
        raise ValueError(f"{path}: not written by any of {', '.join(KINDS)}")
    return programs[0]


def read_log(path: Path) -> tuple[list[Record], list[str]]:
    """The epochs of log.txt (of repeated ones the last), and a line about those that cannot be read."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    records, broken = {}, 0
    for line in lines:
        try:
            record = json.loads(line)
            records[int(record["epoch"])] = record | {"epoch": int(record["epoch"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken += 1
    problems = [f"{path}: {broken} of {len(lines)} lines cannot be read"] if broken else []
    return [records[epoch] for epoch in sorted(records)], problems
