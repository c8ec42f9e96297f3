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

from cli import arguments, console
from encoders.architectures import architecture, default_input_size

# flags of one part of the loss
RECONSTRUCTION = ("mask_ratio", "norm_pix_loss", "crop_scale", "figure_every", "keep_decoder")
VIEWS = ("view_scale", "view_grey", "view_drop")
CONTRAST = ("temperature", "encoder_momentum", "projector_width", "stop_grad_conv1", *VIEWS)


def encoder_name(model: str) -> str:
    """The encoder of an autoencoder as MAE's commands name it: mae_vit_base_patch16, or with its decoder behind."""
    return model.removeprefix("mae_").removesuffix("_dec512d8b")


def get_args_parser() -> console.Parser:
    parser = console.Parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="vit_small_patch16", metavar="MODEL", type=encoder_name, help="architecture, by name")
    add("--input_size", default=None, type=int, help="pixels (default: the model's)")
    losses = "loss: (1 - L) x masked reconstruction + L x contrast; 0: MAE, 1: MoCo-v3"
    add("--contrastive_weight", default=0.0, type=console.share, metavar="L", help=losses)

    add = parser.add_argument_group("masked reconstruction (--contrastive_weight < 1)").add_argument
    add("--mask_ratio", default=0.75, type=console.inner_share, help="share of masked patches")
    standardised = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--norm_pix_loss", **standardised, help="predict pixels standardised per patch")
    add("--crop_scale", default=0.2, type=console.positive_share, help="smallest share of the image in a crop")
    every = {"type": console.non_negative_int, "metavar": "EPOCHS"}
    add("--keep_decoder", action="store_true", help="write the decoder into encoder.safetensors, too, for --decoder")
    add("--figure_every", default=20, **every, help="renew reconstruction.png this often; 0: at the end only")

    add = parser.add_argument_group("contrast (--contrastive_weight > 0)").add_argument
    add("--temperature", default=0.2, type=console.positive, help="of the softmax over similarities")
    add("--encoder_momentum", default=0.99, type=console.share, help="of the momentum encoder, at first; rises to 1")
    add("--projector_width", default=4096, type=console.positive_int, help="hidden width of projector and predictor")
    add("--view_scale", default=0.08, type=console.positive_share, help="smallest share of the image in a view")
    add("--view_grey", default=0.2, type=console.share, help="probability that a view has no colour")
    add("--view_drop", default=0.0, type=console.share_below_one, help="share of each view's patches to leave out")
    add("--stop_grad_conv1", action="store_true", help="do not train the patch embedding, as MoCo-v3's ViT recipes")
    arguments.add_data_arguments(parser, labels=False)

    optim = parser.add_argument_group("optimisation")
    arguments.add_schedule_arguments(optim, batch_size=64, epochs=800, warmup_epochs=40, blr=1.5e-4)
    add, precisions = optim.add_argument, ["bfloat16", "float32", "none"]
    add("--weight_decay", default=0.05, type=console.non_negative, help="of matrices; not of biases and norms")
    add("--amp", default="bfloat16", choices=precisions, help="precision of matrix products")
    add("--compile", action="store_true", help="compile the blocks; for long runs on a GPU")
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("accepted for old commands").add_argument
    add("--start_epoch", default=0, type=console.non_negative_int, help="first epoch of a run that is not resumed")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    arguments.check_training(args)
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
