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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cli.arguments import identity, loading, plain, processes, split_options
from cli.encoder_arguments import build_oracle, choose_precision, frozen_encoder, precision
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
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
from probing.results import best_probe, log_neighbours, log_scores, log_summary, summary, warn_of_choices, warn_of_edges
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


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    multi_label, metric, seeds = DATASETS[args.dataset].multi_label, headline(args), data_seeds(args)
    with process_group(**processes(args)) as world:
        choose_precision(args, world.device)
        folder = RunFolder(args.output_dir + args.suffix if args.output_dir else "", args.log_dir, args.track)
        if not args.eval:
            folder.refuse_overwriting(args.resume)

        # ---- labelled images; with --val_fraction, rates are chosen on held-out training images
        train_images, test_images, num_classes = build_splits(
            args.dataset, args.data_path, args.nb_classes, **split_options(args)
        )
        kept, held_out = hold_out(train_images.targets, args.val_fraction, args.seed)
        if max(args.knn, default=0) > len(kept):
            raise ValueError(f"--knn {max(args.knn)}: must be <= {len(kept)}, the number of training images")

        # ---- a frozen encoder and a bank of probes on its tokens
        encoder, size = frozen_encoder(args)
        backbone = encoder.backbone.to(world.device)
        if args.final_norm and isinstance(backbone.norm, torch.nn.Identity):
            raise ValueError(f"--final_norm: encoders of family {encoder.record['family']} have no last norm; omit it")
        if args.compile:
            backbone.compile_blocks()
        specs, amp = probe_specs(args, backbone), precision(args.amp)
        bank = ProbeBank(
            specs, backbone, backbone.grid_of(size, size), num_classes, args.init, bool(seeds),
            head_precision(args, world.device),
        ).to(world.device)  # fmt: skip
        oracle = build_oracle(args, encoder, size, amp).to(world.device) if bank.needs.oracle else None
        frozen = FrozenTokens(backbone, bank.blocks, amp, args.final_norm, bank.needs, oracle)
        facts = {
            **encoder.facts(size), **(oracle.facts if oracle else {}), "class names": digest(train_images.classes),
        }  # fmt: skip
        evaluated = ["final_norm", *facts]  # what must be as in training if a checkpoint is evaluated
        facts |= {"training images": fingerprint(train_images), "test images": fingerprint(test_images)}
        require_same_run(facts)

        # ---- data: order and augmentation depend on (seed, epoch, sample) alone
        fits, shots = "logreg" in args.optimizer, Shots(args.shots, args.episodes, args.seed)
        batches = Fits(len(kept), len(tasks(specs, shots))) if fits else GlobalBatches(
            len(train_images), args.batch_size, args.accum_iter, args.seed, indices=kept, group=args.bn_group,
            seeds=seeds,
        )  # fmt: skip
        parts = image_parts(args, encoder, size, train_images, kept, held_out, test_images)
        orders = {name: EvaluationBatches(len(p.dataset), args.batch_size, p.indices) for name, p in parts.items()}
        orders["train"] = batches
        load = functools.partial(build_loader, **loading(args, world.device))
        tokens, loaders = frozen, {name: load(part.dataset, orders[name]) for name, part in parts.items()}
        cache = None
        if args.cache_views and not args.eval:
            tokens = CachedTokens(frozen, bank, size, world.device)
            key = cache_key(args, encoder.facts(size), oracle, [train_images, test_images], held_out, world.device)
            cache = FeatureCache(tokens, parts, args.cache_dir, key)
            loaders = {name: cache.loader(name, orders[name]) for name in parts}
        tally = functools.partial(MultiLabelTally if multi_label else Tally, len(specs), num_classes, world.device)

        def score(part: str, keeper: PredictionKeeper | None = None) -> dict[str, dict]:
            scores = evaluate(bank, tokens, loaders[part], world.device, tally(), keeper, part)
            return {spec.name: score._asdict() for spec, score in zip(specs, scores, strict=True)}

        # ---- recipe: LARS, a rate for each probe, warm-up and half-cosine by optimizer step
        lrs = [args.lr if args.lr is not None else scaled_lr(spec.blr, batches.effective) for spec in specs]
        optimizer = build_optimizer(args, specs, bank.parameter_groups(lrs))
        warmup = fitting_warmup(args.warmup_epochs, args.epochs)
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=warmup, min_lr=args.min_lr)
        probing = Probing(bank, tokens, optimizer, world.device, multi_label, args.bn_group, seeds)
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        trained = plan, probing, optimizer, schedule, loaders["train"], batches, folder, identity(args, facts)
        training = Fitting(cache, args.l2, shots, metric, *trained) if fits else Training(*trained, args.start_epoch)
        training.resume(args.resume, args.eval, evaluated)
        keeper = None
        if args.save_predictions:
            keeper = PredictionKeeper(probing.names, num_classes, multi_label, world.device)
        run = {
            "args": plain(args), "encoder": encoder.record, "effective_batch": batches.effective,
            "bn_group": args.bn_group or args.batch_size, "steps_per_epoch": batches.steps,
            "lr": dict(zip(probing.names, lrs, strict=True)), "n_train": len(kept), "n_val": len(held_out),
            "n_test": len(test_images), "classes": num_classes, "class_names": list(map(str, train_images.classes)),
            "headline": metric,
            "train_images": facts["training images"], "test_images": facts["test images"],
            "seeds_vary": seeds_vary(args), "oracle": oracle and oracle.record, **provenance(world.device),
        }  # fmt: skip
        if args.eval:
            log_scores(score("test", keeper))
            write_predictions(folder, keeper, specs, run, {})
            return

        # ---- epochs
        training.start(run)
        warn_of_choices(specs, bool(held_out))
        if batches.steps * args.epochs < FEW_STEPS and not fits:
            command = small_command(args, get_args_parser(), probing.program)
            log.warning("only %d optimizer steps: for so few images, %s", batches.steps * args.epochs, command)
        if cache is not None:
            cache.fill(args.batch_size, **load.keywords)
        log.info(
            "%d probes on %s; %d training images and %d held out, %d steps of %d per epoch, normalised in groups of "
            "%d, lr %s", len(specs), encoder.record["model"], len(kept), len(held_out), batches.steps,
            batches.effective, run["bn_group"], ", ".join(f"{lr:g}" for lr in sorted(set(lrs))),
        )  # fmt: skip
        watched = "val" if held_out and not fits else "test"  # logreg fits the probes to held-out images, too
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                stats = stats._replace(images_per_second=stats.images_per_second * len(batches.seeds))
                record = {
                    "epoch": epoch, "train_loss": stats.losses, "images_per_second": stats.images_per_second,
                    "data_wait": stats.data_wait, "memory_gib": stats.memory_gib,
                }  # fmt: skip
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    record[watched] = score(watched)
                    losses = dict(zip(probing.names, stats.losses, strict=True))
                    training.history.append({"epoch": epoch, "train_loss": losses, watched: record[watched]})
                log.info("epoch %d: %s%s", epoch, best_probe(record.get(watched), metric, watched), stats.speed())
                folder.log_line(record)
                figures = record.get(watched, {}).items()
                training.end_epoch({f"{watched}_{metric}/{name}": scores[metric] for name, scores in figures})

            # ---- results of the last epoch
            final = score("test", keeper) if held_out or keeper else training.history[-1]["test"]
            results = summary(bank, training.history, training.diverged(), watched, metric, final)
            for name, fit in training.facts.items() if fits else ():
                results[name] |= describe(fit)
            labels = (np.asarray(images.targets) for images in (train_images, test_images))
            mark_untrained(
                results, training.history[-1].get("train_loss", {}), next(labels)[kept], next(labels), metric
            )
            write_predictions(folder, keeper, specs, run, results)
            is_cached = cache is not None and args.crop == "center"  # without augmentation
            neighbours = args.knn or [k for k in NEIGHBOURS if is_cached and not multi_label and k <= len(kept)]
            if neighbours:
                order = EvaluationBatches(len(train_images), args.batch_size, kept)
                pixels = parts["test"].dataset.transform
                plain_train = KeyedDataset(train_images, pixels, args.seed, on_bad_image=args.on_bad_image)
                train = cache.loader("train", order) if is_cached else load(plain_train, order)
                test = loaders["test"] if is_cached else load(parts["test"].dataset, orders["test"])
                reader = tokens if is_cached else frozen
                run["knn"] = nearest_neighbours(bank, reader, train, test, world.device, neighbours, num_classes)
                log_neighbours(run["knn"])
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"probes": results, **run})
        log_summary(results, metric, args.report)
        warn_of_edges(results)
        folder.close()


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


def image_parts(
    args: argparse.Namespace, encoder: Encoder, size: int, train_images: Dataset, kept: Sequence[int],
    held_out: Sequence[int], test_images: Dataset,
) -> dict[str, Part]:  # fmt: skip
    """The images of "train" (augmented), of "test", and of "val" if some are held out."""
    normalise = {**encoder.pixels, "loader": args.loader}
    augment = train_transform(size, crop=args.crop, hflip=not args.no_hflip, **normalise)
    pixels = eval_transform(size, **normalise)
    keyed = functools.partial(KeyedDataset, seed=args.seed, on_bad_image=args.on_bad_image)
    seeds = data_seeds(args) if "views" in seeds_vary(args) else ()
    parts = {
        "train": Part(keyed(train_images, augment, train=True, indices=kept), kept, args.cache_views, seeds),
        "test": Part(keyed(test_images, pixels), range(len(test_images))),
    }
    return parts | ({"val": Part(keyed(train_images, pixels), held_out)} if held_out else {})


def cache_key(
    args: argparse.Namespace, encoder: dict[str, Any], oracle: Oracle | None, images: list[Dataset],
    held_out: Sequence[int], device: torch.device,
) -> dict:  # fmt: skip
    """Everything that cached features depend on; nothing for a cache in memory, which needs no name."""
    if args.cache_dir is None:
        return {}
    versions = provenance(device)["versions"]
    return {
        "encoder": encoder,
        "oracle": oracle and oracle.facts,
        "images": [fingerprint(part, local=True) for part in images],
        "held out": held_out,
        "arguments": feature_arguments(args),
        "device": device.type,
        "code": code_digest(),
        "versions": {name: versions[name] for name in ("torch", "torchvision", "pillow", "numpy")},
    }


def build_optimizer(args: argparse.Namespace, specs: list[ProbeSpec], groups: list[dict]) -> LARS:
    """One optimizer, with the rule of its probes in each group."""
    for group in groups:
        group |= OPTIMIZERS[specs[group["rows"][0]].optimizer]
        if args.momentum is not None:
            group["momentum"] = args.momentum
    return LARS(groups, weight_decay=args.weight_decay)


def write_predictions(
    folder: RunFolder, keeper: PredictionKeeper | None, specs: list[ProbeSpec], run: dict, results: dict[str, dict]
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
