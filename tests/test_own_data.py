"""The commands of docs/own_data.md, run on 30 images of three classes."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_readme import commands

import main_linprobe
from cli.console import parse
from models_vit import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own_data.md").read_text()
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "photos" / ("cat", "dog", "hedgehog")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 150, (48, 40, 3))
        pixels[..., number % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def follow(command, tiny):
    """Run a command of the page with a tiny encoder in place of the published one."""
    command = " ".join(command.split()).replace("vit_small_patch16 --finetune dino_vit_small_patch16", tiny)
    program, *words = shlex.split(command)[1:]
    if program == "main_linprobe.py":
        words += ["--num_workers", "0", "--amp", "float32"]
        main_linprobe.main(parse(main_linprobe.get_args_parser(), words))
    else:
        script = __import__(Path(program).stem)
        script.main(script.get_args_parser().parse_args(words))


def test_three_commands_lead_from_photos_to_numbers_and_a_page(photos, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tiny in ARCHITECTURES
    probe, compare, report, shots, *_ = commands(PAGE)
    for command in (probe, compare, report):
        follow(command, tiny)
    results = json.loads(Path("runs/photos/results.json").read_text())
    assert (results["n_train"], results["n_val"], results["n_test"]) == (18, 6, 6)
    assert [probe["head"] for probe in results["probes"].values()] == ["cls", "pos", "abmilp"] and results["knn"]
    assert all(probe["last"]["top1"] == 100 and len(probe["path"]) > 2 for probe in results["probes"].values())
    assert "| pos/block2/logreg | 1 | 100.00 |" in Path("runs/photos/comparison.md").read_text()
    assert Path("runs/photos/report.html").stat().st_size > 10_000
    follow(shots.replace("1 2 5 10 --episodes 20", "1 2 --episodes 3 --l2 0.1"), tiny)
    results = json.loads(Path("runs/few/results.json").read_text())
    assert (results["n_train"], results.get("n_val", 0)) == (24, 0)  # a fixed strength holds out nothing
    few = results["probes"]
    assert all(len(probe["few_shots"][number]["each"]) == 3 for probe in few.values() for number in "12")
