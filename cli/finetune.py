"""What main_finetune.py takes: flags and help in finetune.toml; how they fit together here."""

import argparse

from cli.arguments import check_training, program_parser
from cli.console import Parser
from data_sets.table import DATASETS
from encoders.libraries import library_of


def get_args_parser() -> Parser:
    return program_parser("finetune")


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed in training."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    check_training(args)
    if library_of(args.finetune):
        raise ValueError(f"--finetune {args.finetune} is run by its library, frozen: name a file or a catalogue name")
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
