"""End-to-end fine-tuning on the [cls] token: the paper's MAE-FT, and the demo's fine-tuned encoder.

The run folder ends with `encoder.safetensors` (family mae_ft: encoder and head), which every other main takes as
--finetune. --global_pool classifies on the mean patch instead, as MAE's published models do (family mae_ft_mean).
Defaults are the paper's recipe for ViT-B (B.1). Source: He et al., 2022, appendix A.

examples:
    # the paper's ViT-B: effective batch 1,024
    torchrun --nproc_per_node 8 main_finetune.py --model vit_base_patch16 --finetune mae_vit_base_patch16 \\
        --batch_size 128 --data_path $IMAGENET --output_dir runs/mae_ft_base

    # the accuracy of a published classifier
    python main_finetune.py --eval --resume mae_finetuned_vit_base.pth --global_pool --data_path $IMAGENET

    # go on with a run that was stopped
    python main_finetune.py --args_from runs/mae_ft_base/args.json --resume auto
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from cli.arguments import (
    add_data_arguments,
    add_encoder_arguments,
    add_old_arguments,
    add_run_arguments,
    build_encoder,
    check_files,
    check_training,
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
)
from encoders.load import Encoder, load_plain_or_safetensors, safetensors_metadata
from engine_finetune import Classifier, FineTuning, evaluate
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from runtime.training import Plan, Training
from util.distributed import barrier
from util.files import digest
from util.lr_sched import lr_at, scaled_lr
from util.optim import layer_decay_groups
from util.progress import log
from util.seeding import seeded

RECIPE_AA = "rand-m9-mstd0.5-inc1"
# what must be as in training if a checkpoint is evaluated; the weights of --finetune are replaced
NETWORK = ("model", "num_heads", "no_cls_token", "global_pool", "class names", "pixels", "family")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser)
    add_data_arguments(parser, loaders=False)  # timm augments PIL images
    head = parser.add_argument_group("classifier")
    head.add_argument("--global_pool", action="store_true", help="classify on the mean patch, not on [cls]")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", default=64, type=int, help="images per process and micro-step")
    optim.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    optim.add_argument("--epochs", default=100, type=int, help="of training")
    optim.add_argument("--warmup_epochs", default=5, type=int, help="of them with a rate that rises from 0")
    optim.add_argument("--blr", default=5e-4, type=float, help="base rate: lr = blr x effective batch / 256")
    optim.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    optim.add_argument("--min_lr", default=1e-6, type=float, help="rate at the end of the cosine")
    optim.add_argument("--layer_decay", default=0.65, type=float, help="rate of a block relative to the one above it")
    optim.add_argument("--weight_decay", default=0.05, type=float, help="on matrices; not on biases and norms")
    optim.add_argument("--clip_grad", default=None, type=float, metavar="NORM",
                       help="the gradient's norm is lowered to it (default: it is not)")  # fmt: skip
    optim.add_argument("--compile", action="store_true", help="compile the encoder's blocks: for long runs on a GPU")
    reg = parser.add_argument_group("regularisation")
    reg.add_argument("--drop_path", default=0.1, type=float, help="stochastic depth of the last block")
    reg.add_argument("--crop_scale", default=0.08, type=float, help="smallest share of the image that a crop covers")
    reg.add_argument("--aa", default=RECIPE_AA, help='RandAugment policy in timm\'s notation; "" for none')
    reg.add_argument("--color_jitter", default=None, type=float, help="used where --aa is off")
    reg.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    reg.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    reg.add_argument("--mixup", default=0.8, type=float, help="alpha of the mixing of two images; 0: none")
    reg.add_argument("--cutmix", default=1.0, type=float, help="alpha of patches from another image; 0: none")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval", action="store_true",
                            help="evaluate the classifier of --resume and stop; it may be a published file, "
                            "too")  # fmt: skip
    add_run_arguments(parser)
    old = add_old_arguments(parser)
    old.add_argument("--cls_token", action="store_true", help="MAE's: [cls], which is the default here")
    old.add_argument("--start_epoch", default=0, type=int, help="first epoch of a run that is not resumed")
    old.add_argument("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what erases")
    old.add_argument("--recount", default=1, type=int, help="erased rectangles of an image, at most")
    old.add_argument("--resplit", action="store_true", help="MAE's: no effect, there or here")
    old.add_argument("--mixup_prob", default=1.0, type=float, help="share of the batches that are mixed")
    old.add_argument("--mixup_switch_prob", default=0.5, type=float, help="of them by cutmix, where both are on")
    old.add_argument("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="what shares a mixture")
    old.add_argument("--cutmix_minmax", default=None, nargs=2, type=float, metavar=("MIN", "MAX"),
                     help="share of the sides that cutmix takes, instead of --cutmix")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(args.device, args.dist_url, shared_arguments(args)) as world:
        folder = RunFolder(args.output_dir, args.log_dir)
        if not args.eval:
            folder.refuse_overwriting(args.resume)

        # ---- encoder with a fresh head, all of it trained
        published = published_classifier(args.resume) if args.eval else None
        if published is not None:
            args.finetune = args.resume
        train_images, test_images, num_classes = build_splits(
            args.dataset, args.data_path, args.nb_classes, args.allow_subset
        )
        batches = GlobalBatches(len(train_images), args.batch_size, args.accum_iter, args.seed)
        with seeded("weights", args.seed):
            encoder, size = build_encoder(args, drop_path=args.drop_path)
            facts = {
                "weights": digest(encoder.backbone.state_dict()), "training images": fingerprint(train_images),
                "test images": fingerprint(test_images), "class names": digest(train_images.classes),
                "pixels": [size, list(encoder.mean), list(encoder.std)], "family": encoder.record["family"],
            }  # fmt: skip
            pooled = args.global_pool or (published is not None and "fc_norm.weight" in published)
            if published is None:
                encoder.backbone.set_input_size(size)
            model = Classifier(encoder.backbone.requires_grad_(True), num_classes, pooled).to(world.device)
        if args.compile:
            encoder.backbone.compile_blocks()

        # ---- data
        augment = augmentation(args, size, encoder)
        mixup = None
        if mixes(args):
            from timm.data import Mixup  # seconds to import

            mixup = Mixup(
                args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                label_smoothing=args.smoothing, num_classes=num_classes,
            )  # fmt: skip
        train_set = KeyedDataset(train_images, augment, args.seed, on_bad_image=args.on_bad_image, train=True)
        train_loader = build_loader(train_set, batches, **loading(args, world.device))
        pixels = eval_transform(size, encoder.mean, encoder.std, whole=size > 224)  # as in MAE
        test_set = KeyedDataset(test_images, pixels, args.seed, on_bad_image=args.on_bad_image)
        test_batches = EvaluationBatches(len(test_set), args.batch_size)
        test_loader = build_loader(test_set, test_batches, **loading(args, world.device))

        # ---- optimiser: AdamW (0.9, 0.999), rates decaying from the head down
        lr = args.lr if args.lr is not None else scaled_lr(args.blr, batches.effective)
        groups = layer_decay_groups(model, encoder.backbone.depth, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW([{**group, "peak_lr": lr} for group in groups], lr=lr, fused=True)
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr)
        amp = precision(args.amp)
        tuning = FineTuning(model, optimizer, world.device, amp, args.smoothing, mixup, args.clip_grad)
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        training = Training(
            plan, tuning, optimizer, schedule, train_loader, batches, folder, identity(args, facts), args.start_epoch
        )
        if published is None:
            training.resume(args.resume, args.eval, evaluated=NETWORK)
        else:
            take_over(model, published, args.resume)
            check_classes(args.resume, test_images.classes)
        if args.eval:
            scores = evaluate(model, test_loader, world.device, amp)
            log.info("top-1 %.2f, top-5 %.2f, loss %.4f on %d images", scores.top1, scores.top5, scores.loss, scores.n)
            return

        # ---- epochs
        run = {
            "args": plain(args), "encoder": encoder.record, "lr": lr, "effective_batch": batches.effective,
            "n_train": len(train_images), "n_test": len(test_images), "classes": num_classes,
            "train_images": facts["training images"], "test_images": facts["test images"],
            **provenance(world.device),
        }  # fmt: skip
        training.start(run)
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                scores = evaluate(model, test_loader, world.device, amp)
                training.history.append({**stats.record(epoch), "test": scores._asdict()})
                folder.log_line(training.history[-1])
                log.info("epoch %d: loss %.4f, top-1 %.2f, %s", epoch, stats.losses[0], scores.top1, stats.speed())
                training.end_epoch({"test_top1": scores.top1})
            metadata = {"family": model.family, "model": args.model, "input_size": str(size)}
            metadata |= {"epochs": str(args.epochs), "classes": json.dumps(train_images.classes)}
            folder.save_encoder(model.published_state_dict(), metadata)
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"last": training.history[-1], **run})
        barrier()
        folder.close()


def augmentation(args: argparse.Namespace, size: int, encoder: Encoder) -> Callable[[Image.Image], torch.Tensor]:
    """timm's RandAugment (or colour jitter) and random erasing."""
    from timm.data import auto_augment, create_transform  # seconds to import

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize
    try:
        return create_transform(
            size, is_training=True, scale=(args.crop_scale, 1.0), color_jitter=args.color_jitter,
            auto_augment=args.aa or None, interpolation="bicubic", re_prob=args.reprob, re_mode=args.remode,
            re_count=args.recount, mean=encoder.mean, std=encoder.std,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"--aa {args.aa}: timm has no such policy ({error}); the recipe's is rand-m9-mstd0.5-inc1"
        ) from error


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's operation, extended to 0 bits, which timm's noise on the magnitude can ask for and Pillow refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def published_classifier(path: str) -> dict[str, torch.Tensor] | None:
    """The weights of MAE's published file or of an encoder.safetensors, with its head; None for a run's checkpoint."""
    if not Path(path).is_file():
        return None
    content = load_plain_or_safetensors(Path(path))
    if "sha256" in content:
        return None
    weights = content.get("model", content)
    if not isinstance(weights, dict) or "head.weight" not in weights:
        raise ValueError(
            f"--resume {path} holds no classifier (no head.weight): name a checkpoint or a fine-tuned file"
        )
    return weights


def check_classes(path: str, classes: Sequence[str]) -> None:
    """Refuse to score a classifier on other classes than those of its outputs, or in another order; ValueError.

    A file of main_finetune.py names its classes; any other of 1,000 outputs is taken for one of ImageNet's.
    """
    from data_sets import table  # check_wnids: lands with the data sets

    metadata = safetensors_metadata(Path(path)) if Path(path).suffix == ".safetensors" else {}
    if "classes" in metadata:
        trained = json.loads(metadata["classes"])
        if trained != list(classes):
            pairs = itertools.zip_longest(trained, classes)
            number, (theirs, ours) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"--resume {path}: output {number} of its classifier is class {theirs}, the data has {ours}"
            )
    elif len(classes) == 1000:
        try:
            table.check_wnids(classes)
        except ValueError as error:
            raise ValueError(f"--resume {path} is taken for a classifier of ImageNet-1k: {error}") from error
    else:
        log.warning("%s does not name its classes: the scores assume the order %s, ...", path, ", ".join(classes[:3]))


def take_over(model: Classifier, weights: dict[str, torch.Tensor], path: str) -> None:
    """Load the weights strictly; ValueError."""
    try:
        model.load_published_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"--resume {path} does not fit --model and --data_path: {error}") from error


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args: argparse.Namespace) -> None:
    """Refuse what the arguments alone show to be impossible; ValueError."""
    check_training(args)
    if args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        raise ValueError(f"--dataset {args.dataset} has several labels an image: main_linprobe.py takes it, not this")
    if args.eval and not args.resume:
        raise ValueError("--eval needs a classifier: name its checkpoint with --resume")
    if args.amp == "float16" and not args.eval:
        raise ValueError("--amp float16 would need a loss scaler to train; use bfloat16")
    if args.global_pool and args.cls_token:
        raise ValueError("--global_pool and --cls_token: the classifier reads the mean patch or [cls]; choose one")
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise ValueError("--cutmix_minmax {} {}: the first must be the smaller one".format(*args.cutmix_minmax))
    if mixes(args) and args.batch_size % 2 and not args.eval:
        raise ValueError(f"--batch_size {args.batch_size}: mixup and cutmix pair images, so it must be even")


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
