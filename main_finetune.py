"""End-to-end fine-tuning on the [cls] token: the paper's MAE-FT, and the demo's fine-tuned encoder.

    torchrun --nproc_per_node 8 main_finetune.py --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth \\
        --batch_size 128 --data_path $IMAGENET --output_dir runs/mae_ft_base

The run folder ends with `encoder.safetensors` (family mae_ft: encoder and head), which every other main takes as
--finetune. Defaults are the paper's recipe for ViT-B (B.1). Source: He et al., 2022, appendix A.
"""

import argparse
import functools
import time

import torch
from timm.data import Mixup, create_transform

from engine_finetune import evaluate, train_one_epoch
from models_vit import ClsClassifier
from util.arguments import (
    PRECISIONS,
    Parser,
    add_data_arguments,
    add_encoder_arguments,
    add_run_arguments,
    build_encoder,
    check_resumed,
    check_training,
    parse,
    plain,
    run_main,
)
from util.checkpoints import save_encoder
from util.datasets import (
    DATASETS,
    EvaluationBatches,
    GlobalBatches,
    KeyedDataset,
    build_loader,
    build_splits,
    eval_transform,
)
from util.distributed import barrier, distributed
from util.lr_sched import lr_at, scaled_lr
from util.optim import layer_decay_groups
from util.progress import log, setup_logging
from util.run_folder import RunFolder, provenance
from util.seeding import seeded


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser)
    add_data_arguments(parser)
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", default=64, type=int, help="images per process and micro-step")
    optim.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    optim.add_argument("--epochs", default=100, type=int)
    optim.add_argument("--warmup_epochs", default=5, type=int)
    optim.add_argument("--blr", default=5e-4, type=float, help="base rate: lr = blr x effective batch / 256")
    optim.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    optim.add_argument("--min_lr", default=1e-6, type=float)
    optim.add_argument("--layer_decay", default=0.65, type=float, help="rate of a block relative to the one above it")
    optim.add_argument("--weight_decay", default=0.05, type=float)
    optim.add_argument("--clip_grad", default=None, type=float, metavar="NORM")
    reg = parser.add_argument_group("regularisation")
    reg.add_argument("--drop_path", default=0.1, type=float, help="stochastic depth of the last block")
    reg.add_argument("--crop_scale", default=0.08, type=float, help="smallest share of the image that a crop covers")
    reg.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help='RandAugment policy in timm\'s notation; "" for none')
    reg.add_argument("--color_jitter", default=None, type=float, help="used where --aa is off")
    reg.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    reg.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    reg.add_argument("--mixup", default=0.8, type=float)
    reg.add_argument("--cutmix", default=1.0, type=float)
    reg.add_argument("--cls_token", action="store_true", help="for MAE's commands: [cls] is always what is fine-tuned")
    add_run_arguments(parser)
    run = parser.add_argument_group("evaluation")
    run.add_argument("--eval", action="store_true", help="evaluate the classifier of --resume and stop")
    run.add_argument("--dist_eval", action="store_true", help="for MAE's commands: evaluation is always shared")
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    with distributed(args.device, args.dist_url) as world:
        setup_logging()
        folder = RunFolder(args.output_dir, args.log_dir)
        state = folder.find_checkpoint(args.resume, evaluate_only=args.eval)

        # ---- encoder with a fresh head, all of it trained
        train_images, test_images, num_classes = build_splits(
            args.dataset, args.data_path, args.nb_classes, args.allow_subset
        )
        batches = GlobalBatches(len(train_images), args.batch_size, args.accum_iter, args.seed)
        with seeded("weights", args.seed):
            encoder, size = build_encoder(args, drop_path=args.drop_path)
            model = ClsClassifier(encoder.backbone.requires_grad_(True), num_classes).to(world.device)

        # ---- data
        augment = create_transform(
            size, is_training=True, scale=(args.crop_scale, 1.0), color_jitter=args.color_jitter,
            auto_augment=args.aa or None, interpolation="bicubic", re_prob=args.reprob, re_mode="pixel",
            mean=encoder.mean, std=encoder.std,
        )  # fmt: skip
        mixup = None
        if mixes(args):
            mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
        pin = args.pin_mem and world.device.type == "cuda"
        train_set = KeyedDataset(train_images, augment, args.seed, on_bad_image=args.on_bad_image, train=True)
        train_loader = build_loader(train_set, batches, args.num_workers, pin, args.dataloader_affinity_hack)
        pixels = eval_transform(size, encoder.mean, encoder.std)
        test_set = KeyedDataset(test_images, pixels, args.seed, on_bad_image=args.on_bad_image)
        test_batches = EvaluationBatches(len(test_set), args.batch_size)
        test_loader = build_loader(test_set, test_batches, args.num_workers, pin, args.dataloader_affinity_hack)

        # ---- optimiser: AdamW (0.9, 0.999), rates decaying from the head down
        lr = args.lr if args.lr is not None else scaled_lr(args.blr, batches.effective)
        groups = layer_decay_groups(model, encoder.backbone.depth, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        lr_of = functools.partial(
            lr_at, lr=lr, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr
        )
        first_epoch, history = 0, []
        if state is not None:
            first_epoch, history = restore(model, optimizer, state)
            if not args.eval:
                check_resumed(args, batches.effective, state)
        amp = PRECISIONS[args.amp]
        if args.eval:
            scores = evaluate(model, test_loader, world.device, amp)
            log.info("top-1 %.2f, top-5 %.2f, loss %.4f on %d images", *scores)
            return
        run = {
            "args": plain(args), "encoder": encoder.record, "lr": lr, "effective_batch": batches.effective,
            "n_train": len(train_images), "n_test": len(test_images), "classes": num_classes,
            **provenance(world.device),
        }  # fmt: skip
        folder.start(run)
        trained = model
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            trained = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

        def on_step(step: int, loss: torch.Tensor, rate: float) -> None:
            if step % 20 == 0:  # reading a loss waits for the GPU
                folder.scalars({"train_loss": float(loss), "lr": rate}, step)

        # ---- epochs
        start = time.time()
        for epoch in range(first_epoch, args.epochs):
            batches.epoch = epoch
            stats = train_one_epoch(
                trained, train_loader, optimizer, lr_of, epoch, args.accum_iter, world.device, amp, args.seed,
                args.smoothing, mixup, args.clip_grad, on_step,
            )  # fmt: skip
            scores = evaluate(model, test_loader, world.device, amp)
            history.append({"epoch": epoch, **stats, "test": scores._asdict()})
            folder.scalars({"test_top1": scores.top1}, epoch + 1)
            folder.log_line(history[-1])
            log.info("epoch %d: loss %.4f, top-1 %.2f", epoch, stats["loss"], scores.top1)
            folder.save_checkpoint(epoch, {
                "model": model.published_state_dict(), "optimizer": optimizer.state_dict(), "history": history,
                "args": plain(args), "effective_batch": batches.effective,
            })  # fmt: skip
        if folder.path is not None:
            metadata = {"family": "mae_ft", "model": args.model, "input_size": str(size), "epochs": str(args.epochs)}
            save_encoder(folder.path / "encoder.safetensors", model.published_state_dict(), metadata)
        folder.write("results.json", {"last": history[-1], "seconds": time.time() - start, **run})
        barrier()
        folder.close()


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0


def check(args: argparse.Namespace) -> None:
    """Refuse what the arguments alone show to be impossible; ValueError."""
    check_training(args)
    if args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        raise ValueError(f"--dataset {args.dataset} has several labels an image: main_linprobe.py takes it, not this")
    if args.eval and not args.resume:
        raise ValueError("--eval needs a classifier: name its checkpoint with --resume")
    if args.amp == "float16" and not args.eval:
        raise ValueError("--amp float16 would need a loss scaler to train; use bfloat16")
    if mixes(args) and args.batch_size % 2 and not args.eval:
        raise ValueError(f"--batch_size {args.batch_size}: mixup and cutmix pair images, so it must be even")


def restore(model: ClsClassifier, optimizer: torch.optim.Optimizer, state: dict) -> tuple[int, list[dict]]:
    """Continue from a checkpoint of this program: next epoch and the figures so far."""
    missing = {"epoch", "model", "optimizer", "history"} - state.keys()
    if missing:
        raise ValueError(f"--resume: not a checkpoint of main_finetune.py (no {', '.join(sorted(missing))})")
    try:
        model.load_published_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--resume: the checkpoint does not fit this run: {error}") from error
    return state["epoch"] + 1, state["history"]


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
