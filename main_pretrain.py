"""MAE pretraining; cli/pretrain.py has the arguments and examples. Source: He et al., CVPR 2022."""

import argparse
import functools

from cli.arguments import check_files, identity, loading, plain, processes
from cli.console import checked, parse, run_main
from cli.encoder_arguments import precision
from cli.pretrain import check, get_args_parser
from encoders.architectures import default_input_size

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(parse(get_args_parser()), check, check_files)

import torch
from torch.utils.data import Dataset

from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import GlobalBatches
from data_sets.table import build_dataset
from data_sets.views import train_transform
from engine_pretrain import Pretraining, draw_reconstructions, examples, reconstruct, tiled
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import build_vit
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from runtime.training import Plan, Training
from util.distributed import barrier
from util.lr_sched import lr_at, scaled_lr
from util.optim import weight_decay_groups
from util.progress import log
from util.seeding import seeded


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(**processes(args)) as world:
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

        # ---- data: torchvision's crop, as in MAE (whose probes use another one)
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
        training = Training(
            plan, pretraining, optimizer, schedule, loader, batches, folder, identity(args, facts), args.start_epoch
        )
        training.resume(args.resume)

        # ---- epochs
        run = {"args": plain(args), "lr": lr, "effective_batch": batches.effective, "n_train": len(images),
               "train_images": facts["training images"], **provenance(world.device)}  # fmt: skip
        training.start(run)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        log.info("%s, %.1f M parameters; %d images", args.model, parameters, len(dataset))
        log.info("%d steps of %d images per epoch, lr %.2e", batches.steps, batches.effective, lr)
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
    """Reconstruct a few training images for reconstruction.png and TensorBoard. step: the last one that was done."""
    if folder.path is None:
        return
    encoder = pretraining.model.encoder
    rows, columns = encoder.grid_size
    sample = examples(images, rows * encoder.patch_size, seed, rows * columns)
    pixels, noise = (part.to(pretraining.device) for part in (sample.image, sample.noise))
    pictures = reconstruct(pretraining.model, pixels, noise, pretraining.mask_ratio, pretraining.amp)
    folder.image("reconstruction", tiled(pictures), step)
    draw_reconstructions(pictures, folder.path / "reconstruction.png")


if __name__ == "__main__":
    run_main(main, ARGS)
