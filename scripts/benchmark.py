"""What things cost, as ratios of what was measured in one run on one machine: python scripts/benchmark.py analysis

Every repeat runs all contestants once, in turn, so that a machine whose speed drifts treats them alike. Times are
medians over the repeats, ratios the medians of each repeat's own ratio. Rows are appended to --output, with hardware,
versions and the command.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from attention_stats import PAPER_METRICS
from engine_attention import Recorder, applicable, observe
from main_analyze_attention import sizes_of
from models_vit import VisionTransformer, build_vit
from util.arguments import PRECISIONS, Parser, run_main
from util.progress import log, progress, setup_logging
from util.run_folder import provenance
from util.seeding import seeded


class Timing(NamedTuple):
    """Seconds of one run of a contestant: one per repeat."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_of(self, other: "Timing") -> float:
        """How many times as fast as the other: the median over the repeats."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def race(contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time each contestant `repeats` times, in turn, after one run of each that does not count."""
    seconds = {name: [] for name in contestants}
    for repeat in progress(range(repeats + 1), "repeats", repeats + 1, unit="repeat"):
        for name, contestant in contestants.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            contestant()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(times) for name, times in seconds.items()}


def published_statistics(attention: Tensor, update: Tensor, tokens: Tensor) -> list[Tensor]:
    """What the paper's released code takes from the whole attention (B,H,N,N) of a block; for encoders with [cls]."""
    to_patches = attention[..., 1:]
    total = to_patches.sum(-1, keepdim=True) + 1e-6
    renormalised = to_patches / total
    entropy = -(renormalised * (renormalised + 1e-6).log()).sum(-1)
    own, own_relative = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (attention, attention / total))
    per_token = torch.stack([own, own_relative, attention[:, :, 0], attention[..., 0], entropy])
    return [per_token[..., 0].mean(), per_token[..., 1:].mean(), update.norm(dim=-1), tokens.norm(dim=-1)]


def published_forward(backbone: VisionTransformer, images: Tensor) -> list[list[Tensor]]:
    """A forward pass that builds the attention of each block, for its own use and for the statistics."""
    tokens, found = torch.cat(backbone.embed(images), dim=1), []
    for block in backbone.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1, dtype=torch.float32)  # as autocast on CUDA does
        update = attn.proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        found.append(published_statistics(attention, update, tokens))
        tokens = tokens + block.ls1(update)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return found


def analysis(args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """The analysis with the paper's four metrics beside the encoder's plain forward and the published statistics."""
    size = args.input_size
    with seeded("benchmark", 0):
        backbone = build_vit(args.model, img_size=size).to(device).eval()
        images = torch.randn(args.batch_size, 3, size, size).to(device)
    if args.sharpen != 1:  # trained encoders have larger logits than new ones
        for block in backbone.blocks:
            block.attn.qkv.weight.data[: 2 * backbone.embed_dim] *= args.sharpen**0.5
    amp = PRECISIONS[args.amp]
    if args.compile:
        backbone.compile_blocks()
    sizes = sizes_of(backbone, size)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32)

    def plain() -> Tensor:
        with autocast():
            return backbone(images)[backbone.depth - 1].patches

    def analysed(names: tuple[str, ...] = PAPER_METRICS, reduction: str = "auto") -> Recorder:
        metrics, recorder = applicable(names, backbone), Recorder()
        with autocast():
            observed = {}
            for step in backbone.trace(images):
                observed |= observe(step, metrics, 1, True, sizes, reduction)
        recorder.add(observed)
        return recorder

    def published_on_trace() -> list[list[Tensor]]:
        found = []
        with autocast():
            for step in backbone.trace(images):
                logits = step.q @ step.k.transpose(-2, -1) * step.scale
                found.append(published_statistics(logits.softmax(-1, dtype=torch.float32), step.update, step.x))
        return found

    def published() -> list[list[Tensor]]:
        with autocast():
            return published_forward(backbone, images)

    contestants = {
        "plain forward": plain,
        "analysis": analysed,
        "analysis, explicit reduction": lambda: analysed(reduction="explicit"),
        "published statistics on the trace": published_on_trace,
        "published forward and statistics": published,
    }
    with torch.no_grad():
        return race(contestants, args.repeats, device)


BENCHMARKS = {"analysis": analysis}


def report(timings: dict[str, Timing], images: int, args: argparse.Namespace, device: torch.device) -> None:
    """A line per contestant: seconds, images/s, and its speed as a ratio of each other's."""
    run = provenance(device)
    rows = []
    for name, timing in timings.items():
        ratios = {other: timing.speed_of(timings[other]) for other in timings if other != name}
        log.info(
            "%-34s %8.1f ms (%.1f to %.1f) %8.1f images/s;  speed %s", name, 1e3 * timing.median,
            1e3 * min(timing.seconds), 1e3 * max(timing.seconds), images / timing.median,
            ", ".join(f"{ratio:.3f} x {other}" for other, ratio in ratios.items()),
        )  # fmt: skip
        rows.append({
            "benchmark": args.benchmark, "contestant": name, "median_s": f"{timing.median:.6f}",
            "min_s": f"{min(timing.seconds):.6f}", "max_s": f"{max(timing.seconds):.6f}", "repeats": args.repeats,
            "images_per_second": f"{images / timing.median:.2f}",
            "speed_of_first": f"{timing.speed_of(next(iter(timings.values()))):.4f}",
            "model": args.model, "input_size": args.input_size, "batch_size": args.batch_size, "amp": args.amp,
            "device": run["device"], "threads": run["threads"], "torch": run["versions"]["torch"],
            "commit": run["commit"], "dirty": run["dirty"], "command": run["command"],
        })  # fmt: skip
    if args.output is not None:
        exists = args.output.exists()
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            if not exists:
                writer.writeheader()
            writer.writerows(rows)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("benchmark", help=", ".join(BENCHMARKS))
    parser.add_argument("--model", default="vit_base_patch16", metavar="MODEL", help="architecture, by name")
    parser.add_argument("--input_size", default=224, type=int, help="pixels")
    parser.add_argument("--batch_size", default=16, type=int)
    parser.add_argument("--repeats", default=10, type=int)
    parser.add_argument("--amp", default="bfloat16", choices=list(PRECISIONS), help="precision of the encoder")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--sharpen", default=1.0, type=float, help="factor on all attention logits")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA where there is one")
    parser.add_argument("--output", default=None, type=Path, metavar="CSV", help="append the figures to this file")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {args.benchmark!r}: choose one of {', '.join(BENCHMARKS)}")
    setup_logging()
    has_cuda = torch.cuda.is_available()
    device = torch.device(args.device if args.device != "auto" else "cuda" if has_cuda else "cpu")
    report(BENCHMARKS[args.benchmark](args, device), args.batch_size, args, device)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
