"""Runs on disk, found and read for a report: which program left what, how far it came, and what cannot be read."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from util.run_folder import SNAPSHOT_RECORD

DEPTH = 2  # of folders below a named one, as in quickstart/probes/MAE
# records of a run; demo/mae.args.json and results/quickstart/MAE.results.json are those of the run MAE
RECORD = re.compile(r"(|.+\.)(args\.json|results\.json|attention\.json|aggregation\.json|log\.txt)")
OF_PROGRAM = {  # an argument that no other program has
    "main_linprobe": "cls_features",
    "main_finetune": "layer_decay",
    "main_pretrain": "mask_ratio",
    "main_analyze_attention": "reduction",
    "main_analyze_aggregation": "kl_direction",
}
TRAINING = ("main_linprobe", "main_finetune", "main_pretrain")


class Run(NamedTuple):
    """What a program left in a folder."""

    name: str
    folder: Path
    prefix: str  # of its files' names: "" or "MAE."
    program: str
    asked: dict[str, Any]  # arguments and provenance, of args.json or of the result; empty where neither is there
    results: list[dict[str, Any]]  # results.json, aggregation.json, or each encoder's attention.json; [] before the end
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
        below = self.folder.glob("*/tsne.png") if self.program == "main_analyze_attention" else []
        return sorted([*self.folder.glob(pattern), *below])


class Found(NamedTuple):
    """What the folders of a report hold."""

    runs: list[Run]
    figures: dict[str, list[Path]]  # PNG files that belong to no run, by the name of their folder
    trouble: list[str]  # what is neither, a line each


def find_runs(words: Iterable[str]) -> Found:
    """Runs of [LABEL=]PATH words: a run's folder, one that holds such folders, one of figures, or a record itself.

    A run that is named twice is there once. ValueError for a path that does not exist.
    """
    found, seen = Found([], {}, []), set()
    for word in words:
        label, path = labelled(word)
        runs, trouble = read_folder(path, DEPTH) if path.is_dir() else read_folder(path.parent, 0, path.name)
        own = {picture for run in runs for picture in run.figures()}
        figures = [picture for picture in sorted(path.glob("*.png")) if picture not in own]
        if figures:
            found.figures[label or str(path)] = figures
        elif not runs and not trouble:
            trouble = [f"{path}: no run and no figure: it has no args.json, results.json, attention.json, "
                       "aggregation.json, log.txt or PNG file"]  # fmt: skip
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
    """The runs, with names that tell them apart: as much of their folder's as it takes."""
    keys = [(run.name, run.program) for run in runs]
    return [
        run if keys.count(key) == 1 else run._replace(name=f"{run.folder}/{run.prefix}".rstrip("/."))
        for run, key in zip(runs, keys, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, depth: int, only: str | None = None) -> tuple[list[Run], list[str]]:
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
    prefixes: dict[str, list[str]] = {}
    for entry in entries:
        match = RECORD.fullmatch(entry.name)
        if match and only in (None, entry.name):
            prefixes.setdefault(match[1], []).append(match[2])
    if only is not None and not prefixes:
        return [], [f"{folder / only} is no record of a run: name its folder, or an args.json, results.json, "
                    "attention.json, aggregation.json or log.txt"]  # fmt: skip
    runs, trouble = [], []
    for prefix, names in prefixes.items():
        found, problems = read_prefix(folder, prefix, names, folders if only is None else [])
        runs += found
        trouble += problems
    taken = {run.folder / name for run in runs if run.program == "main_analyze_attention" for name in folders
             if (folder / name / "attention.json").exists()}  # fmt: skip
    for name in folders if depth else []:
        if folder / name not in taken:
            found, problems = read_folder(folder / name, depth - 1)
            runs += found
            trouble += problems
    return runs, trouble


def read_prefix(folder: Path, prefix: str, names: list[str], folders: list[str]) -> tuple[list[Run], list[str]]:
    """The runs whose files in a folder have this prefix: one of each program. folders: those in it."""
    contents, trouble, kept = {}, [], {}  # kept: what is asked and what came out, by program
    for name in names:
        path = folder / f"{prefix}{name}"
        if name != "log.txt":
            try:
                contents[name] = read_json(path)
            except ValueError as error:
                trouble.append(str(error))
    for name, content in contents.items():
        program = {"attention.json": "main_analyze_attention", "aggregation.json": "main_analyze_aggregation"}.get(name)
        program = program or program_of(content)
        if program is None:
            trouble.append(f"{folder / f'{prefix}{name}'}: of none of the programs that a report knows")
        elif name == "args.json":
            kept.setdefault(program, (content, []))
        else:
            asked = kept.get(program, ({}, []))[0]
            kept[program] = ({**asked, **content} if name != "attention.json" else asked or content, [content])
    if "main_analyze_attention" in kept and not kept["main_analyze_attention"][1]:
        below = [folder / one / "attention.json" for one in folders if (folder / one / "attention.json").exists()]
        for path in below:
            try:
                kept["main_analyze_attention"][1].append(read_json(path))
            except ValueError as error:
                trouble.append(str(error))
    epochs, problems = read_log(folder / f"{prefix}log.txt") if "log.txt" in names else ([], [])
    if "log.txt" in names and not any(program in TRAINING for program in kept) and not trouble:
        trouble.append(f"{folder / f'{prefix}log.txt'}: no args.json or results.json tells which program wrote it")
    written = max((folder / f"{prefix}{name}").stat().st_mtime for name in names)
    runs = []
    for program, (asked, results) in kept.items():
        of_training = program in TRAINING
        told = (*trouble, *(problems if of_training else []))
        runs.append(Run("", folder, prefix, program, asked, results, epochs if of_training else [], written, told))
    return runs, [] if runs else trouble


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. ValueError for anything else, in one line."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no record of a run: it holds no object")
    return content


def program_of(content: dict[str, Any]) -> str | None:
    """The program whose arguments a record holds."""
    args = content.get("args")
    known = [name for name, argument in OF_PROGRAM.items() if isinstance(args, dict) and argument in args]
    return known[0] if known else None


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
