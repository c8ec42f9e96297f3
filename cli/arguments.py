"""Command-line arguments that several mains share, in MAE's spelling."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.console import FLAGS, Parser, checked, parse
from cli.encoder_arguments import PRECISIONS, check_input_size, check_weights, settle_model
from data_sets.images import ON_BAD_IMAGE, Images
from data_sets.order import micro_steps_of_a_group
from data_sets.shards import is_packed
from data_sets.table import DATASETS, build_dataset, build_splits, check_dataset
from data_sets.views import LOADERS
from encoders.architectures import FROM_FILE
from encoders.families import FAMILIES
from encoders.libraries import LIBRARIES
from runtime.trackers import TRACKERS
from util.distributed import Timeouts
from util.files import to_json

if TYPE_CHECKING:
    import torch


RESUMABLE_FLAGS, NODE_FLAGS = set(FLAGS["may change when resumed"]), set(FLAGS["may differ between processes"])


def program_flags(program: str) -> dict[str, Any]:
    """The content of a program's TOML file: its `help`, its groups of flags, and lists of its own."""
    return tomllib.loads(Path(__file__).with_name(f"{program}.toml").read_text("utf-8"))


def program_parser(program: str, **tables: Any) -> Parser:
    """The parser of a program's TOML file. tables: see Parser.add_groups, beside those of the shared groups."""
    flags = program_flags(program)
    parser = Parser(flags["help"].lstrip())
    add_groups(parser, {title: group for title, group in flags.items() if isinstance(group, dict)}, **tables)
    return parser


def command_line(parser: Parser, check: Callable[[argparse.Namespace], None]) -> argparse.Namespace:
    """The arguments of a main, checked before its slow imports: a mistake is one line and exit code 2."""
    return checked(parse(parser), check, check_files)


def add_groups(parser: Parser, groups: dict[str, Any], **tables: Any) -> None:
    """Parser.add_groups with the tables that shared groups of flags.toml name."""
    shared = {"datasets": DATASETS, "on_bad_image": ON_BAD_IMAGE, "trackers": TRACKERS, "loaders": LOADERS}
    shared |= {"from_file": FROM_FILE, "families": FAMILIES, "precisions": PRECISIONS}
    shared |= {"libraries": "; ".join(library.names for library in LIBRARIES.values())}
    shared |= {"loader_help": "; ".join(map(": ".join, LOADERS.items()))}
    parser.add_groups(groups, **shared, **tables)
    if "--num_workers" in parser.flags:
        parser.set_defaults(num_workers=min(10, len(os.sched_getaffinity(0))))


def loading(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The options of data_sets.loader.build_loader that the arguments set. device: of the encoder."""
    pin = args.pin_mem and device.type == "cuda"
    workers = {"num_workers": args.num_workers, "affinity_hack": args.dataloader_affinity_hack}
    return {**workers, "pin_memory": pin, "device": device}


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of data_sets.table.build_dataset that the arguments set."""
    return {"allow_subset": args.allow_subset, "label_column": args.label_column}


def build_images(args: argparse.Namespace, split: str, labels: bool = True) -> Images:
    """A split of the images, see data_sets.table.build_dataset."""
    return build_dataset(args.dataset, args.data_path, split, **data_options(args), labels=labels)


def build_split_images(args: argparse.Namespace) -> tuple[Images, Images, int]:
    """Training and test images, and the number of classes, see data_sets.table.build_splits."""
    settings = args.dataset, args.data_path, args.nb_classes
    return build_splits(*settings, **data_options(args), val_split=args.val_split, seed=args.seed)


def run_test_images(args: argparse.Namespace) -> Images:
    """The test images of a finished run with these arguments."""
    if args.val_split:
        return build_split_images(argparse.Namespace(**{**vars(args), "nb_classes": None}))[1]
    return build_images(args, "val")


def timeouts(args: argparse.Namespace) -> Timeouts:
    """The values of --dist_timeout; ValueError for another number of them."""
    if len(args.dist_timeout) not in (1, 3):
        raise ValueError(f"--dist_timeout takes 1 or 3 values (join, train, evaluate), got {len(args.dist_timeout)}")
    return Timeouts(*(args.dist_timeout * 3)[:3])


def plain(args: argparse.Namespace) -> dict:
    """The arguments as values of JSON, without the credentials of URLs."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return json.loads(to_json(values))


def check_training(args: argparse.Namespace) -> None:
    """Check how the arguments of a training fit together; ValueError."""
    if hasattr(args, "finetune"):
        settle_model(args)
    check_input_size(args.input_size, args.model)
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch}: the epochs are 0 to {args.epochs - 1}")
    micro_steps_of_a_group(getattr(args, "bn_group", None) or args.batch_size, args.batch_size, args.accum_iter)


def check_files(args: argparse.Namespace, remote: bool = False) -> None:
    """Check that data, architectures, weights and a checkpoint exist; ValueError. remote: without looking at files."""
    timeouts(args)
    for name in args.track:
        if name != "tensorboard" and not remote and importlib.util.find_spec(name) is None:
            raise ValueError(f"--track {name}: not installed: pip install -r requirements-track.txt")
    check_dataset(args.dataset, None if remote else args.data_path)
    if getattr(args, "loader", "") == "packed" and not (remote or is_packed(args.data_path)):
        raise ValueError(f"--loader packed: {args.data_path} is not a folder of scripts/pack_images.py")
    check_weights(args, remote)
    resume = getattr(args, "resume", "")
    if not (remote or resume in ("", "auto") or Path(resume).is_file()):
        raise ValueError(f"--resume {resume}: no such file")


def identity(args: argparse.Namespace, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must be equal when a run is resumed: the arguments outside RESUMABLE_FLAGS, and `facts`, plain data such as
    digests of weights and images."""
    return {name: value for name, value in plain(args).items() if name not in RESUMABLE_FLAGS} | (facts or {})
