"""What things cost, as ratios of what was measured in one run on one machine: python scripts/benchmark.py analysis

Every repeat runs all contestants once, in turn, so that a machine whose speed drifts treats them alike. Times are
medians over the repeats, ratios the medians of each repeat's own ratio. Rows are appended to --output, with hardware,
versions and the command.
--peak_memory: of each contestant too; on a CPU by running it once more, in a process of its own.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from benchmark_loader import endless, loading, views
from benchmark_pretrain import pretraining_steps
from torch import Tensor

from attention.measure import Recorder, applicable, observe
from attention.metrics import PAPER_METRICS
from cli.arguments import PRECISIONS, precision
from cli.console import Parser, run_main
from data_sets.loader import train_transform
from engine_linprobe import FrozenTokens
from main_analyze_attention import sizes_of
from models_vit import VisionTransformer, build_vit
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import parse_head
from runtime.provenance import provenance
from util.choices import instead_of
from util.lars import LARS
from util.progress import log, progress, setup_logging
from util.seeding import seeded


class Timing(NamedTuple):
    """Seconds of one run of a contestant: one per repeat."""

    seconds: list[float]
    peak_mib: float = float("nan")  # of the device's memory, or of the whole process on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_of(self, other: "Timing") -> float:
        """How many times as fast as the other: the median over the repeats."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def race(
    contestants: dict[str, Callable[[], object]], device: torch.device, args: argparse.Namespace
) -> dict[str, Timing]:
    """Time each contestant args.repeats times, in turn, after one run of each that does not count."""
    if args.only is not None:
        if args.only not in contestants:
            raise ValueError(f"--only {args.only}: {instead_of(args.only, contestants)}")
        contestants = {args.only: contestants[args.only]}
    seconds, repeats = {name: [] for name in contestants}, args.repeats
    peaks = dict.fromkeys(contestants, float("nan"))
    for repeat in progress(range(repeats + 1), "repeats", repeats + 1, unit="repeat"):
        for name, contestant in contestants.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            contestant()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) / 2**20
    if args.peak_memory and args.only is None and device.type != "cuda":
        peaks = {name: peak_of(name) for name in contestants}
    return {name: Timing(times, peaks[name]) for name, times in seconds.items()}


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
    amp = precision(args.amp)
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
        return race(contestants, device, args)


# one by one: heads that fold into columns, and those that transform every token
HEADS = (
    "pos", "abmilp", "ap1", "ap12", "ep32", "abmilp:depth=2", "abmilp:depth=3", "abmilp:depth=4",
    "abmilp:depth=2,act=gated", "abmilp:sa=map", "abmilp:sa=both", "abmilp:sa=residual,depth=2,act=tanh",
)  # fmt: skip


def training_step(
    backbone: VisionTransformer, words: list[tuple[str, float, int]], size: int, amp: torch.dtype,
    feed: Callable[[], tuple[Tensor, Tensor]],
) -> Callable[[], Tensor]:  # fmt: skip
    """The step of a bank of (head, blr, seed) on the last block: frozen forward, probes, their gradients, LARS.

    feed: gives the images and labels of a step.
    """
    specs = []
    for word, blr, seed in words:
        name, options = parse_head(word, {})
        specs.append(ProbeSpec(name, backbone.depth - 1, blr, seed, options))
    bank = ProbeBank(specs, backbone, backbone.grid_of(size, size), CLASSES).to(backbone.norm.weight.device).train()
    tokens = FrozenTokens(backbone, bank.blocks, amp, needs=bank.needs)
    optimizer = LARS(bank.parameter_groups([64 * spec.blr for spec in specs]))  # the rates of a batch of 16,384

    def step() -> Tensor:
        images, labels = feed()
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in bank(tokens(images))])
        losses.sum().backward()
        bank.commit_statistics()
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    return step


def probing(
    args: argparse.Namespace, device: torch.device, banks: dict[str, list[tuple[str, float, int]]]
) -> dict[str, Timing]:
    """The frozen forward, and the training steps of one [cls] probe and of each bank {name: (head, blr, seed)}."""
    size = args.input_size
    with seeded("benchmark", 0):
        backbone = build_vit(args.model, img_size=size).to(device).eval().requires_grad_(False)
        images = torch.randn(args.batch_size, 3, size, size).to(device)
        labels = torch.randint(CLASSES, (args.batch_size,)).to(device)
    amp = precision(args.amp)
    if args.compile:
        backbone.compile_blocks()

    @torch.no_grad()
    def plain() -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            return backbone(images)[backbone.depth - 1].patches

    contestants = {"plain forward": plain}
    for name, words in {"[cls] probe": [("cls", 0.1, 0)], **banks}.items():
        if args.only in (None, name):  # the memory of one is measured without the others
            contestants[name] = training_step(backbone, words, size, amp, lambda: (images, labels))
    if args.data_path is not None:
        batch = endless(views(args, args.num_workers, train_transform(size)))

        def loaded() -> tuple[Tensor, Tensor]:
            sample = batch()
            return sample.image.to(device, non_blocking=True), sample.label.to(device, non_blocking=True)

        name = f"[cls] probe, with a loader of {args.num_workers} workers"
        contestants[name] = training_step(backbone, [("cls", 0.1, 0)], size, amp, loaded)
    return race(contestants, device, args)


def probe(args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """One probe of each kind."""
    return probing(args, device, {f"{head} probe": [(head, 0.1, 0)] for head in HEADS})


def bank(args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """4, 16 and 64 single-query probes, over rates and seeds."""
    heads, rates = ("cls", "pos", "abmilp", "ap1", "ap12"), (0.05, 0.1, 0.2, 0.4)
    words = [(heads[i % 5], rates[i // 5 % 4], i // 20) for i in range(64)]
    return probing(args, device, {f"bank of {size} probes": words[:size] for size in (4, 16, 64)})


def pretrain(args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """Whole training steps of MAE, ours and Hugging Face's."""
    return race(pretraining_steps(args, device), device, args)


def loader(args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """What one core decodes and augments."""
    return race(loading(args, device), device, args)


BENCHMARKS = {"analysis": analysis, "probe": probe, "bank": bank, "pretrain": pretrain, "loader": loader}
CLASSES = 1000  # ImageNet's


def peak_of(name: str) -> float:
    """MiB that a process of its own needs to run one contestant."""
    words = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--repeats", "1"]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(output.rsplit("peak MiB ", 1)[1])


def report(timings: dict[str, Timing], images: int, args: argparse.Namespace, device: torch.device) -> None:
    """A line per contestant: seconds, images/s, and its speed as a ratio of each other's."""
    run = provenance(device)
    rows = []
    for name, timing in timings.items():
        ratios = {other: timing.speed_of(timings[other]) for other in list(timings)[:5] if other != name}
        log.info(
            "%-34s %8.1f ms (%.1f to %.1f) %8.1f images/s%s%s", name, 1e3 * timing.median,
            1e3 * min(timing.seconds), 1e3 * max(timing.seconds), images / timing.median,
            "" if math.isnan(timing.peak_mib) else f", {timing.peak_mib:.0f} MiB",
            ";  speed " * bool(ratios) + ", ".join(f"{ratio:.3f} x {other}" for other, ratio in ratios.items()),
        )  # fmt: skip
        rows.append({
            "benchmark": args.benchmark, "contestant": name, "median_s": f"{timing.median:.6f}",
            "min_s": f"{min(timing.seconds):.6f}", "max_s": f"{max(timing.seconds):.6f}", "repeats": args.repeats,
            "images_per_second": f"{images / timing.median:.2f}",
            "speed_of_first": f"{timing.speed_of(next(iter(timings.values()))):.4f}",
            "peak_mib": f"{timing.peak_mib:.0f}",
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
    parser.add_argument("--batch_size", default=16, type=int, help="images")
    parser.add_argument("--repeats", default=10, type=int, help="of each contestant")
    parser.add_argument("--amp", default="bfloat16", choices=list(PRECISIONS), help="precision of the encoder")
    parser.add_argument("--only", default=None, metavar="CONTESTANT", help="run one contestant alone")
    parser.add_argument("--peak_memory", action="store_true", help="measure memory on a CPU too")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--sharpen", default=1.0, type=float, help="factor on all attention logits")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA where there is one")
    parser.add_argument("--data_path", default=None, type=Path,
                        help="of loader: folder of images; of probe and bank: with a loader, too")  # fmt: skip
    parser.add_argument("--dataset", default="image_folder", help="its kind")
    parser.add_argument("--num_workers", default=1, type=int, help="of the probe's loader")
    parser.add_argument("--output", default=None, type=Path, metavar="CSV", help="append the figures to this file")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {args.benchmark!r}: {instead_of(args.benchmark, BENCHMARKS)}")
    setup_logging()
    has_cuda = torch.cuda.is_available()
    device = torch.device(args.device if args.device != "auto" else "cuda" if has_cuda else "cpu")
    report(BENCHMARKS[args.benchmark](args, device), args.batch_size, args, device)
    if args.only is not None:
        # not getrusage: it counts what the process that started this one held
        status = Path("/proc/self/status").read_text()
        print("peak MiB", int(status.split("VmHWM:")[1].split()[0]) / 2**10)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
