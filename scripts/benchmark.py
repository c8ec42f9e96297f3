"""Time what the programs do, as ratios within one run on one machine: python scripts/benchmark.py analysis

Each repeat runs all contestants once, in turn, so that a machine whose speed drifts treats them alike. Times are
medians over the repeats, ratios the medians of each repeat's own ratio. Rows are appended to --output, with hardware,
versions and command. `plot` draws the newest run of each benchmark in --output as bars into --figure.
--peak_memory: also each contestant's memory; on a CPU it is run once more, in a process of its own.
"""

import argparse
import csv
import functools
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from attention.measure import Recorder, applicable, observe
from attention.metrics import PAPER_METRICS, Sizes
from cli.console import Parser, run_main
from cli.encoder_arguments import PRECISIONS, precision
from data_sets.crop import RandomResizedCrop
from data_sets.loader import KeyedDataset, Loader, Sample, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from data_sets.packed import is_packed
from data_sets.table import build_dataset
from data_sets.views import IMAGENET_MEAN, IMAGENET_STD, View, eval_transform, train_transform
from engine_linprobe import FrozenTokens
from engine_pretrain import Pretraining
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import VisionTransformer, build_vit
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import canonical_head
from runtime.provenance import provenance
from util.choices import instead_of
from util.distributed import GradientMean
from util.lars import LARS
from util.optim import weight_decay_groups
from util.plotting import COLOURS, STYLE, WIDTH, save_figure
from util.progress import log, progress, setup_logging
from util.seeding import seeded

CLASSES = 1000  # ImageNet's
MASK_RATIO = 0.75
Contestants = dict[str, Callable[[], object]]


class Timing(NamedTuple):
    """Seconds of a contestant, one per repeat."""

    seconds: list[float]
    peak_mib: float = math.nan  # of the device's memory, or of the whole process on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed_of(self, other: "Timing") -> float:
        """How many times as fast as the other: the median over the repeats."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def race(contestants: Contestants, device: torch.device, repeats: int, peak_memory: bool) -> dict[str, Timing]:
    """Time each contestant, in turn, after one run of each that does not count."""
    seconds, peaks = {name: [] for name in contestants}, dict.fromkeys(contestants, math.nan)
    on_gpu = device.type == "cuda"
    for repeat in progress(range(repeats + 1), "repeats", repeats + 1, unit="repeat"):
        for name, contestant in contestants.items():
            if on_gpu:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            contestant()
            if on_gpu:
                torch.cuda.synchronize(device)
                peaks[name] = torch.cuda.max_memory_allocated(device) / 2**20
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    if peak_memory and not on_gpu:
        peaks = {name: peak_of(name) for name in contestants}
    return {name: Timing(times, peaks[name]) for name, times in seconds.items()}


def peak_of(name: str) -> float:
    """MiB that a process of its own needs to run one contestant."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--repeats", "1"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.rsplit("peak MiB ", 1)[1])


def autocast(device: torch.device, amp: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32)


def encoder_and_images(args: argparse.Namespace, device: torch.device) -> tuple[VisionTransformer, Tensor, Tensor]:
    size = args.input_size
    with seeded("benchmark", 0):
        backbone = build_vit(args.model, img_size=size).to(device).eval().requires_grad_(False)
        images = torch.randn(args.batch_size, 3, size, size).to(device)
        labels = torch.randint(CLASSES, (args.batch_size,)).to(device)
    if args.compile:
        backbone.compile_blocks()
    return backbone, images, labels


def plain_forward(backbone: VisionTransformer, images: Tensor, amp: torch.dtype) -> Callable[[], Tensor]:
    @torch.no_grad()
    def forward() -> Tensor:
        with autocast(images.device, amp):
            return backbone(images)[backbone.depth - 1].patches

    return forward


def published_statistics(attention: Tensor, update: Tensor, tokens: Tensor) -> list[Tensor]:
    """What the paper's released code takes from a block's whole attention (B,H,N,N); for encoders with [cls]."""
    to_patches = attention[..., 1:]
    total = to_patches.sum(-1, keepdim=True) + 1e-6
    renormalised = to_patches / total
    entropy = -(renormalised * (renormalised + 1e-6).log()).sum(-1)
    own, own_relative = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (attention, attention / total))
    per_token = torch.stack([own, own_relative, attention[:, :, 0], attention[..., 0], entropy])
    return [per_token[..., 0].mean(), per_token[..., 1:].mean(), update.norm(dim=-1), tokens.norm(dim=-1)]


def published_forward(backbone: VisionTransformer, images: Tensor) -> list[list[Tensor]]:
    """A forward pass that builds each block's attention, for its own use and for the statistics."""
    tokens, results = torch.cat(backbone.embed(images), dim=1), []
    for block in backbone.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1, dtype=torch.float32)  # as autocast on CUDA does
        update = attn.proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        results.append(published_statistics(attention, update, tokens))
        tokens = tokens + block.ls1(update)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return results


def analysis(args: argparse.Namespace, device: torch.device) -> Contestants:
    """The paper's four metrics beside the encoder's plain forward and the published statistics."""
    backbone, images, _ = encoder_and_images(args, device)
    amp, sizes = precision(args.amp), Sizes.of(backbone, args.input_size)

    def analysed() -> Recorder:
        metrics, recorder, observed = applicable(PAPER_METRICS, backbone), Recorder(), {}
        with autocast(device, amp):
            for step in backbone.trace(images):
                observed |= observe(step, metrics, 1, True, sizes, "auto")
        recorder.add(observed)
        return recorder

    def published() -> list[list[Tensor]]:
        with autocast(device, amp):
            return published_forward(backbone, images)

    contestants = {"plain forward": plain_forward(backbone, images, amp)}
    contestants |= {"analysis": analysed, "published forward and statistics": published}
    return {name: torch.no_grad()(contestant) for name, contestant in contestants.items()}


# heads that fold into columns, and those that transform every token
HEADS = (
    *("pos", "abmilp", "ap1", "ap12", "ep32", "abmilp:depth=2", "abmilp:depth=3", "abmilp:depth=4"),
    *("abmilp:depth=2,act=gated", "abmilp:sa=map", "abmilp:sa=both", "abmilp:sa=residual,depth=2,act=tanh"),
)
Bank = list[tuple[str, float, int]]  # (head, base rate, seed) of each probe


def training_step(
    backbone: VisionTransformer, probes: Bank, size: int, amp: torch.dtype, feed: Callable[[], tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    """The step of a bank on the last block: frozen forward, probes, their gradients, LARS. feed: images, labels."""
    specs = [
        ProbeSpec(canonical_head(head, {}, backbone.depth), backbone.depth - 1, blr, seed) for head, blr, seed in probes
    ]
    bank = ProbeBank(specs, backbone, backbone.grid_of(size, size), CLASSES).to(backbone.norm.weight.device).train()
    tokens = FrozenTokens(backbone, bank.blocks, amp, needs=bank.needs)
    optimizer = LARS(bank.parameter_groups([64 * spec.blr for spec in specs]))  # the rates of a batch of 16,384

    def step() -> Tensor:
        images, labels = feed()
        logits = bank.logits(tokens(images))
        losses = torch.cat(
            [F.cross_entropy(each, labels.expand(len(each), -1), reduction="none").mean(1) for each in logits]
        )
        losses.sum().backward()
        bank.commit_statistics(
            optimizer.guarded_step([torch.ones_like(stack.index, dtype=torch.bool) for stack in bank.stacks])
        )
        optimizer.zero_grad()
        return losses.detach()

    return step


def probing(args: argparse.Namespace, device: torch.device, banks: dict[str, Bank]) -> Contestants:
    """The frozen forward, and the training steps of one [cls] probe and of each bank."""
    backbone, images, labels = encoder_and_images(args, device)
    amp, size = precision(args.amp), args.input_size
    contestants = {"plain forward": plain_forward(backbone, images, amp)}
    for name, probes in {"[cls] probe": [("cls", 0.1, 0)], **banks}.items():
        if args.only in (None, name):  # the memory of one is measured without the others
            contestants[name] = training_step(backbone, probes, size, amp, lambda: (images, labels))
    if args.data_path is not None:
        batch = endless(views(args, args.num_workers, train_transform(size)))

        def loaded() -> tuple[Tensor, Tensor]:
            sample = batch()
            return sample.image.to(device, non_blocking=True), sample.label.to(device, non_blocking=True)

        name = f"[cls] probe, with a loader of {args.num_workers} workers"
        contestants[name] = training_step(backbone, [("cls", 0.1, 0)], size, amp, loaded)
    return contestants


def probe(args: argparse.Namespace, device: torch.device) -> Contestants:
    return probing(args, device, {f"{head} probe": [(head, 0.1, 0)] for head in HEADS})


def bank(args: argparse.Namespace, device: torch.device) -> Contestants:
    """4, 16 and 64 single-query probes, over rates and seeds."""
    heads, rates = ("cls", "pos", "abmilp", "ap1", "ap12"), (0.05, 0.1, 0.2, 0.4)
    probes = [(heads[i % 5], rates[i // 5 % 4], i // 20) for i in range(64)]
    return probing(args, device, {f"bank of {size} probes": probes[:size] for size in (4, 16, 64)})


def hugging_face_twin(model: MaskedAutoencoder, attention: str) -> torch.nn.Module:
    """Hugging Face's ViTMAE of the same sizes, with new weights; attention: its attn_implementation."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, width = model.encoder, model.decoder_embed.out_features
    sizes = {
        **{"hidden_size": encoder.embed_dim, "num_hidden_layers": encoder.depth},
        **{"num_attention_heads": encoder.num_heads, "intermediate_size": 4 * encoder.embed_dim},
        **{"image_size": encoder.grid_size[0] * encoder.patch_size, "patch_size": encoder.patch_size},
        **{"decoder_hidden_size": width, "decoder_num_hidden_layers": len(model.decoder_blocks)},
        **{"decoder_num_attention_heads": model.decoder_blocks[0].attn.num_heads},
        **{"decoder_intermediate_size": 4 * width},
    }
    options = {"layer_norm_eps": 1e-6, "mask_ratio": MASK_RATIO, "norm_pix_loss": True}
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes, **options, attn_implementation=attention))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The recipe's optimizer, fused, for every contestant, at any rate."""
    return torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)


def pretrain(args: argparse.Namespace, device: torch.device) -> Contestants:
    """Forward, loss, backward and optimizer step on the same images: ours, and Hugging Face's with either attention."""
    size, amp = args.input_size, precision(args.amp)
    with seeded("benchmark", 0):
        encoder = build_vit(args.model, img_size=size)
        model = MaskedAutoencoder(encoder, **DECODERS[args.model])
        images = torch.randn(args.batch_size, 3, size, size)
        noise = torch.rand(args.batch_size, encoder.grid_size[0] * encoder.grid_size[1])
    indices = torch.arange(args.batch_size)
    sample = Sample(images.to(device), indices, indices, noise.to(device))

    def ours() -> Callable[[], Tensor]:
        model.to(device)
        if args.compile:
            model.compile_blocks()
        method = Pretraining(model, adamw(model), MASK_RATIO, device, amp)

        def step() -> Tensor:  # as runtime.training takes it
            mean = GradientMean(method.parameters, 1)
            losses = method.losses(sample, ())
            losses.sum().backward()
            mean.add(losses)
            losses = mean.take()
            method.step(losses.isfinite())
            method.optimizer.zero_grad()
            return losses

        return step

    def theirs(attention: str) -> Callable[[], Tensor]:
        twin = hugging_face_twin(model, attention).to(device).train()
        if args.compile:
            twin.compile()
        optimizer = adamw(twin)

        def step() -> Tensor:
            with autocast(device, amp):
                loss = twin(sample.image, noise=sample.noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    makers = {"pretraining step": ours}
    makers |= {f"Hugging Face, {kind}": functools.partial(theirs, kind) for kind in ("sdpa", "eager")}
    return {name: make() for name, make in makers.items() if args.only in (None, name)}


def loader(args: argparse.Namespace, device: torch.device) -> Contestants:
    """Batches that one core decodes, crops, flips and normalises: as usually written with torchvision, by its v2 on
    tensors, and by each --loader; and each --loader's test views."""
    if args.data_path is None:
        raise ValueError("loader: name a data set with --data_path, of --dataset's kind")
    torch.set_num_threads(1)  # as in a loader's worker
    size, folder, bicubic = args.input_size, args.data_path / split_of(args), transforms.InterpolationMode.BICUBIC
    crop, flip = RandomResizedCrop(size, interpolation=bicubic), transforms.RandomHorizontalFlip()
    normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    usual = transforms.Compose([crop, flip, transforms.ToTensor(), normalise])
    crop, flip = v2.RandomResizedCrop(size, interpolation=bicubic, antialias=True), v2.RandomHorizontalFlip()
    to_float, normalise = v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    on_tensors = v2.Compose([crop, flip, to_float, normalise])

    def decode(path: str) -> Tensor:
        return decode_image(path, ImageReadMode.RGB)

    contestants = {}
    if args.dataset == "image_folder" and not is_packed(args.data_path):
        batches = functools.partial(DataLoader, batch_size=args.batch_size, shuffle=True, drop_last=True)
        contestants["torchvision, PIL images"] = endless(batches(ImageFolder(folder, usual)))
        contestants["torchvision, v2 on tensors"] = endless(batches(ImageFolder(folder, on_tensors, loader=decode)))
    names = ["pil", "tensor", *["packed"] * is_packed(args.data_path), *["gpu"] * (device.type == "cuda")]
    for name in names:
        contestants[f"--loader {name}"] = endless(views(args, 0, train_transform(size, loader=name)))
    for name in names:
        contestants[f"--loader {name}, test"] = endless(views(args, 0, eval_transform(size, loader=name), test=True))
    return contestants


def split_of(args: argparse.Namespace) -> str:
    return "train" if args.dataset != "image_folder" or (args.data_path / "train").is_dir() else "val"


def views(args: argparse.Namespace, workers: int, view: View, test: bool = False) -> Loader:
    """Batches of views of images as the programs load them. test: in the order of an evaluation."""
    images = build_dataset(args.dataset, args.data_path, split_of(args), allow_subset=True)
    batches = GlobalBatches(len(images), args.batch_size, 1, seed=0)
    if test:
        batches = EvaluationBatches(len(images), args.batch_size, range(batches.steps * args.batch_size))
    return build_loader(KeyedDataset(images, view, 0, noise=196), batches, num_workers=workers)


def endless(loader: DataLoader) -> Callable[[], Any]:
    """Batch after batch, epoch after epoch."""

    def batches() -> Iterator[object]:
        for epoch in itertools.count():
            if isinstance(loader, Loader):
                loader.batch_sampler.epoch = epoch
            yield from loader

    return functools.partial(next, batches())


def report(timings: dict[str, Timing], args: argparse.Namespace, device: torch.device) -> None:
    """A line per contestant: seconds, images/s, and its speed as a ratio of each other's; rows of --output."""
    run, images, rows = provenance(device), args.batch_size, []
    first = next(iter(timings.values()))
    for name, timing in timings.items():
        ratios = (f"{timing.speed_of(timings[other]):.3f} x {other}" for other in list(timings)[:5] if other != name)
        low, high, speed = min(timing.seconds), max(timing.seconds), images / timing.median
        text = f"{1e3 * timing.median:8.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}) {speed:8.1f} images/s"
        log.info("%-34s %s; speed %s; peak %.0f MiB", name, text, ", ".join(ratios), timing.peak_mib)
        row = {"benchmark": args.benchmark, "contestant": name, "median_s": f"{timing.median:.6f}"}
        row |= {"min_s": f"{low:.6f}", "max_s": f"{high:.6f}", "repeats": args.repeats}
        row |= {"images_per_second": f"{speed:.2f}", "speed_of_first": f"{timing.speed_of(first):.4f}"}
        row |= {"peak_mib": f"{timing.peak_mib:.0f}"}
        row |= {key: getattr(args, key) for key in ("model", "input_size", "batch_size", "amp")}
        row |= {"device": run["device"], "threads": run["threads"], "torch": run["versions"]["torch"]}
        rows.append(row | {key: run[key] for key in ("commit", "dirty", "command")})
    if args.output is not None:
        exists = args.output.exists()
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            if not exists:
                writer.writeheader()
            writer.writerows(rows)


SETTINGS = ("benchmark", "model", "input_size", "batch_size", "amp", "device", "threads")
Runs = dict[tuple[str, ...], list[dict[str, str]]]  # {settings: a row per contestant}


def newest(rows: Sequence[dict[str, str]]) -> Runs:
    """The last run at each setting; rows of a run follow each other and have one command."""
    runs: Runs = {}
    for before, row in itertools.pairwise([None, *rows]):
        key = tuple(row[name] for name in SETTINGS)
        same_run = before is not None and (row["command"], row["commit"]) == (before["command"], before["commit"])
        if key not in runs or not same_run or row["contestant"] in [other["contestant"] for other in runs[key]]:
            runs[key] = []
        runs[key].append(row)
    return runs


def read_runs(path: Path) -> Runs:
    try:
        with open(path, newline="") as file:
            return newest(list(csv.DictReader(file)))
    except (OSError, KeyError) as error:
        raise ValueError(f"--output {path} is not a file that scripts/benchmark.py wrote: {error}") from error


def plot(runs: Runs) -> Figure:
    """A panel per run: times relative to the first contestant's, and images per second."""
    runs = dict(sorted(runs.items(), key=lambda item: (item[0][0], item[0][4], int(item[0][3]))))
    with matplotlib.rc_context(STYLE):
        heights = [len(rows) for rows in runs.values()]
        figure = Figure(figsize=(WIDTH, 0.17 * sum(heights) + 0.42 * len(heights)), layout="constrained")
        axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
        for axis, (key, rows) in zip(axes, runs.items(), strict=True):
            benchmark, model, size, batch, amp, device, threads = key
            times = [1 / float(row["speed_of_first"]) for row in rows]
            axis.barh([row["contestant"] for row in rows], times, color=[COLOURS[0]] + [COLOURS[1]] * (len(rows) - 1))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            for y, (relative, row) in enumerate(zip(times, rows, strict=True)):
                text = f"{relative:.2f}   {float(row['images_per_second']):,.1f} images/s"
                at = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6, "bbox": box}
                axis.annotate(text, (relative, y), **at)
            axis.set_xlim(0, 1.3 * max(times))
            axis.invert_yaxis()
            axis.axvline(1, color="black", linewidth=0.5)
            encoder, cores = ("", "1 thread") if benchmark == "loader" else (f"{model}, {amp}, ", f"{threads} threads")
            title = f"{benchmark}: {encoder}{size} pixels, {batch} images a step; {device}, {cores}"
            axis.set_title(title, fontsize=7, loc="left")
        axes[-1].set_xlabel("time relative to the first")
        return figure


BENCHMARKS = {"analysis": analysis, "probe": probe, "bank": bank, "pretrain": pretrain, "loader": loader}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "plot"])
    parser.add_argument("--model", default="vit_base_patch16", metavar="MODEL", help="architecture, by name")
    parser.add_argument("--input_size", default=224, type=int, help="pixels")
    parser.add_argument("--batch_size", default=16, type=int, help="images")
    parser.add_argument("--repeats", default=10, type=int, help="of each contestant")
    parser.add_argument("--amp", default="bfloat16", choices=list(PRECISIONS), help="precision of the encoder")
    parser.add_argument("--only", default=None, metavar="CONTESTANT", help="run one contestant alone")
    parser.add_argument("--peak_memory", action="store_true", help="measure memory on a CPU too")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA where available")
    parser.add_argument("--data_path", default=None, type=Path, help="images of loader; also loaded by probe, bank")
    parser.add_argument("--dataset", default="image_folder", help="kind of --data_path")
    parser.add_argument("--num_workers", default=1, type=int, help="of the probe's loader")
    parser.add_argument("--output", default=None, type=Path, metavar="CSV", help="append the figures to this file")
    parser.add_argument("--figure", default=None, type=Path, metavar="FILE", help="of plot: png, pdf or svg")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.benchmark == "plot":
        if args.output is None or args.figure is None:
            raise ValueError("plot: name the figures with --output CSV and the chart with --figure FILE")
        save_figure(plot(read_runs(args.output)), args.figure)
        return
    setup_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(device)
    contestants = BENCHMARKS[args.benchmark](args, device)
    if args.only is not None:
        if args.only not in contestants:
            raise ValueError(f"--only {args.only}: {instead_of(args.only, contestants)}")
        contestants = {args.only: contestants[args.only]}
    report(race(contestants, device, args.repeats, args.peak_memory and args.only is None), args, device)
    if args.only is not None:
        # not getrusage: it counts what the process that started this one held
        status = Path("/proc/self/status").read_text()
        print("peak MiB", int(status.split("VmHWM:")[1].split()[0]) / 2**10)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
