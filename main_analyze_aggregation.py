"""What is aggregated: rules that weigh the patches, and localisation; cli/analyze_aggregation.py has the arguments."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cli.analyze_aggregation import check, get_args_parser
from cli.arguments import check_files, data_options, identity, loading, plain, processes, run_test_images
from cli.console import checked, parse, run_main
from cli.encoder_arguments import ORACLE_ARGUMENTS, build_oracle, choose_precision, frozen_encoder, precision
from cli.linprobe import finished_run

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(parse(get_args_parser()), check, check_files)

import torch

from aggregation import examples as shown
from aggregation.boxes import ImageBoxes, read_boxes
from aggregation.divergence import VectorStats
from aggregation.figures import draw_divergences
from aggregation.localization import Localizer, levels_of
from aggregation.results import describe, describe_boxes, over_seeds, table
from aggregation.rules import Localization, Rule, head_rules, needs_of, rules_of, run_pass
from data_sets.images import Example, fingerprint, random_examples
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.table import build_dataset
from data_sets.views import View, eval_transform
from encoders.load import Encoder
from encoders.oracle import Oracle
from engine_linprobe import FrozenTokens
from probing.finished_run import ProbeRun
from probing.pooling import Tokens
from runtime.analysis import Progress, subset
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from util.distributed import barrier, gather_objects, world_size
from util.files import digest, to_json
from util.progress import log


class Pass(NamedTuple):
    """A pass over the images: which rules weigh them, in which view, and what is accumulated."""

    rules: list[Rule]
    view: View
    make: Callable[[], VectorStats | Localization]

    def record(self, states: Sequence[dict]) -> VectorStats | Localization:
        """A new record with the images of others: of earlier starts, or of several processes."""
        record = self.make()
        for state in states:
            record.add_state(state)
        return record


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(**processes(args)) as world:
        choose_precision(args, world.device)
        # ---- images, frozen encoder, trained probes, rules
        folder = RunFolder(args.output_dir, args.log_dir, args.track)
        if not args.resume:
            folder.refuse_results("aggregation.json")
        run = None if args.probes is None else finished_run(args.probes)
        if run is not None and run.args.val_split and run.args.data_path == args.data_path:
            images = run_test_images(run.args)
        else:
            images = build_dataset(args.dataset, args.data_path, "val", **data_options(args), labels=False)
        chosen = subset(len(images), args.num_images, args.seed)
        encoder, size = frozen_encoder(run.with_encoder(args) if run is not None and not args.finetune else args)
        backbone, amp = encoder.backbone.to(world.device), precision(args.amp)
        grid = backbone.grid_of(size, size)
        shape = Tokens.of(backbone, grid)
        bank = run.bank(encoder, grid) if run is not None else None
        if run is not None:
            check_same(encoder.facts(size), run, "drop --finetune and its flags, and the encoder of the probes is used")
        oracle = find_oracle(args, run, bank is not None and bank.needs.oracle, encoder, size, amp)
        trained = None if bank is None else (bank, run.scores(), args.probe_heads)
        rules = rules_of(args.rules, trained, backbone, shape, oracle is not None)
        heads = head_rules(backbone, shape) if args.loc_map_heads == "best" else []
        everything = [*rules, *heads]
        for rule in everything:
            rule.pooling.to(world.device).eval()
        blocks = tuple(sorted({block for rule in rules for block in rule.blocks}))
        final_norm = run is not None and run.args.final_norm
        oracle = oracle and oracle.to(world.device)
        tokens = FrozenTokens(backbone, blocks, amp, final_norm, needs_of(everything), oracle)

        # ---- true boxes, and images for the figures
        boxes = None
        if args.boxes is not None:
            boxes = read_boxes(args.boxes, args.box_format, images, args.data_path, chosen, args.allow_subset)
            boxes.crop_pct = encoder.crop_pct
        examples = shown.examples_from_files(images, args.images) if args.images else None
        if examples is None:
            examples = random_examples(images, chosen, args.num_examples, args.seed)

        # ---- what to measure in which view of the images
        levels = levels_of(args.loc_step)
        workers = 0 if boxes is None else args.loc_workers
        if workers is None:  # one per core, shared by the processes
            workers = max(1, len(os.sched_getaffinity(0)) // world_size())
        localizer = Localizer(len(everything), (size, size), levels, workers)

        crop = eval_transform(size, **encoder.pixels, loader=args.loader)
        look = encoder.pixels | {"interpolation": "bilinear", "crop_pct": None}  # the whole image, as in wsolevaluation
        pixels = {"crop": crop, "resize": eval_transform(size, **look, loader=args.loader)}
        passes: dict[str, Pass] = {}
        if not args.boxes_only:
            passes["vectors"] = Pass(rules, crop, partial(VectorStats, len(rules), args.kl_direction, args.kl_eps))
        if boxes is not None:
            located = partial(Localization, localizer, boxes, args.loc_transform == "crop", grid)
            passes["boxes"] = Pass(everything, pixels[args.loc_transform], located)

        record = {"args": plain(args), "encoder": encoder.record, "oracle": oracle and oracle.record}
        record |= {"classes": len(images.classes), "n_test": len(images), "test_images": fingerprint(images)}
        record |= provenance(world.device)
        networks = [backbone, *([oracle.backbone] if oracle else []), *(rule.pooling for rule in everything)]
        facts = {
            **encoder.facts(size),
            **(oracle.facts if oracle else {}),
            "rule_names": [rule.name for rule in everything],
            "test images": record["test_images"],
            "weights": digest([network.state_dict() for network in networks]),
            "boxes": boxes and boxes.fingerprint(),
            "scores of the probes": run and to_json(run.scores()),
        }
        name, settings = Path(__file__).name, identity(args, facts)
        amount = len(chosen), args.batch_size, args.save_every_minutes
        makers = {name: part.record for name, part in passes.items()}
        progress = Progress(name, folder, "aggregation.json", settings, makers, *amount)
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.start(record)

        with localizer, progress.stoppable():
            # ---- passes over the images, each image once over all processes
            for name, part in list(passes.items())[len(progress.results) :]:
                dataset = KeyedDataset(images, part.view, args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                run_pass(part.rules, tokens, loader, progress, world.device, name)
                total = part.record(gather_objects(progress.record.state()))
                progress.end_pass({"found": total.state(), "seconds": progress.seconds})

            # ---- results
            pairs = zip(passes.items(), progress.results, strict=True)
            totals = {name: part.record([kept["found"]]) for (name, part), kept in pairs}
            result = describe(rules, encoder, size, run, totals.get("vectors"))
            if boxes is not None:
                settings = {"boxes": str(args.boxes), "transform": args.loc_transform, "step": args.loc_step}
                boxed = describe_boxes(everything, heads, totals["boxes"].tally, levels, settings)
                result["localization"] = boxed
            seconds = sum(kept["seconds"] for kept in progress.results)
            result |= {"over_seeds": over_seeds(result), "seconds": seconds, **record, "finished": utc_now()}
            log.info("%s", table(result))
            folder.write("aggregation.json", result)
            for rule, summaries in result["over_seeds"].items():
                folder.scalars({f"{quantity}/{rule}": summary["mean"] for quantity, summary in summaries.items()}, 0)
            if folder.path is not None:
                draw(args, result, rules, tokens, examples, pixels, boxes, folder)
            barrier()
        folder.close()


def draw(
    args: argparse.Namespace,
    result: dict,
    rules: Sequence[Rule],
    tokens: FrozenTokens,
    examples: Sequence[Example],
    pixels: dict[str, View],
    boxes: ImageBoxes | None,
    folder: RunFolder,
) -> None:
    """kl, and maps and boxes of the examples, as far as they were measured."""
    if not args.boxes_only:
        draw_divergences(result, [folder.path / "kl.png", folder.path / "kl.pdf"])
    drawn = shown.shown_rules(rules)
    if not examples or not drawn:
        return
    paths = [example.path for example in examples]
    log.info("examples: %s", ", ".join(paths))
    if not args.boxes_only:
        maps = shown.draw_example_maps(drawn, tokens, examples, pixels["crop"], folder.path / "maps.png")
        label = Path(result["encoder"]["source"] or result["encoder"]["model"]).stem
        lists = {"rules": [rule.name for rule in drawn], "grid": tokens.backbone.grid_size, "images": paths}
        metadata = {"label": label, **{name: json.dumps(values) for name, values in lists.items()}}
        folder.save_tensors("examples.safetensors", maps, metadata)
    if boxes is not None:
        compared, given, view = shown.compared_rules(drawn), args.draw_threshold, args.loc_transform
        names = [rule.name for rule in compared]
        thresholds = {name: shown.best_threshold(result, name) if given is None else given for name in names}
        size, target = (pixels[view], boxes, view == "crop"), folder.path / "boxes.png"
        shown.draw_example_boxes(compared, tokens, examples, *size, thresholds, target)


def check_same(facts: dict[str, Any], run: ProbeRun, remedy: str) -> None:
    """Refuse an encoder or oracle that differs from that of the probes in its weights or in how it reads its images;
    ValueError."""
    then = run.state["identity"]
    different = [name for name, value in facts.items() if name in then and then[name] != value]
    if different:
        changes = "; ".join(f"{name} {then[name]}, not {facts[name]}" for name in different)
        raise ValueError(f"the probes of {run.folder} were trained with {changes}: {remedy}")


def find_oracle(
    args: argparse.Namespace, run: ProbeRun | None, needed: bool, encoder: Encoder, size: int, amp: torch.dtype
) -> Oracle | None:
    """The encoder of --oracle, or that of the run's probes. ValueError if a probe was trained with another one."""
    if args.oracle is None and not needed:
        return None
    if args.oracle is None:
        args = argparse.Namespace(**{**vars(args), **{name: vars(run.args)[name] for name in ORACLE_ARGUMENTS}})
    oracle = build_oracle(args, encoder, size, amp)
    if needed:
        check_same(oracle.facts, run, "name the --oracle that they were trained with, or drop it")
    return oracle


if __name__ == "__main__":
    run_main(main, ARGS)
