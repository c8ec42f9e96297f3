"""The records that the pages show: made by clean, known code, which still computes them.

Beside a record X.json of the demo lies short/X.json, the golden: the numbers of the same programs in their short mode,
made at the same commit. CI computes them again and compares by value, so that code that changes a number fails until
scripts/remake_records.sh has made records and goldens anew.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from util.files import write_json

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = "short"  # folder beside the records
MEASURED = ("probes", "metrics", "rules", "over_seeds")  # of the programs' results: what a golden keeps and compares
ORIGIN = ("commit", "dirty", "versions", "command")
# Processors round differently, and training amplifies it: after the quickstart's 12 epochs, top-1 of single seeds
# differed by up to 1.1 points and losses by 0.8 % between an AMD and an Intel processor (AVX-512 both), with equal
# code. Metrics of attention, which depend on no training here, differed by 4e-6.
TOLERANCE = {"points": 3.0, "ratio": 1e-2, "metrics": 1e-4}


def shown_records(page: Path) -> dict[Path, dict]:
    """The programs' results that a page links or names in its marks; of a folder, all below it but goldens."""
    paths: set[Path] = set()
    for name in re.findall(r"(?:\]\(|[= ])(?:\.\./)*(results/[\w./+-]+)", page.read_text("utf-8")):
        path = ROOT / name
        paths |= set(path.rglob("*.json") if path.is_dir() else [path])
    records = {}
    for path in sorted(
        path for path in paths if path.suffix == ".json" and path.parent.name != GOLDEN and path.is_file()
    ):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}, which {page} shows, cannot be read: {error}") from error
        if isinstance(content, dict) and "commit" in content:
            records[path] = content
    return records


def git(*command: str) -> str | None:
    """None where git fails or does not exist."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def history_gap() -> str:
    """Why commits cannot be looked up here; "" where they can."""
    if (top := git("rev-parse", "--show-toplevel")) is None or Path(top).resolve() != ROOT:
        return "this is not a git checkout"
    return "this is a shallow clone" if git("rev-parse", "--is-shallow-repository") == "true" else ""


def origin_problems(path: Path, record: Mapping[str, Any], known_history: bool) -> list[str]:
    """Why a shown record, or its golden, cannot be trusted."""
    problems = []
    if record["dirty"] is not False:
        problems.append(f"{path} was made by code {'with uncommitted changes' if record['dirty'] else 'of no commit'}")
    elif known_history and git("merge-base", "--is-ancestor", str(record["commit"]), "HEAD") is None:
        problems.append(f"{path} was made at commit {record['commit']}, which is not in this history")
    if path.parent.name == GOLDEN or "args" not in record or not str(record["args"]["dataset"]).startswith("demo"):
        return problems  # other data sets cannot be computed again here
    golden = path.parent / GOLDEN / path.name
    if not golden.is_file():
        return [*problems, f"{path} has no golden {golden}"]
    content = read_golden(golden)
    if content["commit"] != record["commit"]:
        problems.append(f"{path} and {golden} were made at different commits")
    return problems + origin_problems(golden, content, known_history)


def read_golden(path: Path) -> dict:
    try:
        golden = json.loads(path.read_text())
        return {**{name: golden[name] for name in ORIGIN}, "numbers": dict(golden["numbers"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a golden: scripts/remake_records.sh makes them") from error


def golden_of(result: dict) -> dict:
    numbers = {name: float(f"{value:.6g}") for name, value in numbers_of(result)}
    return {**{name: result[name] for name in ORIGIN}, "numbers": numbers}


def shortened(value: Any) -> Any:
    """A result as the repository keeps it: six digits, and without the counts at each threshold of localisation."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items() if key != "found"}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def numbers_of(result: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of what a result measures: means and scores, without those of single heads of attention."""
    if isinstance(result, dict):
        for key, value in result.items():
            if name or key in MEASURED:
                yield from numbers_of(value, f"{name}/{key}" if name else key)
    elif isinstance(result, list):
        for index, value in enumerate(result):
            yield from numbers_of(value, f"{name}/{index}")
    elif re.search(r"/(mean|top1|loss|maxboxaccv2)$", name) and isinstance(result, int | float):
        yield name, float(result)


def differences(golden: dict, result: dict, tolerance: Mapping[str, float] = TOLERANCE) -> list[str]:
    """Numbers of a golden that the result lacks, or has with another value."""
    computed, texts = dict(numbers_of(result)), []
    for name, expected in golden["numbers"].items():
        if name not in computed:
            texts.append(f"{name} is not computed any more")
            continue
        percent = re.search(r"top1|maxboxacc", name)
        ratio = tolerance["metrics" if name.startswith("metrics/") else "ratio"]
        allowed = tolerance["points"] if percent else ratio * max(abs(expected), 1e-3)
        if not abs(computed[name] - expected) <= allowed:
            texts.append(f"{name} is {computed[name]:.6g}, was {expected:.6g}")
    return texts


def computed_file(golden: Path, folder: Path) -> Path:
    """MAE.attention.json -> FOLDER/**/MAE/attention.json, as the programs write it."""
    label, program = golden.name.removesuffix(".json").rsplit(".", 1)
    paths = sorted(folder.glob(f"**/{label}/{program}.json"))
    if len(paths) != 1:
        raise ValueError(f"{folder} must have one {label}/{program}.json for {golden}, has {len(paths)}")
    return paths[0]


def golden_problems(results: Path, folder: Path) -> list[str]:
    """Where the short runs in a folder do not repeat the goldens below results."""
    problems = []
    for path in sorted(results.glob(f"*/{GOLDEN}/*.json")):
        computed = computed_file(path, folder)
        if texts := differences(read_golden(path), json.loads(computed.read_text())):
            more = f" and {len(texts) - 3} more" * (len(texts) > 3)
            problems.append(f"{computed} differs from {path}: {'; '.join(texts[:3])}{more}")
    return problems


def remake(results: Path, full: Path, short: Path) -> None:
    """Replace the demo's shown records, and their goldens, by the results in folders of full and of short runs."""
    for folder in ("quickstart", "aggregation"):
        for record in sorted((results / folder).glob("*.json")):
            golden = record.parent / GOLDEN / record.name
            golden.parent.mkdir(exist_ok=True)
            write_json(record, shortened(json.loads(computed_file(record, full).read_text())))
            write_json(golden, golden_of(json.loads(computed_file(record, short).read_text())))


if __name__ == "__main__":
    remake(ROOT / "results", *map(Path, sys.argv[1:]))
