"""The records that the pages show: made by clean, known code, which still computes them.

Beside a record X.json of the demo lies short/X.json, the golden: the numbers of the same programs in their short mode,
made at the same commit. CI computes them again and compares by value, so that code that changes a number fails until
scripts/remake_records.sh has made records and goldens anew.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from util.files import reading, write_json

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = "short"  # folder beside the records
MEASURED = ("probes", "metrics", "rules", "over_seeds")  # of the programs' results: what a golden keeps and compares
RUNS = {  # of scripts/remake_records.sh, by the folder of their records
    "quickstart": ("attention/*/attention.json", "probes/*/results.json"),
    "aggregation": ("aggregation/probes/*/results.json", "aggregation/rules/*/aggregation.json"),
}
ORIGIN = ("commit", "dirty", "versions", "command")
# Processors round differently, and training amplifies it: after the quickstart's 12 epochs, top-1 of single seeds
# differed by up to 1.1 points and losses by 0.8 % between an AMD and an Intel processor (AVX-512 both), with equal
# code. Metrics of attention, which depend on no training here, differed by 4e-6.
TOLERANCE = {"points": 3.0, "ratio": 1e-2, "metrics": 1e-4}


def shown_records(page: Path) -> dict[Path, dict]:
    """The programs' results that a page links or names in its marks; of a folder, all below it but goldens."""
    named = {ROOT / name for name in re.findall(r"(?:\]\(|[= ])(?:\.\./)*(results/[\w./+-]+)", page.read_text("utf-8"))}
    paths = {file for path in named for file in (path.rglob("*.json") if path.is_dir() else [path])}
    records = {}
    for path in sorted(paths):
        if path.suffix != ".json" or path.parent.name == GOLDEN or not path.is_file():
            continue
        with reading(path, f"a record, but {page} shows it"):
            content = json.loads(path.read_text())
        if isinstance(content, dict) and "commit" in content:
            records[path] = content
    return records


def origin_problems(path: Path, record: Mapping[str, Any]) -> list[str]:
    """Why a shown record, or its golden, cannot be trusted."""
    if record["dirty"] is not False:
        return [f"{path} was made by code {'with uncommitted changes' if record['dirty'] else 'of no commit'}"]
    if path.parent.name == GOLDEN or not str(record.get("args", {}).get("dataset", "")).startswith("demo"):
        return []  # other data sets cannot be computed again here
    golden = path.parent / GOLDEN / path.name
    if not golden.is_file():
        return [f"{path} has no golden {golden}"]
    content = read_golden(golden)
    different = content["commit"] != record["commit"]
    return [f"{path} and {golden} were made at different commits"] * different + origin_problems(golden, content)


def read_golden(path: Path) -> dict:
    with reading(path, "a golden, which scripts/remake_records.sh makes"):
        golden = json.loads(path.read_text())
        return {**{name: golden[name] for name in ORIGIN}, "numbers": dict(golden["numbers"])}


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


def differences(golden: dict, result: dict) -> list[str]:
    """Numbers of a golden that the result lacks, or has with another value."""
    computed, texts = dict(numbers_of(result)), []
    for name, expected in golden["numbers"].items():
        ratio = TOLERANCE["metrics" if name.startswith("metrics/") else "ratio"]
        is_percent = re.search(r"top1|maxboxacc", name)
        allowed = TOLERANCE["points"] if is_percent else ratio * max(abs(expected), 1e-3)
        if name not in computed:
            texts.append(f"{name} is not computed any more")
        elif not abs(computed[name] - expected) <= allowed:
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
    """Write the demo's shown records, and their goldens, from the results in folders of full and of short runs."""
    for folder, pattern in RUNS.items():
        for computed in sorted(path for part in pattern for path in full.glob(part)):
            record = results / folder / f"{computed.parent.name}.{computed.name}"
            golden = record.parent / GOLDEN / record.name
            golden.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, shortened(json.loads(computed.read_text())))
            write_json(golden, golden_of(json.loads((short / computed.relative_to(full)).read_text())))


if __name__ == "__main__":
    remake(ROOT / "results", *map(Path, sys.argv[1:]))
