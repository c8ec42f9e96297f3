"""Two processes of one run that were given different things: one error that names them, and no result."""

import json
import shutil

import pytest
import torch
from interruptions import changed
from PIL import Image

import main_pretrain
from cli.console import parse
from encoders.load import save_encoder
from models_vit import build_vit

ALL = ["main_linprobe", "main_finetune", "main_pretrain", "main_analyze_attention", "main_analyze_aggregation"]
PATCH = "import cli.session as p; "
# {case: (programs, arguments of both ranks, more arguments of rank 1, code that rank 1 runs first, named in the error)}
CASES = {
    "class renamed": (ALL, "", "--data_path renamed", "", ["images ("]),
    "fewer images": (["main_linprobe"], "", "--data_path fewer", "", ["training images (", "test images ("]),
    "other pixels": (["main_linprobe"], "", "--data_path pixels", "", ["training images (", "test images ("]),
    "other weights": ([p for p in ALL if p != "main_pretrain"], "", "--finetune 1.safetensors", "", ["weights ("]),
    "other weights, cached": (["main_linprobe"], "--cache_views 1", "--finetune 1.safetensors", "", ["weights ("]),
    "another rate": (["main_linprobe"], "", "--lr 2", "", ["--lr (None on rank 0, 2.0 on rank 1)"]),
    "another seed": (["main_analyze_attention"], "", "--seed 3", "", ["--seed (0 on rank 0, 3 on rank 1)"]),
    "other code": (["main_linprobe"], "", "", PATCH + "p.code_digest = lambda: '0'", ["code ("]),
    "another PyTorch": (["main_linprobe"], "", "", PATCH + "p.versions = lambda: {'torch': '1.0'}",
                        ["torch (", "1.0 on rank 1"]),
    "another checkpoint": (["main_pretrain"], "--output_dir run --resume auto", "", "os.chdir('node1')",
                           ["checkpoint run/checkpoint-0.pth ("]),
    "no checkpoint": (["main_pretrain"], "--output_dir run --resume auto", "", "os.chdir('node2')",
                      ["checkpoint run/checkpoint-0.pth (", "on rank 1"]),
}  # fmt: skip
PROGRAM = """
import importlib, json, os, sys
from pathlib import Path

from cli.console import parse, run_main

folder, rank = os.getcwd(), int(os.environ["RANK"])
for number, (program, *argv, change) in enumerate(json.loads(Path("runs.json").read_text())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a new process group
    module, code = importlib.import_module(program), 0
    if rank == 1:
        exec(change)
    try:
        run_main(module.main, parse(module.get_args_parser(), argv[rank]))
    except SystemExit as end:
        code = end.code
    Path(folder, f"{number}-{rank}").write_text(str(code))
    os.chdir(folder)
    importlib.reload(sys.modules["cli.session"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_folder):
    """Data and weights of which rank 1 gets others."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("data", "renamed", "fewer", "pixels"):
        shutil.copytree(image_folder, folder / name)
    for split in ("train", "val"):
        renamed = sorted((folder / "renamed" / split).iterdir())[0]
        renamed.rename(renamed.with_name("aaa"))
        for label in (folder / "fewer" / split).iterdir():
            sorted(label.iterdir())[0].unlink()
    for path in (folder / "pixels").rglob("*.*"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = build_vit("vit_demo_patch8", img_size=32).state_dict()
        save_encoder(folder / f"{seed}.safetensors", weights, {"family": "mae"})
    return folder


def arguments(program, *more):
    argv = "--data_path data --model vit_demo_patch8 --input_size 32 --amp float32 --num_workers 0 --batch_size 2"
    argv += "" if program == "main_pretrain" else " --finetune 0.safetensors"
    argv += "" if "analyze" in program else " --epochs 1 --warmup_epochs 0"
    return " ".join([argv, "--output_dir out --device cpu", *more]).split()


def test_ranks_that_were_given_different_things_end_with_one_line_that_names_them(folder, run_program, monkeypatch):
    monkeypatch.chdir(folder)
    main_pretrain.main(
        parse(main_pretrain.get_args_parser(), arguments("main_pretrain", "--output_dir run --accum_iter 2"))
    )
    for node in ("node1", "node2"):
        shutil.copytree("data", f"{node}/data")
        shutil.copytree("run", f"{node}/run")
    changed(lambda state: state["model"]["mask_token"].add_(1))(folder / "node1/run/checkpoint-0.pth")
    (folder / "node2/run/checkpoint-0.pth").unlink()

    runs, expected = [], []
    for name, (programs, both, other, change, words) in CASES.items():
        for program in programs:
            runs.append([program, arguments(program, both), arguments(program, both, other), change])
            expected.append((name, program, words))
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "program.py").write_text(PROGRAM)
    done = run_program(folder / "program.py", processes=2, cwd=folder)
    for number, (name, program, words) in enumerate(expected):
        where = f"{name}, {program}:\n{done.stderr}"
        assert [(folder / f"{number}-{rank}").read_text() for rank in (0, 1)] == ["2", "2"], where
        errors = [line for line in done.stderr.splitlines() if "differ in" in line]
        assert len(errors) == len(expected), where
        assert all(word in errors[number] for word in words) and "on rank 1" in errors[number], where
    assert not (folder / "out").exists()
