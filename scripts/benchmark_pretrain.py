"""What scripts/benchmark.py races for pretraining: whole training steps."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from cli.arguments import precision
from data_sets.loader import Sample
from engine_pretrain import Pretraining
from models_mae import DECODERS, MaskedAutoencoder
from models_vit import build_vit
from runtime.training import all_finite
from util.distributed import GradientMean
from util.optim import weight_decay_groups
from util.seeding import seeded

MASK_RATIO = 0.75
RATE = 1e-4  # any: it costs the same


def hugging_face_twin(model: MaskedAutoencoder, attention: str) -> ViTMAEForPreTraining:
    """Hugging Face's ViTMAE of the same sizes, with new weights; attention: its attn_implementation."""
    encoder, width = model.encoder, model.decoder_embed.out_features
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=encoder.embed_dim, num_hidden_layers=encoder.depth, num_attention_heads=encoder.num_heads,
        intermediate_size=4 * encoder.embed_dim, image_size=encoder.grid_size[0] * encoder.patch_size,
        patch_size=encoder.patch_size, decoder_hidden_size=width, decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=model.decoder_blocks[0].attn.num_heads, decoder_intermediate_size=4 * width,
        layer_norm_eps=1e-6, mask_ratio=MASK_RATIO, norm_pix_loss=True, attn_implementation=attention,
    ))  # fmt: skip


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The recipe's optimizer, fused, for every contestant."""
    return torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=RATE, betas=(0.9, 0.95), fused=True)


def pretraining_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward, loss, backward and optimizer step on the same images: ours, and Hugging Face's with either attention."""
    size, amp = args.input_size, precision(args.amp)
    with seeded("benchmark", 0):
        encoder = build_vit(args.model, img_size=size)
        model = MaskedAutoencoder(encoder, **DECODERS[args.model])
        images = torch.randn(args.batch_size, 3, size, size)
        noise = torch.rand(args.batch_size, encoder.grid_size[0] * encoder.grid_size[1])
    everything = torch.arange(args.batch_size)
    sample = Sample(images.to(device), everything, everything, noise.to(device))

    def ours() -> Callable[[], Tensor]:
        model.to(device)
        if args.compile:
            model.compile_blocks()
        method = Pretraining(model, adamw(model), MASK_RATIO, device, amp)

        def step() -> Tensor:  # as runtime.training takes it
            mean = GradientMean([p for group in method.groups for p in group], 1)
            losses = method.losses(sample, ())
            losses.sum().backward()
            mean.add(losses)
            losses = mean.take()
            method.step(losses.isfinite() & all_finite([p.grad for p in method.groups[0]]))
            method.optimizer.zero_grad()
            return losses

        return step

    def theirs(attention: str) -> Callable[[], Tensor]:
        twin = hugging_face_twin(model, attention).to(device).train()
        if args.compile:
            twin.compile()
        optimizer = adamw(twin)

        def step() -> Tensor:
            with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
                loss = twin(sample.image, noise=sample.noise).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    makers = {
        "pretraining step": ours,
        "Hugging Face, sdpa": lambda: theirs("sdpa"),
        "Hugging Face, eager": lambda: theirs("eager"),
    }
    return {name: make() for name, make in makers.items() if args.only in (None, name)}
