"""Several --seeds in one run are as many independent runs; --seeds_vary weights is the cheaper kind, and says so."""

import json

import pytest
import torch
from interruptions import in_processes

import main_linprobe
from cli.console import parse

EPOCHS = 2


@pytest.fixture
def command(probe_command):
    flags = f"--epochs {EPOCHS} --warmup_epochs 0 --blr 40 --batch_size 4 --accum_iter 2 --cls_features cls abmilp"
    return [*probe_command, *flags.split()]


def run(command, folder, *words):
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, *words, "--output_dir", str(folder)]))
    return read(folder)


def read(folder):
    probes = torch.load(folder / f"checkpoint-{EPOCHS - 1}.pth", weights_only=True)["probes"]
    return probes, json.loads((folder / "results.json").read_text())


def assert_same(found, expected, tolerance=0.0):
    for name, state in expected.items():
        for key in state:
            if "score.0.bias" not in key:  # of no effect: it follows the rounding of a gradient that is zero
                torch.testing.assert_close(found[name][key], state[key], rtol=tolerance, atol=tolerance)


RECIPES = {
    "augmented": [],
    "joined": ["--bn_group", "8"],
    "cached": ["--cache_views", "2"],
    "cached_vectors": ["--cls_features", "cls", "pos", "--cache_views", "1"],
    "center": ["--crop", "center", "--cache_views", "1"],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_seeds_in_one_run_are_the_separate_runs(command, recipe, tmp_path):
    probes, results = run(command, tmp_path / "all", *recipe, "--seeds", "0", "1")
    for seed in ("0", "1"):
        expected, separate = run(command, tmp_path / seed, *recipe, "--seed", seed)
        assert_same(probes, expected)
        for name, probe in separate["probes"].items():
            assert results["probes"][name]["last"]["loss"] == pytest.approx(probe["last"]["loss"], rel=1e-5)
    assert len(probes) == 4
    views = [] if "center" in recipe else ["views"]
    assert results["seeds_vary"] == ["weights", "order", *views]
    first, second = (state["classifier.weight"] for name, state in probes.items() if name.startswith("cls"))
    assert not torch.equal(first, second)


def test_seeds_of_initial_weights_share_order_and_views_where_that_is_asked_for(command, tmp_path):
    probes, results = run(command, tmp_path / "all", "--seeds", "0", "1", "--seeds_vary", "weights")
    assert results["seeds_vary"] == ["weights"]
    expected, _ = run(command, tmp_path / "0", "--seed", "0")
    assert_same(probes, expected, 1e-6)
    other, _ = run(command, tmp_path / "1", "--seed", "1")
    name = next(name for name in other if name.startswith("cls"))
    assert not torch.equal(probes[name]["classifier.weight"], other[name]["classifier.weight"])


def test_seeds_survive_an_interruption_to_the_bit(command, tmp_path):
    words = ["--seeds", "0", "1", "--save_every_steps", "1"]
    expected, _ = run(command, tmp_path / "run", *words)
    for path in (tmp_path / "run").glob("checkpoint-*.pth"):
        if path.name != "checkpoint-0.pth":
            path.unlink()
    again, _ = run(command, tmp_path / "run", *words, "--resume", "auto")
    assert_same(again, expected)
    with pytest.raises(ValueError, match=r"seeds_vary was all, is weights"):
        run(command, tmp_path / "run", *words, "--resume", "auto", "--seeds_vary", "weights")


def test_two_processes_train_the_same_seeds(image_folder, tmp_path):
    command = [
        "--model", "vit_demo_patch8", "--data_path", image_folder, "--input_size", "16", "--amp", "float32",
        "--device", "cpu", "--num_workers", "0", "--epochs", EPOCHS, "--warmup_epochs", "0", "--blr", "40",
        "--batch_size", "4", "--cls_features", "cls", "abmilp", "--seeds", "0", "1",
    ]  # fmt: skip
    command = list(map(str, command))
    expected, _ = run(command, tmp_path / "one", "--accum_iter", "2")
    words, output = [*command, "--output_dir", str(tmp_path / "two")], tmp_path / "output"
    assert in_processes(2, "main_linprobe", words, output) == [0, 0], output.read_text()
    assert_same(read(tmp_path / "two")[0], expected, 1e-5)
