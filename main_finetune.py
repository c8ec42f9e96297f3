"""End-to-end fine-tuning on the [cls] token; cli/finetune.toml has the arguments and examples."""

from cli.arguments import command_line
from cli.console import run_main
from cli.finetune import check, get_args_parser, mixes

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = command_line(get_args_parser(), check)

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from cli.arguments import build_split_images, identity, loading, plain
from cli.encoder_arguments import build_encoder, precision
from cli.session import peak_rate, plan, schedule, session, write_results
from data_sets.imagenet import check_wnids
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from data_sets.views import eval_transform
from encoders.load import Encoder, load_plain_or_safetensors, safetensors_metadata
from engine_finetune import Classifier, FineTuning, evaluate, layer_decay_groups
from models_vit import compile_blocks
from runtime.provenance import provenance
from runtime.training import Training
from util.files import digest, reading
from util.progress import log
from util.seeding import seeded

# what must be as in training if a checkpoint is evaluated; the weights of --finetune are replaced
NETWORK = ("model", "num_heads", "no_cls_token", "global_pool", "class names", "pixels", "family")


def main(args: argparse.Namespace) -> None:
    with session(args, check) as (world, folder):
        # ---- encoder with a fresh head, all of it trained
        published = published_classifier(args.resume) if args.eval else None
        if published is not None:
            args.finetune = args.resume
        train_images, test_images, num_classes = build_split_images(args)
        batches = GlobalBatches(len(train_images), args.batch_size, args.accum_iter, args.seed)
        with seeded("weights", args.seed):
            encoder, size = build_encoder(args, drop_path=args.drop_path)
            facts = encoder.facts(size) | {"class names": digest(train_images.classes)}
            facts |= {"training images": fingerprint(train_images), "test images": fingerprint(test_images)}
            facts |= {"pixels": [size, list(encoder.mean), list(encoder.std)], "family": encoder.record["family"]}
            pooled = args.global_pool or (published is not None and "fc_norm.weight" in published)
            if published is None:
                encoder.backbone.set_input_size(size)
            model = Classifier(encoder.backbone.requires_grad_(True), num_classes, pooled).to(world.device)
        if args.compile:
            compile_blocks(encoder.backbone)

        # ---- data
        options = loading(args, world.device)
        augment = augmentation(args, size, encoder)
        train_set = KeyedDataset(train_images, augment, args.seed, on_bad_image=args.on_bad_image, train=True)
        train_loader = build_loader(train_set, batches, **options)
        whole = {"crop_pct": 1.0} if size > 224 else {}  # as in MAE
        pixels = eval_transform(size, **encoder.pixels | whole)
        test_set = KeyedDataset(test_images, pixels, args.seed, on_bad_image=args.on_bad_image)
        test_loader = build_loader(test_set, EvaluationBatches(len(test_set), args.batch_size), **options)

        # ---- optimiser: AdamW (0.9, 0.999), rates decaying from the head down
        lr, amp, mixup = peak_rate(args, args.blr, batches.effective), precision(args.amp), mixing(args, num_classes)
        groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW([{**group, "peak_lr": lr} for group in groups], lr=lr, fused=True)
        tuning = FineTuning(model, optimizer, world.device, amp, args.smoothing, mixup, args.clip_grad)
        settings = folder, identity(args, facts), args.start_epoch
        training = Training(plan(args), tuning, optimizer, schedule(args), train_loader, batches, *settings)
        if published is None:
            training.resume(args.resume, args.eval, evaluated=NETWORK)
        else:
            try:
                model.load_published_state_dict(published)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"--resume {args.resume} does not fit --model and --data_path: {error}") from error
            check_classes(args.resume, test_images.classes)
        if args.eval:
            scores = evaluate(model, test_loader, world.device, amp)
            log.info("top-1 %.2f, top-5 %.2f, loss %.4f on %d images", scores.top1, scores.top5, scores.loss, scores.n)
            return

        # ---- epochs
        run = {"args": plain(args), "encoder": encoder.record, "lr": lr, "effective_batch": batches.effective}
        run |= {"n_train": len(train_images), "n_test": len(test_images), "classes": num_classes}
        run |= {"train_images": facts["training images"], "test_images": facts["test images"]}
        run |= provenance(world.device)
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
            folder.save_tensors("encoder.safetensors", model.published_state_dict(), metadata)
            write_results(folder, training, {"last": training.history[-1]}, run)


def augmentation(args: argparse.Namespace, size: int, encoder: Encoder) -> Callable[[Image.Image], torch.Tensor]:
    """timm's RandAugment (or colour jitter) and random erasing."""
    from timm.data import auto_augment, create_transform  # seconds to import

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize
    options = {"interpolation": "bicubic", "mean": encoder.mean, "std": encoder.std, "scale": (args.crop_scale, 1.0)}
    options |= {"color_jitter": args.color_jitter, "auto_augment": args.aa or None}
    options |= {"re_prob": args.reprob, "re_mode": args.remode, "re_count": args.recount}
    try:
        return create_transform(size, is_training=True, **options)
    except (AssertionError, ValueError, KeyError) as error:
        recipe = "the recipe's is rand-m9-mstd0.5-inc1"
        raise ValueError(f"--aa {args.aa}: timm has no such policy ({error}); {recipe}") from error


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's operation, extended to 0 bits, which timm's noise on the magnitude can ask for and Pillow refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def mixing(args: argparse.Namespace, num_classes: int) -> Callable | None:
    """timm's mixup and cutmix."""
    if not mixes(args):
        return None
    from timm.data import Mixup  # seconds to import

    mixed = args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode
    return Mixup(*mixed, label_smoothing=args.smoothing, num_classes=num_classes)


def published_classifier(path: str) -> dict[str, torch.Tensor] | None:
    """The weights of MAE's published file or of an encoder.safetensors, with its head; None for a run's checkpoint."""
    content = load_plain_or_safetensors(Path(path)) if Path(path).is_file() else {"sha256": None}
    if "sha256" in content:
        return None
    weights = content.get("model", content)
    if not isinstance(weights, dict) or "head.weight" not in weights:
        raise ValueError(f"--resume {path} holds no classifier (no head.weight): name a fine-tuned file or checkpoint")
    return weights


def check_classes(path: str, classes: Sequence[str]) -> None:
    """Refuse to score a classifier on other classes than those of its outputs, or in another order; ValueError.

    A file of main_finetune.py names its classes; any other of 1,000 outputs is taken for one of ImageNet's.
    """
    metadata = safetensors_metadata(Path(path)) if Path(path).suffix == ".safetensors" else {}
    if "classes" in metadata:
        with reading(Path(path), "a file of main_finetune.py"):
            known = list(json.loads(metadata["classes"]))
        for number, (trained, given) in enumerate(itertools.zip_longest(known, classes)):
            if trained != given:
                output = f"output {number} of its classifier is class {trained}"
                raise ValueError(f"--resume {path}: {output}, the data has {given}")
    elif len(classes) == 1000:
        try:
            check_wnids(classes)
        except ValueError as error:
            raise ValueError(f"--resume {path} is taken for a classifier of ImageNet-1k: {error}") from error
    else:
        log.warning("%s does not name its classes: the scores assume the order %s, ...", path, ", ".join(classes[:3]))


if __name__ == "__main__":
    run_main(main, ARGS)
