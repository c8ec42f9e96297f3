"""The scripts that turn runs into a table and a picture."""

import json
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
from cli.arguments import frozen_encoder
from cli.console import parse
from data_sets.demo import generate
from probing.finished_run import read_run

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
    assert "20 training and 10 test images, 1 epoch" in (tmp_path / "table.md").read_text()


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


def test_table_says_where_its_runs_are_not_alike(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    results |= {"n_train": 7, "args": {**results["args"], "epochs": 3}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = script("probe_table.py", f"all={run}", f"few={tmp_path}")
    assert "over 2 seeds of the probe; 7 or 20 training and 10 test images, 1 or 3 epochs" in done.stdout


def test_table_joins_the_seeds_of_runs_of_one_label(run, tmp_path):
    for name in "ab":
        shutil.copytree(run, tmp_path / name)
    done = script("probe_table.py", f"mine={tmp_path / 'a'}", f"mine={tmp_path / 'b'}")
    assert done.stdout.count("| mine |") == 1 and "over 4 seeds" in done.stdout
    assert "is named twice" in script("probe_table.py", f"mine={run}", f"mine={run}").stderr


def test_table_of_a_page_is_written_between_its_marks(run, tmp_path):
    page, results = tmp_path / "page.md", run / "results.json"
    mark = f"<!-- quickstart: python scripts/probe_table.py mine={results} --write page.md -->"
    page.write_text(f"{mark}\nold\n<!-- end of quickstart -->\n")
    done = script("probe_table.py", f"mine={results}", "--write", page)
    assert page.read_text() == f"{mark}\n{done.stdout[:-1]}<!-- end of quickstart -->\n"
    results = tmp_path / "results.json"
    results.write_text("{")
    assert f"{results} cannot be read as JSON" in script("probe_table.py", f"mine={results}").stderr


def test_maps_are_drawn(run, tmp_path):
    done = script("show_maps.py", f"mine={run}", "--images", "2", "--output", tmp_path / "maps.png")
    assert done.returncode == 0, done.stderr
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


def test_maps_of_runs_on_different_images_are_refused(run, tmp_path):
    generate(tmp_path / "data", 20, 11, workers=1)
    argv = ["--args_from", run / "args.json", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    done = script("show_maps.py", f"one={run}", f"two={tmp_path / 'run'}", "--output", tmp_path / "maps.png")
    assert done.returncode == 2 and not (tmp_path / "maps.png").exists()
    assert f"{tmp_path / 'run'} was tested on other images than the runs before it" in done.stderr


@pytest.mark.parametrize("name", ["probe_table.py", "show_maps.py"])
def test_unfinished_run_is_one_line(name, tmp_path):
    done = script(name, f"mine={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


def test_quickstart_explains_its_options():
    done = subprocess.run(["bash", "scripts/quickstart.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


PAPER = ("table6", "table8", "figure7", "figure8", "figure9")
