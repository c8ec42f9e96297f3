"""Attention flow over a data set: one pass of each frozen encoder, then JSON, TensorBoard and figures."""

import argparse

from cli.analyze_attention import check, encoder_labels, folder_name, get_args_parser
from cli.arguments import check_files, identity, loading, plain, processes
from cli.console import checked, parse, run_main
from cli.encoder_arguments import frozen_encoder, one_encoder_each, precision

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(parse(get_args_parser()), check, check_files)

from pathlib import Path

from attention.figures import draw_figures, draw_token_maps
from attention.measure import Recorder, applicable, measure, summary, table
from attention.metrics import Sizes, metric_names
from attention.reductions import choose_reduction
from attention.tokens import token_map
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.views import eval_transform
from encoders.architectures import check_blocks
from runtime.analysis import Progress, analysed_images, subset
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from util import signals
from util.distributed import barrier
from util.progress import log


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    names, labels = metric_names(args.metrics), encoder_labels(args)
    with process_group(**processes(args)) as world:
        # ---- images and frozen encoders; every mistake in the arguments shows here
        choose_reduction(args.reduction, world.device)
        folder = RunFolder(args.output_dir)
        if not args.resume:
            folder.refuse_results("*/attention.json")
        images = analysed_images(args.dataset, args.data_path, args.allow_subset)
        chosen = subset(len(images), args.num_images, args.seed)
        encoders = [frozen_encoder(encoder_args) for encoder_args in one_encoder_each(args)]
        for encoder, _ in encoders:
            applicable(names, encoder.backbone)
            check_blocks(args.tsne_blocks, encoder.backbone.depth)

        run = {"args": plain(args), "encoders": [encoder.record for encoder, _ in encoders], **provenance(world.device)}
        facts = {"images": fingerprint(images), "encoders": labels, "weights": []}
        for label, (encoder, size) in zip(labels, encoders, strict=True):
            found = encoder.facts(size)
            facts["weights"].append(found.pop("weights"))
            facts |= {f"{label}, {name}": value for name, value in found.items()}
        progress = Progress(
            Path(__file__).name,
            folder,
            "*/attention.json",
            identity(args, facts),
            {f"encoder {label}": Recorder.of for label in labels},
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
                transform = eval_transform(size, encoder.mean, encoder.std, args.loader)
                dataset = KeyedDataset(images, transform, args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                metrics, sizes = applicable(names, backbone), Sizes.of(backbone, size)
                amp = precision(args.amp)
                numbers = measure(
                    backbone, loader, metrics, sizes, amp, args.reduction, world.device, label, progress
                )  # fmt: skip
                result = {
                    **summary(label, encoder, size, numbers), "amp": args.amp, "reduction": args.reduction,
                    "seed": args.seed, "seconds": progress.seconds, "args": plain(args),
                    "classes": len(images.classes), "n_test": len(images), "test_images": facts["images"],
                    "finished": utc_now(), **provenance(world.device),
                }  # fmt: skip
                speed = result["images"] / result["seconds"]
                log.info("%s: %d images, %.1f images/s", label, result["images"], speed)
                if args.tsne_blocks and world.is_main:
                    # one process can stop at once: its pass is complete, and saved
                    with signals.deferred(world.size > 1):
                        result["tsne"] = token_map(backbone, dataset, args.tsne_blocks, args.seed, world.device)
                backbone.cpu()
                progress.end_pass(result)

            # ---- results
            save(args.output_dir, args.log_dir, progress.results)
            barrier()
        folder.close()


def save(output_dir: str, log_dir: str | None, results: list[dict]) -> None:
    """Log a table; write JSON, TensorBoard (its step is the block) and the figures."""
    folder = RunFolder(output_dir)
    for result in results:
        log.info("%s, mean over images:\n%s", result["label"], table(result))
        if folder.path is None:
            continue
        name = folder_name(result["label"])
        subfolder = RunFolder(folder.path / name, Path(log_dir) / name if log_dir else None)
        tsne = result.pop("tsne", None)
        subfolder.start(result, "attention.json", purge_step=0)  # a resumed run may write them again
        for metric, measured in result["metrics"].items():
            for block in measured["blocks"]:
                if block["mean"] is not None:
                    subfolder.scalars({metric: block["mean"]}, block["block"])
        subfolder.close()
        if tsne is not None:
            subfolder.write("tsne.json", tsne)
            draw_token_maps(tsne, result["label"], folder.path / name / "tsne.png")
    if folder.path is not None:
        draw_figures(results, folder.path)


if __name__ == "__main__":
    run_main(main, ARGS)
