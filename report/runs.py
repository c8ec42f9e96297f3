"""Runs on disk, found and read for a report: which program left what, how far it came, and what cannot be read."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runtime.provenance import SNAPSHOT_RECORD

DEPTH = 2  # of folders below a named one, as in quickstart/probes/MAE


class Kind(NamedTuple):
    """By what the runs of a program are known."""

    argument: str  # that no other program has
    result: str  # the file that it ends with
    trains: bool = True  # and writes log.txt
    several: bool = False  # results, in a folder each


class Run(NamedTuple):
    """What a program left in a folder."""

    name: str
    folder: Path
    prefix: str  # of its files' names: "" or "MAE."
    program: str
    kind: Kind
    asked: dict[str, Any]  # arguments and provenance, of args.json or of the result; empty where neither is there
    results: list[dict[str, Any]]  # what its results, where they are JSON, hold; [] before the end
    epochs: list[dict[str, Any]]  # log.txt, in its order
    written: float  # when the newest of its records was, in seconds since 1970
    trouble: tuple[str, ...] = ()  # what cannot be read

    @property
    def args(self) -> dict[str, Any]:
        args = self.asked.get("args")
        return args if isinstance(args, dict) else {}

    def file(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}"

    def figures(self) -> list[Path]:
        """PNG files of the run, without those of other runs."""
        pattern = "*.png" if self.prefix == "" else f"{self.prefix}*.png"
        below = self.folder.glob("*/tsne.png") if self.kind.several else []
        return sorted([*self.folder.glob(pattern), *below])


class Found(NamedTuple):
    """What the folders of a report hold."""

    runs: list[Run]
    figures: dict[str, list[Path]]  # PNG files that belong to no run, by the name of their folder
    trouble: list[str]  # what is neither, a line each


def find_runs(words: Iterable[str], kinds: dict[str, Kind]) -> Found:
    """Runs of [LABEL=]PATH words: a run's folder, one that holds such folders, one of figures, or a record itself.

    kinds: of the programs whose runs are looked for. A run that is named twice is there once. ValueError for a path
    that does not exist.
    """
    found, seen = Found([], {}, []), set()
    for word in words:
        label, path = labelled(word)
        runs, trouble = (
            read_folder(path, kinds, DEPTH) if path.is_dir() else read_folder(path.parent, kinds, 0, path.name)
        )
        own = {picture for run in runs for picture in run.figures()}
        figures = [picture for picture in sorted(path.glob("*.png")) if picture not in own]
        if figures:
            found.figures[label or str(path)] = figures
        elif not runs and not trouble:
            trouble = [f"{path}: no run and no figure: it has no {', '.join(records(kinds))} or PNG file"]
        found.trouble.extend(trouble)
        for run in runs:
            key = run.folder.resolve(), run.prefix, run.program
            if key not in seen:
                found.runs.append(run._replace(name=name_of(run, label, path)))
                seen.add(key)
    return found._replace(runs=distinct(found.runs))


def labelled(word: str) -> tuple[str, Path]:
    """Label (empty where there is none) and path. ValueError where there is no such path."""
    label, path = ("", word) if Path(word).exists() else word.rpartition("=")[::2]
    if not path or not Path(path).exists():
        raise ValueError(f"{word}: no such file or folder; name the --output_dir of runs, or LABEL=FOLDER")
    return label, Path(path)


def name_of(run: Run, label: str, path: Path) -> str:
    """Of a run that was found at a path: the label, or the name of its folder, and where below it is."""
    below = run.folder.relative_to(path if path.is_dir() else path.parent).parts
    parts = [*below, *([run.prefix.rstrip(".")] if run.prefix else [])]
    return "/".join([label, *parts] if label else parts or [path.resolve().name])


def distinct(runs: list[Run]) -> list[Run]:
    """The runs, with names that tell those of a program apart: as much of the end of their folder's as it takes."""
    keys = [(run.name, run.program) for run in runs]
    paths = [[*run.folder.resolve().parts, *([run.prefix.rstrip(".")] if run.prefix else [])] for run in runs]
    named = []
    for run, key, path in zip(runs, keys, paths, strict=True):
        others = [other for other, of in zip(paths, keys, strict=True) if of == key and other is not path]
        length = next((n for n in range(2, len(path)) if all(path[-n:] != one[-n:] for one in others)), len(path))
        named.append(run._replace(name="/".join(path[-length:])) if others else run)
    return named


# ---------------------------------------------------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------------------------------------------------


def read_folder(
    folder: Path, kinds: dict[str, Kind], depth: int, only: str | None = None
) -> tuple[list[Run], list[str]]:
    """Runs of a folder and of those below it, to a depth, and what cannot be read, a line each.

    only: the one file to be looked at.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        return [], [f"{folder} cannot be read: {error.strerror}"]
    if any(entry.name == SNAPSHOT_RECORD for entry in entries):
        return [], []  # a job's copy of the code, with the records that come with it
    # demo/mae.args.json and results/quickstart/MAE.results.json are those of the runs mae and MAE
    pattern = re.compile(rf"(|.+\.)({'|'.join(map(re.escape, records(kinds)))})")
    prefixes: dict[str, list[str]] = {}
    for entry in entries:
        match = pattern.fullmatch(entry.name)
        if match and only in (None, entry.name):
            prefixes.setdefault(match[1], []).append(match[2])
    if only is not None and not prefixes:
        return [], [f"{folder / only} is no record of a run: name its folder, or one of "
                    f"{', '.join(records(kinds))}"]  # fmt: skip
    runs, trouble = [], []
    for prefix, names in prefixes.items():
        found, problems = read_prefix(folder, prefix, names, kinds, folders if only is None else [])
        runs += found
        trouble += problems
    taken = {path.parent.name for run in runs for path in below(run.kind, folder, folders)}
    for name in folders if depth else []:
        if name not in taken:
            found, problems = read_folder(folder / name, kinds, depth - 1)
            runs += found
            trouble += problems
    return runs, trouble


def records(kinds: dict[str, Kind]) -> list[str]:
    """Names of the files that tell of a run."""
    return list(dict.fromkeys(["args.json", "log.txt", *(kind.result for kind in kinds.values() if is_json(kind))]))


def is_json(kind: Kind) -> bool:
    return kind.result.endswith(".json")


def below(kind: Kind, folder: Path, folders: Sequence[str]) -> list[Path]:
    """The results of a run that has several."""
    paths = [folder / name / kind.result for name in folders] if kind.several else []
    return [path for path in paths if os.path.exists(path)]


def read_prefix(
    folder: Path, prefix: str, names: Sequence[str], kinds: dict[str, Kind], folders: Sequence[str]
) -> tuple[list[Run], list[str]]:
    """The runs whose files in a folder have this prefix: one of each program. folders: those in it."""
    trouble: list[str] = []
    found: dict[str, tuple[dict, list[dict]]] = {}  # what is asked and what came out, by program
    for name in names:
        path = folder / f"{prefix}{name}"
        content = None if name == "log.txt" else read_or_tell(path, trouble)
        if content is None:
            continue
        program = program_of(content, name, kinds)
        if program is None:
            trouble.append(f"{path}: of none of the programs that a report knows")
            continue
        asked, results = found.get(program, ({}, []))
        if name == "args.json":
            found[program] = ({**content, **asked}, results)
        else:  # a result repeats what was asked; one of several does not
            found[program] = (asked or content if kinds[program].several else {**asked, **content}, [content])
    log = folder / f"{prefix}log.txt"
    epochs, problems = read_log(log) if "log.txt" in names else ([], [])
    if "log.txt" in names and not any(kinds[program].trains for program in found) and not trouble:
        trouble.append(f"{log}: no args.json or results.json tells which program wrote it")
    runs = []
    for program, (asked, results) in found.items():
        kind, paths = kinds[program], [folder / f"{prefix}{name}" for name in names]
        if not results:
            paths += (parts := below(kind, folder, folders))
            results = [one for one in (read_or_tell(path, trouble) for path in parts) if one is not None]
        told, written = [*trouble, *(problems if kind.trains else [])], max(path.stat().st_mtime for path in paths)
        own = epochs if kind.trains else []
        runs.append(Run("", folder, prefix, program, kind, asked, results, own, written, tuple(told)))
    return runs, [] if runs else trouble


def read_or_tell(path: Path, trouble: list[str]) -> dict[str, Any] | None:
    """An object of JSON; None where there is none, which `trouble` then says."""
    try:
        return read_json(path)
    except ValueError as error:
        trouble.append(str(error))
        return None


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. ValueError for anything else, in one line."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no record of a run: it holds no object")
    return content


def program_of(content: dict[str, Any], name: str, kinds: dict[str, Kind]) -> str | None:
    """The program that wrote a record: by the arguments that it holds, or by the name that only its results have."""
    args = content.get("args")
    known = [program for program, kind in kinds.items() if isinstance(args, dict) and kind.argument in args]
    named = [program for program, kind in kinds.items() if kind.result == name]
    return known[0] if known else named[0] if len(named) == 1 else None


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of log.txt that are records of epochs, and what to say of the others."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return [], [f"{path} cannot be read: {error.strerror}"]
    records, broken = [], 0
    for line in lines:
        try:
            record = json.loads(line)
            record["epoch"] = int(record["epoch"])
            records.append(record)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken += bool(line.strip())
    told = [f"{path}: {broken} of {len(lines)} lines cannot be read"] if broken else []
    return sorted(records, key=lambda record: record["epoch"]), told
