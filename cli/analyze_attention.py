"""What main_analyze_attention.py takes: flags and help in analyze_attention.toml; how they fit together here."""

import argparse
import re
from pathlib import Path

from attention.metrics import GROUPS, METRICS
from attention.reductions import REDUCTIONS
from attention.tokens import TSNE_IMAGES
from cli.arguments import program_parser
from cli.console import Parser
from cli.encoder_arguments import check_encoder, one_encoder_each
from data_sets.table import DATASETS
from encoders.architectures import check_blocks, known_depth
from util.files import without_credentials


def get_args_parser() -> Parser:
    tables = {"metric_groups": GROUPS, "metric_names": METRICS, "metrics": [*GROUPS, *METRICS]}
    reductions = ["auto", *REDUCTIONS]
    return program_parser("analyze_attention", **tables, reductions=reductions, tsne_images=str(TSNE_IMAGES))


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
    labels = args.label or [Path(without_credentials(weights)).stem or "random weights" for weights in args.finetune]
    if len(labels) != len(args.finetune):
        raise ValueError(f"--label has {len(labels)} names for {len(args.finetune)} encoders: give one name to each")
    if len({folder_name(label) for label in labels}) < len(labels):
        raise ValueError(f"encoders share a name ({', '.join(labels)}): give each its own --label")
    return labels


def folder_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)
