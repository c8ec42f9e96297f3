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
from util.files import write_json
from util.intervals import student

ENDS = ("pos", "abmilp")  # heads that close nothing and all of the gap


def judged(path: Path) -> dict[str, dict]:
    """{rule without its seed: top1, closed and maxboxaccv2, each with an interval} of an analysis."""
    path = path / "aggregation.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text())
        maps, scores, boxes = result.get("localization", {}).get("maps", {}), {}, {}
        for rule in result["rules"]:
            name = rule["name"].removesuffix(f"/seed{rule['seed']}")
            for probe, score in rule["scores"].items():
                scores.setdefault(name, {}).setdefault(probe.rpartition("/seed")[2], []).append(score["top1"])
            if rule["name"] in maps:
                boxes.setdefault(name, []).append(maps[rule["name"]]["maxboxaccv2"])
        heads = {rule["head"]: rule["name"].removesuffix(f"/seed{rule['seed']}") for rule in result["rules"]}
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not an aggregation.json of main_analyze_aggregation.py: {error!r}") from error
    if missing := [head for head in ENDS if not scores.get(heads.get(head))]:
        raise ValueError(f"{path} has no probes of {missing[0]}: probe it, too, with the rules and on the same block")
    if several := [name for name, seeds in scores.items() if max(map(len, seeds.values())) > 1]:
        raise ValueError(f"{path}: {several[0]} has several rates per seed: choose one with --val_fraction")
    below, above = (scores[heads[head]] for head in ENDS)
    rows = {}
    for name in scores.keys() | boxes.keys():
        own = scores.get(name, {})
        seeds = sorted(own.keys() & below.keys() & above.keys())
        start, end, top1 = (np.array([each[seed][0] for seed in seeds]) for each in (below, above, own))
        row = rows[name] = {"top1": measured([each[0] for each in own.values()]), "seeds": len(own)}
        gap = student(end - start)
        if seeds and not gap.low <= 0 <= gap.high:  # of one seed, the interval is not known
            row["closed"] = measured(100 * (top1 - start) / (end - start))
        row["maxboxaccv2"] = measured(boxes.get(name, []))
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
            values = [row.get(column) for column in columns]
            cells = [f"{value['mean']:.1f} ({value['interval']})" if value else "–" for value in values]
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
