"""Pretraining by masked reconstruction (MAE), momentum contrast (MoCo-v3) or their weighted sum.

The run folder gets `encoder.safetensors` (the encoder in MAE's published layout, for --finetune of every other main),
`results.json` (last epoch and provenance), and `reconstruction.png` (image, masked, reconstruction).
Sources: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; Chen, Xie and He, "An Empirical Study
of Training Self-Supervised Vision Transformers", ICCV 2021; their sum: Park et al., "What Do Self-Supervised Vision
Transformers Learn?", ICLR 2023.

examples:
    # the paper's ViT-S: effective batch 4,096
    torchrun --nproc_per_node 8 main_pretrain.py --model vit_small_patch16 --batch_size 512 --data_path $IMAGENET \\
        --output_dir runs/mae_small

    # a small encoder on the demo's images, on any machine
    python main_pretrain.py --model vit_demo_patch8 --dataset demo --data_path demo_images --epochs 20 --warmup_epochs 2

    # MoCo-v3's recipe on the same encoder
    torchrun --nproc_per_node 8 main_pretrain.py --contrastive_weight 1 --stop_grad_conv1 --batch_size 512 \\
        --epochs 300 --weight_decay 0.1 --model vit_small_patch16 --data_path $IMAGENET --output_dir runs/moco_small

    # resume a stopped run
    python main_pretrain.py --args_from runs/mae_small/args.json --resume auto
"""

import argparse

from cli.arguments import add_data_arguments, add_run_arguments, add_schedule_arguments, check_training
from cli.console import (
    Parser,
    inner_share,
    non_negative,
    non_negative_int,
    positive,
    positive_int,
    positive_share,
    share,
    share_below_one,
)
from encoders.architectures import architecture, default_input_size

# flags of one part of the loss
RECONSTRUCTION = ("mask_ratio", "norm_pix_loss", "crop_scale", "figure_every")
CONTRAST = (
    "temperature",
    "encoder_momentum",
    "projector_width",
    "view_scale",
    "view_grey",
    "view_drop",
    "stop_grad_conv1",
)


def encoder_name(model: str) -> str:
    """The encoder of an autoencoder as MAE's commands name it: mae_vit_base_patch16, or with its decoder behind."""
    return model.removeprefix("mae_").removesuffix("_dec512d8b")


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="vit_small_patch16", metavar="MODEL", type=encoder_name,
                       help="encoder architecture, by name")  # fmt: skip
    model.add_argument("--input_size", default=None, type=int, help="pixels (default: the model's)")
    model.add_argument("--contrastive_weight", default=0.0, type=share, metavar="L",
                       help="loss: (1 - L) x masked reconstruction + L x contrast; 0: MAE, 1: MoCo-v3")  # fmt: skip
    mae = parser.add_argument_group("masked reconstruction (--contrastive_weight < 1)")
    mae.add_argument("--mask_ratio", default=0.75, type=inner_share, help="share of masked patches")
    mae.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=True,
                     help="predict pixels standardised per patch")  # fmt: skip
    mae.add_argument("--crop_scale", default=0.2, type=positive_share, help="smallest share of the image in a crop")
    mae.add_argument("--figure_every", default=20, type=non_negative_int, metavar="EPOCHS",
                     help="renew reconstruction.png this often; 0: at the end only")  # fmt: skip
    moco = parser.add_argument_group("contrast (--contrastive_weight > 0)")
    moco.add_argument("--temperature", default=0.2, type=positive, help="of the softmax over similarities")
    moco.add_argument("--encoder_momentum", default=0.99, type=share,
                      help="of the momentum encoder at the first step; rises to 1")  # fmt: skip
    moco.add_argument("--projector_width", default=4096, type=positive_int, help="hidden width of the two MLPs")
    moco.add_argument("--view_scale", default=0.08, type=positive_share, help="smallest share of the image in a view")
    moco.add_argument("--view_grey", default=0.2, type=share, help="probability that a view has no colour")
    moco.add_argument("--view_drop", default=0.0, type=share_below_one,
                      help="share of patches that the trained encoder does not see of a view")  # fmt: skip
    moco.add_argument("--stop_grad_conv1", action="store_true",
                      help="keep the patch embedding at its initial weights, as MoCo-v3's ViT recipes do")  # fmt: skip
    add_data_arguments(parser, labels=False)
    optim = parser.add_argument_group("optimisation")
    add_schedule_arguments(optim, batch_size=64, epochs=800, warmup_epochs=40, blr=1.5e-4)
    optim.add_argument("--weight_decay", default=0.05, type=non_negative, help="of matrices; not of biases and norms")
    optim.add_argument("--amp", default="bfloat16", choices=["bfloat16", "float32", "none"],
                       help="precision of matrix products")  # fmt: skip
    optim.add_argument("--compile", action="store_true", help="compile the blocks; for long runs on a GPU")
    add_run_arguments(parser)
    old = parser.add_argument_group("accepted for old commands")
    old.add_argument("--start_epoch", default=0, type=non_negative_int, help="first epoch of a run that is not resumed")
    return parser


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
