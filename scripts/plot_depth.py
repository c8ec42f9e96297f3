"""Accuracy and attention flow by depth: python scripts/plot_depth.py LABEL=PROBES[,ATTENTION] ... [--output FILE]

PROBES is the results.json (or its folder) of main_linprobe.py with several --return_block, ATTENTION the attention.json
of the same encoder. One figure shows, block by block, the accuracy of every head and the chosen metrics, a line per
encoder. A table names each head's best block and the first block that reaches 90 % of the best accuracy: how early the
information is there. With --decoder in both runs, MAE's decoder follows the encoder.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention.figures import ANY_AXIS, choose_metrics, draw_attention, load_attention
from attention.metrics import GROUPS, METRICS
from cli.console import Parser, run_main
from paper.cells import probes_by_head
from paper.runs import read_runs

METRICS_SHOWN = ["cls_patch_entropy", "patch_patch_entropy", "patch_log_amplitude", "patch_patch_mutual_information"]
SHARE = 0.9  # of the best accuracy


def accuracy_by_block(path: str) -> tuple[dict, dict[str, dict[int, list[float]]]]:
    """The encoder's record, and {head: {block: scores over seeds, %}} at the last epoch."""
    (run,) = read_runs([path]).values()
    accuracies: dict[str, dict[int, list[float]]] = {}
    for head, block, probes in probes_by_head(run):
        accuracies.setdefault(head, {})[block] = [probe["last"][run["headline"]] for probe in probes]
    return run["encoder"], {head: dict(sorted(blocks.items())) for head, blocks in accuracies.items()}


def as_metric(head: str, blocks: dict[int, list[float]]) -> dict:
    """The accuracies in the form of a metric of attention.json, so that one function draws both."""
    entries = []
    for block in range(max(blocks) + 1):
        scores = blocks.get(block)
        std = statistics.stdev(scores) if scores and len(scores) > 1 else None
        entries.append({"block": block, "mean": statistics.mean(scores) if scores else None, "std": std})
    return {"unit": "%", "definition": f"accuracy of {head}: mean over seeds", "axis": None, "blocks": entries}


def main(args: argparse.Namespace) -> None:
    results, heads = [], {}
    print(f"| encoder | head | best block | accuracy | first block with {SHARE:.0%} of it |\n|---|---|---|---|---|")
    for argument in args.runs:
        label, _, paths = argument.rpartition("=")
        probes, _, attention = paths.partition(",")
        encoder, accuracies = accuracy_by_block(probes)
        result = load_attention(Path(attention)) if attention else {"encoder": encoder, "metrics": {}}
        result["label"] = label or Path(probes).stem
        for head, blocks in accuracies.items():
            result["metrics"][f"accuracy, {head}"] = as_metric(head, blocks)
            heads[f"accuracy, {head}"] = None
            means = {block: statistics.mean(scores) for block, scores in blocks.items()}
            best = max(means, key=means.get)
            first = next(block for block, mean in means.items() if mean >= SHARE * means[best])
            behind = encoder.get("decoder", {}).get("first_block", best + 1)
            named = [f"{block}{' (decoder)' * (block >= behind)}" for block in (best, first)]
            print(f"| {result['label']} | {head} | {named[0]} | {means[best]:.1f} | {named[1]} |")
        results.append(result)
    measured = {name for result in results for name in result["metrics"]}
    names = args.metrics or [name for name in METRICS_SHOWN if name in measured]
    draw_attention(results, [*heads, *choose_metrics(names, results, ANY_AXIS)], args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=PROBES[,ATTENTION]", help="results of one encoder")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", choices=[*GROUPS, *METRICS], help=f"default: {METRICS_SHOWN}"
    )
    parser.add_argument("--output", type=Path, default=Path("depth.png"), help="png, pdf or svg")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
