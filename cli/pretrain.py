"""What main_pretrain.py takes: flags and help in pretrain.toml; how they fit together here."""

import argparse

from cli.arguments import check_training, program_parser
from cli.console import Parser
from encoders.architectures import architecture, default_input_size

# flags of one part of the loss
RECONSTRUCTION = ("mask_ratio", "norm_pix_loss", "crop_scale", "figure_every", "keep_decoder")
VIEWS = ("view_scale", "view_grey", "view_drop")
CONTRAST = ("temperature", "encoder_momentum", "projector_width", "stop_grad_conv1", *VIEWS)


def encoder_name(model: str) -> str:
    """The encoder of an autoencoder as MAE's commands name it: mae_vit_base_patch16, or with its decoder's name."""
    return model.removeprefix("mae_").removesuffix("_dec512d8b")


def get_args_parser() -> Parser:
    return program_parser("pretrain", encoder_name=encoder_name)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    check_training(args)
    side = (args.input_size or default_input_size(args.model)) // architecture(args.model)["patch_size"]
    for flag in ("mask_ratio", "view_drop"):
        if int(side**2 * (1 - getattr(args, flag))) == 0:
            raise ValueError(f"--{flag} {getattr(args, flag)} leaves none of {side**2} patches: lower it")
    if args.nb_classes is not None:
        raise ValueError(f"--nb_classes {args.nb_classes}: pretraining uses no labels; drop it")
    weight, parser = args.contrastive_weight, get_args_parser()
    for flag in {0: CONTRAST, 1: RECONSTRUCTION}.get(weight, ()):
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag} has no effect at --contrastive_weight {weight:g}: drop it or change the weight")
