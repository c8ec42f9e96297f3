"""Contestants of the benchmarks do the work of the programs; rows come from commits without changes."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoder
from models_vit import build_vit
from scripts import benchmark

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--tiny", "--device", "cpu", "--amp", "float32"]


def run(*flags):
    benchmark.main(benchmark.get_args_parser().parse_args([*flags, *TINY]))


def test_twins_have_the_same_parameters():
    """Of ViT-B and its published decoder."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = MaskedAutoencoder(build_vit("vit_base_patch16"))
        twin = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**benchmark.hugging_face_sizes(model)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    assert len(model.decoder_blocks) == len(twin.decoder.decoder_layers) == 8


def test_the_whole_benchmark_runs_on_a_cpu(tmp_path, image_folder):
    """As the script starts it on a GPU."""
    pytest.importorskip("transformers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DATA_PATH": str(image_folder), "OUT": str(tmp_path)}
    command = ["bash", "scripts/benchmark_gpu.sh", *TINY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    named = ("tokens in bfloat16", "metrics all", "accumulation 2", "one pass is", "MaxBoxAccV2", "Hugging Face, sdpa")
    for text in (*named, "--loader"):
        assert text in done.stdout, text


@pytest.mark.usefixtures("rendered")
def test_rows_of_a_clean_commit_become_a_table_and_a_chart(tmp_path, monkeypatch):
    origin = benchmark.provenance(torch.device("cpu"))
    page, path = tmp_path / "page.md", tmp_path / "rows.csv"
    output = ["--output", str(path)]
    monkeypatch.setattr(benchmark, "provenance", lambda device: {**origin, "dirty": True})
    with pytest.raises(ValueError, match="commit them, or omit --output"):
        run("heads", *output)
    monkeypatch.setattr(benchmark, "provenance", lambda device: {**origin, "dirty": False})
    for _ in range(2):
        run("heads", *output)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 4 and rows[0]["contestant"] == "one [cls] probe" and float(rows[0]["ratio"]) == 1
    assert int(rows[1]["operations"]) > int(rows[0]["operations"]) > 0
    begin = f"<!-- costs: python scripts/benchmark.py table --output {path} --write page.md -->\n"
    page.write_text(f"{begin}<!-- end of costs -->\n")
    run("table", "plot", *output, "--write", str(page), "--figure", str(tmp_path / "rows.png"))
    assert page.read_text().count("| heads: ") == 2 and "vit_demo_patch8 at 32 pixels" in page.read_text()
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_differences_within_the_noise_are_not_stated():
    row = {"ratio_min": "0.98", "ratio": "1.02", "ratio_max": "1.05"}
    assert benchmark.text_of(row) == "no difference"
    assert benchmark.text_of({**row, "ratio_min": "1.01"}) == "1.02 (1.01 to 1.05)"


def test_other_files_and_loaders_without_images_are_refused(tmp_path):
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for name in ("b.csv", "none.csv"):
        with pytest.raises(ValueError, match=f"{name} is not a file that scripts/benchmark.py wrote"):
            run("plot", "--output", str(tmp_path / name), "--figure", str(tmp_path / "b.png"))
    with pytest.raises(ValueError, match="loader: name a data set with --data_path"):
        run("loader")


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: b"\xff" + c, lambda c: c + b"x,y\n", lambda c: c.replace(b"1.", b"x.")]
)
def test_a_damaged_benchmark_is_one_line(damage, tmp_path):
    path, whole = tmp_path / "benchmark.csv", (ROOT / "results" / "benchmark.csv").read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=f"--output {path}"):
        run("table", "--output", str(path))
