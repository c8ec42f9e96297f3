"""Train and test linear probes on the frozen tokens of one encoder, all in one pass.

The probes are the product of --cls_features, --return_block, --optimizer, --blr and --seeds. Defaults are the paper's
recipe (B.2).

examples:
    # the paper's probes: effective batch 16,384
    torchrun --nproc_per_node 4 main_linprobe.py --model vit_base_patch16 --finetune mae_vit_base_patch16 \\
        --cls_features cls pos abmilp --batch_size 2048 --accum_iter 2 --data_path $IMAGENET --output_dir runs/mae_b

    # a rate chosen on held-out images, three seeds, on a data set that is downloaded
    python main_linprobe.py --finetune mae_vit_base_patch16 --dataset imagenette --data_path data --epochs 20 \\
        --blr 0.1 1 10 --seeds 0 1 2 --val_fraction 0.1 --save_predictions --output_dir runs/imagenette

    # a few hundred photos: logistic regression, and AbMILP, on features that are computed once
    python main_linprobe.py --preset small --finetune dino_vit_base_patch16 --data_path photos --val_split 0.2 \\
        --cls_features cls abmilp:depth=2,act=tanh --return_block 5 11 --output_dir runs/photos

    # continue a stopped run
    python main_linprobe.py --args_from runs/mae_b/args.json --resume auto
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.arguments import (
    RESUMABLE_FLAGS,
    add_data_arguments,
    add_old_arguments,
    add_run_arguments,
    add_schedule_arguments,
    check_training,
    plain,
)
from cli.console import Parser, add_flags, parse
from cli.encoder_arguments import add_encoder_arguments, add_oracle_arguments, precision
from cli.presets import add_preset
from data_sets.table import DATASETS
from encoders.architectures import check_blocks, known_depth
from probing.heads import AGGREGATIONS, canonical_head, check_aggregation, option_flags, parts_of

if TYPE_CHECKING:
    import torch

    from probing.finished_run import ProbeRun

FLAGS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
OPTIMIZERS = {  # settings of util.lars.LARS; momentum as in the paper, and as in its code for SGD
    "lars": {"momentum": 0.9},
    "sgd": {"momentum": 0.0, "trust_coefficient": None},
    "logreg": {},  # probing.logreg, which does not use it
}

# arguments without effect on cached features, or whose effect is compared itself: --finetune by the digest of the
# weights, --data_path by the fingerprint of the images, --seed and --val_fraction by the images and views they choose
NOT_IN_FEATURES = (RESUMABLE_FLAGS - {"on_bad_image"}) | set(FLAGS["not in features"])


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    add_preset(parser)
    add_encoder_arguments(parser)
    add_data_arguments(parser, splits=True)

    probes = parser.add_argument_group("probes")
    heads = FLAGS["probes"]["cls_features"]
    heads = {**heads, "help": f"heads: {', '.join(AGGREGATIONS)}, {heads['help']}"}
    add_flags(probes, {**FLAGS["probes"], "cls_features": heads})
    for flag, option in option_flags().items():
        kind = {"type": int} if isinstance(option.allowed, int) else {"choices": option.allowed}
        text = f"{option.help}; for heads that do not specify it"
        probes.add_argument(f"--{flag}", default=option.default, **kind, help=text)
    add_oracle_arguments(parser.add_argument_group("oracle of the head dino"), default="dino_vit_base_patch16")
    optimizer = {**FLAGS["recipe"]["optimizer"], "choices": list(OPTIMIZERS)}
    add_flags(parser.add_argument_group("recipe"), {**FLAGS["recipe"], "optimizer": optimizer})
    add_schedule_arguments(parser.add_argument_group("schedule"), 512, 90, 10, [0.1])
    add_flags(parser.add_argument_group("evaluation"), FLAGS["evaluation"])
    add_run_arguments(parser)
    add_flags(add_old_arguments(parser), FLAGS["old"])
    return parser


def check(args: argparse.Namespace) -> None:
    """Resolve arguments that depend on each other; ValueError for contradictions."""
    if "logreg" in args.optimizer:
        _check_logreg(args)
    check_training(args)
    if args.global_pool:
        raise ValueError(
            "--global_pool is MAE's probe of the mean patch through a new, untrained fc_norm, which is not offered: "
            "use --cls_features pos (tokens before the last norm) or --cls_features pos --final_norm"
        )
    if args.cls_token:
        if args.cls_features not in (None, ["cls"]):
            raise ValueError("--cls_token is MAE's probe of [cls]: omit --cls_features or --cls_token")
        args.final_norm, args.init = True, "trunc_normal"
    args.cls_features = args.cls_features or ["cls"]
    depth = None if args.decoder else known_depth(args.model)
    for head in heads(args, depth):
        for part in parts_of(head, {}):
            check_aggregation(part.aggregation, not args.no_cls_token)
    check_blocks(args.return_block or [], depth)
    logreg = "logreg" in args.optimizer
    refused = {
        f"--lr {args.lr} sets one rate, --blr {args.blr} several: omit one": args.lr is not None and len(args.blr) > 1,
        "--eval evaluates a checkpoint: name it with --resume": args.eval and not args.resume,
        "batch normalisation needs at least two images: raise --batch_size or --bn_group": (
            args.bn_group or args.batch_size
        )
        < 2,
        "--report best is the epoch that is best on the test set, which --val_fraction uses once: omit one of them": (
            args.val_fraction and args.report == "best"
        ),
        f"--cache_views must be <= --epochs {args.epochs}, as an epoch uses one view; got {args.cache_views}": (
            args.cache_views > args.epochs and not logreg
        ),
        f"--cache_views must be 1 without augmentation (--crop center), got {args.cache_views}": (
            args.crop == "center" and args.cache_views > 1
        ),
        "--cache_dir stores the features of --cache_views: set it to the number of views": (
            args.cache_dir is not None and not args.cache_views
        ),
        f"--shots {' '.join(map(str, args.shots))} needs --optimizer logreg": args.shots and not logreg,
        "--save_predictions needs an --output_dir to write to": args.save_predictions and not args.output_dir,
    }
    if wrong := [message for message, applies in refused.items() if applies]:
        raise ValueError(wrong[0])
    if args.dataset in DATASETS and DATASETS[args.dataset].multi_label:
        for flag in ("per_class", "knn", "shots"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} needs one label per image; --dataset {args.dataset} has several: omit it")


def _check_logreg(args: argparse.Namespace) -> None:
    """Replace what logreg has no use for: epochs, rates, and, without --cache_views, augmentation."""
    if len(set(args.optimizer)) > 1:
        raise ValueError(f"--optimizer {' '.join(args.optimizer)}: logreg has no epochs; give it a run of its own")
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


def data_seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """Seeds of data order and augmentation; none if all probes use those of --seed."""
    return () if args.seeds_vary == "weights" else tuple(args.seeds or [args.seed])


def seeds_vary(args: argparse.Namespace) -> list[str]:
    """What differs between probes of different seeds."""
    if args.seeds_vary == "weights":
        return ["weights"]
    return ["weights", "order"] if args.crop == "center" else ["weights", "order", "views"]


def feature_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that cached features depend on: all that are not known to be irrelevant."""
    return {name: value for name, value in plain(args).items() if name not in NOT_IN_FEATURES}


def finished_run(folder: Path) -> ProbeRun:
    """The run of main_linprobe.py in a folder; flags that it did not have yet take their defaults. ValueError."""
    from probing.finished_run import read_run

    run = read_run(folder)
    defaults = vars(parse(get_args_parser(), ["--data_path", "."]))
    return run._replace(args=argparse.Namespace(**{**defaults, **vars(run.args)}))
