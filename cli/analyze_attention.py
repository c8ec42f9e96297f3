"""Measure attention flow, block by block, over a data set: Figs. 3-6 and 10-13 of the paper, and entropies of Table 3.

For every encoder, <output_dir>/<label>/attention.json holds each metric of --metrics in each block: mean and standard
deviation over the images, summarised and for each head. Four figures are drawn from it: attention (the paper's four
metrics), park (Park et al.'s), heads and spectra. Under torchrun the processes share the images, each taken once.

examples:
    # two encoders in the same figures
    python main_analyze_attention.py --data_path $IMAGENET --model vit_base_patch16 \\
        --finetune mae_vit_base_patch16 dino_vit_base_patch16 --label MAE DINO --output_dir runs/attention

    # all metrics on 5,000 images, with t-SNE after the first and the last block
    python main_analyze_attention.py --data_path $IMAGENET --finetune mae_vit_base_patch16 --metrics all \\
        --num_images 5000 --tsne_blocks 0 11 --output_dir runs/attention_all

    # an untrained encoder, to compare with
    python main_analyze_attention.py --data_path $IMAGENET --model vit_base_patch16 --label random
"""

import argparse
import re
from pathlib import Path

from attention.metrics import GROUPS, METRICS
from attention.reductions import REDUCTIONS
from attention.tokens import TSNE_IMAGES
from cli.arguments import add_data_arguments, add_run_arguments
from cli.console import Parser, non_negative_int, one_of, positive_int
from cli.encoder_arguments import add_encoder_arguments, check_encoder, one_encoder_each
from data_sets.table import DATASETS
from encoders.architectures import check_blocks, known_depth


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser, several=True)
    add_data_arguments(parser)
    analysis = parser.add_argument_group("analysis")
    add_label_argument(analysis)
    add = analysis.add_argument
    add(
        "--metrics",
        nargs="+",
        default=["flow"],
        metavar="METRIC",
        type=one_of([*GROUPS, *METRICS]),
        help=f"groups ({', '.join(GROUPS)}) or names: {', '.join(METRICS)}",
    )
    add("--num_images", type=positive_int, help="size of a random subset of the images (default: all images)")
    add("--batch_size", default=64, type=positive_int, help="images per process")
    add("--reduction", default="auto", choices=["auto", *REDUCTIONS], help="how attention is computed; results agree")
    add("--num_examples", default=4, type=non_negative_int, help="images whose maps a report shows; 0: none")
    add("--compile", action="store_true", help="compile the encoder's blocks: for long runs on a GPU")
    add(
        "--tsne_blocks",
        nargs="+",
        type=non_negative_int,
        default=[],
        metavar="BLOCK",
        help=f"t-SNE of the patch tokens of {TSNE_IMAGES} images after these blocks",
    )
    add_run_arguments(parser, trains=False)
    return parser


def add_label_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--label", nargs="+", help="names of the encoders (default: the names of their files)")


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that cannot work, whatever the data and the weights."""
    encoder_labels(args)
    for encoder in one_encoder_each(args):
        check_encoder(encoder)
        check_blocks(args.tsne_blocks, None if args.decoder else known_depth(encoder.model))
    if args.tsne_blocks and args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        raise ValueError(f"--tsne_blocks colours images by class, but --dataset {args.dataset} has several per image")


def encoder_labels(args: argparse.Namespace) -> list[str]:
    """One name per encoder; ValueError if two are equal, also as names of folders."""
    labels = args.label or [Path(weights).stem or "random weights" for weights in args.finetune]
    if len(labels) != len(args.finetune):
        raise ValueError(f"--label has {len(labels)} names for {len(args.finetune)} encoders: give one name to each")
    if len({folder_name(label) for label in labels}) < len(labels):
        raise ValueError(f"encoders share a name ({', '.join(labels)}): give each its own --label")
    return labels


def folder_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)
