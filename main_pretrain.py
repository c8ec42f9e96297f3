"""Pretraining: MAE (He et al., CVPR 2022), MoCo-v3 (Chen et al., ICCV 2021), or their sum (Park et al., ICLR 2023).

cli/pretrain.toml has the arguments and examples.
"""

from cli.arguments import command_line
from cli.console import run_main
from cli.pretrain import check, get_args_parser

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = command_line(get_args_parser(), check)

import argparse

import torch
from timm.optim import param_groups_weight_decay
from torch.utils.data import Dataset

from cli.arguments import build_images, identity, loading, plain
from cli.encoder_arguments import precision
from cli.session import peak_rate, plan, schedule, session, write_results
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import GlobalBatches
from data_sets.views import Stacked, View, contrastive_views, train_transform
from encoders.architectures import default_input_size
from engine_pretrain import Comparison, Pretraining, examples, reconstruct, save_picture, tiled
from models_mae import DECODERS, MaskedAutoencoder
from models_moco import MomentumContrast, SharedEncoder
from models_vit import VisionTransformer, build_vit, compile_blocks
from runtime.folder import RunFolder
from runtime.provenance import provenance
from runtime.training import Training
from util.progress import log
from util.seeding import seeded


def main(args: argparse.Namespace) -> None:
    with session(args, check) as (world, folder):
        # ---- networks and images
        size, weight = args.input_size or default_input_size(args.model), args.contrastive_weight
        images = build_images(args, "train", labels=False)
        batches = GlobalBatches(len(images), args.batch_size, args.accum_iter, args.seed)
        encoder, model = build_networks(args, size)
        model.to(world.device)
        if args.compile:
            compile_blocks(model)
        augment, patches = augmentation(args, size, encoder)
        dataset = KeyedDataset(images, augment, args.seed, patches, args.on_bad_image, train=True)
        loader = build_loader(dataset, batches, **loading(args, world.device))

        # ---- optimiser: AdamW (0.9, 0.95), weight decay on matrices only, warm-up and half-cosine per step
        lr = peak_rate(args, args.blr, batches.effective)
        groups = [{**group, "peak_lr": lr} for group in param_groups_weight_decay(model, args.weight_decay)]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        facts = {"training images": fingerprint(images)}
        comparison = Comparison(weight, args.encoder_momentum, batches, args.epochs) if weight > 0 else None
        if comparison:
            facts["images compared"] = args.batch_size * world.size
        amp = precision(args.amp)
        pretraining = Pretraining(model, optimizer, args.mask_ratio, world.device, amp, comparison)
        settings = folder, identity(args, facts), args.start_epoch
        training = Training(plan(args), pretraining, optimizer, schedule(args), loader, batches, *settings)
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
            kept = pretraining.autoencoder.published_state_dict() if args.keep_decoder else encoder.state_dict()
            folder.save_tensors("encoder.safetensors", kept, metadata)
            write_results(folder, training, {"last": folder.last_line()}, run)
    log.info("pretraining took %.0f s", training.elapsed)


def build_networks(args: argparse.Namespace, size: int) -> tuple[VisionTransformer, torch.nn.Module]:
    """The encoder, and what trains it: by one part of the loss or by both."""
    with seeded("weights", args.seed):
        encoder = build_vit(args.model, img_size=size)
        networks = []
        if args.contrastive_weight < 1:
            networks += [MaskedAutoencoder(encoder, **DECODERS[args.model], norm_pix_loss=args.norm_pix_loss)]
        if args.contrastive_weight > 0:
            networks += [MomentumContrast(encoder, args.projector_width, args.temperature, args.view_drop)]
    encoder.patch_embed.requires_grad_(not args.stop_grad_conv1)
    return encoder, networks[0] if args.contrastive_weight == 0 else SharedEncoder(networks)


def augmentation(args: argparse.Namespace, size: int, encoder: VisionTransformer) -> tuple[View | Stacked, int]:
    """torchvision's crop as in MAE (not in its probes), views to compare as in MoCo-v3; and the patches of all."""
    augment = train_transform(size, scale=(args.crop_scale, 1.0), crop="torchvision", loader=args.loader)
    patches, weight = encoder.grid_size[0] * encoder.grid_size[1], args.contrastive_weight
    if weight == 0:
        return augment, patches
    views = [*[augment] * (weight < 1), *contrastive_views(size, args.view_scale, args.view_grey, args.loader)]
    return Stacked(views), patches * len(views)


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
