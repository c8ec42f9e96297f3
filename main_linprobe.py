"""Train and test linear probes on the frozen tokens of one encoder, all in one pass.

The bank is the product of --cls_features, --return_block, --optimizer, --blr and --seeds. Defaults are the paper's
recipe (B.2).

examples:
    # the paper's probes: effective batch 16,384
    torchrun --nproc_per_node 4 main_linprobe.py --model vit_base_patch16 --finetune mae_vit_base_patch16 \\
        --cls_features cls pos abmilp --batch_size 2048 --accum_iter 2 --data_path $IMAGENET --output_dir runs/mae_b

    # a rate chosen on held-out images, three seeds, on a data set that is downloaded
    python main_linprobe.py --finetune mae_vit_base_patch16 --dataset imagenette --data_path data --epochs 20 \\
        --blr 0.1 1 10 --seeds 0 1 2 --val_fraction 0.1 --save_predictions --output_dir runs/imagenette

    # several blocks of a small encoder, from features that are computed once
    python main_linprobe.py --model vit_small_patch16 --finetune dino_vit_small_patch16 --dataset cifar10 \\
        --data_path data --cls_features cls abmilp:depth=2,act=tanh --return_block 2 5 8 11 --cache_views 1

    # go on with a run that was stopped
    python main_linprobe.py --args_from runs/mae_b/args.json --resume auto
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from cli.arguments import (
    add_data_arguments,
    add_encoder_arguments,
    add_old_arguments,
    add_oracle_arguments,
    add_run_arguments,
    build_oracle,
    check_files,
    check_training,
    frozen_encoder,
    identity,
    loading,
    plain,
    precision,
    shared_arguments,
)
from cli.console import Parser, parse, run_main
from data_sets.images import fingerprint
from data_sets.loader import (
    DATASETS,
    EvaluationBatches,
    GlobalBatches,
    KeyedDataset,
    build_loader,
    build_splits,
    eval_transform,
    hold_out,
    train_transform,
)
from encoders.architectures import known_depth
from encoders.load import Encoder
from engine_linprobe import FrozenTokens, Probing, evaluate, pooled
from models_vit import VisionTransformer, check_blocks
from probing.bank import ProbeBank, ProbeSpec
from probing.feature_cache import CachedTokens, FeatureCache, Part
from probing.heads import AGGREGATIONS, check_aggregation, option_flags, parse_head
from probing.knn import knn_scores
from probing.predictions import FILE, PredictionKeeper
from probing.results import (
    best_probe,
    log_neighbours,
    log_scores,
    log_summary,
    summary,
    warn_of_choices,
    warn_of_edges,
)
from runtime.folder import RunFolder
from runtime.processes import process_group, require_same_run
from runtime.provenance import provenance, utc_now
from runtime.training import Plan, Training
from util.files import digest
from util.lars import LARS
from util.lr_sched import lr_at, scaled_lr
from util.progress import log
from util.scores import MULTILABEL_METRICS, MultiLabelTally, Tally

OPTIMIZERS = {  # settings of util.lars.LARS; momentum: the paper's, and that of its code's SGD
    "lars": {"momentum": 0.9},
    "sgd": {"momentum": 0.0, "trust_coefficient": None},
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser)
    add_data_arguments(parser)

    probe = parser.add_argument_group("probes")
    probe.add_argument("--cls_features", nargs="+", default=None, metavar="HEAD",
                       help=f"aggregations to probe: {', '.join(AGGREGATIONS)} (default: cls); with options as in "
                       "abmilp:depth=2,act=tanh, ap12, ca2")  # fmt: skip
    probe.add_argument("--return_block", nargs="+", type=int, default=None, metavar="BLOCK",
                       help="blocks to probe, counted from 0 (default: the last)")  # fmt: skip
    probe.add_argument("--seeds", nargs="+", type=int, default=None,
                       help="a probe for each seed: independent runs (default: --seed)")  # fmt: skip
    probe.add_argument("--seeds_vary", choices=["all", "weights"], default="all",
                       help="all: initial weights, data order and augmentation, one pass over the training images per "
                       "seed; weights: initial weights only, one pass for all seeds")  # fmt: skip
    for flag, option in option_flags().items():
        words = not isinstance(option.allowed, int)
        probe.add_argument(
            f"--{flag}", default=option.default, type=str if words else int, choices=option.allowed if words else None,
            metavar=None if words else "N", help=f"{option.help}; of heads that do not say {flag.split('_')[-1]}=",
        )  # fmt: skip
    add_oracle_arguments(probe, default="dino_vit_base_patch16")
    probe.add_argument("--final_norm", action="store_true", help="probe tokens after the encoder's last norm")
    probe.add_argument("--init", choices=["default", "trunc_normal"], default="default",
                       help="of the classifier: PyTorch's, or MAE's (std 0.01)")  # fmt: skip

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--batch_size", default=512, type=int, help="images per process and micro-step")
    recipe.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    recipe.add_argument("--bn_group", default=None, type=int, metavar="N",
                        help="images that are normalised together, a part of --batch_size or several of them (paper: "
                        "2048; default: --batch_size)")  # fmt: skip
    recipe.add_argument("--epochs", default=90, type=int, help="of training")
    recipe.add_argument("--warmup_epochs", default=10, type=int, help="of them with a rate that rises from 0")
    recipe.add_argument("--optimizer", nargs="+", choices=list(OPTIMIZERS), default=["lars"],
                        help="rule of the updates")  # fmt: skip
    recipe.add_argument("--momentum", default=None, type=float, help="default: 0.9 for LARS, 0 for SGD (paper's code)")
    recipe.add_argument("--weight_decay", default=0.0, type=float, help="of matrices; with SGD of vectors, too")
    recipe.add_argument(
        "--blr", nargs="+", default=[0.1], type=float, help="base rate: lr = blr x effective batch / 256"
    )
    recipe.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    recipe.add_argument("--min_lr", default=0.0, type=float, help="rate at the end of the cosine")
    recipe.add_argument("--crop", choices=["mae", "torchvision", "center"], default="mae",
                        help="random crop of one draw, or of up to ten; center: no augmentation")  # fmt: skip
    recipe.add_argument("--no_hflip", action="store_true", help="no horizontal flips")
    recipe.add_argument("--cache_views", default=0, type=int, metavar="V",
                        help="keep what the encoder makes of V augmented views of each training image, and of the test "
                        "images, instead of computing it each epoch; 0: do not")  # fmt: skip
    recipe.add_argument("--cache_dir", default=None, type=Path, metavar="FOLDER",
                        help="keep it in a file there, for later runs too (default: in memory)")  # fmt: skip

    test = parser.add_argument_group("evaluation")
    test.add_argument("--eval", action="store_true", help="evaluate the probes of --resume and stop")
    test.add_argument(
        "--eval_every", default=1, type=int, help="epochs between evaluations; the last is always evaluated"
    )
    test.add_argument("--val_fraction", default=0.0, type=float, metavar="SHARE",
                      help="of the training images, held out of training: rates are chosen on them, and the test set "
                      "is used once")  # fmt: skip
    test.add_argument("--save_predictions", action="store_true",
                      help="write what probes say of every test image, for scripts/compare_probes.py")  # fmt: skip
    test.add_argument("--knn", nargs="+", type=int, default=[], metavar="K",
                      help="classify by K nearest neighbours, too, as DINO does (there: 10 20 100 200)")  # fmt: skip
    test.add_argument("--per_class", action="store_true",
                      help="what counts is the mean over classes of their accuracies")  # fmt: skip
    test.add_argument("--multilabel_metric", choices=MULTILABEL_METRICS, default="map",
                      help="what counts where images have several labels")  # fmt: skip
    test.add_argument("--report", choices=["last", "best"], default="last", help="epoch whose top-1 the summary prints")

    add_run_arguments(parser)
    old = add_old_arguments(parser)
    old.add_argument("--cls_token", action="store_true",
                     help="MAE's linear probe: --cls_features cls --final_norm --init trunc_normal")  # fmt: skip
    old.add_argument("--global_pool", action="store_true", help=argparse.SUPPRESS)  # MAE's; refused with the reason
    old.add_argument("--start_epoch", default=0, type=int, help="first epoch of a run that is not resumed")
    old.add_argument("--suffix", default="", help="appended to the name of --output_dir")
    return parser


def chosen_heads(args: argparse.Namespace) -> list[tuple[str, tuple]]:
    """--cls_features, read: aggregations and their options. ValueError for what does not exist."""
    flags = {flag: vars(args)[flag] for flag in option_flags()}
    return [parse_head(word, flags) for word in args.cls_features]


def probe_specs(args: argparse.Namespace, backbone: VisionTransformer) -> list[ProbeSpec]:
    """The bank that the arguments ask for. ValueError for what does not exist or does not fit the encoder."""
    heads = chosen_heads(args)
    for aggregation, _ in heads:
        check_aggregation(aggregation, backbone.has_cls)
    blocks = args.return_block if args.return_block is not None else [backbone.depth - 1]
    check_blocks(blocks, backbone.depth)
    # runs of the time when there could be one optimizer saved a word
    optimizers = [args.optimizer] if isinstance(args.optimizer, str) else args.optimizer
    return [
        ProbeSpec(aggregation, block, blr, seed, options, optimizer, args.lr)
        for (aggregation, options), block, optimizer, blr, seed in itertools.product(
            heads, blocks, optimizers, args.blr, args.seeds or [args.seed]
        )
    ]


def main(args: argparse.Namespace) -> None:
    settle(args)
    check_files(args)
    multi_label = DATASETS[args.dataset].multi_label
    headline = choose_metric(args, multi_label)
    with process_group(args.device, args.dist_url, shared_arguments(args)) as world:
        folder = RunFolder(args.output_dir + args.suffix if args.output_dir else "", args.log_dir)
        if not args.eval:
            folder.refuse_overwriting(args.resume)

        # ---- images with labels; some of those for training are held out where rates are chosen on them
        train_images, test_images, num_classes = build_splits(
            args.dataset, args.data_path, args.nb_classes, args.allow_subset
        )
        kept, held_out = hold_out(train_images.targets, args.val_fraction, args.seed)
        if max(args.knn, default=0) > len(kept):
            raise ValueError(f"--knn {max(args.knn)}: must be <= {len(kept)}, the number of training images")

        # ---- a frozen encoder and a bank of probes on its tokens
        encoder, size = frozen_encoder(args)
        backbone = encoder.backbone.to(world.device)
        if args.final_norm and isinstance(backbone.norm, torch.nn.Identity):
            raise ValueError(f"--final_norm: encoders of family {encoder.record['family']} have no last norm")
        specs = probe_specs(args, backbone)
        grid = backbone.grid_of(size, size)
        bank = ProbeBank(specs, backbone, grid, num_classes, args.init).to(world.device)
        amp = precision(args.amp)
        oracle = build_oracle(args, encoder, size, amp).to(world.device) if bank.needs.oracle else None
        frozen = FrozenTokens(backbone, bank.blocks, amp, args.final_norm, bank.needs, oracle)
        facts = {
            "weights": digest(backbone.state_dict()), "training images": fingerprint(train_images),
            "test images": fingerprint(test_images),
        }  # fmt: skip
        require_same_run(facts)

        # ---- data: order and augmentation depend on (seed, epoch, sample) alone
        seeds = data_seeds(args)
        batches = GlobalBatches(
            len(train_images), args.batch_size, args.accum_iter, args.seed, indices=kept, group=args.bn_group,
            seeds=seeds,
        )  # fmt: skip
        parts = image_parts(args, encoder, size, train_images, kept, held_out, test_images)
        orders = {name: EvaluationBatches(len(p.dataset), args.batch_size, p.indices) for name, p in parts.items()}
        orders["train"] = batches
        how = loading(args, world.device)
        tokens, loaders = frozen, {n: build_loader(p.dataset, orders[n], **how) for n, p in parts.items()}
        cache = None
        if args.cache_views and not args.eval:
            tokens = CachedTokens(frozen, bank, size, world.device)
            key = {} if args.cache_dir is None else {  # memory needs no name
                "weights": facts["weights"], "oracle": oracle and oracle.record["sha256"], "size": size,
                "images": [fingerprint(images, local=True) for images in (train_images, test_images)],
                **feature_facts(args, encoder, held_out, world.device.type),
            }  # fmt: skip
            cache = FeatureCache(tokens, parts, args.cache_dir, key)
            loaders = {name: cache.loader(name, orders[name]) for name in parts}
        tally = functools.partial(MultiLabelTally if multi_label else Tally, len(specs), num_classes, world.device)

        def score(part: str, keeper: PredictionKeeper | None = None) -> dict[str, dict]:
            scores = evaluate(bank, tokens, loaders[part], world.device, tally(), keeper, part)
            return {spec.name: score._asdict() for spec, score in zip(specs, scores, strict=True)}

        # ---- recipe: LARS, rate per probe, warm-up and half-cosine per optimizer step
        lrs = [args.lr if args.lr is not None else scaled_lr(spec.blr, batches.effective) for spec in specs]
        optimizer = build_optimizer(args, specs, bank.parameter_groups(lrs))
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr)
        probing = Probing(bank, tokens, optimizer, world.device, multi_label, args.bn_group, seeds)
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        run_identity = identity(args, facts)
        training = Training(
            plan, probing, optimizer, schedule, loaders["train"], batches, folder, run_identity, args.start_epoch
        )
        training.resume(args.resume, evaluate_only=args.eval)
        keeper = (
            PredictionKeeper(probing.names, num_classes, multi_label, world.device) if args.save_predictions else None
        )
        run = {
            "args": plain(args), "encoder": encoder.record, "effective_batch": batches.effective,
            "bn_group": args.bn_group or args.batch_size, "steps_per_epoch": batches.steps,
            "lr": dict(zip(probing.names, lrs, strict=True)), "n_train": len(kept), "n_val": len(held_out),
            "n_test": len(test_images), "classes": num_classes, "headline": headline,
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
        if cache is not None and (training.epoch < args.epochs or held_out or keeper):
            cache.fill(args.batch_size, **how)
        log.info(
            "%d probes on %s; %d training images%s, %d steps of %d per epoch, normalised in groups of %d, lr %s%s",
            len(specs), args.model, len(kept), f" and {len(held_out)} held out" if held_out else "", batches.steps,
            batches.effective, run["bn_group"],
            ", ".join(f"{lr:g}" for lr in sorted(set(lrs))),
            "" if args.lr is not None else f" (blr x {batches.effective} / 256)",
        )  # fmt: skip
        watched = "val" if held_out else "test"
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
                    training.history.append({"epoch": epoch, watched: record[watched]})
                log.info("epoch %d: %s%s", epoch, best_probe(record.get(watched), headline, watched), stats.speed())
                folder.log_line(record)
                figures = record.get(watched, {}).items()
                training.end_epoch({f"{watched}_{headline}/{name}": scores[headline] for name, scores in figures})

            # ---- results: the last epoch's
            final = score("test", keeper) if held_out or keeper else training.history[-1]["test"]
            results = summary(bank, training.history, training.diverged(), watched, headline, final)
            write_predictions(folder, keeper, specs, run, results)
            if args.knn:
                run["knn"] = neighbours(bank, frozen, parts, args, num_classes, how)
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"probes": results, **run})
        log_summary(results, headline, args.report)
        warn_of_edges(results)
        folder.close()


def data_seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """Seeds of data order and augmentation; none where the probes share those of --seed."""
    return () if args.seeds_vary == "weights" else tuple(args.seeds or [args.seed])


def seeds_vary(args: argparse.Namespace) -> list[str]:
    """What differs between probes of different seeds."""
    if args.seeds_vary == "weights":
        return ["weights"]
    return ["weights", "order"] if args.crop == "center" else ["weights", "order", "views"]


def image_parts(
    args: argparse.Namespace, encoder: Encoder, size: int, train_images: Dataset, kept: Sequence[int],
    held_out: Sequence[int], test_images: Dataset,
) -> dict[str, Part]:  # fmt: skip
    """The images of "train", augmented, of "test", and of "val" where some are held out."""
    augment = train_transform(size, encoder.mean, encoder.std, crop=args.crop, hflip=not args.no_hflip,
                              loader=args.loader)  # fmt: skip
    pixels = eval_transform(size, encoder.mean, encoder.std, args.loader)
    keyed = functools.partial(KeyedDataset, seed=args.seed, on_bad_image=args.on_bad_image)
    parts = {
        "train": Part(
            keyed(train_images, augment, train=True, indices=kept),
            kept,
            args.cache_views,
            data_seeds(args) if "views" in seeds_vary(args) else (),
        ),
        "test": Part(keyed(test_images, pixels), range(len(test_images))),
    }
    return parts | ({"val": Part(keyed(train_images, pixels), held_out)} if held_out else {})


# arguments that features do not depend on, or whose effect is compared itself: --finetune by the digest of its weights,
# --data_path by the fingerprint of its images, --seed and --val_fraction by the images and views that they choose
NOT_IN_FEATURES = {
    "finetune", "checkpoint_key", "offline", "data_path", "dataset", "allow_subset", "nb_classes", "num_workers",
    "pin_mem", "dataloader_affinity_hack", "seeds", "seeds_vary", "oracle", "oracle_model", "oracle_family",
    "oracle_checkpoint_key", "init", "batch_size", "accum_iter", "bn_group", "epochs", "warmup_epochs", "optimizer",
    "momentum", "weight_decay", "blr", "lr", "min_lr", "cache_views", "cache_dir", "eval", "eval_every", "val_fraction",
    "save_predictions", "knn", "per_class", "multilabel_metric", "report", "output_dir", "log_dir", "seed", "resume",
    "save_every_minutes", "save_every_steps", "dist_url", "args_from", "world_size", "local_rank", "dist_eval",
    "cls_token", "global_pool", "start_epoch", "suffix",
}  # fmt: skip


def feature_facts(args: argparse.Namespace, encoder: Encoder, held_out: Sequence[int], device: str) -> dict[str, Any]:
    """What cached features depend on beside weights and images. Arguments not known to be irrelevant count."""
    versions = provenance(torch.device("cpu"))["versions"]
    return {
        "held out": held_out, "encoder": [*encoder[1:3], encoder.record["family"]], "device": device,
        "versions": {name: versions[name] for name in ("torch", "torchvision", "pillow", "numpy")},
        "arguments": {name: value for name, value in plain(args).items() if name not in NOT_IN_FEATURES},
    }  # fmt: skip


def settle(args: argparse.Namespace) -> None:
    """Resolve arguments that depend on each other; ValueError where they contradict."""
    check_training(args)
    if args.global_pool:
        raise ValueError(
            "--global_pool is MAE's probe of the mean patch through a new, untrained fc_norm; it is not offered: "
            "write --cls_features pos (tokens before the last norm) or --cls_features pos --final_norm"
        )
    if args.cls_token:
        if args.cls_features not in (None, ["cls"]):
            raise ValueError("--cls_token is MAE's probe of [cls]: leave out --cls_features or --cls_token")
        args.final_norm, args.init = True, "trunc_normal"
    args.cls_features = args.cls_features or ["cls"]
    for aggregation, _ in chosen_heads(args):
        check_aggregation(aggregation, not args.no_cls_token)
    check_blocks(args.return_block or [], known_depth(args.model))
    if args.lr is not None and len(args.blr) > 1:
        raise ValueError(f"--lr {args.lr} sets one rate, --blr {args.blr} several: leave out one of them")
    if args.eval and not args.resume:
        raise ValueError("--eval needs the probes: name their checkpoint with --resume")
    if args.eval_every < 1:
        raise ValueError(f"--eval_every {args.eval_every}: write after how many epochs, such as 1")
    if (args.bn_group or args.batch_size) < 2:
        raise ValueError("batch normalisation needs at least two images: raise --batch_size or --bn_group")
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"--val_fraction {args.val_fraction}: write a share from 0 up to, but not, 1")
    if args.val_fraction and args.report == "best":
        raise ValueError("--report best is the epoch that is best on the test set, which --val_fraction uses once")
    if not 0 <= args.cache_views <= args.epochs:
        raise ValueError(
            f"--cache_views {args.cache_views}: an epoch takes one view, and there are --epochs {args.epochs}"
        )
    if args.crop == "center" and args.cache_views > 1:
        raise ValueError(f"--cache_views {args.cache_views}: without augmentation (--crop center) all views are one")
    if args.cache_dir is not None and not args.cache_views:
        raise ValueError("--cache_dir names where --cache_views V are kept: say how many")
    if args.save_predictions and not args.output_dir:
        raise ValueError("--save_predictions needs an --output_dir to write to")
    if min(args.knn, default=1) < 1:
        raise ValueError(f"--knn {min(args.knn)}: it takes at least one neighbour")


def choose_metric(args: argparse.Namespace, multi_label: bool) -> str:
    """The score that counts; ValueError for flags of the other kind of data set."""
    if not multi_label:
        return "per_class" if args.per_class else "top1"
    for flag in ("per_class", "knn"):
        if getattr(args, flag):
            raise ValueError(f"--{flag} is for images of one label, and those of --dataset {args.dataset} have several")
    return args.multilabel_metric


def build_optimizer(args: argparse.Namespace, specs: list[ProbeSpec], groups: list[dict]) -> LARS:
    """One optimizer; each probe's group follows the rule of its own kind."""
    for spec, group in zip(specs, groups, strict=True):
        group |= OPTIMIZERS[spec.optimizer]
        if args.momentum is not None:
            group["momentum"] = args.momentum
    return LARS(groups, weight_decay=args.weight_decay)


def neighbours(
    bank: ProbeBank, tokens: FrozenTokens, parts: dict[str, Part], args: argparse.Namespace, num_classes: int,
    how: dict,
) -> dict[str, dict]:  # fmt: skip
    """{vector: {k: its scores}} of k-NN classification on the vectors that the probes read; nothing is augmented.

    how: to load images, see cli.arguments.loading.
    """
    plain_train = Part(KeyedDataset(parts["train"].dataset.dataset, parts["test"].dataset.transform, args.seed,
                                    on_bad_image=args.on_bad_image), parts["train"].indices)  # fmt: skip
    (train, train_labels), (test, test_labels) = (
        pooled(bank, tokens, build_loader(
            part.dataset, EvaluationBatches(len(part.dataset), args.batch_size, part.indices), **how
        ), how["device"])
        for part in (plain_train, parts["test"])
    )  # fmt: skip
    found = {}
    for spec, learned, ours, theirs in zip(bank.distinct, bank.learned, train, test, strict=True):
        name = spec.name if learned else f"{spec.head}/block{spec.block}"
        found[name] = knn_scores(ours, train_labels, theirs, test_labels, args.knn, num_classes)
    log_neighbours(found)
    return found


def write_predictions(
    folder: RunFolder, keeper: PredictionKeeper | None, specs: list[ProbeSpec], run: dict, results: dict[str, dict]
) -> None:  # fmt: skip
    """predictions.safetensors, where they were kept; with the choice of the results, where they have one."""
    if keeper is None:
        return
    probes = {spec.name: {"head": spec.head, **dataclasses.asdict(spec)} for spec in specs}
    for name, result in results.items():
        probes[name] |= {key: result[key] for key in ("chosen",) if key in result}
    known = "headline", "seeds_vary", "test_images", "classes", "encoder", "command", "commit", "dirty"
    tensors, metadata = keeper.gather({"probes": probes, **{name: run[name] for name in known}})
    folder.save_tensors(FILE, tensors, metadata)


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
