"""Attention flow over a data set: one pass of each frozen encoder, then JSON, TensorBoard and figures.

cli/analyze_attention.toml has the arguments and examples.
"""

from cli.analyze_attention import check, encoder_labels, folder_name, get_args_parser
from cli.arguments import command_line
from cli.console import run_main

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = command_line(get_args_parser(), check)

import argparse
from pathlib import Path

from attention.examples import FILE as EXAMPLES
from attention.examples import example_maps
from attention.figures import draw_figures, draw_token_maps
from attention.measure import Recorder, applicable, measure, summary, table
from attention.metrics import Sizes, metric_names
from attention.reductions import choose_reduction
from attention.tokens import token_map
from cli.arguments import build_images, identity, loading, plain
from cli.encoder_arguments import frozen_encoder, one_encoder_each, precision
from cli.session import session
from data_sets.images import fingerprint, random_examples
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.views import eval_transform
from encoders.architectures import check_blocks
from models_vit import compile_blocks
from runtime.analysis import Progress, subset
from runtime.folder import RunFolder
from runtime.provenance import provenance, utc_now
from util import signals
from util.distributed import alone, barrier
from util.progress import log


def main(args: argparse.Namespace) -> None:
    with session(args, check, results="*/attention.json") as (world, folder):
        # ---- images and frozen encoders; every mistake in the arguments shows here
        names, labels = metric_names(args.metrics), encoder_labels(args)
        choose_reduction(args.reduction, world.device)
        images = build_images(args, "val", labels=False)
        chosen = subset(len(images), args.num_images, args.seed)
        examples = random_examples(images, chosen, args.num_examples, args.seed)
        encoders = [frozen_encoder(encoder_args) for encoder_args in one_encoder_each(args)]
        for encoder, _ in encoders:
            applicable(names, encoder.backbone)
            check_blocks(args.tsne_blocks, encoder.backbone.depth)

        run = {"args": plain(args), "encoders": [encoder.record for encoder, _ in encoders], **provenance(world.device)}
        facts = {"images": fingerprint(images), "encoders": labels, "weights": []}
        for label, (encoder, size) in zip(labels, encoders, strict=True):
            encoder_facts = encoder.facts(size)
            facts["weights"].append(encoder_facts.pop("weights"))
            facts |= {f"{label}, {name}": value for name, value in encoder_facts.items()}
        passes = {f"encoder {label}": Recorder.of for label in labels}
        amount = len(chosen), args.batch_size, args.save_every_minutes
        progress = Progress(Path(__file__).name, folder, "*/attention.json", identity(args, facts), passes, *amount)
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.claim()
        folder.write("args.json", run)

        with progress.stoppable():
            # ---- one pass over the images per encoder, each image once over all processes
            for label, (encoder, size) in list(zip(labels, encoders, strict=True))[len(progress.results) :]:
                backbone = encoder.backbone.to(world.device).eval()
                if args.compile:
                    compile_blocks(backbone)
                transform = eval_transform(size, **encoder.pixels, loader=args.loader)
                dataset = KeyedDataset(images, transform, args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                how = precision(args.amp), args.reduction, world.device, label, progress
                numbers = measure(backbone, loader, applicable(names, backbone), Sizes.of(backbone, size), *how)
                result = summary(label, encoder, size, numbers)
                result |= {"amp": args.amp, "reduction": args.reduction, "seed": args.seed, "seconds": progress.seconds}
                result |= {"args": plain(args), "classes": len(images.classes), "n_test": len(images)}
                result |= {"test_images": facts["images"], "finished": utc_now(), **provenance(world.device)}
                speed = result["images"] / result["seconds"]
                log.info("%s: %d images, %.1f images/s", label, result["images"], speed)
                if args.tsne_blocks and world.rank == 0:
                    # one process can stop at once: its pass is complete, and saved
                    with alone(), signals.deferred(world.size > 1):
                        result["tsne"] = token_map(backbone, dataset, args.tsne_blocks, args.seed, world.device)
                if examples and folder.path is not None:
                    own = RunFolder(folder.path / folder_name(label))
                    own.save_tensors(EXAMPLES, *example_maps(label, backbone, examples, transform))
                backbone.cpu()
                progress.end_pass(result)

            # ---- results
            with alone():
                save(folder, args.log_dir, args.track, progress.results)
            barrier()


def save(folder: RunFolder, log_dir: str | None, track: list[str], results: list[dict]) -> None:
    """Log a table; write JSON, the figures, and to the trackers (their step is the block)."""
    tsne = [result.pop("tsne", None) for result in results]
    if folder.path is not None:
        draw_figures(results, folder.path)
    for result, maps in zip(results, tsne, strict=True):
        log.info("%s, mean over images:\n%s", result["label"], table(result))
        if folder.path is None:
            continue
        name = folder_name(result["label"])
        subfolder = RunFolder(folder.path / name, Path(log_dir) / name if log_dir else None, track)
        subfolder.start(result, "attention.json", purge_step=0)  # a resumed run may write them again
        for block in range(max(len(measured["blocks"]) for measured in result["metrics"].values())):
            means = {metric: measured["blocks"][block]["mean"] for metric, measured in result["metrics"].items()}
            subfolder.scalars({metric: mean for metric, mean in means.items() if mean is not None}, block)
        if maps is not None:
            subfolder.write("tsne.json", maps)
            draw_token_maps(maps, result["label"], folder.path / name / "tsne.png")
        subfolder.close(folder.path.glob("*.png"))


if __name__ == "__main__":
    run_main(main, ARGS)
