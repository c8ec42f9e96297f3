"""Time what the programs do, beside what it is compared with: python scripts/benchmark.py step heads --output CSV

groups:
  step      the training step of main_linprobe with banks of probes, beside that of one probe
  accumulate  the step of the smallest bank, of one and of two micro-batches, beside the encoder's forward pass
  heads     the step without the encoder: a run with cached features
  paper     all heads of Tables 1, 5, 6 and 7 in one pass, and each of them in a pass of its own
  evaluate  the evaluation of banks, k-nearest neighbours among 50,000 images, and MaxBoxAccV2 of maps
  analysis  attention metrics, beside timm's forward pass
  pretrain  the training step of main_pretrain, beside Hugging Face's ViTMAE with both of its attentions
  loader    batches that one core loads from --data_path, a data set or a folder of scripts/pack_images.py
  start     programs from their start to their help
  values    no times: fast code against its definitions, on this device
  plot      a chart of --output, at --figure
  table     the table of costs from --output, written into the page --write

Each round runs all contestants of a group in turn, so that a machine whose speed drifts treats them alike. Times are
medians over the rounds; ratios are medians of the rounds' own ratios to the first contestant, with their range. Rows
are appended to --output, and only from a commit without changes.
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
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine_linprobe
from aggregation.localization import levels_of, tally
from attention.measure import applicable, measure
from attention.metrics import GROUPS, METRICS, Sizes, reduce_attention
from cli.arguments import add_groups
from cli.console import Parser, positive_int, run_main
from cli.encoder_arguments import build_encoder, choose_precision, precision
from cli.linprobe import OPTIMIZERS
from cli.session import keep_freed_memory
from data_sets.loader import KeyedDataset, Sample, build_loader
from data_sets.order import GlobalBatches
from data_sets.shards import is_packed
from data_sets.table import build_dataset
from data_sets.views import train_transform
from engine_linprobe import FrozenTokens, Probing
from engine_pretrain import Pretraining
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import build_vit, compile_blocks
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import canonical_head
from probing.knn import knn_scores
from runtime.folder import RunFolder
from runtime.provenance import provenance
from runtime.training import Method, Plan, Training
from util.files import keep_table, no_link
from util.lars import LARS
from util.progress import log, peak_memory, progress, setup_logging
from util.scores import Tally

Contestant = Callable[[], object]
Contestants = dict[str, Contestant]
DEEP = [f"abmilp:depth={depth},act={act}" for depth in (2, 3, 4) for act in ("relu", "gelu", "tanh")]
MIXED = ["cls", "pos", "abmilp", "ap1", "ap12"]  # with rates and seeds, a bank of any number
PAPER = [*MIXED, *DEEP, "abmilp:sa=both", *("attn-mn", "attn-lcte", "ca1", "ca2", "cp1", "cp2")]
PROGRAMS = ("main_linprobe.py", "main_analyze_attention.py", "main_pretrain.py", "submitit_linprobe.py")


class Operations(TorchDispatchMode):
    """Counts the operations that are launched in its block."""

    launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.launched += 1
        return func(*args, **(kwargs or {}))


class Setting:
    """A random or trained encoder, a batch of images, and what contestants are built from."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.amp = args, device, precision(args.amp)
        encoder, self.size = build_encoder(args)
        self.backbone = encoder.backbone.to(device).eval().requires_grad_(False)
        if args.compile:
            compile_blocks(self.backbone)
        torch.manual_seed(0)
        indices = torch.arange(args.batch_size)
        noise = torch.rand(args.batch_size, math.prod(self.backbone.grid_of(self.size, self.size)))
        images = torch.randn(args.batch_size, 3, self.size, self.size)
        labels = torch.randint(args.classes, (args.batch_size,))
        self.sample = Sample(images.to(device), labels.to(device), indices, noise.to(device))

    def forward(self) -> Any:
        return FrozenTokens(self.backbone, (self.backbone.depth - 1,), self.amp)(self.sample.image)

    def bank(self, specs: Sequence[tuple[str, float, int]]) -> tuple[ProbeBank, FrozenTokens]:
        """A bank of (head, base rate, seed) on the last block, and what it reads."""
        last = self.backbone.depth - 1
        probes = [ProbeSpec(canonical_head(head, {}, last + 1), last, rate, seed) for head, rate, seed in specs]
        grid, amp = self.backbone.grid_of(self.size, self.size), self.amp if self.args.head_amp else torch.float32
        bank = ProbeBank(probes, self.backbone, grid, self.args.classes, amp=amp).to(self.device)
        return bank, FrozenTokens(self.backbone, bank.blocks, self.amp, needs=bank.needs)

    def step(self, specs: Sequence[tuple[str, float, int]], cached: bool = False, accum: int = 1) -> Contestant:
        """An optimizer step of main_linprobe; cached: its tokens were computed before."""
        bank, tokens = self.bank(specs)
        rates = [64 * spec.blr for spec in bank.specs]  # of the effective batch of 16,384
        optimizer = LARS([group | OPTIMIZERS["lars"] for group in bank.parameter_groups(rates)], weight_decay=0.0)
        if cached:
            tokens = functools.partial(lambda read, images: read, tokens(self.sample.image))
            tokens.backbone = self.backbone
        return self.training(Probing(bank, tokens, optimizer, self.device), optimizer, accum)

    def training(self, method: Method, optimizer: torch.optim.Optimizer, accum: int = 1) -> Contestant:
        """A step as runtime.training takes it."""
        order = SimpleNamespace(accum_iter=accum, joined=1, steps=10**6, effective=accum * self.args.batch_size)
        run = Training(
            Plan(1, 0), method, optimizer, lambda epoch, rate: rate, [self.sample] * accum, order, RunFolder("")
        )
        return run.train_one_epoch


def mixed(probes: int) -> list[tuple[str, float, int]]:
    """Heads of Table 1 and 7 by rates and seeds."""
    return [(MIXED[i % 5], 0.05 * 2 ** (i // 5 % 4), i // 20) for i in range(probes)]


def step(setting: Setting, cached: bool = False) -> Contestants:
    sizes = {"one [cls] probe": 1, **{f"{n} probes": n for n in setting.args.probes}}
    return {name: setting.step(mixed(n), cached) for name, n in sizes.items()}


def accumulate(setting: Setting) -> Contestants:
    probes = min(setting.args.probes)
    steps = {f"{probes} probes, accumulation {n}": setting.step(mixed(probes), accum=n) for n in (1, 2)}
    return {"plain forward": setting.forward, **steps}


def paper(setting: Setting) -> Contestants:
    """The sum of the runs' ratios is the factor by which one pass is faster than a run for each head."""
    chosen = PAPER if not setting.args.tiny else PAPER[:6]
    singles = {f"run of {head}": setting.step([(head, 0.1, 0)]) for head in chosen}
    return {"all heads in one pass": setting.step([(head, 0.1, 0) for head in chosen]), **singles}


def evaluate(setting: Setting) -> Contestants:
    def evaluated(probes: int) -> Contestant:
        bank, tokens = setting.bank(mixed(probes))
        counts = functools.partial(Tally, probes, setting.args.classes, setting.device)
        return lambda: engine_linprobe.evaluate(bank, tokens, [setting.sample], setting.device, counts())

    count = 50_000 if not setting.args.tiny else 300
    train, test = (torch.randn(n, 768, device=setting.device) for n in (count, 512))
    labels, answers = (torch.randint(1000, (n,), device=setting.device) for n in (count, 512))
    # of noise: the slowest kind
    maps = torch.rand(setting.args.batch_size, 1, *setting.backbone.grid_of(setting.size, setting.size)).numpy()
    truths = [np.array([[0, 0, setting.size // 2, setting.size // 2]])] * len(maps)
    return {
        "plain forward": setting.forward,
        **{f"{n} probes": evaluated(n) for n in setting.args.probes},
        f"512 queries among {count}": lambda: knn_scores(train, labels, test, answers, [10, 20, 100, 200], 1000),
        "MaxBoxAccV2 of as many maps": lambda: tally(maps, truths, (setting.size, setting.size), levels_of(0.001)),
    }


def analysis(setting: Setting) -> Contestants:
    import timm

    from encoders.libraries import Loaded, Pixels, run_model
    from encoders.traced import TracedEncoder

    amp, device = setting.amp, setting.device

    def analysed(backbone: Any, group: str) -> Contestant:
        metrics, sizes = applicable(list(GROUPS[group]), backbone), Sizes.of(backbone, setting.size)
        return lambda: measure(backbone, [setting.sample], metrics, sizes, amp, "auto", device)

    @torch.no_grad()
    def timms_forward() -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            return twin.forward_features(setting.sample.image)

    name = "vit_base_patch16_224" if not setting.args.tiny else "test_vit"
    twin = timm.create_model(name, num_classes=0, img_size=setting.size).to(device).eval()
    traced = TracedEncoder(Loaded(twin, "", run_model, setting.size, Pixels(), None))
    return {
        "timm's forward": timms_forward,
        "plain forward": setting.forward,
        **{f"metrics {group}": analysed(setting.backbone, group) for group in ("paper", "flow", "all")},
        "metrics paper, traced timm model": analysed(traced, "paper"),
    }


def pretrain(setting: Setting) -> Contestants:
    from timm.optim import param_groups_weight_decay
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    def adamw(model: nn.Module) -> torch.optim.AdamW:
        groups = [{**group, "peak_lr": 1e-4} for group in param_groups_weight_decay(model, 0.05)]
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    encoder = build_vit(setting.args.model, img_size=setting.size)
    model = MaskedAutoencoder(encoder, **DECODERS[setting.args.model]).to(setting.device)
    optimizer = adamw(model)
    ours = setting.training(Pretraining(model, optimizer, 0.75, setting.device, setting.amp), optimizer)

    def theirs(attention: str) -> Contestant:
        config = ViTMAEConfig(**hugging_face_sizes(model), norm_pix_loss=True, attn_implementation=attention)
        twin = ViTMAEForPreTraining(config).to(setting.device)
        optimizer = adamw(twin.train())

        def run() -> None:
            with torch.autocast(setting.device.type, dtype=setting.amp, enabled=setting.amp != torch.float32):
                loss = twin(setting.sample.image, noise=setting.sample.noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"pretraining step": ours, **{f"Hugging Face, {kind}": theirs(kind) for kind in ("sdpa", "eager")}}


def hugging_face_sizes(model: MaskedAutoencoder) -> dict[str, int | float]:
    encoder, blocks = model.encoder, model.decoder_blocks
    width, size = model.decoder_embed.out_features, encoder.grid_size[0] * encoder.patch_size
    return {
        **{"image_size": size, "patch_size": encoder.patch_size, "layer_norm_eps": 1e-6},
        **{"hidden_size": encoder.embed_dim, "num_hidden_layers": encoder.depth},
        **{"num_attention_heads": encoder.num_heads, "intermediate_size": 4 * encoder.embed_dim},
        **{"decoder_hidden_size": width, "decoder_num_hidden_layers": len(blocks)},
        **{"decoder_num_attention_heads": blocks[0].attn.num_heads, "decoder_intermediate_size": 4 * width},
    }


def loader(setting: Setting) -> Contestants:
    args, packed = setting.args, is_packed(setting.args.data_path)
    torch.set_num_threads(1)  # as in a loader's worker
    images = build_dataset(args.dataset, args.data_path, "train", allow_subset=True)

    def batches(name: str) -> Iterator[object]:
        order = GlobalBatches(len(images), args.batch_size, 1, seed=0)
        dataset = KeyedDataset(images, train_transform(setting.size, loader=name), 0)
        batches = build_loader(dataset, order, 0, device=setting.device)
        for epoch in itertools.count():
            order.epoch = epoch
            yield from batches

    names = ["packed"] if packed else ["pil", "tensor", *["gpu"] * (setting.device.type == "cuda")]
    return {f"--loader {name}": functools.partial(next, batches(name)) for name in names}


def start(setting: Setting) -> Contestants:
    def helped(program: str) -> Contestant:
        command = [sys.executable, Path(__file__).parent.parent / program, "--help"]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    return {program: helped(program) for program in PROGRAMS}


def values(setting: Setting) -> Contestants:
    """ValueError where fast code does not compute what its definition does, within what its precision allows."""
    wide, images = setting.backbone.double(), setting.sample.image[:2].double()
    checks: dict[str, tuple[Tensor, Tensor, float]] = {}  # ours, exact, allowed relative error
    with torch.no_grad():
        for trace in (traces := list(wide.trace(images))):
            exact = reduce_attention(trace, 1, True, "explicit")
            single = trace._replace(**{name: getattr(trace, name).float() for name in ("q", "k")})
            ours = reduce_attention(single, 1, True)
            for name in GROUPS["paper"]:
                both = (METRICS[name].compute(reduced) for reduced in (ours, exact))
                checks[f"{name} of block {trace.index}"] = *both, 1e-4
        exact, narrow = traces[-1].out, setting.backbone.float()
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            checks["tokens in bfloat16"] = list(narrow.trace(images.float()))[-1].out, exact, 0.05
        compile_blocks(narrow, "inductor" if setting.device.type == "cuda" else "eager")
        checks["tokens of compiled blocks"] = list(narrow.trace(images.float()))[-1].out, exact, 1e-3
    for what, (ours, exact, allowed) in checks.items():
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        log.info("%-44s relative error %.1e", what, error)
        if not error <= allowed:
            raise ValueError(f"{what}: relative error {error:.1e}, allowed {allowed:.0e}")
    return {}


BENCHMARKS: dict[str, Callable[[Setting], Contestants]] = {
    **{function.__name__: function for function in (step, accumulate, paper, evaluate, analysis, pretrain, loader)},
    **{"heads": functools.partial(step, cached=True), "start": start, "values": values},
}


def race(contestants: Contestants, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Facts of each contestant, in columns of the table. One run of each does not count: its operations are counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    facts: dict[str, dict[str, Any]] = {name: {} for name in contestants}
    for number in progress(range(rounds + 1), "rounds", rounds + 1, unit="round"):
        for name, contestant in contestants.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            begin = time.perf_counter()
            if number == 0:
                with Operations() as operations:
                    contestant()
                facts[name]["operations"] = operations.launched
            else:
                contestant()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
            facts[name]["peak_gib"] = f"{peak_memory(device):.3f}"  # on a CPU: of the process so far
    first = next(iter(seconds.values()), [])[1:]
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times[1:], first, strict=True)]
        for column, numbers in (("seconds", times[1:]), ("ratio", ratios)):
            spread = {"": statistics.median(numbers), "_min": min(numbers), "_max": max(numbers)}
            facts[name] |= {f"{column}{suffix}": f"{number:.6f}" for suffix, number in spread.items()}
        yield {"contestant": name, **facts[name]}


def text_of(row: dict[str, Any]) -> str:
    """A ratio, unless it is within the noise: the range of the rounds includes 1."""
    low, ratio, high = (float(row[f"ratio{suffix}"]) for suffix in ("_min", "", "_max"))
    if low == high == 1:  # the first
        return "1"
    return "no difference" if low <= 1 <= high else f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def run(args: argparse.Namespace, device: torch.device) -> None:
    origin, setting = provenance(device), Setting(args, device)
    if args.output is not None and origin["dirty"]:
        raise ValueError(f"--output {args.output} is for commits without changes: commit them, or omit --output")
    shared = {key: getattr(args, key) for key in ("model", "finetune", "batch_size", "classes", "amp", "rounds")}
    shared |= {"input_size": setting.size, "torch": origin["versions"]["torch"]}
    shared |= {key: origin[key] for key in ("device", "threads", "commit", "command")}
    for name in args.groups:
        rows = []
        for row in race(BENCHMARKS[name](setting), device, args.rounds):
            speed = f"{args.batch_size / float(row['seconds']):.2f}"
            rows.append({"group": name, **row, "images_per_second": speed, **shared})
            text = f"{1e3 * float(row['seconds']):.1f} ms, {speed} images/s, {row['operations']} operations"
            log.info("%-9s %-36s %s; times the first: %s", name, row["contestant"], text, text_of(row))
        if name == "paper":
            _, runs = summed(rows)
            log.info("paper: one pass is %.1f times as fast as %s", runs["ratio"], runs["contestant"])
        if args.output is not None and rows:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with open(args.output, "a", newline="", opener=no_link) as file:
                writer = csv.DictWriter(file, rows[0].keys())
                if not file.tell():
                    writer.writeheader()
                writer.writerows(rows)


def newest(path: Path) -> list[dict[str, str]]:
    """The newest row of each contestant in each setting. ValueError for another file, and a damaged one."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        keys = ("group", "contestant", "model", "input_size", "batch_size", "classes", "amp", "device", "threads")
        for row in rows:
            numbers = [float(row[name]) for name in ("ratio", "ratio_min", "ratio_max", "images_per_second")]
            if None in (*row, *row.values()) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"a row without all values: {', '.join(map(str, row.values()))}")
        return list({tuple(row[key] for key in keys): row for row in rows}.values())
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"--output {path} is not a file that scripts/benchmark.py wrote: {error}") from error


def summed(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, those of `paper`'s runs as one."""
    for (group, _), part in itertools.groupby(rows, lambda row: (row["group"], row["batch_size"])):
        first, *others = part
        if group == "paper":
            columns = ("seconds", "ratio", "ratio_min", "ratio_max", "operations")
            sums = {column: sum(float(row[column]) for row in others) for column in columns}
            others = [{**first, "contestant": f"a run for each of the {len(others)} heads", **sums}]
        yield from (first, *others)


def table(rows: Sequence[dict[str, str]]) -> str:
    lines = ["| | images | ms | times the first of its group | operations |", "|---|---|---|---|---|"]
    rows = [row for row in rows if row["group"] != "loader"]  # one row per source of images: docs/datasets.md
    for row in summed(rows):
        cells = f"{row['group']}: {row['contestant']}", row["batch_size"], f"{1e3 * float(row['seconds']):,.0f}"
        lines.append(f"| {' | '.join(cells)} | {text_of(row)} | {int(row['operations']):,} |")
    machines = dict.fromkeys(
        f"{row['model']} at {row['input_size']} pixels in {row['amp']} on {row['device']}, {row['threads']} threads, "
        f"torch {row['torch']}, commit {row['commit'][:7]}"
        for row in rows
    )
    return "\n".join(lines) + f"\n\nMedians and ranges of interleaved rounds: {'; '.join(machines)}.\n"


def plot(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Bars of the ratios, a panel for each group and number of images."""
    import matplotlib
    from matplotlib.figure import Figure

    from util.plotting import COLOURS, STYLE, WIDTH, save_figure

    panels = {key: list(part) for key, part in itertools.groupby(rows, lambda row: (row["group"], row["batch_size"]))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.17 * len(rows) + 0.5 * len(panels)), layout="constrained")
        heights = [len(part) + 1 for part in panels.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, ((group, images), part) in zip(axes, panels.items(), strict=True):
            ratios = [[float(row[f"ratio{suffix}"]) for row in part] for suffix in ("", "_min", "_max")]
            ranges = [[abs(a - b) for a, b in zip(ratios[0], end, strict=True)] for end in ratios[1:]]
            axis.barh([row["contestant"] for row in part], ratios[0], xerr=ranges, color=COLOURS[1])
            axis.invert_yaxis()
            axis.set_title(f"{group}, {images} images, {part[0]['device']}: time of the first", loc="left")
        save_figure(figure, path)


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("groups", nargs="+", choices=[*BENCHMARKS, "plot", "table"])
    add_groups(parser, {"encoder": {"include": "encoder"}})
    parser.add_argument("--batch_size", default=16, type=positive_int, help="images")
    parser.add_argument("--rounds", default=7, type=positive_int, help="of each contestant")
    parser.add_argument("--probes", default=[16, 64, 256, 512], type=positive_int, nargs="+", help="sizes of banks")
    parser.add_argument("--classes", default=1000, type=positive_int, help="of probes; ImageNet-21k has 21841")
    parser.add_argument("--compile", action="store_true", help="compile the encoder's blocks")
    parser.add_argument("--head_amp", action="store_true", help="heads that transform every token in --amp")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA where available")
    parser.add_argument("--data_path", default=None, type=Path, help="images of loader")
    parser.add_argument("--dataset", default="image_folder", help="kind of --data_path")
    parser.add_argument("--tiny", action="store_true", help="only test that everything runs: two images of 32 pixels")
    parser.add_argument("--output", default=None, type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--figure", default=None, type=Path, metavar="FILE", help="of plot: png, pdf or svg")
    parser.add_argument("--write", default=None, type=Path, metavar="PAGE", help="of table: a Markdown page")
    return parser


def main(args: argparse.Namespace) -> None:
    setup_logging()
    keep_freed_memory()
    if args.tiny:
        vars(args).update(model="vit_demo_patch8", input_size=32, batch_size=2, rounds=1, probes=[5], classes=7)
    if "loader" in args.groups and args.data_path is None:
        raise ValueError("loader: name a data set with --data_path, of --dataset's kind")
    if {"plot", "table"} & set(args.groups):
        rows = newest(args.output)
        if not rows:
            raise ValueError(f"--output {args.output} has no rows")
        if "plot" in args.groups:
            plot(rows, args.figure)
        if args.write is not None:
            command = f"python scripts/benchmark.py table --output {args.output} --write"
            keep_table(args.write, "costs", command, table(rows), write=True)
        return
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if args.device == "auto" else args.device)
    choose_precision(args, device)
    run(args, device)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
