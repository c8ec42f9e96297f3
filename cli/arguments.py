"""Command-line arguments that several mains share, in MAE's spelling."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.console import FLAGS, Parser, add_flags
from cli.encoder_arguments import check_input_size, check_weights, settle_model
from data_sets.images import ON_BAD_IMAGE, Images
from data_sets.order import micro_steps_of_a_group
from data_sets.shards import is_packed
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
    skip = [] if loaders else ["loader"]
    add_flags(
        parser.add_argument_group("data"),
        FLAGS["data"],
        skip=skip if splits else [*skip, "val_split"],
        dataset={"fill": {"datasets": ", ".join(DATASETS)}},
        on_bad_image={"choices": ON_BAD_IMAGE},
        nb_classes={} if labels else {"help": ""},
        loader={"choices": list(LOADERS), "fill": {"loaders": "; ".join(map(": ".join, LOADERS.items()))}},
        num_workers={"default": min(10, len(os.sched_getaffinity(0)))},
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
    add_flags(
        parser.add_argument_group("run"),
        FLAGS["run"],
        skip=[] if trains else ["save_every_steps"],
        track={"choices": TRACKERS},
        save_every_minutes={"fill": {"unit": "an epoch" if trains else "a pass"}},
    )


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
    defaults = {"batch_size": batch_size, "epochs": epochs, "warmup_epochs": warmup_epochs, "min_lr": min_lr}
    options = {name: {"default": value} for name, value in defaults.items()}
    add_flags(group, FLAGS["schedule"], blr={"default": blr, **several}, **options)


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
