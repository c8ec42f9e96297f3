"""Judge rules that weigh patches: python scripts/compare_rules.py [LABEL=]AGGREGATION ... [--output FILE.json]

AGGREGATION is the aggregation.json (or its folder) of main_analyze_aggregation.py --probes RUN --boxes FILE, where RUN
has probes of pos, of abmilp and of the rules. The table has, for each rule, the accuracy of its probes, the share that
it closes of the gap between mean patch (pos) and AbMILP, (rule - pos) / (abmilp - pos), and MaxBoxAccV2, which measures
whether it finds the object. Intervals are Student's over seeds, paired by seed. No share is given where the interval of
the gap includes 0.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from cli.console import Parser, run_main
from util.files import reading, write_json
from util.intervals import student

ENDS = ("pos", "abmilp")  # heads that close nothing and all of the gap


def judged(path: Path) -> dict[str, dict]:
    """{head, with its block unless that is the last: top1, closed and maxboxaccv2, each with an interval}."""
    path = path / "aggregation.json" if path.is_dir() else path
    scores: dict[str, dict[str, float]] = {}
    boxes: dict[str, list[float]] = {}
    with reading(path, "an aggregation.json of main_analyze_aggregation.py with probes"):
        result = json.loads(path.read_text("utf-8"))
        maps, last = result.get("localization", {}).get("maps", {}), max(rule["block"] for rule in result["rules"])
        for rule in result["rules"]:
            name = rule["head"] if rule["block"] == last else f"{rule['head']}/block{rule['block']}"
            own = scores.setdefault(name, {})
            boxes.setdefault(name, []).extend([maps[rule["name"]]["maxboxaccv2"]] if rule["name"] in maps else [])
            for probe, score in rule["scores"].items():
                if (seed := probe.rpartition("/seed")[2]) in own:
                    raise ValueError(f"{name} has several rates per seed: choose one with --val_fraction")
                own[seed] = np.nan if score["top1"] is None else float(score["top1"])
        boxes = {name: [float(value) for value in values] for name, values in boxes.items()}
    if missing := [head for head in ENDS if not scores.get(head)]:
        raise ValueError(f"{path} has no probes of {missing[0]}: probe it, too, with the rules and on the same block")
    rows = {}
    for name, own in scores.items():
        seeds = sorted(set.intersection(*(set(scores[end]) for end in ENDS), own))
        start, end, top1 = (np.array([each[seed] for seed in seeds]) for each in (*(scores[end] for end in ENDS), own))
        gap = student(end - start)
        may_be_none = not seeds or gap.low <= 0 <= gap.high  # of one seed, the interval is not known
        closed = [] if may_be_none else 100 * (top1 - start) / (end - start)
        columns = {"top1": list(own.values()), "closed": closed, "maxboxaccv2": boxes[name]}
        rows[name] = {"seeds": len(own), **{column: measured(values) for column, values in columns.items()}}
    return dict(sorted(rows.items(), key=lambda pair: -(pair[1]["top1"] or {"mean": -1})["mean"]))


def measured(values: Sequence[float]) -> dict | None:
    """Mean and interval over seeds."""
    values = np.asarray(values, dtype=float)
    return {"mean": float(values.mean()), "interval": student(values)} if len(values) else None


def table(judgements: dict[str, dict[str, dict]]) -> str:
    columns = {"top1": "top-1", "closed": "share of the gap closed (%)", "maxboxaccv2": "MaxBoxAccV2"}
    lines = ["| encoder | rule | seeds | " + " | ".join(columns.values()) + " |", "|---" * 6 + "|"]
    for label, rows in judgements.items():
        for name, row in rows.items():
            values = [row[column] for column in columns]
            cells = [f"{value['mean']:.1f} ({value['interval']})" if value else "–" for value in values]
            cells = [cell.removesuffix(" (–)") for cell in cells]
            lines.append(f"| {label} | {name} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    judgements = {}
    for argument in args.analyses:
        label, _, path = argument.rpartition("=")
        judgements[label or Path(path).name] = judged(Path(path))
    print(table(judgements), end="")
    if args.output is not None:
        write_json(args.output, judgements)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("analyses", nargs="+", metavar="[LABEL=]AGGREGATION", help="analyses, one of each encoder")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the numbers there")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
