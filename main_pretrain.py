"""MAE pretraining: the paper's ViT-S, the demo encoder, or any size of models_vit.

    torchrun --nproc_per_node 8 main_pretrain.py --model vit_small_patch16 --data_path $IMAGENET --batch_size 512

The run folder ends with `encoder.safetensors` (the encoder in MAE's published layout), which every other main takes
as --finetune. Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
"""

import argparse
import functools
import time

import torch

from engine_pretrain import train_one_epoch
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import build_vit, default_input_size
from util.arguments import (
    PRECISIONS,
    Parser,
    add_data_arguments,
    add_run_arguments,
    check_resumed,
    check_training,
    parse,
    plain,
    run_main,
)
from util.checkpoints import save_encoder
from util.datasets import GlobalBatches, KeyedDataset, build_dataset, build_loader, train_transform
from util.distributed import barrier, distributed
from util.lr_sched import lr_at, scaled_lr
from util.optim import weight_decay_groups
from util.progress import log, setup_logging
from util.run_folder import RunFolder, provenance
from util.seeding import seeded


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="vit_small_patch16", metavar="MODEL", type=encoder_name,
                       help="encoder architecture, by name")  # fmt: skip
    model.add_argument("--input_size", default=None, type=int, help="pixels (default: the model's)")
    model.add_argument("--mask_ratio", default=0.75, type=float, help="share of patches that the encoder does not see")
    model.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=True,
                       help="predict pixels normalised within their patch")  # fmt: skip
    model.add_argument("--crop_scale", default=0.2, type=float, help="smallest share of the image that a crop covers")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", default=64, type=int, help="images per process and micro-step")
    optim.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    optim.add_argument("--epochs", default=800, type=int)
    optim.add_argument("--warmup_epochs", default=40, type=int)
    optim.add_argument("--blr", default=1.5e-4, type=float, help="base rate: lr = blr x effective batch / 256")
    optim.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    optim.add_argument("--min_lr", default=0.0, type=float)
    optim.add_argument("--weight_decay", default=0.05, type=float, help="on matrices; not on biases and norms")
    optim.add_argument("--amp", default="bfloat16", choices=["bfloat16", "float32", "none"],
                       help="precision of the network's products")  # fmt: skip
    add_run_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    check_training(args)
    if args.model not in DECODERS:
        raise ValueError(f"there is no decoder for {args.model}: choose one of {', '.join(DECODERS)}")
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: a share between 0 and 1 of the patches, to be predicted")
    with distributed(args.device, args.dist_url) as world:
        setup_logging()
        folder = RunFolder(args.output_dir, args.log_dir)
        state = folder.find_checkpoint(args.resume)

        # ---- network
        images = build_dataset(args.dataset, args.data_path, "train", args.allow_subset)
        batches = GlobalBatches(len(images), args.batch_size, args.accum_iter, args.seed)
        size = args.input_size or default_input_size(args.model)
        with seeded("weights", args.seed):
            encoder = build_vit(args.model, img_size=size)
            model = MaskedAutoencoder(encoder, **DECODERS[args.model], norm_pix_loss=args.norm_pix_loss)
        model.to(world.device)

        # ---- data: torchvision's crop, as in MAE (its probes draw theirs differently)
        augment = train_transform(size, scale=(args.crop_scale, 1.0), crop="torchvision")
        patches = encoder.grid_size[0] * encoder.grid_size[1]
        dataset = KeyedDataset(images, augment, args.seed, patches, args.on_bad_image, train=True)
        pin = args.pin_mem and world.device.type == "cuda"
        loader = build_loader(dataset, batches, args.num_workers, pin, args.dataloader_affinity_hack)

        # ---- optimiser: AdamW (0.9, 0.95), weight decay on matrices only, warm-up and half-cosine per step
        lr = args.lr if args.lr is not None else scaled_lr(args.blr, batches.effective)
        groups = weight_decay_groups(model, args.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        lr_of = functools.partial(
            lr_at, lr=lr, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr
        )
        first_epoch = 0
        if state is not None:
            restore(model, optimizer, state)
            check_resumed(args, batches.effective, state)
            first_epoch = state["epoch"] + 1
        folder.start({"args": plain(args), "lr": lr, "effective_batch": batches.effective, **provenance(world.device)})
        log.info(
            "%s, %.1f M parameters; %d images, %d steps of %d per epoch, lr %.2e",
            args.model, sum(p.numel() for p in model.parameters()) / 1e6, len(dataset), batches.steps,
            batches.effective, lr,
        )  # fmt: skip
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
                trained, loader, optimizer, lr_of, epoch, args.accum_iter, args.mask_ratio, world.device,
                PRECISIONS[args.amp], on_step,
            )  # fmt: skip
            folder.log_line({"epoch": epoch, **stats})
            log.info("epoch %d: loss %.4f, %.0f images/s", epoch, stats["loss"], stats["images_per_second"])
            folder.save_checkpoint(epoch, {
                "model": model.published_state_dict(), "optimizer": optimizer.state_dict(), "args": plain(args),
                "effective_batch": batches.effective,
            })  # fmt: skip
        if folder.path is not None:
            metadata = {"family": "mae", "model": args.model, "input_size": str(size), "epochs": str(args.epochs)}
            save_encoder(folder.path / "encoder.safetensors", encoder.state_dict(), metadata)
        barrier()
        folder.close()
        log.info("pretraining took %.0f s", time.time() - start)


def encoder_name(model: str) -> str:
    """MAE's commands name the autoencoder, mae_vit_base_patch16; this is its encoder."""
    return model.removeprefix("mae_")


def restore(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Continue from a checkpoint of this program; ValueError where it is of another program or model."""
    missing = {"model", "optimizer"} - state.keys()
    if missing:
        raise ValueError(f"--resume: not a checkpoint of main_pretrain.py (no {', '.join(sorted(missing))})")
    try:
        model.load_published_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--resume: the checkpoint does not fit this run: {error}") from error


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
