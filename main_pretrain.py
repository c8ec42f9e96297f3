"""MAE pretraining: the paper's ViT-S, the demo encoder, or any size of models_vit.

The run folder ends with `encoder.safetensors` (the encoder in MAE's published layout), which every other main takes
as --finetune, with `results.json` (the last epoch, and where it comes from), and with `reconstruction.png`: image,
masked, reconstruction.
Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

examples:
    # the paper's ViT-S: effective batch 4,096
    torchrun --nproc_per_node 8 main_pretrain.py --model vit_small_patch16 --batch_size 512 --data_path $IMAGENET \\
        --output_dir runs/mae_small

    # a small encoder on the demo's images, on any machine
    python main_pretrain.py --model vit_demo_patch8 --dataset demo --data_path demo_images --epochs 20 --warmup_epochs 2

    # go on with a run that was stopped
    python main_pretrain.py --args_from runs/mae_small/args.json --resume auto
"""

import argparse
import functools

import torch
from torch.utils.data import Dataset

from cli.arguments import (
    add_data_arguments,
    add_run_arguments,
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
from data_sets.loader import GlobalBatches, KeyedDataset, build_dataset, build_loader, train_transform
from engine_pretrain import Pretraining, draw_reconstructions, examples, reconstruct, tiled
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import architecture, build_vit, default_input_size
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from runtime.training import Plan, Training
from util.distributed import barrier
from util.lr_sched import lr_at, scaled_lr
from util.optim import weight_decay_groups
from util.progress import log
from util.seeding import seeded


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="vit_small_patch16", metavar="MODEL", type=encoder_name,
                       help="encoder architecture, by name")  # fmt: skip
    model.add_argument("--input_size", default=None, type=int, help="pixels (default: the model's)")
    model.add_argument("--mask_ratio", default=0.75, type=float, help="share of patches that the encoder does not see")
    model.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=True,
                       help="predict pixels normalised within their patch")  # fmt: skip
    model.add_argument("--crop_scale", default=0.2, type=float, help="smallest share of the image that a crop covers")
    add_data_arguments(parser, labels=False)
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--batch_size", default=64, type=int, help="images per process and micro-step")
    optim.add_argument("--accum_iter", default=1, type=int, help="micro-steps per optimizer step")
    optim.add_argument("--epochs", default=800, type=int, help="of training")
    optim.add_argument("--warmup_epochs", default=40, type=int, help="of them with a rate that rises from 0")
    optim.add_argument("--blr", default=1.5e-4, type=float, help="base rate: lr = blr x effective batch / 256")
    optim.add_argument("--lr", default=None, type=float, help="absolute rate (overrides --blr)")
    optim.add_argument("--min_lr", default=0.0, type=float, help="rate at the end of the cosine")
    optim.add_argument("--weight_decay", default=0.05, type=float, help="on matrices; not on biases and norms")
    optim.add_argument("--amp", default="bfloat16", choices=["bfloat16", "float32", "none"],
                       help="precision of the network's products")  # fmt: skip
    optim.add_argument("--compile", action="store_true",
                       help="compile the blocks of encoder and decoder: for long runs on a GPU")  # fmt: skip
    figure = parser.add_argument_group("figure")
    figure.add_argument("--figure_every", default=20, type=int, metavar="EPOCHS",
                        help="draw reconstruction.png every so many epochs, too; 0: at the end only")  # fmt: skip
    add_run_arguments(parser)
    old = parser.add_argument_group("accepted for old commands")
    old.add_argument("--start_epoch", default=0, type=int, help="first epoch of a run that is not resumed")
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(args.device, args.dist_url, shared_arguments(args)) as world:
        folder = RunFolder(args.output_dir, args.log_dir)
        folder.refuse_overwriting(args.resume)

        # ---- network
        images = build_dataset(args.dataset, args.data_path, "train", args.allow_subset)
        batches = GlobalBatches(len(images), args.batch_size, args.accum_iter, args.seed)
        size = args.input_size or default_input_size(args.model)
        with seeded("weights", args.seed):
            encoder = build_vit(args.model, img_size=size)
            model = MaskedAutoencoder(encoder, **DECODERS[args.model], norm_pix_loss=args.norm_pix_loss)
        model.to(world.device)
        if args.compile:
            model.compile_blocks()

        # ---- data: torchvision's crop, as in MAE (its probes draw theirs differently)
        augment = train_transform(size, scale=(args.crop_scale, 1.0), crop="torchvision", loader=args.loader)
        patches = encoder.grid_size[0] * encoder.grid_size[1]
        dataset = KeyedDataset(images, augment, args.seed, patches, args.on_bad_image, train=True)
        loader = build_loader(dataset, batches, **loading(args, world.device))

        # ---- optimiser: AdamW (0.9, 0.95), weight decay on matrices only, warm-up and half-cosine per step
        lr = args.lr if args.lr is not None else scaled_lr(args.blr, batches.effective)
        groups = [{**group, "peak_lr": lr} for group in weight_decay_groups(model, args.weight_decay)]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr)
        pretraining = Pretraining(model, optimizer, args.mask_ratio, world.device, precision(args.amp))
        facts = {"training images": fingerprint(images)}
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        run_identity = identity(args, facts)
        training = Training(
            plan, pretraining, optimizer, schedule, loader, batches, folder, run_identity, args.start_epoch
        )
        training.resume(args.resume)

        # ---- epochs
        run = {
            "args": plain(args), "lr": lr, "effective_batch": batches.effective, "n_train": len(images),
            "train_images": facts["training images"], **provenance(world.device),
        }  # fmt: skip
        training.start(run)
        log.info(
            "%s, %.1f M parameters; %d images, %d steps of %d per epoch, lr %.2e",
            args.model, sum(p.numel() for p in model.parameters()) / 1e6, len(dataset), batches.steps,
            batches.effective, lr,
        )  # fmt: skip
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                folder.log_line(stats.record(epoch))
                log.info("epoch %d: loss %.4f, %s", epoch, stats.losses[0], stats.speed())
                if epoch + 1 == args.epochs or (args.figure_every and (epoch + 1) % args.figure_every == 0):
                    record_reconstructions(folder, pretraining, images, args.seed, training.steps_done - 1)
                training.end_epoch()
            metadata = {"family": "mae", "model": args.model, "input_size": str(size), "epochs": str(args.epochs)}
            folder.save_encoder(encoder.state_dict(), metadata)
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"last": folder.last_line(), **run})
        barrier()
        folder.close()
        log.info("pretraining took %.0f s", training.elapsed)


def record_reconstructions(folder: RunFolder, pretraining: Pretraining, images: Dataset, seed: int, step: int) -> None:
    """A few training images, masked and made whole again: reconstruction.png of the run folder, and TensorBoard.

    step: the last one that is done.
    """
    if folder.path is None:
        return
    encoder = pretraining.model.encoder
    rows, columns = encoder.grid_size
    sample = examples(images, rows * encoder.patch_size, seed, rows * columns)
    shown, noise = (part.to(pretraining.device) for part in (sample.image, sample.noise))
    pictures = reconstruct(pretraining.model, shown, noise, pretraining.mask_ratio, pretraining.amp)
    folder.image("reconstruction", tiled(pictures), step)
    draw_reconstructions(pictures, folder.path / "reconstruction.png")


def check(args: argparse.Namespace) -> None:
    """Refuse what the arguments alone show to be impossible; ValueError."""
    check_training(args)
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: a share between 0 and 1 of the patches, to be predicted")
    patches = ((args.input_size or default_input_size(args.model)) // architecture(args.model)["patch_size"]) ** 2
    if int(patches * (1 - args.mask_ratio)) == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio} leaves none of the {patches} patches to be seen: lower it")
    if args.figure_every < 0:
        raise ValueError(f"--figure_every {args.figure_every}: write how often, or 0 for once, at the end")
    if args.nb_classes is not None:
        raise ValueError(f"--nb_classes {args.nb_classes}: pretraining looks at no labels; leave it out")


def encoder_name(model: str) -> str:
    """MAE's commands name the autoencoder, mae_vit_base_patch16, perhaps with its decoder; this is its encoder."""
    return model.removeprefix("mae_").removesuffix("_dec512d8b")


if __name__ == "__main__":
    run_main(main, parse(get_args_parser()))
