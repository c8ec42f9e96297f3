"""Find runs on disk and read their records."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from paper.shown import GOLDEN
from runtime.provenance import SNAPSHOT_RECORD

DEPTH = 3  # levels of subfolders that are searched, as in quickstart/attention/MAE
Record = Mapping[str, Any]


class Kind(NamedTuple):
    """How a report calls the runs of a program and recognises their records."""

    title: str
    argument: str  # an argument that no other program has
    result: str  # the file written at the end
    trains: bool = True  # writes log.txt, one line per epoch
    several: bool = False  # writes one result per encoder, each into a subfolder


KINDS = {  # by program
    "main_linprobe": Kind("Linear probes", "cls_features", "results.json"),
    "main_analyze_attention": Kind("Attention flow", "reduction", "attention.json", trains=False, several=True),
    "main_analyze_aggregation": Kind("Aggregation", "kl_direction", "aggregation.json", trains=False),
    "main_finetune": Kind("Fine-tuning", "layer_decay", "results.json"),
    "main_pretrain": Kind("Pretraining", "mask_ratio", "results.json"),
}
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


def args_of(record: Record) -> Record:
    return record["args"] if isinstance(record.get("args"), dict) else {}


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
        here, problems = read_runs(list_records(path, trouble))
        own = {picture for run in here for picture in run.files("*.png")}
        if pictures := [picture for picture in sorted(path.glob("*.png")) if picture not in own]:
            figures[label or str(path)] = pictures
        elif not here and not problems:
            problems = [f"{path}: no run and no figure; a run has one of {', '.join(RECORDS)}"]
        trouble += problems
        for run in here:
            below = [*run.folder.relative_to(path if path.is_dir() else path.parent).parts, run.prefix.rstrip(".")]
            name = "/".join(filter(None, [label, *below])) or path.resolve().name
            runs.setdefault((run.folder.resolve(), run.prefix, run.program), replace(run, name=name))
    names = [(run.name, run.program) for run in runs.values()]
    named = []
    for i, run in enumerate(runs.values(), 1):
        unique = names.count((run.name, run.program)) == 1
        name = run.name if unique else str(run.folder / run.prefix.rstrip("."))
        named.append(replace(run, name=name, anchor=f"run-{i}"))
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
    records: dict[tuple[Path, str, str], dict[str, Record]] = {}  # {(folder, prefix, program): {path: content}}
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
            records.setdefault((*key, program_of(path, match[2], content)), {})[str(path)] = content
        except ValueError as error:
            trouble.setdefault(key, []).append(str(error))
    runs = []
    for (folder, prefix, program), contents in records.items():
        started = contents.pop(str(folder / f"{prefix}args.json"), None)
        log = logs.pop((folder, prefix), None) if KINDS[program].trains else None
        epochs, problems = read_log(log) if log else ([], [])
        paths = [folder / f"{prefix}args.json"] * (started is not None) + [Path(path) for path in contents]
        written = max(path.stat().st_mtime for path in [*paths, *([log] if log else [])])
        problems += trouble.pop((folder, prefix), [])
        results = list(contents.values())
        runs.append(Run("", folder, prefix, program, started or {}, results, epochs, written, problems))
    for key, log in logs.items():
        trouble.setdefault(key, [f"{log}: no args.json or results.json beside it says which program wrote it"])
    return runs, [line for lines in trouble.values() for line in lines]


def read_json(path: Path) -> Record:
    """ValueError unless the file is a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a record of a run: expected a JSON object, got {type(content).__name__}")
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
