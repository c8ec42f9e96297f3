"""Train and test linear probes on the frozen tokens of one encoder; cli/linprobe.py has the arguments and examples."""

from cli.arguments import check_files
from cli.console import checked, parse, run_main
from cli.linprobe import (
    OPTIMIZERS,
    check,
    data_seeds,
    feature_arguments,
    get_args_parser,
    head_precision,
    headline,
    heads,
    seeds_vary,
)
from cli.presets import FEW_STEPS, small_command

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(parse(get_args_parser()), check, check_files)

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cli.arguments import identity, loading, plain, processes, split_options
from cli.encoder_arguments import build_oracle, choose_precision, frozen_encoder, precision
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, Loader, Sample, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches, hold_out
from data_sets.table import DATASETS, build_splits
from data_sets.views import eval_transform, train_transform
from encoders.architectures import check_blocks
from encoders.load import Encoder
from encoders.oracle import Oracle
from engine_linprobe import FrozenTokens, Probing, evaluate, nearest_neighbours
from models_vit import VisionTransformer
from probing.bank import ProbeBank, ProbeSpec
from probing.feature_cache import CachedTokens, FeatureCache, Part
from probing.heads import own_block
from probing.logreg import Fits, Fitting, Shots, describe, tasks
from probing.predictions import FILE, PredictionKeeper
from probing.results import (
    best_probe,
    log_neighbours,
    log_scores,
    log_start,
    log_summary,
    summary,
    warn_of_choices,
    warn_of_edges,
)
from probing.untrained import mark_untrained
from runtime.folder import RunFolder
from runtime.processes import process_group, require_same_run
from runtime.provenance import code_digest, provenance, utc_now
from runtime.training import Plan, Training
from util.files import digest
from util.lars import LARS
from util.lr_sched import fitting_warmup, lr_at, scaled_lr
from util.progress import log
from util.scores import MultiLabelTally, Tally

NEIGHBOURS = (1, 5, 20)  # of k-NN without --knn, if features are cached


class Splits(NamedTuple):
    """Labelled images: all training images, of which some are held out, and test images."""

    train: Dataset
    test: Dataset
    classes: int
    kept: Sequence[int]  # positions of the training images that are not held out
    held_out: Sequence[int]


class Inputs(NamedTuple):
    """What a bank reads, by parts of the images: "train", "test", and "val" if some are held out."""

    parts: dict[str, Part]
    tokens: FrozenTokens | CachedTokens
    loaders: dict[str, Iterable[Sample]]
    cache: FeatureCache | None
    load: Callable[..., Loader]  # (data set, order) of images that are not cached


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(**processes(args)) as world:
        choose_precision(args, world.device)
        folder = RunFolder(args.output_dir + args.suffix if args.output_dir else "", args.log_dir, args.track)
        if not args.eval:
            folder.refuse_overwriting(args.resume)

        # ---- labelled images, a frozen encoder, and a bank of probes on its tokens
        images, metric = read_images(args), headline(args)
        encoder, size = frozen_encoder(args)
        frozen, bank = build_bank(args, encoder, size, images.classes, world.device)
        oracle = frozen.oracle
        facts = {**encoder.facts(size), **(oracle.facts if oracle else {}), "class names": digest(images.train.classes)}
        evaluated = ["final_norm", *facts]  # what must be as in training if a checkpoint is evaluated
        facts |= {"training images": fingerprint(images.train), "test images": fingerprint(images.test)}
        require_same_run(facts)

        # ---- data: order and augmentation depend on (seed, epoch, sample) alone
        fits, shots = "logreg" in args.optimizer, Shots(args.shots, args.episodes, args.seed)
        if fits:
            batches = Fits(len(images.kept), len(tasks(bank.specs, shots)))
        else:
            options = {"indices": images.kept, "group": args.bn_group, "seeds": data_seeds(args)}
            batches = GlobalBatches(len(images.train), args.batch_size, args.accum_iter, args.seed, **options)
        inputs = build_inputs(args, encoder, size, images, batches, frozen, bank, world.device)

        # ---- recipe: LARS, a rate for each probe, warm-up and half-cosine by optimizer step
        lrs = [args.lr if args.lr is not None else scaled_lr(spec.blr, batches.effective) for spec in bank.specs]
        optimizer = build_optimizer(args, bank.specs, bank.parameter_groups(lrs))
        warmup = fitting_warmup(args.warmup_epochs, args.epochs)
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=warmup, min_lr=args.min_lr)
        several = DATASETS[args.dataset].multi_label
        options = world.device, several, args.bn_group, data_seeds(args)
        probing = Probing(bank, inputs.tokens, optimizer, *options)
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        recipe = plan, probing, optimizer, schedule, inputs.loaders["train"], batches, folder, identity(args, facts)
        training = (
            Fitting(inputs.cache, args.l2, shots, metric, *recipe) if fits else Training(*recipe, args.start_epoch)
        )
        training.resume(args.resume, args.eval, evaluated)
        keeper = None
        if args.save_predictions:
            keeper = PredictionKeeper(probing.names, images.classes, several, world.device)
        run = run_record(
            args, encoder, images, batches, dict(zip(probing.names, lrs, strict=True)), facts, world.device
        )
        run["oracle"] = oracle and oracle.record
        score = functools.partial(evaluate_part, bank, inputs, several, images.classes, world.device)
        if args.eval:
            log_scores(score("test", keeper))
            write_predictions(folder, keeper, bank.specs, run, {})
            return

        # ---- epochs
        training.start(run)
        warn_of_choices(bank.specs, bool(images.held_out))
        if batches.steps * args.epochs < FEW_STEPS and not fits:
            command = small_command(args, get_args_parser(), probing.program)
            log.warning("only %d optimizer steps: for so few images, %s", batches.steps * args.epochs, command)
        if inputs.cache is not None:
            inputs.cache.fill(args.batch_size, **inputs.load.keywords)
        log_start(run, bank)
        watched = "val" if images.held_out and not fits else "test"  # logreg fits the probes to held-out images, too
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                stats = stats._replace(images_per_second=stats.images_per_second * len(batches.seeds))
                record = {"epoch": epoch, "train_loss": stats.losses, **stats.costs()}
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    record[watched] = score(watched)
                    losses = dict(zip(probing.names, stats.losses, strict=True))
                    training.history.append({"epoch": epoch, "train_loss": losses, watched: record[watched]})
                log.info("epoch %d: %s%s", epoch, best_probe(record.get(watched), metric, watched), stats.speed())
                folder.log_line(record)
                figures = record.get(watched, {}).items()
                training.end_epoch({f"{watched}_{metric}/{name}": scores[metric] for name, scores in figures})

            # ---- results of the last epoch
            final = score("test", keeper) if images.held_out or keeper else training.history[-1]["test"]
            results = summary(bank, training.history, training.diverged(), watched, metric, final)
            for name, fit in training.facts.items() if fits else ():
                results[name] |= describe(fit)
            labels = np.asarray(images.train.targets)[images.kept], np.asarray(images.test.targets)
            mark_untrained(results, training.history[-1].get("train_loss", {}), *labels, metric)
            write_predictions(folder, keeper, bank.specs, run, results)
            if neighbours := neighbour_scores(args, images, inputs, frozen, bank, world.device):
                run["knn"] = neighbours
                log_neighbours(neighbours)
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"probes": results, **run})
        log_summary(results, metric, args.report)
        warn_of_edges(results)
        folder.close()


def read_images(args: argparse.Namespace) -> Splits:
    """With --val_fraction, rates are chosen on training images that are held out."""
    train, test, classes = build_splits(args.dataset, args.data_path, args.nb_classes, **split_options(args))
    kept, held_out = hold_out(train.targets, args.val_fraction, args.seed)
    if max(args.knn, default=0) > len(kept):
        raise ValueError(f"--knn {max(args.knn)}: must be <= {len(kept)}, the number of training images")
    return Splits(train, test, classes, kept, held_out)


def build_bank(
    args: argparse.Namespace, encoder: Encoder, size: int, classes: int, device: torch.device
) -> tuple[FrozenTokens, ProbeBank]:
    """How the encoder is read, and the probes on its tokens."""
    backbone, amp = encoder.backbone.to(device), precision(args.amp)
    if args.final_norm and isinstance(backbone.norm, torch.nn.Identity):
        raise ValueError(f"--final_norm: encoders of family {encoder.record['family']} have no last norm; omit it")
    if args.compile:
        backbone.compile_blocks()
    options = args.init, bool(data_seeds(args)), head_precision(args, device)
    grid = backbone.grid_of(size, size)
    bank = ProbeBank(probe_specs(args, backbone), backbone, grid, classes, *options).to(device)
    oracle = build_oracle(args, encoder, size, amp).to(device) if bank.needs.oracle else None
    return FrozenTokens(backbone, bank.blocks, amp, args.final_norm, bank.needs, oracle), bank


def build_inputs(
    args: argparse.Namespace, encoder: Encoder, size: int, images: Splits, batches: GlobalBatches | Fits,
    frozen: FrozenTokens, bank: ProbeBank, device: torch.device,
) -> Inputs:  # fmt: skip
    """The images of each part in their order; with --cache_views, features that are computed once."""
    parts = image_parts(args, encoder, size, images)
    orders = {name: EvaluationBatches(len(p.dataset), args.batch_size, p.indices) for name, p in parts.items()}
    orders["train"] = batches
    load = functools.partial(build_loader, **loading(args, device))
    if not args.cache_views or args.eval:
        return Inputs(parts, frozen, {name: load(p.dataset, orders[name]) for name, p in parts.items()}, None, load)
    tokens = CachedTokens(frozen, bank, size, device)
    cache = FeatureCache(
        tokens, parts, args.cache_dir, cache_key(args, encoder.facts(size), frozen.oracle, images, device)
    )
    return Inputs(parts, tokens, {name: cache.loader(name, orders[name]) for name in parts}, cache, load)


def run_record(
    args: argparse.Namespace, encoder: Encoder, images: Splits, batches: GlobalBatches | Fits, lrs: dict[str, float],
    facts: dict[str, Any], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """What args.json and results.json say about the run."""
    return {
        "args": plain(args),
        "encoder": encoder.record,
        "effective_batch": batches.effective,
        "bn_group": args.bn_group or args.batch_size,
        "steps_per_epoch": batches.steps,
        "lr": lrs,
        "n_train": len(images.kept),
        "n_val": len(images.held_out),
        "n_test": len(images.test),
        "classes": images.classes,
        "class_names": list(map(str, images.train.classes)),
        "headline": headline(args),
        "train_images": facts["training images"],
        "test_images": facts["test images"],
        "seeds_vary": seeds_vary(args),
        **provenance(device),
    }


def evaluate_part(
    bank: ProbeBank, inputs: Inputs, multi_label: bool, classes: int, device: torch.device, part: str,
    keeper: PredictionKeeper | None = None,
) -> dict[str, dict]:  # fmt: skip
    """{probe: its scores} on a part of the images. keeper: collects the predictions."""
    tally = (MultiLabelTally if multi_label else Tally)(len(bank.specs), classes, device)
    scores = evaluate(bank, inputs.tokens, inputs.loaders[part], device, tally, keeper, part)
    return {spec.name: score._asdict() for spec, score in zip(bank.specs, scores, strict=True)}


def neighbour_scores(
    args: argparse.Namespace,
    images: Splits,
    inputs: Inputs,
    frozen: FrozenTokens,
    bank: ProbeBank,
    device: torch.device,
) -> dict[str, dict]:
    """k-NN scores of --knn on images without augmentation; with features of such images in a cache, of NEIGHBOURS."""
    is_cached = inputs.cache is not None and args.crop == "center"
    multi_label, order = (
        DATASETS[args.dataset].multi_label,
        EvaluationBatches(len(images.train), args.batch_size, images.kept),
    )
    neighbours = args.knn or [k for k in NEIGHBOURS if is_cached and not multi_label and k <= len(images.kept)]
    if not neighbours:
        return {}
    if is_cached:
        tokens, train, test = inputs.tokens, inputs.cache.loader("train", order), inputs.loaders["test"]
    else:
        shown = inputs.parts["test"].dataset
        plain_train = KeyedDataset(images.train, shown.transform, args.seed, on_bad_image=args.on_bad_image)
        tokens, train = frozen, inputs.load(plain_train, order)
        test = inputs.load(shown, EvaluationBatches(len(shown), args.batch_size))
    return nearest_neighbours(bank, tokens, train, test, device, neighbours, images.classes)


def probe_specs(args: argparse.Namespace, backbone: VisionTransformer) -> list[ProbeSpec]:
    """The probes that the arguments name. ValueError for what does not exist or does not fit the encoder."""
    blocks = args.return_block if args.return_block is not None else [backbone.depth - 1]
    check_blocks(blocks, backbone.depth)
    placed = [
        (head, block)
        for head in heads(args, backbone.depth)
        for block in dict.fromkeys(own_block(head) if own_block(head) is not None else block for block in blocks)
    ]
    settings = itertools.product(placed, args.optimizer, args.blr, args.seeds or [args.seed])
    return [ProbeSpec(*place, blr, seed, optimizer, args.lr) for place, optimizer, blr, seed in settings]


def image_parts(args: argparse.Namespace, encoder: Encoder, size: int, images: Splits) -> dict[str, Part]:
    """Training images are augmented, the others are not."""
    normalise = {**encoder.pixels, "loader": args.loader}
    augment = train_transform(size, crop=args.crop, hflip=not args.no_hflip, **normalise)
    pixels = eval_transform(size, **normalise)
    keyed = functools.partial(KeyedDataset, seed=args.seed, on_bad_image=args.on_bad_image)
    seeds = data_seeds(args) if "views" in seeds_vary(args) else ()
    train = keyed(images.train, augment, train=True, indices=images.kept)
    parts = {
        "train": Part(train, images.kept, args.cache_views, seeds),
        "test": Part(keyed(images.test, pixels), range(len(images.test))),
    }
    return parts | ({"val": Part(keyed(images.train, pixels), images.held_out)} if images.held_out else {})


def cache_key(
    args: argparse.Namespace, encoder: dict[str, Any], oracle: Oracle | None, images: Splits, device: torch.device
) -> dict:
    """Everything that cached features depend on; nothing for a cache in memory, which needs no name."""
    if args.cache_dir is None:
        return {}
    versions = provenance(device)["versions"]
    return {
        "encoder": encoder,
        "oracle": oracle and oracle.facts,
        "images": [fingerprint(part, local=True) for part in (images.train, images.test)],
        "held out": images.held_out,
        "arguments": feature_arguments(args),
        "device": device.type,
        "code": code_digest(),
        "versions": {name: versions[name] for name in ("torch", "torchvision", "pillow", "numpy")},
    }


def build_optimizer(args: argparse.Namespace, specs: Sequence[ProbeSpec], groups: list[dict]) -> LARS:
    """One optimizer, with the rule of its probes in each group."""
    for group in groups:
        group |= OPTIMIZERS[specs[group["rows"][0]].optimizer]
        if args.momentum is not None:
            group["momentum"] = args.momentum
    return LARS(groups, weight_decay=args.weight_decay)


def write_predictions(
    folder: RunFolder, keeper: PredictionKeeper | None, specs: Sequence[ProbeSpec], run: dict, results: dict[str, dict]
) -> None:  # fmt: skip
    """Write predictions.safetensors if predictions were kept, with the choices in `results`, if any."""
    if keeper is None:
        return
    probes = {spec.name: {"head": spec.head, **dataclasses.asdict(spec)} for spec in specs}
    for name, result in results.items():
        probes[name] |= {key: result[key] for key in ("chosen", "learned_nothing") if key in result}
    known = "headline", "seeds_vary", "test_images", "classes", "encoder", "command", "commit", "dirty"
    tensors, metadata = keeper.gather({"probes": probes, **{name: run[name] for name in known}})
    folder.save_tensors(FILE, tensors, metadata)


if __name__ == "__main__":
    run_main(main, ARGS)
