"""What is aggregated: rules that weigh the patches, and localisation; cli/analyze_aggregation.py has the arguments."""

import argparse
import json
import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from cli.analyze_aggregation import check, get_args_parser
from cli.arguments import check_files, data_options, identity, loading, plain, processes, run_test_images
from cli.console import checked, parse, run_main
from cli.encoder_arguments import ORACLE_ARGUMENTS, build_oracle, frozen_encoder, precision

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(parse(get_args_parser()), check, check_files)

import torch

from aggregation.boxes import ImageBoxes, read_boxes
from aggregation.divergence import VectorStats
from aggregation.examples import (
    Example,
    best_threshold,
    compared_rules,
    draw_example_boxes,
    draw_example_maps,
    examples_from_files,
    random_examples,
    shown_rules,
)
from aggregation.figures import draw_divergences
from aggregation.localization import Localizer, levels_of
from aggregation.results import describe, describe_boxes, over_seeds, table
from aggregation.rules import (
    Findings,
    Localization,
    Rule,
    default_rules,
    fixed_rules,
    head_rules,
    needs_of,
    probe_rules,
    run_pass,
)
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.table import unlabelled_images
from data_sets.views import View, eval_transform, stretch_transform
from encoders.load import Encoder, input_size
from encoders.oracle import Oracle
from engine_linprobe import FrozenTokens
from models_vit import VisionTransformer
from probing.bank import ProbeBank
from probing.finished_run import ProbeRun, read_run
from probing.pooling import Tokens
from runtime.analysis import Progress, subset
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from util.choices import nearest
from util.distributed import barrier, gather_objects, world_size
from util.files import digest, to_json
from util.progress import log


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(**processes(args)) as world:
        # ---- images, frozen encoder, trained probes, rules
        folder = RunFolder(args.output_dir, args.log_dir, args.track)
        if not args.resume:
            folder.refuse_results("aggregation.json")
        run = read_run(args.probes) if args.probes is not None else None
        own_split = run is not None and run.args.val_split and run.args.data_path == args.data_path
        images = (
            run_test_images(run.args)
            if own_split
            else unlabelled_images(args.dataset, args.data_path, **data_options(args))
        )
        chosen = subset(len(images), args.num_images, args.seed)
        asked = run.with_encoder(args) if run is not None and not args.finetune else args
        encoder, size = frozen_encoder(asked)
        backbone, amp = encoder.backbone.to(world.device), precision(args.amp)
        grid = backbone.grid_of(size, size)
        shape = Tokens.of(backbone, grid)
        bank = run.bank(encoder, grid) if run is not None else None
        if run is not None:
            check_encoder(run, asked, encoder, size)
        oracle = find_oracle(args, run, bank is not None and bank.needs.oracle, encoder, size, amp)
        rules = find_rules(args, backbone, shape, run, bank, oracle is not None)
        heads = head_rules(backbone, shape) if args.loc_map_heads == "best" else []
        everything = [*rules, *heads]
        for rule in everything:
            rule.pooling.to(world.device).eval()
        blocks, final_norm = (
            tuple(sorted({block for rule in rules for block in rule.blocks})),
            run is not None and run.args.final_norm,
        )
        needs, oracle = needs_of(everything), oracle and oracle.to(world.device)
        tokens = FrozenTokens(backbone, blocks, amp, final_norm, needs, oracle)

        # ---- true boxes, and images for the figures
        boxes = None
        if args.boxes is not None:
            boxes = read_boxes(args.boxes, args.box_format, images, args.data_path, chosen, args.allow_subset)
            boxes.crop_pct = encoder.crop_pct
        if args.images:
            examples = examples_from_files(images, args.images)
        else:
            examples = random_examples(images, chosen, args.num_examples, args.seed)

        # ---- what to measure in which view of the images: one pass per view
        levels = levels_of(args.loc_step)
        workers = 0 if boxes is None else args.loc_workers
        if workers is None:  # one per core, shared by the processes
            workers = max(1, len(os.sched_getaffinity(0)) // world_size())
        localizer = Localizer(len(everything), (size, size), levels, workers)

        def findings(parts: Collection[str], states: Sequence[dict]) -> Findings:
            return Findings(
                VectorStats(len(rules), args.kl_direction, args.kl_eps) if "vectors" in parts else None,
                Localization(localizer, boxes, args.loc_transform == "crop", grid) if "boxes" in parts else None,
                states,
            )

        pixels = {"crop": eval_transform(size, **encoder.pixels, loader=args.loader),
                  "resize": stretch_transform(size, encoder.mean, encoder.std, args.loader)}  # fmt: skip
        parts = {} if args.boxes_only else {"crop": ["vectors"]}
        if boxes is not None:
            parts.setdefault(args.loc_transform, []).append("boxes")
        passes = {view: partial(findings, wanted) for view, wanted in parts.items()}

        record = {"args": plain(args), "encoder": encoder.record, "oracle": oracle and oracle.record,
                  "classes": len(images.classes), "n_test": len(images), "test_images": fingerprint(images),
                  **provenance(world.device)}  # fmt: skip
        networks = [backbone, *([oracle.backbone] if oracle else []), *(rule.pooling for rule in everything)]
        facts = {
            **encoder.facts(size), **(oracle.facts if oracle else {}),
            "rule_names": [rule.name for rule in everything], "test images": record["test_images"],
            "weights": digest([network.state_dict() for network in networks]), "boxes": boxes and boxes.fingerprint(),
            "scores of the probes": run and to_json(run.scores()),
        }  # fmt: skip
        progress = Progress(Path(__file__).name, folder, "aggregation.json", identity(args, facts), passes,
                            len(chosen), args.batch_size, args.save_every_minutes)  # fmt: skip
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.start(record)

        with localizer, progress.stoppable():
            # ---- passes over the images, each image once over all processes
            for view in list(passes)[len(progress.results) :]:
                dataset = KeyedDataset(images, pixels[view], args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                run_pass(everything, tokens, loader, progress, world.device, f"{view}s")
                found = passes[view](gather_objects(progress.record.state()))
                progress.end_pass({"found": found.state(), "seconds": progress.seconds})

            # ---- results
            parts = {part: state for kept in progress.results for part, state in kept["found"].items()}
            total = findings(parts, [parts])
            result = describe(rules, encoder, size, run, total.vectors)
            if boxes is not None:
                boxed = describe_boxes(everything, heads, total.boxes, levels, args.boxes, args.loc_step)
                result["localization"] = boxed
            seconds = sum(kept["seconds"] for kept in progress.results)
            result |= {"over_seeds": over_seeds(result), "seconds": seconds, **record, "finished": utc_now()}
            log.info("%s", table(result))
            folder.write("aggregation.json", result)
            for rule, summaries in result["over_seeds"].items():
                folder.scalars({f"{quantity}/{rule}": summary["mean"] for quantity, summary in summaries.items()}, 0)
            if folder.path is not None:
                draw(args, result, rules, tokens, examples, pixels, boxes, folder.path)
            barrier()
        folder.close()


def draw(
    args: argparse.Namespace, result: dict, rules: Sequence[Rule], tokens: FrozenTokens, examples: Sequence[Example],
    pixels: dict[str, View], boxes: ImageBoxes | None, folder: Path,
) -> None:  # fmt: skip
    """kl, and maps and boxes of the examples, as far as they were measured."""
    if not args.boxes_only:
        draw_divergences(result, [folder / "kl.png", folder / "kl.pdf"])
    if examples:
        log.info("examples: %s", ", ".join(example.path for example in examples))
    shown = shown_rules(rules) if examples else []
    if shown and not args.boxes_only:
        draw_example_maps(shown, tokens, examples, pixels["crop"], folder / "maps.png")
    compared = compared_rules(shown)
    if boxes is not None and compared:
        given, view = args.draw_threshold, args.loc_transform
        thresholds = {rule.name: best_threshold(result, rule.name) if given is None else given for rule in compared}
        draw_example_boxes(compared, tokens, examples, pixels[view], boxes, view == "crop", thresholds,
                           folder / "boxes.png")  # fmt: skip


def check_encoder(run: ProbeRun, args: argparse.Namespace, encoder: Encoder, size: int) -> None:
    """Refuse an encoder that reads its images in another way than that of the probes; ValueError.

    Its weights are compared when the probes are loaded."""
    stated = ("num_heads", "mean", "std", "grid", "timm_name")
    encoder_now = {**encoder.record, **{name: vars(args)[name] for name in stated}, "input_size": size}
    encoder_now = json.loads(json.dumps(encoder_now))  # tuples become lists, as in the run's results
    encoder_then = {**run.results.get("encoder", {}), **{name: vars(run.args)[name] for name in stated},
                    "input_size": input_size(encoder, run.args.input_size)}  # fmt: skip
    names = encoder_now.keys() & encoder_then.keys() - {"source", "sha256", "assumed"}
    different = [name for name in sorted(names) if encoder_then[name] != encoder_now[name]]
    if different:
        changes = "; ".join(f"{name} {encoder_then[name]}, not {encoder_now[name]}" for name in different)
        raise ValueError(
            f"the probes of {run.folder} were trained with {changes}: drop --finetune and its flags, and the encoder "
            "of the probes is used"
        )


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
        trained = run.results.get("oracle") or {}
        names = oracle.record.keys() - ({"source"} if oracle.record["sha256"] else set())
        different = [name for name in sorted(names) if name not in trained or trained[name] != oracle.record[name]]
        if different:
            raise ValueError(
                f"a probe of {run.folder} was trained with the oracle {trained.get('source')}, which differs from "
                f"{args.oracle} in {', '.join(different)}: name the encoder that it was trained with"
            )
    return oracle


def find_rules(
    args: argparse.Namespace, backbone: VisionTransformer, shape: Tokens, run: ProbeRun | None, bank: ProbeBank | None,
    has_oracle: bool,
) -> list[Rule]:  # fmt: skip
    """The fixed rules, then those of the run's probes; of several rates, only the one chosen on held-out images."""
    usable, missing = default_rules(backbone, has_oracle)
    if args.rules is None and missing:
        log.info("rules left out, for want of a [cls] token or an --oracle: %s", ", ".join(missing))
    rules = fixed_rules(usable if args.rules is None else args.rules, backbone, shape, has_oracle)
    if bank is None:
        return rules
    learned = probe_rules(bank, backbone.depth - 1, run.scores())
    known = dict.fromkeys(rule.head for rule in learned)
    if unknown := [head for head in args.probe_heads or [] if head not in known]:
        raise ValueError(
            f"--probe_heads {unknown[0]}: {nearest(unknown[0], known)}{run.folder} weighs patches by {', '.join(known)}"
        )
    if unweighted := sorted({spec.head for spec in bank.specs} - known.keys()):
        log.info("probes left out, which do not weigh patches: %s", ", ".join(unweighted))
    fixed = {(rule.head, rule.block) for rule in rules}
    learned = [rule for rule in learned if args.probe_heads is None or rule.head in args.probe_heads]
    return [*rules, *(rule for rule in learned if rule.probe is not None or (rule.head, rule.block) not in fixed)]


if __name__ == "__main__":
    run_main(main, ARGS)
