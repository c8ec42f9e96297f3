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

from attention.figures import choose_metrics, draw_attention, load_attention
from attention.metrics import GROUPS, METRICS
from cli.console import Parser, one_of, run_main
from paper.runs import read_runs

METRICS_SHOWN = ["cls_patch_entropy", "patch_patch_entropy", "patch_log_amplitude", "patch_patch_mutual_information"]
SHARE = 0.9  # of the best accuracy


def accuracy_by_block(path: str) -> tuple[dict, dict[str, dict[int, list[float]]]]:
    """The encoder's record, and {head: {block: scores over seeds, %}} at the last epoch.

    ValueError where a head has several rates per block.
    """
    ((run,),) = read_runs([path]).values()
    accuracies: dict[str, dict[int, list[float]]] = {}
    for probe in run["probes"].values():
        if probe.get("chosen", True) and probe["diverged_at"] is None:
            scores = accuracies.setdefault(probe["head"], {}).setdefault(probe["block"], [])
            scores.append(probe["last"][run["headline"]])
    for head, blocks in accuracies.items():
        if max(map(len, blocks.values())) > len(run["seeds"]):
            raise ValueError(f"{path}: {head} has several learning rates: choose one with --val_fraction, or train one")
    return run["encoder"], accuracies


def as_metric(head: str, blocks: dict[int, list[float]]) -> dict:
    """The accuracies in the form of a metric of attention.json, so that one function draws both."""
    entries = [{"block": b, "mean": None, "std": None} for b in range(max(blocks) + 1)]
    for block, scores in blocks.items():
        std = statistics.stdev(scores) if len(scores) > 1 else 0.0
        entries[block] = {"block": block, "mean": statistics.mean(scores), "std": std}
    return {"unit": "%", "definition": f"accuracy of {head}: mean over seeds", "axis": None, "blocks": entries}


def reached(blocks: dict[int, list[float]]) -> tuple[int, float, int]:
    """The best block, its mean accuracy, and the first block with SHARE of it."""
    means = {block: statistics.mean(scores) for block, scores in sorted(blocks.items())}
    best = max(means, key=means.get)
    return best, means[best], next(block for block, mean in means.items() if mean >= SHARE * means[best])


def main(args: argparse.Namespace) -> None:
    results, heads = [], []
    print(f"| encoder | head | best block | accuracy | first block with {SHARE:.0%} of it |\n|---|---|---|---|---|")
    for argument in args.runs:
        label, _, paths = argument.rpartition("=")
        probes, _, attention = paths.partition(",")
        encoder, accuracies = accuracy_by_block(probes)
        result = load_attention(Path(attention)) if attention else {"encoder": encoder, "metrics": {}}
        result["label"] = label or Path(probes).stem
        result["metrics"] |= {f"accuracy, {head}": as_metric(head, blocks) for head, blocks in accuracies.items()}
        heads += [f"accuracy, {head}" for head in accuracies if f"accuracy, {head}" not in heads]
        results.append(result)
        for head, blocks in accuracies.items():
            best, accuracy, first = reached(blocks)
            behind = encoder.get("decoder", {}).get("first_block", best + 1)
            best, first = (f"{block}{' (decoder)' * (block >= behind)}" for block in (best, first))
            print(f"| {result['label']} | {head} | {best} | {accuracy:.1f} | {first} |")
    measured = {name for result in results for name in result["metrics"]}
    names = args.metrics or [name for name in METRICS_SHOWN if name in measured]
    draw_attention(results, [*heads, *choose_metrics(names, results, (None, "head", "frequency", "rank"))], args.output)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=PROBES[,ATTENTION]", help="results of one encoder")
    parser.add_argument("--metrics", nargs="+", type=one_of([*GROUPS, *METRICS]), help=f"default: {METRICS_SHOWN}")
    parser.add_argument("--output", type=Path, default=Path("depth.png"), help="png, pdf or svg")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
