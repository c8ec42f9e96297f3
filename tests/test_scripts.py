"""The scripts that turn runs into a table and a picture."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_linprobe
from cli.console import parse
from cli.encoder_arguments import frozen_encoder
from data_sets.demo import generate
from probing.finished_run import read_run

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.usefixtures("rendered")
def test_maps_are_drawn(run, tmp_path, run_script):
    code, _, error = run_script("show_maps.py", f"mine={run}", "--images", "2", "--output", tmp_path / "maps.png")
    assert code == 0, error
    assert Image.open(tmp_path / "maps.png").size[0] > 300


def test_maps_are_of_the_tokens_that_the_probes_were_trained_on(run, tmp_path):
    argv = ["--args_from", run / "args.json", "--final_norm", "--output_dir", tmp_path / "run"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    found = read_run(tmp_path / "run")
    encoder, size = frozen_encoder(found.args)
    images = torch.randn(3, 3, size, size)
    bank = found.bank(encoder, encoder.backbone.grid_size)
    (features,) = encoder.backbone(images).values()
    scores = [p.aggregation.pool.score(encoder.backbone.norm(features.patches)) for p in bank.probes[2:]]
    expected = 64 * torch.stack([score[..., 0].softmax(1) for score in scores]).mean(0).unflatten(1, (8, 8))
    maps = runpy.run_path(str(ROOT / "scripts" / "show_maps.py"))["cls_and_abmilp"](found, encoder, images)
    np.testing.assert_allclose(maps["AbMILP"], expected.detach(), rtol=1e-5)


def test_maps_of_runs_on_different_images_are_refused(run, tmp_path, run_script):
    generate(tmp_path / "data", 20, 11, workers=1)
    argv = ["--args_from", run / "args.json", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    words = f"one={run}", f"two={tmp_path / 'run'}", "--output", tmp_path / "maps.png"
    code, _, error = run_script("show_maps.py", *words)
    assert code == 2 and not (tmp_path / "maps.png").exists()
    assert f"{tmp_path / 'run'} was tested on other images than the runs before it" in error


def test_maps_of_several_rates_are_not_averaged_and_labels_must_differ(run, tmp_path, run_script):
    argv = ["--args_from", run / "args.json", "--blr", "0.1", "1", "--output_dir", tmp_path / "run"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    found = read_run(tmp_path / "run")
    encoder, size = frozen_encoder(found.args)
    maps = runpy.run_path(str(ROOT / "scripts" / "show_maps.py"))["cls_and_abmilp"]
    assert list(maps(found, encoder, torch.randn(1, 3, size, size))) == ["[cls]", "AbMILP, blr0.1", "AbMILP, blr1.0"]
    code, _, error = run_script("show_maps.py", run, f"{run.name}={run}", "--output", tmp_path / "maps.png")
    assert code == 2 and f"two runs are called {run.name}: write LABEL=RUN" in error


def test_unfinished_run_is_one_line(tmp_path, run_script):
    code, _, error = run_script("show_maps.py", f"mine={tmp_path}")
    assert code == 2 and error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("ulimit -f 1; exec {python} scripts/export_probe.py {run} --head cls --output {out}", "probe.safetensors: "),
        (
            "ulimit -f 2; exec {python} scripts/make_demo_data.py {out}/data --train 10 --val 10",
            "/data: File too large",
        ),
        ("exec {python} scripts/list.py heads > /dev/full", "the output, or a connection: No space left on device"),
    ],
)
def test_a_disk_that_fills_is_one_line_and_leaves_nothing_half_written(command, named, run, tmp_path):
    command = command.format(python=sys.executable, run=run, out=tmp_path)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--fast", 2)])
def test_quickstart_explains_its_options_before_it_installs_anything(tmp_path, option, code):
    """In a copy without an environment, which it would have to make."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = subprocess.run(["bash", "scripts/quickstart.sh", option], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and "--short" in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()
