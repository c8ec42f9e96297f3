"""The Python interface: equal to what the programs compute, from any folder, and as an installed package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import hubconf
import main_linprobe
from cli.console import parse
from data_sets.demo import generate
from data_sets.table import build_dataset
from probing.finished_run import read_trained
from probing.predictions import read_predictions

ROOT = Path(__file__).resolve().parent.parent
MAE = str(ROOT / "demo" / "mae.safetensors")
HEADS = ["cls", "abmilp", "ap4", "aim4:content=all", "alf", "cls@4-5+pos", "attn-mn"]


@pytest.fixture(scope="module")
def encoder():
    return hubconf.encoder(MAE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of HEADS on the demo, with its images."""
    folder = tmp_path_factory.mktemp("demo")
    generate(folder / "data", 20, 10, workers=1)
    argv = ["--model", "vit_demo_patch8", "--finetune", MAE, "--data_path", folder / "data", "--amp", "float32",
            "--cls_features", *HEADS, "--seeds", "0", "1", "--batch_size", "10", "--epochs", "1", "--num_workers", "0",
            "--final_norm", "--warmup_epochs", "0", "--device", "cpu", "--save_predictions",
            "--output_dir", folder / "run"]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "abmilp"
    argv = [sys.executable, "scripts/export_probe.py", run, "--head", "abmilp", "--seed", "1", "--output", folder]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_features_and_attention_are_those_of_explicit_attention(encoder):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features, flow = encoder.features(images, blocks=[0, -1]), encoder.attention(images)
    assert features[-1].patches.shape == (2, 64, 128) and features[0].cls.shape == (2, 128)
    for block, step in enumerate(encoder.backbone.trace(images)):
        attention = (step.q.double() @ step.k.double().transpose(-1, -2) * step.scale).softmax(-1)
        torch.testing.assert_close(
            flow["cls_self_attention"][block].double(), attention[:, :, 0, 0], rtol=1e-5, atol=1e-6
        )
        patches = attention[:, :, 0, 1:] / attention[:, :, 0, 1:].sum(-1, keepdim=True)
        entropy = torch.special.entr(patches).sum(-1)
        torch.testing.assert_close(flow["cls_patch_entropy"][block].double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[-1].patches, step.out[:, 1:])


@pytest.mark.parametrize("head", [None, *HEADS])
def test_a_trained_probe_predicts_what_its_run_predicted(run, exported, head):
    """head None: the exported folder."""
    probe = hubconf.probe(exported) if head is None else hubconf.probe(run, head=head, seed=1)
    names = [name for name in read_predictions(run).outputs if f"{probe.spec.head}/block5" in name and "seed1" in name]
    dataset = build_dataset("image_folder", run.parent / "data", "val")
    images = torch.stack([probe.transform(Image.open(path).convert("RGB")) for path, _ in dataset.samples])
    logits, weights = probe(images)
    predictions = read_predictions(run)
    torch.testing.assert_close(
        F.cross_entropy(logits, predictions.labels, reduction="none"),
        predictions.losses[names[0]],
        rtol=1e-4,
        atol=1e-5,
    )
    assert (logits.topk(5).indices == predictions.outputs[names[0]]).float().mean() > 0.99  # but for ties
    weighs = probe.spec.head in ("abmilp", "ap4", "aim4:content=all", "attn-mn")
    assert (weights is not None) == weighs
    if weighs:
        assert weights.shape == (len(images), 64)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(images)))


def test_mistakes_name_what_exists(encoder, run, exported, tmp_path):
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"block 6: .* 0 to 5"):
        encoder.features(images, blocks=[6])
    with pytest.raises(ValueError, match=r"patch_log_amplitude .* not of attention"):
        encoder.attention(images, ["all"])
    with pytest.raises(ValueError, match=r"7 probes fit; .* cls/block5/.*seed0"):
        hubconf.probe(run)
    with pytest.raises(ValueError, match="0 probes fit"):
        hubconf.probe(run, head="abmilp", seed=2)
    with pytest.raises(ValueError, match=r"trained on another encoder: .*mae.safetensors"):
        hubconf.probe(exported, weights=str(ROOT / "demo" / "mae_ft.safetensors"))
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        hubconf.probe(tmp_path)
    (tmp_path / "probe.json").write_text('{"spec": {"head": "cls"}}')
    with pytest.raises(ValueError, match=r"probe\.json is not a probe of scripts/export_probe\.py"):
        hubconf.probe(tmp_path)


def test_the_card_states_what_a_user_must_know(run, exported):
    text, facts = (exported / "README.md").read_text(), read_trained(exported).facts
    scores, training = facts["scores"], facts["training"]
    for fact in ("library_name: beyond-cls", "`abmilp`", "block 5", "mae.safetensors", f"top1 {scores['top1']:.2f}",
                 f"{scores['n']} test images", training["command"], str(training["commit"])):  # fmt: skip
        assert fact in text, fact


FIVE_LINES = """
encoder = {load_encoder}
images = torch.zeros(1, 3, 64, 64)
probe = {load_probe}
logits, weights = probe(images)
print(tuple(encoder.features(images)[-1].cls.shape), encoder.record["family"], tuple(logits.shape), weights.shape[1])
"""
PRINTED = "(1, 128) mae (1, 10) 64"


def test_torch_hub_loads_it_from_another_folder(exported, tmp_path):
    load_encoder = f'torch.hub.load({str(ROOT)!r}, "encoder", {MAE!r}, source="local")'
    load_probe = f'torch.hub.load({str(ROOT)!r}, "probe", {str(exported)!r}, source="local")'
    code = "import torch" + FIVE_LINES.format(load_encoder=load_encoder, load_probe=load_probe)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith(PRINTED), done.stderr


def test_it_installs_as_one_package_and_works_from_another_folder(exported, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo", "docs", "results", "output_dir", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"beyond_cls"}
    code = f"""
import importlib.util, torch, beyond_cls
assert beyond_cls.__file__.startswith({str(site)!r}) and importlib.util.find_spec("util") is None
""" + FIVE_LINES.format(load_encoder=f"beyond_cls.encoder({MAE!r})", load_probe=f"beyond_cls.probe({str(exported)!r})")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith(PRINTED), done.stderr


def test_the_notebook_of_first_steps_runs_and_its_figure_is_drawn(tmp_path):
    cells = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "OUTPUT": str(tmp_path), "MPLBACKEND": "Agg"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT / "docs", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = {head: float(score) for head, score in re.findall(r"(\w+): top-1 ([\d.]+) %", done.stdout)}
    assert scores["abmilp"] > scores["cls"] > 10  # chance; as the paper has it for MAE
    assert Image.open(tmp_path / "first_steps.png").size[0] > 300
