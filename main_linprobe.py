"""Train and test linear probes on the frozen tokens of one encoder, all in one pass.

    torchrun --nproc_per_node 4 main_linprobe.py --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth \\
        --cls_features cls pos abmilp --batch_size 2048 --accum_iter 2 --data_path $IMAGENET --output_dir runs/mae_b

The bank is the product of --cls_features, --return_block, --optimizer, --blr and --seeds. Defaults are the paper's
recipe (B.2).
"""

import argparse
import functools
import itertools
import time

import torch

from aggregation import AGGREGATIONS, check_aggregation, option_flags, parse_head
from engine_linprobe import FrozenTokens, Probing, evaluate
from models_vit import VisionTransformer
from oracle import build_oracle
from probes import ProbeBank, ProbeSpec
from util.arguments import (
    PRECISIONS,
    Parser,
    add_data_arguments,
    add_encoder_arguments,
    add_run_arguments,
    build_encoder,
    check_training,
    parse,
    plain,
    run_main,
)
from util.datasets import (
    DATASETS,
    EvaluationBatches,
    GlobalBatches,
    KeyedDataset,
    build_loader,
    build_splits,
    eval_transform,
    train_transform,
)
from util.distributed import distributed
from util.files import digest
from util.lars import LARS
from util.lr_sched import lr_at, scaled_lr
from util.progress import log, setup_logging, throughput
from util.run_folder import RunFolder, provenance
from util.scores import MULTILABEL_METRICS, MultiLabelScores, Scores
from util.seeding import seeded
from util.training import Training

MOMENTUM_RULES = {  # momentum: the paper's, and that of its code's SGD
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
    probe.add_argument("--seeds", nargs="+", type=int, default=None, help="of initial weights (default: --seed)")
    for flag, option in option_flags().items():
        words = not isinstance(option.allowed, int)
        probe.add_argument(
            f"--{flag}", default=option.default, type=str if words else int, choices=option.allowed if words else None,
            metavar=None if words else "N", help=f"{option.help}; of heads that do not say {flag.split('_')[-1]}=",
        )  # fmt: skip
    probe.add_argument("--oracle", default="dino_vit_base_patch16", metavar="WEIGHTS",
                       help="encoder whose [cls] attention the head dino takes; as --finetune")  # fmt: skip
    probe.add_argument("--oracle_model", default="vit_base_patch16", metavar="MODEL", help="its architecture")
    probe.add_argument("--oracle_family", default=None, help="format of its file (default: detected)")
    probe.add_argument("--oracle_checkpoint_key", default=None, help="entry of its file that holds the weights")
    probe.add_argument("--final_norm", action="store_true", help="probe tokens after the encoder's last norm")
    probe.add_argument("--init", choices=["default", "trunc_normal"], default="default",
                       help="of the classifier: PyTorch's, or MAE's (std 0.01)")  # fmt: skip
    probe.add_argument("--cls_token", action="store_true",
                       help="MAE's linear probe: --cls_features cls --final_norm --init trunc_normal")  # fmt: skip
    probe.add_argument("--global_pool", action="store_true", help=argparse.SUPPRESS)  # MAE's; refused with the reason

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--batch_size", default=512, type=int, help="images per process and micro-step, one BN batch")
    recipe.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    recipe.add_argument("--epochs", default=90, type=int)
    recipe.add_argument("--warmup_epochs", default=10, type=int)
    recipe.add_argument("--optimizer", nargs="+", choices=list(MOMENTUM_RULES), default=["lars"])
    recipe.add_argument("--momentum", default=None, type=float, help="default: 0.9 for LARS, 0 for SGD (paper's code)")
    recipe.add_argument("--weight_decay", default=0.0, type=float)
    recipe.add_argument(
        "--blr", nargs="+", default=[0.1], type=float, help="base rate: lr = blr x effective batch / 256"
    )
    recipe.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    recipe.add_argument("--min_lr", default=0.0, type=float)
    recipe.add_argument(
        "--crop", choices=["mae", "torchvision"], default="mae", help="random crop: one draw, or up to ten"
    )
    recipe.add_argument("--no_hflip", action="store_true", help="no horizontal flips")

    add_run_arguments(parser)
    run = parser.add_argument_group("evaluation")
    run.add_argument("--eval", action="store_true", help="evaluate the probes of --resume and stop")
    run.add_argument(
        "--eval_every", default=1, type=int, help="epochs between evaluations; the last is always evaluated"
    )
    run.add_argument("--multilabel_metric", choices=MULTILABEL_METRICS, default="map",
                     help="what counts where images have several labels")  # fmt: skip
    run.add_argument("--report", choices=["last", "best"], default="last", help="epoch whose top-1 the summary prints")
    run.add_argument(
        "--dist_eval", action="store_true", help="accepted for MAE's commands: evaluation is always shared"
    )
    run.add_argument("--start_epoch", default=0, type=int, help="first epoch of a run that is not resumed")
    run.add_argument("--suffix", default="", help="appended to the name of --output_dir")
    return parser


def probe_specs(args: argparse.Namespace, backbone: VisionTransformer) -> list[ProbeSpec]:
    """The bank that the arguments ask for. ValueError for what does not exist or does not fit the encoder."""
    flags = {flag: vars(args)[flag] for flag in option_flags()}
    heads = [parse_head(word, flags) for word in args.cls_features]
    for aggregation, _ in heads:
        check_aggregation(aggregation, backbone.has_cls)
    blocks = args.return_block if args.return_block is not None else [backbone.depth - 1]
    backbone.check_blocks(blocks)
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
    with distributed(args.device, args.dist_url) as world:
        setup_logging()
        folder = RunFolder(args.output_dir + args.suffix if args.output_dir else "", args.log_dir)
        if not args.eval:
            folder.refuse_overwriting(args.resume)

        # ---- a frozen encoder and a bank of probes on its tokens
        train_images, test_images, num_classes = build_splits(
            args.dataset, args.data_path, args.nb_classes, args.allow_subset
        )
        multi_label = DATASETS[args.dataset].multi_label
        headline = args.multilabel_metric if multi_label else "top1"
        batches = GlobalBatches(len(train_images), args.batch_size, args.accum_iter, args.seed)
        with seeded("weights", args.seed):
            encoder, size = build_encoder(args)
        backbone = encoder.backbone.to(world.device)
        if args.final_norm and isinstance(backbone.norm, torch.nn.Identity):
            raise ValueError(f"--final_norm: encoders of family {encoder.record['family']} have no last norm")
        specs = probe_specs(args, backbone)
        grid = (size // backbone.patch_size, size // backbone.patch_size)
        bank = ProbeBank(specs, backbone, grid, num_classes, args.init).to(world.device)
        amp = PRECISIONS[args.amp]
        oracle = build_oracle(args, encoder, size, amp).to(world.device) if bank.needs.oracle else None
        tokens = FrozenTokens(backbone, bank.blocks, amp, args.final_norm, bank.needs, oracle)

        # ---- data: order and augmentation depend on (seed, epoch, sample) alone
        augment = train_transform(size, encoder.mean, encoder.std, crop=args.crop, hflip=not args.no_hflip)
        pixels = eval_transform(size, encoder.mean, encoder.std)
        test_batches = EvaluationBatches(len(test_images), args.batch_size)
        loader = functools.partial(
            build_loader, num_workers=args.num_workers, pin_memory=args.pin_mem and world.device.type == "cuda",
            affinity_hack=args.dataloader_affinity_hack,
        )  # fmt: skip
        train_set = KeyedDataset(train_images, augment, args.seed, on_bad_image=args.on_bad_image, train=True)
        test_set = KeyedDataset(test_images, pixels, args.seed, on_bad_image=args.on_bad_image)
        train_loader, test_loader = loader(train_set, batches), loader(test_set, test_batches)
        evaluated = functools.partial(
            evaluate, bank, tokens, test_loader, world.device, num_classes if multi_label else 0
        )

        # ---- recipe: LARS, rate per probe, warm-up and half-cosine per optimizer step
        lrs = [args.lr if args.lr is not None else scaled_lr(spec.blr, batches.effective) for spec in specs]
        optimizer = build_optimizer(args, specs, bank.parameter_groups(lrs))
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr)
        probing = Probing(bank, tokens, optimizer, world.device, multi_label)
        facts = {"weights": digest(backbone.state_dict())}
        training = Training(args, probing, optimizer, schedule, train_loader, batches, folder, facts)
        training.resume(args.resume, evaluate_only=args.eval)
        if args.eval:
            report(evaluated(), specs)
            return

        # ---- epochs
        run = {
            "args": plain(args), "encoder": encoder.record, "effective_batch": batches.effective,
            "steps_per_epoch": batches.steps, "lr": dict(zip([spec.name for spec in specs], lrs, strict=True)),
            "n_train": len(train_images), "n_test": len(test_images), "classes": num_classes,
            "oracle": oracle and oracle.record, **provenance(world.device),
        }  # fmt: skip
        training.start(run)
        log.info(
            "%d probes on %s; %d training images, %d steps of %d per epoch, lr %s", len(specs), args.model,
            len(train_images), batches.steps, batches.effective, ", ".join(f"{lr:g}" for lr in sorted(set(lrs))),
        )  # fmt: skip
        start = time.time()
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                record = {
                    "epoch": epoch, "train_loss": stats.losses, "images_per_second": stats.images_per_second,
                    "data_wait": stats.data_wait,
                }  # fmt: skip
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    scores = evaluated()
                    record["test"] = {spec.name: score._asdict() for spec, score in zip(specs, scores, strict=True)}
                    training.history.append({"epoch": epoch, "test": record["test"]})
                tell(record, headline)
                folder.log_line(record)
                tested = record.get("test", {}).items()
                training.end_epoch({f"test_{headline}/{name}": score[headline] for name, score in tested})
            results = summary(specs, bank, training.history, training.diverged(), headline)
            folder.write("results.json", {"probes": results, "seconds": time.time() - start, **run})
        for name, result in results.items():
            log.info(
                "%s: %s %.2f (%s epoch; last %.2f, best %.2f at epoch %d)", name, spoken(headline),
                result[args.report][headline], args.report, result["last"][headline], result["best"][headline],
                result["best"]["epoch"],
            )  # fmt: skip
        folder.close()


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
    if args.lr is not None and len(args.blr) > 1:
        raise ValueError(f"--lr {args.lr} sets one rate, --blr {args.blr} several: leave out one of them")
    if args.eval and not args.resume:
        raise ValueError("--eval needs the probes: name their checkpoint with --resume")


def spoken(headline: str) -> str:
    return {"top1": "top-1", "top5": "top-5", "map": "mAP"}.get(headline, headline)


def tell(record: dict, headline: str) -> None:
    """An epoch's figures to the log."""
    words = throughput(record["images_per_second"], record["data_wait"])
    if "test" in record:
        best = max(record["test"], key=lambda name: record["test"][name][headline])
        words = f"{spoken(headline)} up to {record['test'][best][headline]:.2f} ({best}), {words}"
    log.info("epoch %d: %s", record["epoch"], words)


def build_optimizer(args: argparse.Namespace, specs: list[ProbeSpec], groups: list[dict]) -> LARS:
    """One optimizer; each probe's group follows the rule of its own kind."""
    for spec, group in zip(specs, groups, strict=True):
        group |= MOMENTUM_RULES[spec.optimizer]
        if args.momentum is not None:
            group["momentum"] = args.momentum
    return LARS(groups, weight_decay=args.weight_decay)


def summary(
    specs: list[ProbeSpec], bank: ProbeBank, history: list[dict], diverged: dict[str, dict | None], headline: str
) -> dict[str, dict]:
    """{probe name: what it is, its scores at the last epoch, and at the epoch that is best on the test set}.

    diverged: {probe name: the epoch and step after which it did not change any more, or None}.
    """
    results = {}
    for spec, probe in zip(specs, bank.probes, strict=True):
        scores = [{"epoch": entry["epoch"], **entry["test"][spec.name]} for entry in history]
        results[spec.name] = {
            "aggregation": spec.aggregation, "head": spec.head, "block": spec.block, "blr": spec.blr, "seed": spec.seed,
            "optimizer": spec.optimizer,
            "parameters": sum(p.numel() for p in probe.parameters()),
            "diverged_at": diverged[spec.name],
            "last": scores[-1], "best": max(scores, key=lambda score: score[headline]),
        }  # fmt: skip
    return results


def report(scores: list[Scores] | list[MultiLabelScores], specs: list[ProbeSpec]) -> None:
    for spec, score in zip(specs, scores, strict=True):
        rates = score._fields[: score._fields.index("loss")]  # in percent
        percents = ", ".join(f"{spoken(name)} {getattr(score, name):.2f}" for name in rates)
        log.info("%s: %s, loss %.4f on %d images", spec.name, percents, score.loss, score.n)


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
