"""MAE pretraining: the paper's ViT-S, the demo encoder, or any architecture of models_vit.

The run folder gets `encoder.safetensors` (the encoder in MAE's published layout, for --finetune of every other main),
`results.json` (last epoch and provenance), and `reconstruction.png` (image, masked, reconstruction).
Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

examples:
    # the paper's ViT-S: effective batch 4,096
    torchrun --nproc_per_node 8 main_pretrain.py --model vit_small_patch16 --batch_size 512 --data_path $IMAGENET \\
        --output_dir runs/mae_small

    # a small encoder on the demo's images, on any machine
    python main_pretrain.py --model vit_demo_patch8 --dataset demo --data_path demo_images --epochs 20 --warmup_epochs 2

    # resume a stopped run
    python main_pretrain.py --args_from runs/mae_small/args.json --resume auto
"""

import argparse

from cli.arguments import add_data_arguments, add_run_arguments, add_schedule_arguments, check_training
from cli.console import Parser, inner_share, non_negative, non_negative_int, positive_share
from encoders.architectures import architecture, default_input_size


def encoder_name(model: str) -> str:
    """The encoder of an autoencoder as MAE's commands name it: mae_vit_base_patch16, or with its decoder behind."""
    return model.removeprefix("mae_").removesuffix("_dec512d8b")


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="vit_small_patch16", metavar="MODEL", type=encoder_name,
                       help="encoder architecture, by name")  # fmt: skip
    model.add_argument("--input_size", default=None, type=int, help="pixels (default: the model's)")
    model.add_argument("--mask_ratio", default=0.75, type=inner_share, help="share of masked patches")
    model.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=True,
                       help="predict pixels standardised per patch")  # fmt: skip
    model.add_argument("--crop_scale", default=0.2, type=positive_share, help="smallest share of the image in a crop")
    add_data_arguments(parser, labels=False)
    optim = parser.add_argument_group("optimisation")
    add_schedule_arguments(optim, batch_size=64, epochs=800, warmup_epochs=40, blr=1.5e-4)
    optim.add_argument("--weight_decay", default=0.05, type=non_negative, help="of matrices; not of biases and norms")
    optim.add_argument("--amp", default="bfloat16", choices=["bfloat16", "float32", "none"],
                       help="precision of matrix products")  # fmt: skip
    optim.add_argument("--compile", action="store_true", help="compile the blocks; for long runs on a GPU")
    figure = parser.add_argument_group("figure")
    figure.add_argument("--figure_every", default=20, type=non_negative_int, metavar="EPOCHS",
                        help="renew reconstruction.png this often; 0: at the end only")  # fmt: skip
    add_run_arguments(parser)
    old = parser.add_argument_group("accepted for old commands")
    old.add_argument("--start_epoch", default=0, type=non_negative_int, help="first epoch of a run that is not resumed")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    check_training(args)
    patches = ((args.input_size or default_input_size(args.model)) // architecture(args.model)["patch_size"]) ** 2
    if int(patches * (1 - args.mask_ratio)) == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio} masks all {patches} patches: lower it")
    if args.nb_classes is not None:
        raise ValueError(f"--nb_classes {args.nb_classes}: pretraining uses no labels; drop it")
