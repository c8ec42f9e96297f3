"""What is aggregated: rules that weigh the patches, and localisation; cli/analyze_aggregation.toml has the flags."""

from cli.analyze_aggregation import check, get_args_parser
from cli.arguments import command_line
from cli.console import run_main

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = command_line(get_args_parser(), check)

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aggregation import examples as shown
from aggregation.boxes import read_boxes
from aggregation.divergence import VectorStats
from aggregation.figures import draw_divergences
from aggregation.localization import Localizer, levels_of
from aggregation.results import describe, describe_boxes, over_seeds, table
from aggregation.rules import Localization, Rule, head_rules, needs_of, rules_of, run_pass
from cli.arguments import build_images, identity, loading, plain, run_test_images
from cli.encoder_arguments import ORACLE_ARGUMENTS, build_oracle, frozen_encoder, precision
from cli.linprobe import finished_run
from cli.session import session
from data_sets.images import fingerprint, random_examples
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.views import View, eval_transform
from encoders.load import Encoder, Oracle
from engine_linprobe import FrozenTokens
from probing.finished_run import ProbeRun
from probing.pooling import Tokens
from runtime.analysis import Progress, subset
from runtime.folder import RunFolder
from runtime.provenance import provenance, utc_now
from util.distributed import alone, barrier, gather_objects, world_size
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
    with session(args, check, results="aggregation.json") as (world, folder):
        # ---- images, frozen encoder, trained probes, rules; true boxes, and images for the figures
        setup = Setup(args, world.device)
        images, chosen, localizer = setup.images, setup.chosen, setup.localizer
        passes = setup.passes()
        record = setup.record(provenance(world.device))
        settings = identity(args, setup.facts(record["test_images"]))
        amount = len(chosen), args.batch_size, args.save_every_minutes
        makers = {name: part.record for name, part in passes.items()}
        progress = Progress(Path(__file__).name, folder, "aggregation.json", settings, makers, *amount)
        progress.resume(args.resume)
        barrier()  # no rank writes before rank 0 has looked
        folder.start(record)

        with localizer, progress.stoppable():
            # ---- passes over the images, each image once over all processes
            for name, part in list(passes.items())[len(progress.results) :]:
                dataset = KeyedDataset(images, part.view, args.seed, on_bad_image=args.on_bad_image)
                batches = EvaluationBatches(len(images), args.batch_size, chosen[progress.seen :])
                loader = build_loader(dataset, batches, **loading(args, world.device))
                run_pass(part.rules, setup.tokens, loader, progress, world.device, name)
                total = part.record(gather_objects(progress.record.state()))
                progress.end_pass({"found": total.state(), "seconds": progress.seconds})

            # ---- results
            pairs = zip(passes.items(), progress.results, strict=True)
            totals = {name: part.record([kept["found"]]) for (name, part), kept in pairs}
            result = describe(setup.rules, setup.encoder, setup.size, setup.run, totals.get("vectors"))
            if setup.boxes is not None:
                of_boxes = {"boxes": str(args.boxes), "transform": args.loc_transform, "step": args.loc_step}
                rules = setup.rules + setup.heads, setup.heads
                result["localization"] = describe_boxes(*rules, totals["boxes"].tally, setup.levels, of_boxes)
            seconds = sum(kept["seconds"] for kept in progress.results)
            result |= {"over_seeds": over_seeds(result), "seconds": seconds, **record, "finished": utc_now()}
            log.info("%s", table(result))
            folder.write("aggregation.json", result)
            for rule, summaries in result["over_seeds"].items():
                folder.scalars({f"{quantity}/{rule}": summary["mean"] for quantity, summary in summaries.items()}, 0)
            if folder.path is not None:
                with alone():
                    draw(args, result, setup, folder)
            barrier()


class Setup:
    """What the arguments name: images, a frozen encoder, rules on its tokens, true boxes, and images to show."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        run = self.run = None if args.probes is None else finished_run(args.probes)
        if run is not None and run.args.val_split and run.args.data_path == args.data_path:
            self.images = run_test_images(run.args)
        else:
            self.images = build_images(args, "val", labels=False)
        self.chosen = subset(len(self.images), args.num_images, args.seed)
        self.encoder, self.size = frozen_encoder(run.with_encoder(args) if run and not args.finetune else args)
        backbone, amp = self.encoder.backbone.to(device), precision(args.amp)
        self.grid = backbone.grid_of(self.size, self.size)
        shape, bank = Tokens.of(backbone, self.grid), None
        if run is not None:
            bank = run.bank(self.encoder, self.grid)
            remedy = "drop --finetune and its flags, and the encoder of the probes is used"
            check_same(self.encoder.facts(self.size), run, remedy)
        oracle = find_oracle(args, run, bank is not None and bank.needs.oracle, self.encoder, self.size, amp)
        trained = None if bank is None else (bank, run.scores(), args.probe_heads)
        self.rules = rules_of(args.rules, trained, backbone, shape, oracle is not None)
        self.heads = head_rules(backbone, shape) if args.loc_map_heads == "best" else []
        everything = [*self.rules, *self.heads]
        for rule in everything:
            rule.pooling.to(device).eval()
        blocks = tuple(sorted({block for rule in self.rules for block in rule.blocks}))
        self.oracle = oracle and oracle.to(device)
        final_norm = run is not None and run.args.final_norm
        self.tokens = FrozenTokens(backbone, blocks, amp, final_norm, needs_of(everything), self.oracle)

        self.boxes = None
        if args.boxes is not None:
            source = args.boxes, args.box_format, self.images, args.data_path, self.chosen, args.allow_subset
            self.boxes = read_boxes(*source)
            self.boxes.crop_pct = self.encoder.crop_pct
        self.examples = shown.examples_from_files(self.images, args.images) if args.images else None
        if self.examples is None:
            self.examples = random_examples(self.images, self.chosen, args.num_examples, args.seed)
        workers = 0 if self.boxes is None else args.loc_workers
        if workers is None:  # one per core, shared by the processes
            workers = max(1, len(os.sched_getaffinity(0)) // world_size())
        self.levels = levels_of(args.loc_step)
        self.localizer = Localizer(len(everything), (self.size, self.size), self.levels, workers)
        crop = eval_transform(self.size, **self.encoder.pixels, loader=args.loader)
        look = self.encoder.pixels | {"interpolation": "bilinear", "crop_pct": None}  # as in wsolevaluation
        stretched = eval_transform(self.size, **look, loader=args.loader)
        self.views = {"crop": crop, "resize": stretched}

    def passes(self) -> dict[str, Pass]:
        """What to measure in which view of the images."""
        args, passes = self.args, {}
        if not args.boxes_only:
            vectors = partial(VectorStats, len(self.rules), args.kl_direction, args.kl_eps)
            passes["vectors"] = Pass(self.rules, self.views["crop"], vectors)
        if self.boxes is not None:
            located = partial(Localization, self.localizer, self.boxes, args.loc_transform == "crop", self.grid)
            passes["boxes"] = Pass(self.rules + self.heads, self.views[args.loc_transform], located)
        return passes

    def record(self, origin: dict[str, Any]) -> dict[str, Any]:
        """What args.json and aggregation.json say about the run."""
        encoders = {"encoder": self.encoder.record, "oracle": self.oracle and self.oracle.record}
        images = {"classes": len(self.images.classes), "n_test": len(self.images)}
        return {"args": plain(self.args), **encoders, **images, "test_images": fingerprint(self.images), **origin}

    def facts(self, images: str) -> dict[str, Any]:
        """What must be equal when the analysis is resumed. images: their fingerprint."""
        everything = self.rules + self.heads
        networks = [self.encoder.backbone, *([self.oracle.backbone] if self.oracle else [])]
        networks += [rule.pooling for rule in everything]
        return {
            **self.encoder.facts(self.size),
            **(self.oracle.facts if self.oracle else {}),
            "rule_names": [rule.name for rule in everything],
            "test images": images,
            "weights": digest([network.state_dict() for network in networks]),
            "boxes": self.boxes and self.boxes.fingerprint(),
            "scores of the probes": self.run and to_json(self.run.scores()),
        }


def draw(args: argparse.Namespace, result: dict, setup: Setup, folder: RunFolder) -> None:
    """kl, and maps and boxes of the examples, as far as they were measured."""
    if not args.boxes_only:
        draw_divergences(result, folder.path / "kl.png", folder.path / "kl.pdf")
    drawn, tokens, examples = shown.shown_rules(setup.rules), setup.tokens, setup.examples
    if not examples or not drawn:
        return
    paths = [example.path for example in examples]
    log.info("examples: %s", ", ".join(paths))
    if not args.boxes_only:
        maps = shown.draw_example_maps(drawn, tokens, examples, setup.views["crop"], folder.path / "maps.png")
        label = Path(result["encoder"]["source"] or result["encoder"]["model"]).stem
        lists = {"rules": [rule.name for rule in drawn], "grid": tokens.backbone.grid_size, "images": paths}
        metadata = {"label": label, **{name: json.dumps(values) for name, values in lists.items()}}
        folder.save_tensors("examples.safetensors", maps, metadata)
    if setup.boxes is not None:
        compared, given, view = shown.compared_rules(drawn), args.draw_threshold, args.loc_transform
        names = [rule.name for rule in compared]
        thresholds = {name: shown.best_threshold(result, name) if given is None else given for name in names}
        boxed = setup.views[view], setup.boxes, view == "crop"
        shown.draw_example_boxes(compared, tokens, examples, *boxed, thresholds, folder.path / "boxes.png")


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
    """The encoder of --oracle, or that of the run's probes. ValueError if a probe was trained with another."""
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
