"""Attention flow, block by block, over a data set: Figs. 3 to 6 and 10 to 13, and the entropies of Table 3.

For every encoder, `<output_dir>/<label>/attention.json` holds each metric of attention.metrics.METRICS that --metrics
names, in each block: mean and standard deviation over the images, of its summary and of each head. FIGURES
draws them: attention (the paper's four), park, heads, spectra. Under torchrun the images are shared among the
processes, each taken once.

examples:
    # two encoders in the same figures
    python main_analyze_attention.py --data_path $IMAGENET --model vit_base_patch16 \\
        --finetune mae_vit_base_patch16 dino_vit_base_patch16 --label MAE DINO --output_dir runs/attention

    # everything that can be measured, on 5,000 images, with t-SNE after the first and the last block
    python main_analyze_attention.py --data_path $IMAGENET --finetune mae_vit_base_patch16 --metrics all \\
        --num_images 5000 --tsne_blocks 0 11 --output_dir runs/attention_all

    # an untrained encoder, to compare with
    python main_analyze_attention.py --data_path $IMAGENET --model vit_base_patch16 --label random
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from attention.figures import draw_figures, draw_token_maps
from attention.measure import Place, Recorder, applicable, measure
from attention.metrics import GROUPS, LEGEND, METRICS, REFERENCES, Sizes, metric_names
from attention.reductions import REDUCTIONS, choose_reduction
from attention.tokens import embed_tokens
from cli.arguments import add_data_arguments, add_run_arguments, check_files, identity, loading, plain, shared_arguments
from cli.console import Parser, parse, run_main
from cli.encoder_arguments import add_encoder_arguments, check_input_size, frozen_encoder, one_encoder_each, precision
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.table import DATASETS
from data_sets.views import eval_transform
from encoders.architectures import check_blocks, known_depth
from encoders.load import Encoder
from models_vit import VisionTransformer
from runtime.analysis import Progress, analysed_images, subset
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from util import signals
from util.distributed import barrier
from util.files import digest
from util.progress import log
from util.seeding import stable_seed

TSNE_CLASSES, TSNE_IMAGES = 3, 18  # Park et al. 2023


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser, several=True)
    add_data_arguments(parser)
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--label", nargs="+", default=None, help="names of the encoders (default: of their files)")
    analysis.add_argument("--metrics", nargs="+", default=["flow"], metavar="METRIC",
                          help=f"groups ({', '.join(GROUPS)}) or names: {', '.join(METRICS)}")  # fmt: skip
    analysis.add_argument("--num_images", default=None, type=int, help="a random subset of this size (default: all)")
    analysis.add_argument("--batch_size", default=64, type=int, help="images per process")
    analysis.add_argument("--reduction", default="auto", choices=["auto", *REDUCTIONS],
                          help="how attention is summed up; the results agree")  # fmt: skip
    analysis.add_argument("--compile", action="store_true", help="compile the encoder's blocks: for long runs on a GPU")
    analysis.add_argument("--tsne_blocks", nargs="+", type=int, default=[], metavar="BLOCK",
                          help=f"t-SNE of the patch tokens of {TSNE_IMAGES} images after these blocks")  # fmt: skip
    add_run_arguments(parser, trains=False)
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    names, labels = metric_names(args.metrics), encoder_labels(args)
    with process_group(args.device, args.dist_url, shared_arguments(args)) as world:
        # ---- images and frozen encoders; every mistake in the arguments shows here
        choose_reduction(args.reduction, world.device)
        folder = RunFolder(args.output_dir)
        if not args.resume:
            folder.refuse_results("*/attention.json")
        images = analysed_images(args.dataset, args.data_path, args.allow_subset)
        chosen = subset(len(images), args.num_images, args.seed)
        encoders = [frozen_encoder(one) for one in one_encoder_each(args)]
        for encoder, _ in encoders:
            applicable(names, encoder.backbone)

        run = {"args": plain(args), "encoders": [encoder.record for encoder, _ in encoders], **provenance(world.device)}
        weights = [digest(encoder.backbone.state_dict()) for encoder, _ in encoders]
        facts = {"images": fingerprint(images), "encoders": labels, "weights": weights}
        passes = {f"encoder {label}": Recorder.of for label in labels}
        run_identity = identity(args, facts)
        progress = Progress(
            Path(__file__).name,
            folder,
            "*/attention.json",
            run_identity,
            passes,
            len(chosen),
            args.batch_size,
            args.save_every_minutes,
        )
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.claim()
        folder.write("args.json", run)

        with progress.stoppable():
            # ---- one pass over the images per encoder, each image once over all processes
            for label, (encoder, size) in list(zip(labels, encoders, strict=True))[len(progress.results) :]:
                backbone = encoder.backbone.to(world.device).eval()
                if args.compile:
                    backbone.compile_blocks()
                pixels = eval_transform(size, encoder.mean, encoder.std, args.loader)
                dataset = KeyedDataset(images, pixels, args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                found = measure(
                    backbone, loader, applicable(names, backbone), sizes_of(backbone, size), precision(args.amp),
                    args.reduction, world.device, label, progress,
                )  # fmt: skip
                seconds = progress.seconds
                log.info("%s: %d images, %.1f images/s", label, len(chosen), len(chosen) / seconds)
                how = {"amp": args.amp, "reduction": args.reduction, "seed": args.seed, "seconds": seconds,
                       "args": plain(args), "classes": len(images.classes), "n_test": len(images),
                       "test_images": facts["images"], "finished": utc_now()}  # fmt: skip
                result = {**summary(label, encoder, size, found), **how, **provenance(world.device)}
                if args.tsne_blocks and world.is_main:
                    with signals.deferred(world.size > 1):  # one process need not wait: the pass is complete, and kept
                        result["tsne"] = token_map(backbone, dataset, args.tsne_blocks, args.seed, world.device)
                backbone.cpu()
                progress.end_pass(result)

            # ---- results
            save(args, progress.results)
            barrier()
        folder.close()


def check(args: argparse.Namespace) -> None:
    """Refuse what the arguments alone show to be impossible; ValueError."""
    metric_names(args.metrics)
    encoder_labels(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: it takes at least one image")
    for one in one_encoder_each(args):
        check_input_size(one.input_size, one.model)
        check_blocks(args.tsne_blocks, known_depth(one.model))
    if args.tsne_blocks and args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        raise ValueError(f"--tsne_blocks shows classes, but images of --dataset {args.dataset} have several")


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


def sizes_of(backbone: VisionTransformer, size: int) -> Sizes:
    grid = backbone.grid_of(size, size)
    patches = grid[0] * grid[1]
    return Sizes(backbone.num_prefix_tokens + patches, patches, backbone.num_registers, grid, backbone.patch_size)


def summary(label: str, encoder: Encoder, size: int, found: dict[Place, dict]) -> dict:
    """What was measured, on what, and what each number means; enough to draw every figure."""
    backbone = encoder.backbone
    sizes = sizes_of(backbone, size)

    def reference(name: str | None) -> dict | None:
        return None if name is None else {"name": name, "value": REFERENCES[name](sizes)}

    measured = {}
    for name in dict.fromkeys(name for name, _ in found):
        metric = METRICS[name]
        measured[name] = {
            "unit": metric.unit, "definition": metric.definition, "source": metric.source, "axis": metric.axis,
            **{bound: reference(getattr(metric, bound)) for bound in ("lower", "upper", "uniform")},
        }  # fmt: skip
        if metric.of_tokens:
            measured[name]["embedding"] = found[name, 0]
        blocks = range(backbone.depth)
        measured[name]["blocks"] = [{"block": b, **found[name, b + metric.of_tokens]} for b in blocks]
    return {
        "label": label,
        "encoder": encoder.record,
        "random_weights": encoder.record["source"] is None,
        "images": next(iter(found.values()))["count"],
        "input_size": size,
        "patch_size": sizes.patch_size,
        "patches": sizes.patches,
        "tokens": sizes.tokens,
        "registers": sizes.registers,
        "heads": backbone.num_heads,
        "legend": LEGEND,
        "metrics": measured,
    }


@torch.no_grad()
def token_map(
    backbone: VisionTransformer, dataset: KeyedDataset, blocks: Sequence[int], seed: int, device: torch.device
) -> dict:
    """t-SNE of the patch tokens of 18 images after each of the blocks, in float32 (Park et al. 2023)."""
    samples = [dataset[0, index] for index in images_of_few_classes(dataset.dataset.targets, seed)]
    chosen = [sample.index for sample in samples if sample.valid]
    images = torch.stack([sample.image for sample in samples if sample.valid]).to(device)
    maps = []
    for block, features in backbone(images, blocks).items():
        log.info("t-SNE of the tokens after block %d", block)
        tokens = features.patches.flatten(0, 1).float().cpu().numpy()
        points = embed_tokens(tokens, stable_seed("tsne", seed) % 2**32)
        maps.append({"block": block, "points": points.reshape(len(chosen), -1, 2).tolist()})
    classes = [dataset.dataset.classes[dataset.dataset.targets[index]] for index in chosen]
    return {"images": chosen, "classes": classes, "maps": maps}


def images_of_few_classes(targets: Sequence[int], seed: int) -> list[int]:
    """Eighteen images of three classes, six each; of more classes where there are not as many of a class."""
    order = list(range(len(targets)))
    random.Random(stable_seed("tsne images", seed)).shuffle(order)
    each = TSNE_IMAGES // TSNE_CLASSES
    of_class: dict[int, list[int]] = {}
    for index in order:
        of_class.setdefault(targets[index], []).append(index)
    largest_first = sorted(of_class.values(), key=lambda images: -min(len(images), each))
    return [index for images in largest_first for index in images[:each]][:TSNE_IMAGES]


def save(args: argparse.Namespace, results: list[dict]) -> None:
    """Log a table; write JSON, TensorBoard (its step is the block) and the figures."""
    folder = RunFolder(args.output_dir)
    for result in results:
        log.info("%s, mean over images:\n%s", result["label"], table(result))
        if folder.path is None:
            continue
        name = folder_name(result["label"])
        own = RunFolder(folder.path / name, Path(args.log_dir) / name if args.log_dir else None)
        tsne = result.pop("tsne", None)
        own.start(result, "attention.json", purge_step=0)  # they may be written again
        for metric, measured in result["metrics"].items():
            for block in measured["blocks"]:
                if block["mean"] is not None:
                    own.scalars({metric: block["mean"]}, block["block"])
        own.close()
        if tsne is not None:
            own.write("tsne.json", tsne)
            draw_token_maps(tsne, result["label"], folder.path / name / "tsne.png")
    if folder.path is not None:
        draw_figures(results, folder.path)


def table(result: dict) -> str:
    """The metrics of one encoder: a line each, of the first block, the middle one, the last, and the mean over all."""
    blocks = len(next(iter(result["metrics"].values()))["blocks"])
    places = dict.fromkeys((0, blocks // 2, blocks - 1))
    lines = [f"{'':34}" + "".join(f"{f'block {place}':>11}" for place in places) + f"{'all blocks':>12}  unit"]
    for name, metric in result["metrics"].items():
        means = [block["mean"] for block in metric["blocks"]]
        if None not in means:
            shown = "".join(f"{means[place]:>11.4g}" for place in places)
            lines.append(f"  {name:32}{shown}{sum(means) / blocks:>12.4g}  {metric['unit']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
