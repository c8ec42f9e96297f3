"""The scripts that turn runs into a table and a picture."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_linprobe
import submitit_linprobe
from util.arguments import parse
from util.demo_data import generate

ROOT = Path(__file__).resolve().parent.parent


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, f"scripts/{name}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate(folder / "data", 20, 10, workers=1)
    torch.manual_seed(0)
    argv = ["--model", "vit_demo_patch8", "--data_path", folder / "data", "--amp", "float32", "--num_workers", "0",
            "--cls_features", "cls", "abmilp", "--seeds", "0", "1", "--batch_size", "10", "--epochs", "1",
            "--warmup_epochs", "0", "--device", "cpu", "--output_dir", folder / "run"]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    return folder / "run"


def test_table_averages_seeds_of_each_head(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    for probe in results["probes"].values():
        probe["last"]["top1"] = {"cls": 10.0, "abmilp": 50.0}[probe["aggregation"]] + 2 * probe["seed"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = script("probe_table.py", f"mine={tmp_path}", "--output", tmp_path / "table.md")
    assert "| mine | 11.0 ± 1.4 | 51.0 ± 1.4 |" in done.stdout
    assert "20 training and 10 test images, 1 epochs" in (tmp_path / "table.md").read_text()


def test_table_has_a_row_for_each_setting_or_for_those_that_were_chosen(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    first, probes = next(iter(results["probes"].values())), {}
    for block, blr, top1 in ((0, 0.1, 1.0), (0, 2.0, 2.0), (5, 0.1, 3.0), (5, 2.0, 4.0)):
        for seed in (0, 1):
            setting = {"block": block, "blr": blr, "seed": seed, "last": {"top1": top1}}
            probes[f"cls/block{block}/blr{blr}/seed{seed}"] = {**first, **setting}
    (tmp_path / "results.json").write_text(json.dumps({**results, "probes": probes}))
    done = script("probe_table.py", f"mine={tmp_path}")
    assert "| mine, block 0, blr 2 | 2.0 ± 0.0 |" in done.stdout and done.stdout.count("| mine") == 4
    for probe in probes.values():
        probe |= {"chosen": probe["last"]["top1"] in (1.0, 4.0), "val": {}}
    (tmp_path / "results.json").write_text(json.dumps({**results, "probes": probes, "n_val": 5}))
    done = script("probe_table.py", f"mine={tmp_path}")
    assert "| mine, block 0 | 1.0 ± 0.0 |\n| mine, block 5 | 4.0 ± 0.0 |" in done.stdout
    assert "rates chosen on 5 held-out images" in done.stdout
    assert "has none" in script("probe_table.py", f"mine={tmp_path}", "--report", "best").stderr


def test_maps_are_drawn(run, tmp_path):
    done = script("show_maps.py", f"mine={run}", "--images", "2", "--output", tmp_path / "maps.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "maps.png").size[0] > 300


@pytest.mark.parametrize("name", ["probe_table.py", "show_maps.py"])
def test_unfinished_run_is_one_line(name, tmp_path):
    done = script(name, f"mine={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


def test_quickstart_explains_its_options():
    done = subprocess.run(["bash", "scripts/quickstart.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


PAPER = ("table6", "table8", "figure7", "figure8", "figure9")


@pytest.mark.parametrize("name", PAPER)
def test_scripts_of_the_paper_say_what_they_need(name):
    def run(*words):
        environment = {key: value for key, value in os.environ.items() if key != "IMAGENET"}
        return subprocess.run(
            ["bash", f"scripts/{name}.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    for words in (["--fast"], ["--smoke", "more"]):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.startswith(f"usage: bash scripts/{name}.sh [--smoke")
    done = run()
    assert done.returncode != 0 and "name the folder of ImageNet-1k in IMAGENET" in done.stderr
    done = run("--slurm", "--ngpus", "8")
    assert done.returncode == 2 and "4 GPUs" in done.stderr
    head = (ROOT / "scripts" / f"{name}.sh").read_text()
    assert re.search(r"^# Models?\b", head, re.M) and "# Expected" in head


def test_programs_of_the_paper_are_called_as_they_can_be(tmp_path):
    """The chain on ImageNet, with a python that writes down what it is asked for."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 2; else echo "$@" >> "$LOG"; fi\n')
    fake.chmod(0o755)
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/sh\nshift 3\necho "$@" >> "$LOG"\n')
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    for path in ("paper.sh", "table6.sh", "table8.sh"):  # beside another env.sh, which installs nothing
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / path).write_text((ROOT / "scripts" / path).read_text())
    (tmp_path / "scripts" / "env.sh").write_text(f'cd "{tmp_path}"; PATH="{tmp_path}/bin:$PATH"\n')
    environment = {**os.environ, "IMAGENET": str(tmp_path), "LOG": str(tmp_path / "log")}
    for words in (["table6.sh"], ["table8.sh"], ["table6.sh", "--slurm", "--partition", "gpu"]):
        command = ["bash", str(tmp_path / "scripts" / words[0]), *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    calls = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    programs = [call[0] for call in calls]
    assert programs == [
        "main_linprobe.py", "main_analyze_aggregation.py", "scripts/make_tables.py",
        "main_linprobe.py", "main_analyze_aggregation.py", "main_linprobe.py", "main_analyze_aggregation.py",
        "scripts/make_tables.py", "submitit_linprobe.py", "submitit_linprobe.py", "scripts/make_tables.py",
    ]  # fmt: skip
    for program, *argv in calls:
        if program == "submitit_linprobe.py":
            launcher, argv = submitit_linprobe.get_args_parser().parse_known_args(argv)
            assert launcher.partition == "gpu" and launcher.ngpus == 4 and launcher.wait
            program = f"{launcher.main}.py"
        if program.startswith("main_"):
            args = parse(importlib.import_module(program.removesuffix(".py")).get_args_parser(), argv)
            if program == "main_linprobe.py":
                gpus = 4 if "--output_dir" not in argv else 2
                assert args.batch_size * args.accum_iter * gpus == 16_384 and args.blr == [0.1] and args.epochs == 90
