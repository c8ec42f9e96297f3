"""End-to-end fine-tuning on the [cls] token: the paper's MAE-FT, and the demo's fine-tuned encoder.

The run folder gets `encoder.safetensors` (encoder and head, family mae_ft), for --finetune of every other main.
--global_pool classifies the mean patch instead, as MAE's published models do (family mae_ft_mean). Defaults are the
paper's recipe for ViT-B (B.1). Source: He et al., 2022, appendix A.

examples:
    # the paper's ViT-B: effective batch 1,024
    torchrun --nproc_per_node 8 main_finetune.py --model vit_base_patch16 --finetune mae_vit_base_patch16 \\
        --batch_size 128 --data_path $IMAGENET --output_dir runs/mae_ft_base

    # the accuracy of a published classifier
    python main_finetune.py --eval --resume mae_finetuned_vit_base.pth --global_pool --data_path $IMAGENET

    # resume a stopped run
    python main_finetune.py --args_from runs/mae_ft_base/args.json --resume auto
"""

import argparse

from cli import arguments, console
from cli.encoder_arguments import add_encoder_arguments
from data_sets.table import DATASETS
from encoders.libraries import library_of


def get_args_parser() -> console.Parser:
    parser = console.Parser(__doc__)
    add_encoder_arguments(parser)
    arguments.add_data_arguments(parser, loaders=False, splits=True)  # timm augments PIL images
    add = parser.add_argument_group("classifier").add_argument
    add("--global_pool", action="store_true", help="classify the mean patch instead of [cls]")
    optim = parser.add_argument_group("optimisation")
    arguments.add_schedule_arguments(optim, batch_size=64, epochs=100, warmup_epochs=5, blr=5e-4, min_lr=1e-6)
    add = optim.add_argument
    add("--layer_decay", default=0.65, type=console.positive, help="rate of a block relative to the next one")
    add("--weight_decay", default=0.05, type=console.non_negative, help="of matrices; not of biases and norms")
    add("--clip_grad", default=None, type=console.positive, metavar="NORM", help="largest norm of the gradient")
    add("--compile", action="store_true", help="compile the encoder's blocks; for long runs on a GPU")
    add = parser.add_argument_group("regularisation").add_argument
    add("--drop_path", default=0.1, type=console.share_below_one, help="stochastic depth of the last block")
    add("--crop_scale", default=0.08, type=console.positive_share, help="smallest share of the image in a crop")
    add("--aa", default="rand-m9-mstd0.5-inc1", help='RandAugment policy of timm; "" for none')
    add("--color_jitter", default=None, type=console.non_negative, help="strength; used if --aa is empty")
    add("--reprob", default=0.25, type=console.share, help="probability of random erasing")
    add("--smoothing", default=0.1, type=console.share_below_one, help="label smoothing")
    add("--mixup", default=0.8, type=console.non_negative, help="alpha of mixup; 0: none")
    add("--cutmix", default=1.0, type=console.non_negative, help="alpha of cutmix; 0: none")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="evaluate --resume, a checkpoint or published file, and stop")
    arguments.add_run_arguments(parser)
    add = arguments.add_old_arguments(parser).add_argument
    add("--cls_token", action="store_true", help="MAE's; no effect: [cls] is the default here")
    add("--start_epoch", default=0, type=console.non_negative_int, help="first epoch of a run that is not resumed")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="content of erased parts")
    add("--recount", default=1, type=console.positive_int, help="largest number of erased parts per image")
    add("--resplit", action="store_true", help="MAE's; no effect, there or here")
    add("--mixup_prob", default=1.0, type=console.share, help="share of the batches that are mixed")
    add("--mixup_switch_prob", default=0.5, type=console.share, help="share of cutmix if mixup is on as well")
    add("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="what shares a mixture")
    sides = {"default": None, "nargs": 2, "type": console.share, "metavar": ("MIN", "MAX")}
    add("--cutmix_minmax", **sides, help="range of the sides of cutmix's part, instead of --cutmix")
    return parser


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed in training."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    arguments.check_training(args)
    if library_of(args.finetune):
        raise ValueError(f"--finetune {args.finetune} is run by its library, frozen: name a file or a catalogue name")
    if args.decoder:
        raise ValueError("--decoder: fine-tuning trains the encoder alone: drop it")
    if args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        raise ValueError(f"--dataset {args.dataset} has several labels per image: probe it with main_linprobe.py")
    if args.eval and not args.resume:
        raise ValueError("--eval needs a classifier: name its file with --resume")
    if args.amp == "float16" and not args.eval:
        raise ValueError("--amp float16 would need a loss scaler to train; use bfloat16")
    if args.global_pool and args.cls_token:
        raise ValueError("--global_pool classifies the mean patch and --cls_token [cls]: drop one of them")
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise ValueError("--cutmix_minmax {} {}: MIN must be smaller than MAX".format(*args.cutmix_minmax))
    if mixes(args) and args.batch_size % 2 and not args.eval:
        raise ValueError(f"--batch_size {args.batch_size} must be even: mixup and cutmix pair images")
