"""Attention flow, block by block, over a data set: Figs. 3 to 6 and 10 to 13, and the entropies of Table 3.

    python main_analyze_attention.py --data_path $IMAGENET --model vit_base_patch16 \\
        --finetune mae_vit_base_patch16 dino_vit_base_patch16 --label MAE DINO --output_dir attention

For every encoder, `<output_dir>/<label>/attention.json` holds each metric of attention_stats.METRICS in each block:
mean and standard deviation over the images, for the average over heads and for each head. `attention.png` and
`attention.pdf` draw the paper's four. Under torchrun the images are shared among the processes, each taken once.
"""

import argparse
import itertools
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from attention_stats import LEGEND, METRICS, PAPER_METRICS, REDUCTIONS, REFERENCES, Moments, reduce_attention
from models_vit import VisionTransformer
from util.arguments import (
    PRECISIONS,
    Parser,
    add_data_arguments,
    add_encoder_arguments,
    add_run_arguments,
    build_encoder,
    parse,
    plain,
    run_main,
)
from util.checkpoints import Encoder
from util.datasets import EvaluationBatches, KeyedDataset, build_dataset, build_loader, eval_transform
from util.distributed import barrier, distributed
from util.figures import draw_attention
from util.progress import log, progress, setup_logging
from util.run_folder import RunFolder, provenance
from util.seeding import seeded, stable_seed


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_arguments(parser)
    add_encoder_arguments(parser, several=True)
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--label", nargs="+", default=None, help="names of the encoders (default: of their files)")
    analysis.add_argument("--num_images", default=None, type=int, help="a random subset of this size (default: all)")
    analysis.add_argument("--batch_size", default=64, type=int, help="images per process")
    analysis.add_argument("--reduction", default="auto", choices=["auto", *REDUCTIONS],
                          help="how attention is summarised; the results agree")  # fmt: skip
    add_run_arguments(parser, resumable=False)
    return parser


def main(args: argparse.Namespace) -> None:
    with distributed(args.device, args.dist_url) as world:
        setup_logging()

        # ---- images and frozen encoders; every mistake in the arguments shows here
        images = analysed_images(args)
        chosen = subset(len(images), args.num_images, args.seed)
        labels = encoder_labels(args)
        encoders = [load(one) for one in one_encoder_each(args)]

        run = {"args": plain(args), "encoders": [encoder.record for encoder, _ in encoders], **provenance(world.device)}
        folder = RunFolder(args.output_dir)
        if folder.path is not None and (folder.path / "args.json").exists():
            raise ValueError(f"--output_dir {args.output_dir} already holds results: name another folder, or remove it")
        barrier()  # no rank writes before rank 0 has looked
        folder.write("args.json", run)

        # ---- one pass over the images per encoder, each image once over all processes
        results = []
        for label, (encoder, size) in zip(labels, encoders, strict=True):
            dataset = KeyedDataset(images, eval_transform(size, encoder.mean, encoder.std), args.seed)
            batches = EvaluationBatches(len(images), args.batch_size, chosen)
            pin = args.pin_mem and world.device.type == "cuda"
            loader = build_loader(dataset, batches, args.num_workers, pin, args.dataloader_affinity_hack)
            backbone = encoder.backbone.to(world.device)
            start = time.perf_counter()
            moments = measure(backbone, loader, PRECISIONS[args.amp], args.reduction, world.device, label)
            seconds = time.perf_counter() - start
            log.info("%s: %d images, %.1f images/s", label, len(chosen), len(chosen) / seconds)
            how = {"amp": args.amp, "reduction": args.reduction, "seed": args.seed, "seconds": seconds}
            results.append({**summary(label, encoder, size, moments), **how, **provenance(world.device)})

        # ---- results
        save(args, results)


def analysed_images(args: argparse.Namespace) -> torch.utils.data.Dataset:
    """The validation images of a data set, or all of a plain folder of class folders."""
    splits = (args.data_path / "train", args.data_path / "val")
    is_plain = args.dataset == "image_folder" and not any(split.exists() for split in splits)
    return build_dataset(args.dataset, args.data_path, "." if is_plain else "val")


def subset(length: int, num_images: int | None, seed: int) -> list[int]:
    """Indices to analyse, in order: all, or a random subset that is a function of the seed."""
    if num_images is None:
        return list(range(length))
    if not 1 <= num_images <= length:
        raise ValueError(f"--num_images {num_images}, but there are {length} images: choose from 1 to {length}")
    generator = torch.Generator().manual_seed(stable_seed("subset", seed))
    return torch.randperm(length, generator=generator)[:num_images].sort().values.tolist()


def one_encoder_each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each encoder, as util.arguments.build_encoder reads them."""
    count = len(args.finetune)
    columns = {"finetune": args.finetune}
    for name in ("model", "family", "checkpoint_key"):
        values = getattr(args, name)
        if len(values) not in (1, count):
            raise ValueError(
                f"--{name} has {len(values)} values for {count} encoders: write one for all or one for each"
            )
        columns[name] = values if len(values) == count else values * count
    rows = zip(*columns.values(), strict=True)
    return [argparse.Namespace(**{**vars(args), **dict(zip(columns, row, strict=True))}) for row in rows]


def load(args: argparse.Namespace) -> tuple[Encoder, int]:
    with seeded("weights", args.seed):  # random weights are a function of the seed
        return build_encoder(args)


def encoder_labels(args: argparse.Namespace) -> list[str]:
    """One name per encoder, distinct also as folders."""
    labels = args.label or [Path(weights).stem or "random weights" for weights in args.finetune]
    if len(labels) != len(args.finetune):
        raise ValueError(f"--label has {len(labels)} names for {len(args.finetune)} encoders: write one for each")
    if len({folder_name(label) for label in labels}) < len(labels):
        raise ValueError(f"encoders share a name ({', '.join(labels)}): write a --label of its own for each")
    return labels


def folder_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)


@torch.no_grad()
def measure(
    backbone: VisionTransformer,
    loader: Iterable,
    precision: torch.dtype,
    reduction: str,
    device: torch.device,
    description: str = "attention",
) -> dict[str, list[Moments]]:
    """{metric: moments of each block} over the images of all processes; metrics of [cls] only where there is one."""
    metrics = {name: metric for name, metric in METRICS.items() if backbone.has_cls or not metric.needs_cls}
    moments = {name: [Moments() for _ in range(backbone.depth)] for name in metrics}
    seen, start = 0, time.perf_counter()
    for sample in (bar := progress(loader, description, len(loader))):
        images = sample.image.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            for step in backbone.trace(images):
                reduced = reduce_attention(step, backbone.num_prefix_tokens, backbone.has_cls, reduction)
                for name, metric in metrics.items():
                    moments[name][step.index].update(metric.compute(reduced))
        if not reduced.patches.update_ratio.isfinite().all():  # what overflows in any block reaches the last
            raise FloatingPointError(f"{description}: activations are not finite in {precision}; use another --amp")
        seen += len(images)
        bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.0f} images/s")
    for block in itertools.chain.from_iterable(moments.values()):
        block.all_reduce()
    return moments


def summary(label: str, encoder: Encoder, size: int, moments: dict[str, list[Moments]]) -> dict:
    """What was measured, on what, and what each number means; enough to draw the figure."""
    backbone = encoder.backbone
    patches = (size // backbone.patch_size) ** 2
    tokens = backbone.num_prefix_tokens + patches

    def reference(name: str | None) -> dict | None:
        return None if name is None else {"name": name, "value": REFERENCES[name](tokens, patches)}

    measured = {}
    for name, blocks in moments.items():
        metric = METRICS[name]
        measured[name] = {
            "unit": metric.unit,
            "definition": metric.definition,
            "source": metric.source,
            "upper": reference(metric.upper),
            "uniform": reference(metric.uniform),
            "blocks": [{"block": index, **block.to_json()} for index, block in enumerate(blocks)],
        }
    return {
        "label": label,
        "encoder": encoder.record,
        "random_weights": encoder.record["source"] is None,
        "images": next(iter(moments.values()))[0].count,
        "input_size": size,
        "patches": patches,
        "tokens": tokens,
        "heads": backbone.num_heads,
        "legend": LEGEND,
        "metrics": measured,
    }


def save(args: argparse.Namespace, results: list[dict]) -> None:
    """Log the means over blocks; write JSON, TensorBoard (its step is the block) and the figure."""
    folder = RunFolder(args.output_dir)
    for result in results:
        means = {
            name: sum(block["mean"] for block in metric["blocks"]) / len(metric["blocks"])
            for name, metric in result["metrics"].items()
        }
        words = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        log.info("%s, mean over blocks: %s", result["label"], words)
        if folder.path is not None:
            name = folder_name(result["label"])
            own = RunFolder(folder.path / name, Path(args.log_dir) / name if args.log_dir else None)
            own.start(result, "attention.json")
            for metric, measured in result["metrics"].items():
                for block in measured["blocks"]:
                    own.scalars({metric: block["mean"]}, block["block"])
            own.close()
    if folder.path is not None:
        panels = [name for name in PAPER_METRICS if any(name in result["metrics"] for result in results)]
        for suffix in ("png", "pdf"):
            draw_attention(results, panels, folder.path / f"attention.{suffix}")


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
