"""Attention from another frozen encoder, by which a probe may weight its own encoder's patches (the paper's Table 6).

Letters: B images, M patches.
"""

import argparse
import re

import torch
from torch import Tensor

from cli.arguments import frozen_encoder
from encoders.load import Encoder

ORACLE_ARGUMENTS = ("oracle", "oracle_model", "oracle_family", "oracle_checkpoint_key")


class Oracle:
    """Images, as the probed encoder takes them, -> the mean [cls] attention (B,M) of another encoder's last block.

    Not normalised: a sum below 1, as [cls] attends to itself too. Images are standardised anew where the two encoders
    differ in that. Raises ValueError where it has no [cls] token, or another grid of patches than the probed encoder.
    """

    def __init__(self, oracle: Encoder, probed: Encoder, size: int, amp: torch.dtype = torch.float32):
        self.backbone, self.amp, self.record = oracle.backbone.eval().requires_grad_(False), amp, oracle.record
        if not self.backbone.has_cls:
            raise ValueError("this encoder has no [cls] token whose attention could be asked for")
        patches = self.backbone.patch_size, probed.backbone.patch_size
        if patches[0] != patches[1]:
            raise ValueError(
                f"its patches have {patches[0]} pixels, the probed encoder's {patches[1]}: at {size} pixels "
                "the two have different grids; name an oracle with the same patch size"
            )

        def constants(encoder: Encoder) -> tuple[Tensor, Tensor]:
            return torch.tensor(encoder.mean)[:, None, None], torch.tensor(encoder.std)[:, None, None]

        (mean, std), (probed_mean, probed_std) = constants(oracle), constants(probed)
        self.factor, self.offset = probed_std / std, (probed_mean - mean) / std
        self.same = (oracle.mean, oracle.std) == (probed.mean, probed.std)

    def to(self, device: torch.device) -> "Oracle":
        self.backbone.to(device)
        self.factor, self.offset = self.factor.to(device), self.offset.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            standardised = images if self.same else images * self.factor + self.offset
            (features,) = self.backbone(standardised, cls_attention=True).values()
        return features.cls_attention.mean(1)


def add_oracle_arguments(group: argparse._ArgumentGroup, default: str | None) -> None:
    """ORACLE_ARGUMENTS: what --finetune, --model, --family and --checkpoint_key say, of another encoder."""
    group.add_argument("--oracle", default=default, metavar="WEIGHTS",
                       help="encoder whose [cls] attention the head dino takes; as --finetune")  # fmt: skip
    group.add_argument("--oracle_model", default="vit_base_patch16", metavar="MODEL", help="its architecture")
    group.add_argument("--oracle_family", default=None, help="format of its file (default: detected)")
    group.add_argument("--oracle_checkpoint_key", default=None, help="entry of its file that holds the weights")


def build_oracle(args: argparse.Namespace, probed: Encoder, size: int, amp: torch.dtype) -> Oracle:
    """The oracle that --oracle and its companions name. ValueError, with that flag in front, where it does not fit."""
    named = argparse.Namespace(**{
        **vars(args), "finetune": args.oracle, "model": args.oracle_model, "family": args.oracle_family,
        "checkpoint_key": args.oracle_checkpoint_key, "num_heads": None, "no_cls_token": False, "input_size": size,
    })  # fmt: skip
    try:
        return Oracle(frozen_encoder(named)[0], probed, size, amp)
    except ValueError as error:
        words = re.sub("--(model|family|checkpoint_key)", r"--oracle_\1", str(error))
        raise ValueError(f"--oracle: {words}") from error
