"""What main_linprobe.py takes: flags and help in linprobe.toml; how they fit together, and their meaning, here."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cli.arguments import RESUMABLE_FLAGS, check_training, program_flags, program_parser
from cli.console import Parser, parse, refuse
from cli.encoder_arguments import precision
from data_sets.table import DATASETS
from encoders.architectures import check_blocks, known_depth
from probing.heads import AGGREGATIONS, canonical_head, check_aggregation, option_flags, parts_of

if TYPE_CHECKING:
    import torch

    from probing.finished_run import ProbeRun

OPTIMIZERS = {  # settings of util.lars.LARS; momentum as in the paper, and as in its code for SGD
    "lars": {"momentum": 0.9},
    "sgd": {"momentum": 0.0, "trust_coefficient": None},
    "logreg": {},  # probing.logreg, which does not use it
}
PRESETS = {"small": "--optimizer logreg --val_fraction 0.2 --batch_size 64 --save_predictions"}
FEW_STEPS = 300  # optimizer steps of a run; the paper's recipe takes 7,020 on ImageNet, 1,080 on its 1 %
REPEATED = ("encoder", "data", "probes", "oracle of the head dino")  # groups of flags in a proposed command

# arguments without effect on cached features, or whose effect is compared itself: --finetune by the digest of the
# weights, --data_path by the fingerprint of the images, --seed and --val_fraction by the images and views they choose
NOT_IN_FEATURES = (RESUMABLE_FLAGS - {"on_bad_image"}) | set(program_flags("linprobe")["not in features"])


def get_args_parser() -> Parser:
    tables = {"heads": AGGREGATIONS, "optimizers": OPTIMIZERS, "presets": PRESETS, **PRESETS}
    parser = program_parser("linprobe", **tables)
    parser.presets = PRESETS
    for flag, option in option_flags().items():
        kind = {"type": int} if isinstance(option.allowed, int) else {"choices": option.allowed}
        text = f"{option.help}; for heads that do not specify it"
        parser.groups["probes"].add_argument(f"--{flag}", default=option.default, **kind, help=text)
    return parser


def small_command(args: argparse.Namespace) -> str:
    """The command with --preset small for the encoder, images and heads of `args`."""
    command = ["python", "main_linprobe.py", "--preset", "small"]
    for title, group in get_args_parser().groups.items():
        for action in group._group_actions if title in REPEATED else ():
            value = getattr(args, action.dest)
            if value != action.default and value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                command += [action.option_strings[0], *map(str, values)]
    folder = Path(args.output_dir or "output_dir")
    return shlex.join([*command, "--output_dir", str(folder.with_name(f"{folder.name}_small"))])


def check(args: argparse.Namespace) -> None:
    """Resolve arguments that depend on each other; ValueError for contradictions."""
    logreg = "logreg" in args.optimizer
    if logreg:
        _settle_logreg(args)
    check_training(args)
    refuse(
        args.global_pool,
        "--global_pool is MAE's probe of the mean patch through a new, untrained fc_norm, which is not offered: "
        "use --cls_features pos (tokens before the last norm) or --cls_features pos --final_norm",
    )
    if args.cls_token:
        other = args.cls_features not in (None, ["cls"])
        refuse(other, "--cls_token is MAE's probe of [cls]: omit --cls_features or --cls_token")
        args.final_norm, args.init = True, "trunc_normal"
    args.cls_features = args.cls_features or ["cls"]
    depth = None if args.decoder else known_depth(args.model)
    for head in heads(args, depth):
        for part in parts_of(head, {}):
            check_aggregation(part.aggregation, not args.no_cls_token)
    check_blocks(args.return_block or [], depth)
    several = args.lr is not None and len(args.blr) > 1
    refuse(several, f"--lr {args.lr} sets one rate, --blr {args.blr} several: omit one")
    refuse(args.eval and not args.resume, "--eval evaluates a checkpoint: name it with --resume")
    single = (args.bn_group or args.batch_size) < 2
    refuse(single, "batch normalisation needs at least two images: raise --batch_size or --bn_group")
    refuse(
        args.val_fraction and args.report == "best",
        "--report best is the epoch that is best on the test set, which --val_fraction uses once: omit one of them",
    )
    if not logreg:
        rule = f"--cache_views must be <= --epochs {args.epochs}, as an epoch uses one view"
        refuse(args.cache_views > args.epochs, f"{rule}; got {args.cache_views}")
        refuse(args.shots, f"--shots {' '.join(map(str, args.shots))} needs --optimizer logreg")
    same = args.crop == "center" and args.cache_views > 1
    refuse(same, f"--cache_views must be 1 without augmentation (--crop center), got {args.cache_views}")
    unused = args.cache_dir is not None and not args.cache_views
    refuse(unused, "--cache_dir stores the features of --cache_views: set it to the number of views")
    refuse(args.save_predictions and not args.output_dir, "--save_predictions needs an --output_dir to write to")
    if args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        for flag in ("per_class", "knn", "shots"):
            problem = f"--{flag} needs one label per image; --dataset {args.dataset} has several: omit it"
            refuse(getattr(args, flag), problem)


def _settle_logreg(args: argparse.Namespace) -> None:
    """Replace what logreg has no use for: epochs, rates, and, without --cache_views, augmentation."""
    several = len(set(args.optimizer)) > 1
    refuse(several, f"--optimizer {' '.join(args.optimizer)}: logreg has no epochs; give it a run of its own")
    if not args.cache_views:
        args.crop, args.cache_views = "center", 1
    if len(set(args.l2)) > 1:
        args.val_fraction = args.val_fraction or 0.2
    elif args.preset:  # there is nothing to choose on the images that it holds out
        args.val_fraction = 0.0
    args.epochs, args.warmup_epochs, args.start_epoch = 1, 0, 0
    args.blr, args.lr, args.seeds_vary = [0.0], None, "weights"


def heads(args: argparse.Namespace, depth: int | None) -> list[str]:
    """The heads of --cls_features, as canonical_head names them; depth: of the encoder, None: not known yet."""
    flags = {flag: vars(args)[flag] for flag in option_flags()}
    return [canonical_head(head, flags, depth) for head in args.cls_features]


def head_precision(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype of heads that transform every token. ValueError for a --head_amp without use."""
    import torch

    if not args.head_amp:
        return torch.float32
    if args.amp == "float16":
        raise ValueError("--head_amp: gradients of heads underflow in float16; use --amp bfloat16")
    if device.type == "cpu" and precision(args.amp) == torch.float32:
        raise ValueError(f"--head_amp has no effect with --amp {args.amp} on a CPU: use --amp bfloat16, or omit it")
    torch.backends.cuda.matmul.allow_tf32 = True
    return precision(args.amp)


def headline(args: argparse.Namespace) -> str:
    """The score that ranks probes."""
    if DATASETS[args.dataset].multi_label:
        return args.multilabel_metric
    return "per_class" if args.per_class else "top1"


def seeds_vary(args: argparse.Namespace) -> list[str]:
    """What differs between probes of different seeds."""
    if args.seeds_vary == "weights":
        return ["weights"]
    return ["weights", "order"] if args.crop == "center" else ["weights", "order", "views"]


def finished_run(folder: Path) -> ProbeRun:
    """The run of main_linprobe.py in a folder; flags that it did not have yet take their defaults. ValueError."""
    from probing.finished_run import read_run
    from util.files import reading

    run, parser = read_run(folder), get_args_parser()
    defaults = vars(parse(parser, ["--data_path", "."]))
    with reading(Path(folder) / "args.json", "the args.json of a run of main_linprobe.py"):
        parser.take_defaults({name: value for name, value in vars(run.args).items() if name in defaults})
    return run._replace(args=argparse.Namespace(**{**defaults, **vars(run.args)}))
