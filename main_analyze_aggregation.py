"""What gets aggregated: how rules weigh the patches of one encoder, and whether that finds objects. Table 6, Figures 7
to 9 and Table 8.

Rules are fixed ones (--rules) and the trained probes of a main_linprobe.py run (--probes), whose encoder is taken where
--finetune names no other. `<output_dir>/aggregation.json` holds the entropy of each rule's vector, the divergences of
each pair of rules, and with --boxes MaxBoxAccV2; figures: kl, maps, boxes. Under torchrun the images are shared among
the processes, each taken once.

examples:
    # everything: fixed rules, an oracle, the probes of a run, and whether they find the object
    python main_analyze_aggregation.py --data_path $IMAGENET --probes runs/mae_base --oracle dino_vit_base_patch16 \\
        --boxes $IMAGENET/LOC_val_solution.csv --output_dir runs/aggregation

    # rules without parameters, on 1,000 images
    python main_analyze_aggregation.py --data_path $IMAGENET --finetune mae_vit_base_patch16 \\
        --rules attn-mn attn-lcte pos ca2 --num_images 1000 --output_dir runs/rules
"""

import argparse
import json
import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from aggregation import DEFAULT_RULES, KL_FLOOR
from aggregation.boxes import BOX_SOURCES, ImageBoxes, read_boxes
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
from cli.arguments import (
    ORACLE_ARGUMENTS,
    add_data_arguments,
    add_encoder_arguments,
    add_oracle_arguments,
    add_run_arguments,
    build_oracle,
    check_files,
    frozen_encoder,
    identity,
    loading,
    plain,
    precision,
    shared_arguments,
)
from cli.console import Parser, parse, run_main
from data_sets.images import fingerprint
from data_sets.loader import EvaluationBatches, KeyedDataset, View, build_loader, eval_transform, stretch_transform
from encoders.architectures import FROM_FILE, default_input_size
from encoders.load import Encoder
from encoders.oracle import Oracle
from engine_linprobe import FrozenTokens
from probing.bank import ProbeBank
from probing.finished_run import ProbeRun, read_run
from probing.pooling import Tokens
from runtime.analysis import Progress, analysed_images, subset
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from util.choices import nearest
from util.distributed import barrier, gather_objects, world_size
from util.files import digest, to_json
from util.progress import log


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser)
    add_data_arguments(parser, labels=False)
    rules = parser.add_argument_group("rules")
    rules.add_argument("--probes", default=None, type=Path, metavar="RUN",
                       help="run folder of main_linprobe.py; without --finetune, its encoder is taken")  # fmt: skip
    rules.add_argument("--probe_heads", nargs="+", default=None, metavar="HEAD",
                       help="of the probes, these alone (default: all)")  # fmt: skip
    rules.add_argument("--rules", nargs="+", default=None, metavar="HEAD",
                       help="heads without parameters, of the last block (default: those of "
                       f"{', '.join(DEFAULT_RULES)} that the encoder can follow; pos is uniform weights)")  # fmt: skip
    add_oracle_arguments(rules, default=None)

    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--num_images", default=None, type=int, help="a random subset of this size (default: all)")
    analysis.add_argument("--batch_size", default=64, type=int, help="images per process")
    analysis.add_argument("--kl_direction", choices=["row_col", "col_row"], default="row_col",
                          help="cells are KL(row || column) or KL(column || row)")  # fmt: skip
    analysis.add_argument("--kl_eps", default=KL_FLOOR, type=float, metavar="EPS",
                          help="weights are raised to it first; 0: not at all")  # fmt: skip
    analysis.add_argument("--images", nargs="+", default=[], metavar="FILE",
                          help="to show in the figures (default: a random choice)")  # fmt: skip
    analysis.add_argument("--num_examples", default=5, type=int, help="images to show, where --images names none")

    boxes = parser.add_argument_group("localisation")
    boxes.add_argument("--boxes", default=None, type=Path, metavar="SOURCE",
                       help=f"true boxes: {'; '.join(one.description for one in BOX_SOURCES.values())}")  # fmt: skip
    boxes.add_argument("--box_format", choices=list(BOX_SOURCES), default=None, help="default: detected")
    boxes.add_argument("--boxes_only", action="store_true", help="localisation alone: no entropies, no divergences")
    boxes.add_argument("--loc_transform", choices=["resize", "crop"], default="resize",
                       help="the whole image stretched to a square, in a pass of its own; or the crop that the rest of "
                       "the analysis sees, in the same pass, with the boxes cropped likewise")  # fmt: skip
    boxes.add_argument("--loc_step", default=0.001, type=float, help="between thresholds from 0 to 1")
    boxes.add_argument("--loc_map_heads", choices=["mean", "best"], default="mean",
                       help="of [cls] attention: the mean map; best: each head's, too, and which is best")  # fmt: skip
    boxes.add_argument("--loc_workers", default=None, type=int, metavar="N",
                       help="processes that evaluate maps (default: the cores, shared by ranks); 0: none")  # fmt: skip
    boxes.add_argument("--draw_threshold", default=None, type=float, metavar="T",
                       help="of the boxes in the figure (default: the best one at IoU 0.5)")  # fmt: skip
    add_run_arguments(parser, trains=False)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read; ValueError."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: it takes at least one image")
    if not 0 <= args.kl_eps < 1:
        raise ValueError(f"--kl_eps {args.kl_eps}: weights lie between 0 and 1, and so does what they are raised to")
    if args.num_examples < 0:
        raise ValueError(f"--num_examples {args.num_examples}: write how many, or 0 for no figures of images")
    if args.probe_heads is not None and args.probes is None:
        raise ValueError("--probe_heads chooses among the probes of a run: name it with --probes")
    if args.boxes is None:
        needing = {"--boxes_only": args.boxes_only, "--box_format": args.box_format,
                   "--draw_threshold": args.draw_threshold is not None,
                   "--loc_map_heads best": args.loc_map_heads == "best"}  # fmt: skip
        if given := [flag for flag, value in needing.items() if value]:
            raise ValueError(f"{given[0]} is about localisation: name the true boxes with --boxes")
    if args.draw_threshold is not None and not 0 <= args.draw_threshold < 1:
        raise ValueError(f"--draw_threshold {args.draw_threshold}: thresholds lie between 0 and 1")
    if args.loc_workers is not None and args.loc_workers < 0:
        raise ValueError(f"--loc_workers {args.loc_workers}: write how many processes, or 0 for none")
    levels_of(args.loc_step)


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    if args.boxes is not None and not args.boxes.exists():
        raise ValueError(f"--boxes {args.boxes}: there is no such file or folder")
    with process_group(args.device, args.dist_url, shared_arguments(args)) as world:
        # ---- images, frozen encoder, trained probes, rules; every mistake in the arguments shows here
        folder = RunFolder(args.output_dir)
        if not args.resume:
            folder.refuse_results("aggregation.json")
        run = read_run(args.probes) if args.probes is not None else None
        images = analysed_images(args.dataset, args.data_path, args.allow_subset)
        chosen = subset(len(images), args.num_images, args.seed)
        asked = run.with_encoder(args) if run is not None and not args.finetune else args
        encoder, size = frozen_encoder(asked)
        if run is not None:
            check_encoder(run, asked, encoder, size)
        backbone, amp = encoder.backbone.to(world.device), precision(args.amp)
        grid = backbone.grid_of(size, size)
        given = Tokens(backbone.embed_dim, grid, backbone.num_prefix_tokens)
        bank = run.bank(encoder, grid) if run is not None else None
        oracle = find_oracle(args, run, bank is not None and bank.needs.oracle, encoder, size, amp)
        rules = find_rules(args, encoder, given, run, bank, oracle is not None)
        heads = head_rules(backbone, given) if args.loc_map_heads == "best" else []
        for rule in (*rules, *heads):
            rule.pooling.to(world.device).eval()
        everything = [*rules, *heads]
        tokens = FrozenTokens(
            backbone, tuple(sorted({rule.block for rule in rules})), amp, run is not None and run.args.final_norm,
            needs_of(everything), oracle and oracle.to(world.device),
        )  # fmt: skip
        boxes = None
        if args.boxes is not None:
            boxes = read_boxes(args.boxes, args.box_format, images, args.data_path, chosen, args.allow_subset)
        if args.images:
            examples = examples_from_files(images, args.images)
        else:
            examples = random_examples(images, chosen, args.num_examples, args.seed)

        # ---- what is looked for, and in which view of the images: each view has a pass of its own
        levels = levels_of(args.loc_step)
        workers = 0 if boxes is None else args.loc_workers
        if workers is None:  # a core each, shared by the processes
            workers = max(1, len(os.sched_getaffinity(0)) // world_size())
        localizer = Localizer(len(everything), (size, size), levels, workers)

        def findings(parts: Collection[str], states: Sequence[dict]) -> Findings:
            return Findings(
                VectorStats(len(rules), args.kl_direction, args.kl_eps) if "vectors" in parts else None,
                Localization(localizer, boxes, args.loc_transform == "crop", grid) if "boxes" in parts else None,
                states,
            )

        pixels = {"crop": eval_transform(size, encoder.mean, encoder.std, args.loader),
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
            "rule_names": [rule.name for rule in everything], "test images": record["test_images"],
            "weights": digest([network.state_dict() for network in networks]), "boxes": boxes and boxes.fingerprint(),
            "scores of the probes": run and to_json(run.scores()),
        }  # fmt: skip
        progress = Progress(Path(__file__).name, folder, "aggregation.json", identity(args, facts), passes,
                            len(chosen), args.batch_size, args.save_every_minutes)  # fmt: skip
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.claim()
        folder.write("args.json", record)

        with localizer, progress.stoppable():
            # ---- one pass over the images, each once over all processes; another one where boxes need other pixels
            for view in list(passes)[len(progress.results) :]:
                dataset = KeyedDataset(images, pixels[view], args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                run_pass(everything, tokens, loader, progress, world.device, f"{view}s")
                found = passes[view](gather_objects(progress.record.state()))
                progress.end_pass({"found": found.state(), "seconds": progress.seconds})

            # ---- results
            found = {part: state for kept in progress.results for part, state in kept["found"].items()}
            total = findings(found, [found])
            result = describe(rules, encoder, size, run, total.vectors)
            if boxes is not None:
                located = describe_boxes(everything, heads, total.boxes, levels, args.boxes, args.loc_step)
                result["localization"] = located
            seconds = sum(kept["seconds"] for kept in progress.results)
            result |= {"over_seeds": over_seeds(result), "seconds": seconds, **record, "finished": utc_now()}
            log.info("%s", table(result))
            folder.write("aggregation.json", result)
            if folder.path is not None:
                draw(args, result, rules, tokens, examples, pixels, boxes, folder.path)
            barrier()
        folder.close()


def draw(
    args: argparse.Namespace, result: dict, rules: Sequence[Rule], tokens: FrozenTokens, examples: Sequence[Example],
    pixels: dict[str, View], boxes: ImageBoxes | None, folder: Path,
) -> None:  # fmt: skip
    """kl, maps and boxes, as far as they were measured and there are examples."""
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
    """Refuse an encoder that differs from that of the probes in more than its weights' file; ValueError."""
    stated = ("num_heads", "mean", "std", "grid", "timm_name")
    described = {**encoder.record, **{name: vars(args)[name] for name in stated}, "input_size": size}
    own_size = size if run.args.model == FROM_FILE else default_input_size(run.args.model)
    trained = {**run.results.get("encoder", {}), **{name: vars(run.args)[name] for name in stated}}
    trained["input_size"] = run.args.input_size or own_size
    described = json.loads(json.dumps(described))  # lists and tuples alike
    names = [name for name in described if name in trained and name not in ("source", "sha256", "assumed")]
    if different := [
        f"{name} {trained[name]}, not {described[name]}" for name in names if trained[name] != described[name]
    ]:
        raise ValueError(
            f"the probes of {run.folder} were trained with {'; '.join(different)}: leave out --finetune and what "
            "belongs to it, and the encoder of the probes is taken"
        )


def find_oracle(
    args: argparse.Namespace, run: ProbeRun | None, needed: bool, encoder: Encoder, size: int, amp: torch.dtype
) -> Oracle | None:
    """The encoder of --oracle, or that of the run's probes. ValueError if a probe was trained with another one."""
    if args.oracle is None and not needed:
        return None
    if args.oracle is None:
        asked = argparse.Namespace(**{**vars(args), **{name: vars(run.args)[name] for name in ORACLE_ARGUMENTS}})
    else:
        asked = args
    oracle = build_oracle(asked, encoder, size, amp)
    trained = run.results.get("oracle") if needed else None
    different = [name for name, value in oracle.record.items() if name in (trained or {}) and trained[name] != value]
    if needed and (trained is None or set(different) - ({"source"} if oracle.record["sha256"] else set())):
        raise ValueError(
            f"a probe of {run.folder} was trained with the oracle {(trained or {}).get('source')}, which differs from "
            f"{asked.oracle} in {', '.join(different) or 'everything'}: name the file that the probe was trained with"
        )
    return oracle


def find_rules(
    args: argparse.Namespace, encoder: Encoder, tokens: Tokens, run: ProbeRun | None, bank: ProbeBank | None,
    has_oracle: bool,
) -> list[Rule]:  # fmt: skip
    """The fixed rules, then those of the run's probes; of several rates, only the one chosen on held-out images."""
    heads, missing = args.rules, []
    if heads is None:
        heads, missing = default_rules(encoder.backbone, has_oracle)
    if missing:
        reasons = "no --oracle" if encoder.backbone.has_cls else "no [cls] token in this encoder, or no --oracle"
        log.info("rules left out: %s (%s)", ", ".join(missing), reasons)
    rules = fixed_rules(heads, encoder.backbone, tokens, has_oracle)
    if bank is None:
        return rules
    fixed = {(rule.head, rule.block) for rule in rules}
    learned = probe_rules(bank, encoder.backbone.depth - 1, run.scores())
    known = dict.fromkeys(rule.head for rule in learned)
    if unknown := [head for head in args.probe_heads or [] if head not in known]:
        raise ValueError(
            f"--probe_heads {unknown[0]}: {nearest(unknown[0], known)}{run.folder} weighs patches by {', '.join(known)}"
        )
    chosen = [rule for rule in learned if args.probe_heads is None or rule.head in args.probe_heads]
    unweighted = {
        spec.head for spec, probe in zip(bank.specs, bank.probes, strict=True) if not probe.aggregation.weighs
    }
    if unweighted:
        log.info("probes left out, which do not weigh patches: %s", ", ".join(sorted(unweighted)))
    return [*rules, *(rule for rule in chosen if rule.probe is not None or (rule.head, rule.block) not in fixed)]


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
