"""What main_finetune.py takes: flags and help in finetune.toml; how they fit together here."""

import argparse

from cli.arguments import check_training, program_parser
from cli.console import Parser, refuse
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
    weights, dataset, sides = args.finetune, args.dataset, args.cutmix_minmax
    refuse(library_of(weights), f"--finetune {weights} is run by its library, frozen: name a file or a catalogue name")
    refuse(args.decoder, "--decoder: fine-tuning trains the encoder alone: drop it")
    multi_label = dataset in DATASETS and DATASETS[dataset].multi_label
    refuse(multi_label, f"--dataset {dataset} has several labels per image: probe it with main_linprobe.py")
    refuse(args.eval and not args.resume, "--eval needs a classifier: name its file with --resume")
    scaled = args.amp == "float16" and not args.eval
    refuse(scaled, "--amp float16 would need a loss scaler to train; use bfloat16")
    both = args.global_pool and args.cls_token
    refuse(both, "--global_pool classifies the mean patch and --cls_token [cls]: drop one of them")
    empty = sides is not None and sides[0] >= sides[1]
    refuse(empty, f"--cutmix_minmax {' '.join(map(str, sides or ()))}: MIN must be smaller than MAX")
    odd = mixes(args) and args.batch_size % 2 and not args.eval
    refuse(odd, f"--batch_size {args.batch_size} must be even: mixup and cutmix pair images")
