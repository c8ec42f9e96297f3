"""Pretraining: MAE (He et al., CVPR 2022), MoCo-v3 (Chen et al., ICCV 2021), or their sum (Park et al., ICLR 2023).

cli/pretrain.py has the arguments and examples.
"""

import argparse
import functools

from cli.arguments import check_files, data_options, identity, loading, plain, processes
from cli.console import checked, parse, run_main
from cli.encoder_arguments import choose_precision, precision
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
from data_sets.views import Stacked, contrastive_views, train_transform
from engine_pretrain import Comparison, Pretraining, examples, reconstruct, save_picture, tiled
from models_mae import DECODERS, MaskedAutoencoder
from models_moco import MomentumContrast, SharedEncoder
from models_vit import build_vit
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import provenance, utc_now
from runtime.training import Plan, Training
from util.distributed import barrier
from util.lr_sched import fitting_warmup, lr_at, scaled_lr
from util.optim import weight_decay_groups
from util.progress import log
from util.seeding import seeded


def main(args: argparse.Namespace) -> None:
    check(args)
    check_files(args)
    with process_group(**processes(args)) as world:
        choose_precision(args, world.device)
        folder = RunFolder(args.output_dir, args.log_dir, args.track)
        folder.refuse_overwriting(args.resume)

        # ---- networks
        images = build_dataset(args.dataset, args.data_path, "train", **data_options(args), labels=False)
        batches = GlobalBatches(len(images), args.batch_size, args.accum_iter, args.seed)
        size, weight = args.input_size or default_input_size(args.model), args.contrastive_weight
        with seeded("weights", args.seed):
            encoder = build_vit(args.model, img_size=size)
            networks = []
            if weight < 1:
                networks += [MaskedAutoencoder(encoder, **DECODERS[args.model], norm_pix_loss=args.norm_pix_loss)]
            if weight > 0:
                networks += [MomentumContrast(encoder, args.projector_width, args.temperature, args.view_drop)]
        encoder.patch_embed.requires_grad_(not args.stop_grad_conv1)
        model = networks[0] if weight == 0 else SharedEncoder(networks)
        model.to(world.device)
        if args.compile:
            model.compile_blocks()

        # ---- data: torchvision's crop, as in MAE (whose probes use another one); views to compare as in MoCo-v3
        augment = train_transform(size, scale=(args.crop_scale, 1.0), crop="torchvision", loader=args.loader)
        patches = encoder.grid_size[0] * encoder.grid_size[1]
        if weight > 0:
            views = [*[augment] * (weight < 1), *contrastive_views(size, args.view_scale, args.view_grey, args.loader)]
            augment, patches = Stacked(views), patches * len(views)
        dataset = KeyedDataset(images, augment, args.seed, patches, args.on_bad_image, train=True)
        loader = build_loader(dataset, batches, **loading(args, world.device))

        # ---- optimiser: AdamW (0.9, 0.95), weight decay on matrices only, warm-up and half-cosine per step
        lr = args.lr if args.lr is not None else scaled_lr(args.blr, batches.effective)
        groups = [{**group, "peak_lr": lr} for group in weight_decay_groups(model, args.weight_decay)]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        warmup = fitting_warmup(args.warmup_epochs, args.epochs)
        schedule = functools.partial(lr_at, epochs=args.epochs, warmup_epochs=warmup, min_lr=args.min_lr)
        facts = {"training images": fingerprint(images)}
        comparison = Comparison(weight, args.encoder_momentum, batches, args.epochs) if weight > 0 else None
        if comparison:
            facts["images compared"] = args.batch_size * world.size
        amp = precision(args.amp)
        pretraining = Pretraining(model, optimizer, args.mask_ratio, world.device, amp, comparison)
        plan = Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)
        settings = identity(args, facts), args.start_epoch
        training = Training(plan, pretraining, optimizer, schedule, loader, batches, folder, *settings)
        training.resume(args.resume)

        # ---- epochs
        run = {"args": plain(args), "lr": lr, "effective_batch": batches.effective, "n_train": len(images)}
        run |= {"train_images": facts["training images"], **provenance(world.device)}
        training.start(run)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        log.info("%s, %.1f M parameters; %d images", args.model, parameters, len(dataset))
        log.info("%d steps of %d images per epoch, lr %.2e", batches.steps, batches.effective, lr)
        with training.stoppable():
            for epoch in training.epochs():
                stats = training.train_one_epoch()
                values = pretraining.record(stats.losses[0])
                folder.log_line(stats.record(epoch) | values)
                listed = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                log.info("epoch %d: %s, %s", epoch, listed, stats.speed())
                if epoch >= args.warmup_epochs and (failure := pretraining.failure(values)):
                    log.warning("epoch %d: %s", epoch, failure)
                due = epoch + 1 == args.epochs or (args.figure_every and (epoch + 1) % args.figure_every == 0)
                if due and pretraining.autoencoder is not None:
                    record_reconstructions(folder, pretraining, images, args.seed, training.steps_done - 1)
                training.end_epoch(values if weight > 0 else None)
            metadata = {"family": "mae", "model": args.model, "input_size": str(size), "epochs": str(args.epochs)}
            kept = networks[0].published_state_dict() if args.keep_decoder else encoder.state_dict()
            folder.save_encoder(kept, metadata)
            run |= {"seconds": training.elapsed, "finished": utc_now()}
            folder.write("results.json", {"last": folder.last_line(), **run})
        barrier()
        folder.close()
        log.info("pretraining took %.0f s", training.elapsed)


def record_reconstructions(folder: RunFolder, pretraining: Pretraining, images: Dataset, seed: int, step: int) -> None:
    """Reconstruct a few training images for reconstruction.png and TensorBoard. step: the last one that was done."""
    if folder.path is None:
        return
    encoder = pretraining.autoencoder.encoder
    rows, columns = encoder.grid_size
    sample = examples(images, rows * encoder.patch_size, seed, rows * columns)
    pixels, noise = (part.to(pretraining.device) for part in (sample.image, sample.noise))
    pictures = reconstruct(pretraining.autoencoder, pixels, noise, pretraining.mask_ratio, pretraining.amp)
    picture = tiled(pictures)
    folder.image("reconstruction", picture, step)
    save_picture(picture, folder.path / "reconstruction.png")


if __name__ == "__main__":
    run_main(main, ARGS)
