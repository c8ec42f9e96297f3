"""The scripts that make the paper's own encoders start its recipes, on any number of GPUs and on SLURM."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

import cli.launcher
from cli.console import parse

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, FINETUNE = "scripts/pretrain_mae_small.sh", "scripts/finetune_mae_cls.sh"


def call(script, *words, **settings):
    environment = {**os.environ, "PRINT": "1", "DATA": "images", "OUT": "run", **settings}
    return subprocess.run(["bash", script, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def asked(script, *words, **settings):
    """(processes, parsed arguments of the program, its name) of the command that a script would run."""
    done = call(script, *words, **settings)
    assert done.returncode == 0, done.stderr
    argv = shlex.split(done.stdout)
    if "submitit_linprobe.py" in argv:
        launcher, rest = cli.launcher.get_args_parser().parse_known_args(argv[2:])
        processes, program = launcher.nodes * launcher.ngpus, launcher.main
        assert str(launcher.job_dir) == "run"
    else:
        place = next(index for index, word in enumerate(argv) if word.endswith(".py"))
        program, rest = argv[place].removesuffix(".py"), argv[place + 1 :]
        processes = int(argv[argv.index("--nproc_per_node") + 1]) if "--nproc_per_node" in argv else 1
        assert rest[rest.index("--output_dir") + 1] == "run" and rest[rest.index("--resume") + 1] == "auto"
    module = importlib.import_module(program)
    args = parse(module.get_args_parser(), rest)
    module.check(args)
    return processes, args, program


def test_small_is_pretrained_at_maes_recipe():
    processes, args, program = asked(PRETRAIN, GPUS="8")
    assert program == "main_pretrain" and processes * args.batch_size * args.accum_iter == 4096
    recipe = {
        "model": "vit_small_patch16", "mask_ratio": 0.75, "norm_pix_loss": True, "epochs": 800, "warmup_epochs": 40,
        "blr": 1.5e-4, "lr": None, "min_lr": 0.0, "weight_decay": 0.05, "crop_scale": 0.2, "amp": "bfloat16",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in recipe} == recipe


@pytest.mark.parametrize(
    ("size", "recipe"),
    [
        ("small", (100, 5e-4, 0.65, 0.1, "runs/mae_small/encoder.safetensors")),
        ("base", (100, 5e-4, 0.65, 0.1, "mae_vit_base_patch16")),
        ("large", (50, 1e-3, 0.75, 0.2, "mae_vit_large_patch16")),
    ],
)
def test_sizes_are_fine_tuned_on_cls_at_their_recipes(size, recipe):
    processes, args, program = asked(FINETUNE, size, GPUS="4")
    assert program == "main_finetune" and processes * args.batch_size * args.accum_iter == 1024
    assert (args.epochs, args.blr, args.layer_decay, args.drop_path, args.finetune) == recipe
    common = {
        "model": f"vit_{size}_patch16", "weight_decay": 0.05, "warmup_epochs": 5, "smoothing": 0.1, "mixup": 0.8,
        "cutmix": 1.0, "reprob": 0.25, "aa": "rand-m9-mstd0.5-inc1", "global_pool": False, "lr": None, "min_lr": 1e-6,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in common} == common


@pytest.mark.parametrize(
    "settings",
    [{"GPUS": "0"}, {"GPUS": "1"}, {"GPUS": "32"}, {"GPUS": "2", "BATCH": "8"}, {"SLURM": "", "NODES": "4"},
     {"SLURM": "--partition gpu", "GPUS": "4"}],
)  # fmt: skip
def test_effective_batches_do_not_depend_on_the_machine(settings):
    processes, args, _ = asked(FINETUNE, "base", **settings)
    assert processes * args.batch_size * args.accum_iter == 1024


def test_flags_of_the_user_win():
    _, args, _ = asked(PRETRAIN, "--epochs", "1600", "--compile", GPUS="8")
    assert args.epochs == 1600 and args.compile
    assert asked(FINETUNE, "base", GPUS="8", WEIGHTS="mine.pth")[1].finetune == "mine.pth"


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([FINETUNE], {}, "usage: DATA="),
        ([FINETUNE, "base"], {"DATA": ""}, "set DATA=folder"),
        ([FINETUNE, "base"], {"GPUS": "3"}, "3 processes x BATCH="),
        ([PRETRAIN], {"GPUS": "2", "BATCH": "3000"}, "2 processes x BATCH=3000 do not divide"),
        (
            [PRETRAIN],
            {"NODES": "x[$(touch executed)]", "GPUS": "2"},
            "NODES must be an integer, got x[$(touch executed)]",
        ),
        ([PRETRAIN], {"GPUS": "a[$(touch executed)]"}, "GPUS must be an integer"),
        ([PRETRAIN], {"BATCH": "-8", "GPUS": "2"}, "BATCH must be an integer"),
        ([PRETRAIN], {"BATCH": "0", "GPUS": "2"}, "must be >= 1"),
        ([PRETRAIN], {"GPUS": "2", "NODES": "2"}, "NODES=2 needs SLURM"),
    ],
)
def test_mistakes_are_one_line(words, settings, message):
    done = call(*words, **settings)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "executed").exists()
