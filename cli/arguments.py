"""Command-line arguments that several mains share, in MAE's spelling."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.console import (
    Parser,
    any_int,
    named_path,
    non_negative,
    non_negative_int,
    positive,
    positive_int,
    share_below_one,
)
from cli.encoder_arguments import check_input_size, check_weights, settle_model
from data_sets.images import ON_BAD_IMAGE, Images
from data_sets.order import micro_steps_of_a_group
from data_sets.packed import is_packed
from data_sets.table import DATASETS, build_dataset, build_splits, check_dataset
from data_sets.views import LOADERS
from runtime.trackers import TRACKERS
from util.distributed import Timeouts
from util.files import to_json

if TYPE_CHECKING:
    import torch


def add_data_arguments(parser: Parser, labels: bool = True, loaders: bool = True, splits: bool = False) -> None:
    """labels: whether the program uses labels, and so has --nb_classes; loaders: whether it has --loader; splits:
    whether it trains and tests, and so has --val_split."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", required=True, type=named_path, help="folder of the data set, or hf:ORG/NAME")
    group.add_argument("--dataset", default="image_folder", help=f"kind of data set: {', '.join(DATASETS)}")
    group.add_argument("--allow_subset", action="store_true", help="accept fewer images than the official data set has")
    group.add_argument("--label_column", metavar="NAME", help="column of the labels in a list, in .json or in a table")
    if splits:
        group.add_argument(
            "--val_split",
            default=0.0,
            type=share_below_one,
            metavar="SHARE",
            help="test on this share of each class of a folder of classes without train/ and val/, drawn by --seed",
        )
    group.add_argument(
        "--on_bad_image",
        choices=ON_BAD_IMAGE,
        default="error",
        help="at a damaged image: stop, or train on the next image and leave it out of the evaluation",
    )
    group.add_argument(
        "--nb_classes",
        default=None,
        type=positive_int,
        help="number of classes to expect (default: those of the data)" if labels else argparse.SUPPRESS,
    )
    if loaders:
        group.add_argument(
            "--loader",
            choices=list(LOADERS),
            default="pil",
            help="; ".join(f"{name}: {text}" for name, text in LOADERS.items()),
        )
    group.add_argument(
        "--num_workers",
        default=min(10, len(os.sched_getaffinity(0))),
        type=non_negative_int,
        help="processes that load images",
    )
    group.add_argument(
        "--pin_mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load images into pinned memory; no effect without a GPU",
    )
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)  # MAE's spelling
    group.add_argument(
        "--dataloader_affinity_hack", "-dlah", action="store_true", help="let loader workers use all cores"
    )


def loading(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The options of data_sets.loader.build_loader that the arguments set. device: of the encoder."""
    return {
        "num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda",
        "affinity_hack": args.dataloader_affinity_hack, "device": device,
    }  # fmt: skip


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of data_sets.table.build_dataset that the arguments set."""
    return {"allow_subset": args.allow_subset, "label_column": args.label_column}


def run_test_images(args: argparse.Namespace) -> Images:
    """The test images of a finished run with these arguments."""
    if args.val_split:
        return build_splits(args.dataset, args.data_path, None, **split_options(args))[1]
    return build_dataset(args.dataset, args.data_path, "val", **data_options(args))


def split_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of data_sets.table.build_splits that the arguments set."""
    return {**data_options(args), "val_split": args.val_split, "seed": args.seed}


def add_run_arguments(parser: Parser, trains: bool = True) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="folder of the results; empty: write nothing")
    group.add_argument("--log_dir", default=None, help="TensorBoard folder (default: --output_dir)")
    group.add_argument(
        "--track",
        nargs="*",
        choices=TRACKERS,
        default=["tensorboard"],
        help="send metrics, configuration, figures and records to these; wandb, trackio: requirements-track.txt",
    )
    group.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA if there is a GPU")
    group.add_argument("--seed", default=0, type=any_int, help="seed of data order, augmentation and initial weights")
    group.add_argument("--resume", default="", help='checkpoint to continue from; "auto": the newest in --output_dir')
    group.add_argument(
        "--save_every_minutes",
        default=30.0,
        type=non_negative,
        metavar="MINUTES",
        help=f"also checkpoint within {'an epoch' if trains else 'a pass'}, this often; 0: never",
    )
    if trains:
        group.add_argument(
            "--save_every_steps",
            default=0,
            type=non_negative_int,
            metavar="STEPS",
            help="also checkpoint after this many optimizer steps; 0: never",
        )
    group.add_argument("--dist_url", default="env://", help="rendezvous of the processes; torchrun sets it up")
    group.add_argument(
        "--dist_timeout",
        nargs="+",
        type=positive,
        default=[300.0, 120.0, 1800.0],
        metavar="SECONDS",
        help="to wait for other processes: to join, in a training step, in evaluation and other work; or one for all",
    )
    group.add_argument(
        "--args_from", default=None, type=Path, metavar="FILE", help="take defaults from a run's args.json"
    )
    # torchrun describes the processes in the environment; commands written for MAE may still name them
    for flag in ("--world_size", "--local_rank", "--local-rank"):
        group.add_argument(flag, type=int, default=None, help=argparse.SUPPRESS)


def timeouts(args: argparse.Namespace) -> Timeouts:
    """The values of --dist_timeout; ValueError for another number of them."""
    if len(args.dist_timeout) not in (1, 3):
        raise ValueError(f"--dist_timeout takes 1 or 3 values (join, train, evaluate), got {len(args.dist_timeout)}")
    return Timeouts(*(args.dist_timeout * 3)[:3])


def add_old_arguments(parser: Parser):
    """The last group, for more flags of commands published with MAE and beyond_cls."""
    group = parser.add_argument_group("accepted for old commands")
    group.add_argument(
        "--dist_eval", action="store_true", help="MAE's; no effect: evaluation always uses all processes"
    )
    return group


def add_schedule_arguments(
    group: argparse._ArgumentGroup, batch_size: int, epochs: int, warmup_epochs: int, blr: float | list[float],
    min_lr: float = 0.0,
) -> None:  # fmt: skip
    """Effective batch and learning rate; the defaults are the program's. A list as `blr` allows several rates."""
    several = {"nargs": "+"} if isinstance(blr, list) else {}
    group.add_argument("--batch_size", default=batch_size, type=positive_int, help="images per process and micro-step")
    group.add_argument("--accum_iter", default=1, type=positive_int, help="micro-steps per optimizer step")
    group.add_argument("--epochs", default=epochs, type=positive_int, help="training epochs")
    group.add_argument(
        "--warmup_epochs",
        default=warmup_epochs,
        type=non_negative_int,
        help="linear warm-up epochs; if more than --epochs, a tenth of these",
    )
    group.add_argument(
        "--blr", default=blr, type=non_negative, **several, help="base learning rate: lr = blr x effective batch / 256"
    )
    group.add_argument("--lr", default=None, type=non_negative, help="learning rate; overrides --blr")
    group.add_argument("--min_lr", default=min_lr, type=non_negative, help="learning rate at the end of the cosine")


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


# flags that may change when a run is resumed: where it runs and what it reports, not what it computes (the weights of
# --finetune are compared by their digest, so the file may move)
RESUMABLE_FLAGS = set(
    """
    output_dir log_dir resume device num_workers pin_mem dataloader_affinity_hack dist_url dist_timeout world_size
    local_rank args_from data_path accum_iter eval eval_every report dist_eval suffix save_predictions knn per_class
    cache_dir offline on_bad_image multilabel_metric finetune save_every_minutes save_every_steps figure_every
    loc_workers images num_examples draw_threshold track preset
    """.split()  # noqa: SIM905
)


# arguments that processes of one run may have different values of: paths (their content is compared) and resources
NODE_FLAGS = set(
    """
    data_path finetune args_from cache_dir local_rank device num_workers loc_workers pin_mem
    dataloader_affinity_hack
    """.split()  # noqa: SIM905
)


def processes(args: argparse.Namespace) -> dict[str, Any]:
    """The options of runtime.processes.process_group that the arguments set."""
    shared = {f"--{name}": value for name, value in plain(args).items() if name not in NODE_FLAGS}
    return {"device": args.device, "dist_url": args.dist_url, "timeouts": timeouts(args), "arguments": shared}


def identity(args: argparse.Namespace, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must be equal when a run is resumed: the arguments outside RESUMABLE_FLAGS, and `facts`, plain data such as
    digests of weights and images."""
    return {name: value for name, value in plain(args).items() if name not in RESUMABLE_FLAGS} | (facts or {})
