"""Command-line arguments that several mains share, in MAE's spelling."""

import argparse
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli.encoder_arguments import (  # noqa: F401
    ORACLE_ARGUMENTS,
    add_encoder_arguments,
    add_oracle_arguments,
    build_encoder,
    build_oracle,
    check_input_size,
    check_weights,
    frozen_encoder,
    one_encoder_each,
)
from data_sets.loader import DATASETS, LOADERS, ON_BAD_IMAGE, check_dataset, micro_steps_of_a_group
from util import signals
from util.choices import instead_of, nearest
from util.distributed import PeerLost, said_first

PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "none": torch.float32,  # beyond_cls's other name for float32
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line.

    description: the program's docstring, whose examples, below a line that says so, come after the arguments.
    """

    def __init__(self, description: str | None, **options):
        description, heading, examples = (description or "").partition("examples:\n")
        # a flag that is cut short would mean something else as soon as another flag begins alike
        super().__init__(description=description, epilog=heading + examples, formatter_class=HelpFormatter,
                         allow_abbrev=False, **options)  # fmt: skip
        self.beside: list[str] = []  # flags that another program has taken from the same command

    def error(self, message: str) -> NoReturn:
        told = "" if "--help" in message else "; --help lists the arguments"
        self.exit(2, f"{self.prog}: {message}{told}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        for flag in (word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words)):
            # before argparse says that a required flag is missing, which may be the one that is misspelt
            if flag.startswith("--") and flag not in self._option_string_actions and " " not in flag:
                near = nearest(flag, [*self._option_string_actions, *self.beside])
                self.error(f"{flag}: unknown; {near}--help lists the arguments")
        return super().parse_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown {value!r}: {instead_of(str(value), action.choices)}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, where there is one to tell; the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", []) or action.default is False or "default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = super()._get_default_metavar_for_optional(action)
        return {int: "N", float: "X", Path: "PATH"}.get(action.type, name)

    def add_usage(self, usage: str | None, actions: Iterable, groups: Iterable, prefix: str | None = None) -> None:
        """Of many arguments, what has to be given: all are listed below."""
        many = len(list(actions)) > 12
        super().add_usage(usage, [one for one in actions if one.required or not many], [] if many else groups, prefix)


def add_data_arguments(parser: argparse.ArgumentParser, labels: bool = True, loaders: bool = True) -> None:
    """labels: whether the program uses them; otherwise it has no --nb_classes to offer. loaders: so with --loader."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", required=True, type=named_path, help="folder of the data set")
    group.add_argument("--dataset", default="image_folder", help=f"its kind: {', '.join(DATASETS)}")
    group.add_argument("--allow_subset", action="store_true", help="take fewer images than the data set officially has")
    group.add_argument("--on_bad_image", choices=ON_BAD_IMAGE, default="error",
                       help="of a damaged image: stop, or train on the next one and test without it")  # fmt: skip
    told = "checked against the data (default: the data's)" if labels else argparse.SUPPRESS
    group.add_argument("--nb_classes", default=None, type=int, help=told)
    if loaders:
        group.add_argument(
            "--loader",
            choices=LOADERS,
            default="pil",
            help="pil: the recipe's pixels; tensor: sooner, and other by a level of 255 here and there",
        )
    group.add_argument("--num_workers", default=min(10, len(os.sched_getaffinity(0))), type=int,
                       help="processes that load images")  # fmt: skip
    group.add_argument("--pin_mem", action=argparse.BooleanOptionalAction, default=True,
                       help="load into memory that a GPU copies from faster; without one, no effect")  # fmt: skip
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)  # MAE's spelling
    group.add_argument(
        "--dataloader_affinity_hack", "-dlah", action="store_true", help="let loader workers use all cores"
    )


def loading(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How the arguments want images loaded, for data_sets.loader.build_loader; device: where the encoder is."""
    return {
        "num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda",
        "affinity_hack": args.dataloader_affinity_hack, "device": device,
    }  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser, trains: bool = True) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="folder of the results; empty to keep nothing")
    group.add_argument("--log_dir", default=None, help="TensorBoard folder (default: --output_dir)")
    group.add_argument("--device", default="auto", help="cuda, cpu, or auto: CUDA where there is one")
    group.add_argument("--seed", default=0, type=int, help="of data order and augmentation, and of new weights")
    group.add_argument("--resume", default="", help='checkpoint to continue from, or "auto": the run\'s newest')
    within = "an epoch" if trains else "a pass over the images"
    group.add_argument("--save_every_minutes", default=30.0, type=float, metavar="MINUTES",
                       help=f"checkpoint within {within}, too; 0: not by the clock")  # fmt: skip
    if trains:
        group.add_argument("--save_every_steps", default=0, type=int, metavar="STEPS",
                           help="checkpoint after so many optimizer steps, too; 0: not by their number")  # fmt: skip
    group.add_argument("--dist_url", default="env://", help="rendezvous of the processes (torchrun sets it up)")
    group.add_argument("--args_from", default=None, type=Path, metavar="FILE", help="replay a run's args.json")
    # torchrun describes the processes in the environment; commands written for MAE may still name them
    for flag in ("--world_size", "--local_rank", "--local-rank"):
        group.add_argument(flag, type=int, default=None, help=argparse.SUPPRESS)


def add_old_arguments(parser: argparse.ArgumentParser):
    """The last group, to be added to: what commands published with MAE and beyond_cls may say."""
    group = parser.add_argument_group("accepted for old commands")
    group.add_argument("--dist_eval", action="store_true", help="MAE's: no effect, evaluation is always shared")
    return group


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, with the defaults of --args_from where it is given; flags on the command line win."""
    parser_of_file = argparse.ArgumentParser(add_help=False)
    parser_of_file.add_argument("--args_from", type=Path)
    path = parser_of_file.parse_known_args(argv)[0].args_from
    if path is not None:
        try:
            saved = dict(json.loads(path.read_text())["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--args_from {path}: not the args.json of a run ({error})")
        known = {action.dest: action for action in parser._actions}
        for name, value in saved.items():
            if name not in known:
                parser.error(f"--args_from {path}: {name!r} is no argument of this program")
            known[name].required = False
            parser.set_defaults(**{name: Path(value) if known[name].type is Path and value is not None else value})
    return parser.parse_args(argv)


def plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# what numbers have to be, and the flags that take them
NUMBERS = {
    "0 or more": (
        lambda x: 0 <= x < math.inf,
        ("lr", "blr", "min_lr", "weight_decay", "start_epoch", "num_workers", "mixup", "cutmix", "color_jitter"),
    ),
    "more than 0": (lambda x: 0 < x < math.inf, ("layer_decay", "clip_grad", "recount")),
    "from 0 to 1": (lambda x: 0 <= x <= 1, ("reprob", "mixup_prob", "mixup_switch_prob", "cutmix_minmax")),
    "from 0 up to, but not, 1": (lambda x: 0 <= x < 1, ("drop_path", "smoothing")),
    "more than 0 and at most 1": (lambda x: 0 < x <= 1, ("crop_scale",)),
}


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that have no meaning, NaN and infinity among them; ValueError."""
    for words, (allowed, names) in NUMBERS.items():
        for name in names:
            given = getattr(args, name, None)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not allowed(value):
                    raise ValueError(f"--{name} {value}: write a number, {words}")


def check_training(args: argparse.Namespace) -> None:
    """Refuse what no training can do, before anything is read; ValueError."""
    check_input_size(args.input_size, args.model)
    check_numbers(args)
    if args.epochs < 1:
        raise ValueError(f"--epochs {args.epochs}: it takes at least one")
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch}: the epochs are 0 to {args.epochs - 1}")
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise ValueError(
            f"--warmup_epochs {args.warmup_epochs} does not fit into --epochs {args.epochs}: write a number from 0 to "
            f"{args.epochs}"
        )
    micro_steps_of_a_group(getattr(args, "bn_group", None) or args.batch_size, args.batch_size, args.accum_iter)
    check_saving(args)


def check_saving(args: argparse.Namespace) -> None:
    for name in ("save_every_minutes", "save_every_steps"):
        if not getattr(args, name, 0) >= 0:  # NaN, too
            raise ValueError(f"--{name} {getattr(args, name)}: write how often, or 0 for never")


def named_path(text: str) -> Path:
    """A path from the command line; an empty one would be the folder where the program stands."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell not set?")
    return Path(text)


def check_files(args: argparse.Namespace, remote: bool = False) -> None:
    """Refuse data, architectures, weights and a checkpoint that are not there, at the cost of a look; ValueError.

    remote: files are out of sight.
    """
    check_dataset(args.dataset, None if remote else args.data_path)
    check_weights(args, remote)
    resume = getattr(args, "resume", "")
    if not (remote or resume in ("", "auto") or Path(resume).is_file()):
        raise ValueError(f"--resume {resume}: there is no file of that name")


# flags that may change when a run is resumed: where it runs and what it reports, not what it computes (the weights of
# --finetune are compared by their digest, so the file may move)
RESUMABLE_FLAGS = {
    "output_dir", "log_dir", "resume", "device", "num_workers", "pin_mem", "dataloader_affinity_hack", "dist_url",
    "world_size", "local_rank", "args_from", "data_path", "accum_iter", "eval", "eval_every", "report", "dist_eval",
    "suffix", "save_predictions", "knn", "per_class", "cache_dir", "offline", "on_bad_image", "multilabel_metric",
    "finetune", "save_every_minutes", "save_every_steps", "figure_every", "loc_workers", "images", "num_examples",
    "draw_threshold",
}  # fmt: skip


def identity(args: argparse.Namespace, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What must be equal when a run is resumed: the arguments outside RESUMABLE_FLAGS, and `facts`, plain data such as
    digests of weights and images."""
    return {name: value for name, value in plain(args).items() if name not in RESUMABLE_FLAGS} | (facts or {})


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a program; what its user can mend is one line on standard error, and the exit code says what happened.

    2: a mistake in the arguments, the files or the disk (ValueError). 1: a run that diverged, lost a worker or another
    process. signals.EXIT_STOPPED: stopped as requested. 130: Ctrl-C where nothing listens to it any more.
    """
    threading.excepthook = _quiet_about_disks
    try:
        with signals.listening():
            main(args)
    except ValueError as error:
        fail(error, 2)
    except (FloatingPointError, signals.DeadWorker, PeerLost) as error:
        fail(error, 1)
    except signals.Stopped as stop:
        fail(stop, signals.EXIT_STOPPED)
    except KeyboardInterrupt:
        fail(KeyboardInterrupt("interrupted"), signals.EXIT_INTERRUPTED)
    except RuntimeError as error:  # PyTorch tells of a killed worker wherever the program is just then
        if "DataLoader worker" not in str(error):
            raise
        fail(error, 1)


def fail(error: BaseException, code: int) -> NoReturn:
    """One line, from the first process that has this to say, and the end."""
    signals.kill_children()
    line = f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
    if said_first(line):
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from error


def _quiet_about_disks(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread, whose trouble with the disk the next write reports as the program's own."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)
