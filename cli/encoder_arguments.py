"""The flags that name an encoder: declared, checked and turned into calls of encoders.load. Imports no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from cli.console import FLAGS
from encoders.architectures import FROM_FILE, architecture, default_input_size
from encoders.catalogue import CATALOGUE, fetch_weights, known_family
from encoders.libraries import library_of
from util.progress import log
from util.seeding import seeded

if TYPE_CHECKING:
    import torch

    from encoders.load import Encoder, Oracle

ORACLE_ARGUMENTS = ("oracle", "oracle_model", "oracle_family", "oracle_checkpoint_key")
PRECISIONS = ("bfloat16", "float16", "float32", "none")  # of --amp; none: beyond_cls's other name for float32
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of Intel and AMD, of Arm
MAX_SIZE = 10_000  # pixels of an input
EACH = [name for name, options in FLAGS["encoder"].items() if options.get("each") and name != "finetune"]


def precision(name: str) -> torch.dtype:
    """The dtype that --amp names."""
    import torch

    return getattr(torch, name.replace("none", "float32"))


def choose_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Set --amp where it is not given. bfloat16 that a CPU emulates takes several times as long as float32."""
    if args.amp is None:
        slow = device.type == "cpu" and not cpu_flags() & BFLOAT16_FLAGS
        args.amp = "float32" if slow else "bfloat16"
        if slow:
            log.info("--amp float32: this CPU has no instructions for bfloat16")


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets that Linux lists for the first CPU; none where there is no such list."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def settle_model(args: argparse.Namespace) -> None:
    """Set --model to FROM_FILE for weights that their own library loads: it knows the architecture."""
    weights, models = args.finetune, args.model
    if not isinstance(weights, list):
        args.model = FROM_FILE if library_of(weights) else models
    elif len(models) in (1, len(weights)):
        pairs = zip(weights, models * (len(weights) // len(models)), strict=True)
        args.model = [FROM_FILE if library_of(name) else model for name, model in pairs]


def check_input_size(size: int | None, model: str) -> None:
    """ValueError where an input size, or the model's own, is not a multiple of the model's patch size."""
    if model == FROM_FILE:  # checked when the file is read
        if size is not None and not 1 <= size <= MAX_SIZE:
            raise ValueError(f"--input_size {size}: it must be from 1 to {MAX_SIZE}")
        return
    size = default_input_size(model) if size is None else size
    patch_size = architecture(model)["patch_size"]
    if not 1 <= size <= MAX_SIZE or size % patch_size:
        problem = f"--input_size {size} is not divisible by the patch size {patch_size} of {model}"
        raise ValueError(f"{problem}: name a multiple of it, at most {MAX_SIZE}")


def check_encoder(args: argparse.Namespace) -> None:
    """Refuse what the flags of one encoder alone show to be impossible; ValueError."""
    settle_model(args)
    check_input_size(args.input_size, args.model)
    for name, lowest in (("mean", -2), ("std", 0)):
        values = getattr(args, name) or []
        if not all(lowest < value <= 2 for value in values):  # NaN is neither
            shown = " ".join(map(str, values))
            raise ValueError(f"--{name} {shown}: must be above {lowest} and at most 2: pixels are from 0 to 1, not 255")


def check_weights(args: argparse.Namespace, remote: bool = False) -> None:
    """Refuse architectures and weights that are not there, without reading them; ValueError. remote: no files here."""
    encoders = [getattr(args, name, None) for name in ("finetune", "model", "family")]
    weights, models, families = (value if isinstance(value, list) else [value] for value in encoders)
    for model in models:
        if model != FROM_FILE:
            architecture(model)
    for index, name in enumerate(weights):
        if not name or (remote and name not in CATALOGUE):
            continue
        if len(models) in (1, len(weights)) and len(families) in (1, len(weights)):
            known_family(name, models[index % len(models)], families[index % len(families)])
        if library_of(name):
            continue
        downloaded = (name in CATALOGUE and CATALOGUE[name].url) or urlparse(name).scheme in ("http", "https")
        if args.offline or not downloaded:
            fetch_weights(name, offline=True)


def one_encoder_each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each encoder of a program that takes several."""
    settle_model(args)
    count, columns = len(args.finetune), {"finetune": args.finetune}
    for name in EACH:
        values = getattr(args, name)
        if len(values) not in (1, count):
            raise ValueError(f"--{name} has {len(values)} values for {count} encoders: write one for all or for each")
        columns[name] = values if len(values) == count else values * count
    rows = zip(*columns.values(), strict=True)
    return [argparse.Namespace(**{**vars(args), **dict(zip(columns, row, strict=True))}) for row in rows]


def build_encoder(args: argparse.Namespace, **options) -> tuple[Encoder, int]:
    """The encoder that the flags name, and its input size in pixels; options of models_vit.VisionTransformer."""
    from encoders.load import input_size, load_encoder

    if args.no_cls_token:
        options["class_token"] = False
    if args.num_heads:
        options["num_heads"] = args.num_heads
    options |= {name: getattr(args, name) for name in ("mean", "std", "grid", "timm_name", "decoder")}
    check_encoder(args)
    file = args.finetune, args.model, args.family, args.checkpoint_key, args.offline
    encoder = load_encoder(*file, size=args.input_size, **options)
    if not args.finetune:
        log.warning("no --finetune: the encoder's weights are random")
    return encoder, input_size(encoder, args.input_size)


def frozen_encoder(args: argparse.Namespace) -> tuple[Encoder, int]:
    """build_encoder where the encoder is only read: random weights, if any, are a function of --seed."""
    with seeded("weights", args.seed):
        return build_encoder(args)


def build_oracle(args: argparse.Namespace, probed: Encoder, size: int, amp: torch.dtype) -> Oracle:
    """The oracle that --oracle and its companions name. ValueError, with that flag in front, where it does not fit."""
    from encoders.load import Oracle, load_encoder

    if not args.oracle:
        log.warning("no --oracle: its weights are random")
    file = args.oracle, args.oracle_model, args.oracle_family, args.oracle_checkpoint_key, args.offline
    try:
        with seeded("weights", args.seed):  # if there are none in a file
            encoder = load_encoder(*file, size=size)
        return Oracle(encoder, probed, size, amp)
    except ValueError as error:
        message = re.sub("--(model|family|checkpoint_key)", r"--oracle_\1", str(error))
        raise ValueError(f"--oracle: {message}") from error
