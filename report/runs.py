"""Find runs on disk and read their records."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from runtime.provenance import SNAPSHOT_RECORD

DEPTH = 3  # levels of subfolders that are searched, as in quickstart/attention/MAE
Record = Mapping[str, Any]


class Kind(NamedTuple):
    """How the records of a program are recognised."""

    argument: str  # an argument that no other program has
    result: str  # the file written at the end
    trains: bool = True  # writes log.txt, one line per epoch
    several: bool = False  # writes one result per encoder, each into a subfolder


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    prefix: str  # of its file names: "" or, as in MAE.results.json, "MAE."
    program: str
    kind: Kind
    started: Record  # args.json, or {}
    results: list[Record]
    epochs: list[Record]  # log.txt, sorted by epoch
    written: float  # modification time of the newest record
    trouble: list[str]  # records that could not be read

    @property
    def record(self) -> Record:
        """Arguments, data and provenance of the run; of several results, those at the start of the run."""
        result = self.results[0] if self.results else {}
        return {**result, **self.started} if self.kind.several else {**self.started, **result}

    @property
    def args(self) -> Record:
        return args_of(self.record)

    def figures(self) -> list[Path]:
        below = self.folder.glob("*/tsne.png") if self.kind.several else []
        return sorted([*self.folder.glob(f"{self.prefix}*.png"), *below])


class Findings(NamedTuple):
    runs: list[Run]
    figures: dict[str, list[Path]]  # {folder or label: PNG files that belong to no run}
    trouble: list[str]  # one line per file or folder that is left out


def args_of(record: Record) -> Record:
    return record["args"] if isinstance(record.get("args"), dict) else {}


def find_runs(arguments: Iterable[str], kinds: Mapping[str, Kind]) -> Findings:
    """Runs of [LABEL=]PATH arguments: folders of runs, folders that contain them, folders of figures, single records.

    A run named twice is listed once. ValueError for a path that does not exist.
    """
    runs: dict[tuple, Run] = {}
    figures: dict[str, list[Path]] = {}
    trouble: list[str] = []
    for argument in arguments:
        label, path = ("", argument) if Path(argument).exists() else argument.rpartition("=")[::2]
        if not path or not Path(path).exists():
            raise ValueError(f"{argument}: no such file or folder; give the --output_dir of runs, or LABEL=FOLDER")
        path = Path(path)
        files, unreadable = list_records(path, kinds) if path.is_dir() else ([path], [])
        found, problems = read_runs(files, kinds)
        problems += unreadable
        own = {picture for run in found for picture in run.figures()}
        if pictures := [picture for picture in sorted(path.glob("*.png")) if picture not in own]:
            figures[label or str(path)] = pictures
        elif not found and not problems:
            problems = [f"{path}: no run and no figure; a run has one of {', '.join(record_names(kinds))}"]
        trouble += problems
        for run in found:
            below = [*run.folder.relative_to(path if path.is_dir() else path.parent).parts, run.prefix.rstrip(".")]
            name = "/".join(filter(None, [label, *below])) or path.resolve().name
            runs.setdefault((run.folder.resolve(), run.prefix, run.program), replace(run, name=name))
    return Findings(distinct_names(list(runs.values())), figures, trouble)


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs; those of one program and name are named by their paths."""
    names = [(run.name, run.program) for run in runs]
    return [
        replace(run, name=str(run.folder / run.prefix.rstrip("."))) if names.count(name) > 1 else run
        for run, name in zip(runs, names, strict=True)
    ]


def record_names(kinds: Mapping[str, Kind]) -> list[str]:
    return list(dict.fromkeys(["args.json", "log.txt", *(kind.result for kind in kinds.values())]))


def list_records(top: Path, kinds: Mapping[str, Kind]) -> tuple[list[Path], list[str]]:
    """Records in a folder and its subfolders, and a line for each folder that cannot be read; hidden folders and code
    snapshots of SLURM jobs are skipped."""
    files, errors = [], []
    for folder, subfolders, names in os.walk(top, onerror=errors.append, followlinks=True):
        if SNAPSHOT_RECORD in names or len(Path(folder).relative_to(top).parts) > DEPTH:
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if name.endswith(tuple(record_names(kinds)))]
    return files, [f"{error.filename} cannot be read: {error.strerror}" for error in errors]


def read_runs(files: Iterable[Path], kinds: Mapping[str, Kind]) -> tuple[list[Run], list[str]]:
    """The runs whose records these are, and a line for each record that belongs to none."""
    # demo/mae.args.json is a record of the run mae
    pattern = re.compile(rf"(|.+\.)({'|'.join(map(re.escape, record_names(kinds)))})")
    records: dict[tuple[Path, str, str], dict[Path, Record]] = {}  # by folder, prefix and program
    logs: dict[tuple[Path, str], Path] = {}
    trouble: dict[tuple[Path, str], list[str]] = {}
    for path in files:
        if not (match := pattern.fullmatch(path.name)):
            return [], [f"{path} is not a record of a run: give its folder, or {', '.join(record_names(kinds))}"]
        key = path.parent, match[1]
        if match[2] == "log.txt":
            logs[key] = path
            continue
        try:
            content = read_json(path)
            records.setdefault((*key, program_of(path, match[2], content, kinds)), {})[path] = content
        except ValueError as error:
            trouble.setdefault(key, []).append(str(error))
    for folder, prefix, program in [key for key in records if kinds[key[2]].several]:
        owner = records.get((folder.parent, "", program), {})
        if folder.parent / "args.json" in owner and folder / "args.json" not in records[folder, prefix, program]:
            owner |= records.pop((folder, prefix, program))
    runs = []
    for (folder, prefix, program), contents in records.items():
        kind, started = kinds[program], folder / f"{prefix}args.json"
        log = logs.pop((folder, prefix), None) if kind.trains else None
        epochs, problems = read_log(log) if log else ([], [])
        results = [content for path, content in contents.items() if path != started]
        written = max(path.stat().st_mtime for path in filter(None, [*contents, log]))
        problems += trouble.pop((folder, prefix), [])
        run = Run("", folder, prefix, program, kind, contents.get(started, {}), results, epochs, written, problems)
        runs.append(run)
    for key, log in logs.items():
        trouble.setdefault(key, [f"{log}: no args.json or results.json beside it says which program wrote it"])
    return runs, [line for lines in trouble.values() for line in lines]


def read_json(path: Path) -> Record:
    """ValueError unless the file is a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a record of a run: expected a JSON object, got {type(content).__name__}")
    return content


def program_of(path: Path, name: str, content: Record, kinds: Mapping[str, Kind]) -> str:
    """The program that wrote a record: by its arguments, else by a file name that only one program uses."""
    programs = [program for program, kind in kinds.items() if kind.argument in args_of(content)]
    programs = programs or [program for program, kind in kinds.items() if kind.result == name]
    if len(programs) != 1:
        raise ValueError(f"{path}: not written by any of {', '.join(kinds)}")
    return programs[0]


def read_log(path: Path) -> tuple[list[Record], list[str]]:
    """The epochs of log.txt (of repeated ones the last), and what to say of lines that cannot be read."""
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return [], [f"{path} cannot be read: {error.strerror}"]
    records, broken = {}, 0
    for line in lines:
        try:
            record = json.loads(line)
            records[int(record["epoch"])] = record | {"epoch": int(record["epoch"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken += 1
    problems = [f"{path}: {broken} of {len(lines)} lines cannot be read"] if broken else []
    return [records[epoch] for epoch in sorted(records)], problems
