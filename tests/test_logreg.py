"""--optimizer logreg: scikit-learn's optimum, a stated tolerance for learned heads, draws of few images, resumption."""

import itertools
import json
import shlex

import numpy as np
import pytest
import torch
from miniatures import make_coco
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import main_linprobe
from cli.console import parse
from data_sets.table import DATASETS
from probing import logreg
from probing.predictions import guessing, prior_loss, read_predictions
from util import signals

FIXED = ["cls", "pos", "both", "attn-mn", "attn-lcte", "ca2", "cp1"]


def run(command, folder, *flags):
    argv = [*command, *map(str, flags), "--output_dir", str(folder)]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def command(probe_command):
    return [*probe_command, "--optimizer", "logreg"]


@pytest.fixture
def fits(monkeypatch):
    """The fits that follow: (vectors, labels, strength, probe, record)."""
    calls, fit = [], logreg.fit

    def spy(probe, vectors, labels, strength):
        end = fit(probe, vectors, labels, strength)
        with torch.no_grad():
            calls.append((vectors().numpy(), labels.numpy(), strength, probe, end))
        return end

    monkeypatch.setattr(logreg, "fit", spy)
    return calls


def cost(weight, bias, vectors, labels, strength):
    """The objective by its definition: mean cross-entropy and penalty."""
    logits = vectors @ weight.T + bias
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return losses.mean() + strength / 2 * (weight**2).sum()


def test_every_fixed_head_of_every_block_has_the_optimum_of_scikit_learn(command, fits, tmp_path):
    results = run(command, tmp_path / "run", "--cls_features", *FIXED, "--return_block", 0, 2, "--l2", 1e-3, 0.1)
    assert len(results["probes"]) == 2 * len(FIXED) and len(fits) == 3 * len(results["probes"])
    for vectors, labels, strength, probe, end in fits:
        scaled = StandardScaler().fit_transform(vectors)
        judge = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-10, max_iter=10_000).fit(scaled, labels)
        ours = [parameter.detach().numpy() for parameter in probe.classifier.parameters()]
        expected = cost(judge.coef_, judge.intercept_, scaled, labels, strength)
        assert cost(*ours, scaled, labels, strength) == pytest.approx(expected, rel=1e-5) and end["gap"] <= 1e-6
    for name, probe in results["probes"].items():
        losses = {float(strength): scores["loss"] for strength, scores in probe["path"].items()}
        assert name.endswith("/logreg/seed0") and probe["l2"] == min(losses, key=losses.get) and len(losses) == 2
    assert results["knn"].keys() == {f"{head}/block{block}" for head in FIXED for block in (0, 2)}


def test_learned_heads_reach_the_stated_tolerance_in_one_chunk_or_several(command, fits, tmp_path, monkeypatch):
    flags = ["--cls_features", "abmilp", "ap2", "cls", "--l2", 0.01, "--save_predictions"]
    whole = run(command, tmp_path / "whole", *flags)
    monkeypatch.setattr(logreg, "CHUNK", 5 * 17 * 32)  # five images
    cut = run(command, tmp_path / "cut", *flags)
    for name, probe in whole["probes"].items():
        assert probe["converged"]["gap"] <= 1e-4 and probe["converged"]["steps"] < logreg.MOST_STEPS
        assert probe["converged"]["loss"] == pytest.approx(cut["probes"][name]["converged"]["loss"], rel=1e-3)
        assert probe["last"]["top1"] == 100 and probe["learned_nothing"] is None  # red, green and blue images
    kept = read_predictions(tmp_path / "whole")
    with torch.no_grad():  # what is saved is the probe that was fitted, in evaluation mode
        for (_, _, _, probe, _), name in zip(fits, kept.outputs, strict=False):
            (stored,) = (state for key, state in states(tmp_path / "whole").items() if key == name)
            torch.testing.assert_close(stored["classifier.weight"], probe.classifier.weight.float())


def states(folder):
    return torch.load(folder / "checkpoint-0.pth", weights_only=True)["probes"]


def test_several_labels_are_independent_regressions(tiny, fits, tmp_path, monkeypatch):
    make_coco(tmp_path / "coco")
    monkeypatch.setitem(DATASETS, "coco", DATASETS["coco"]._replace(classes=3))
    argv = ["--model", tiny, "--dataset", "coco", "--data_path", str(tmp_path / "coco"), "--allow_subset", "--amp",
            "float32", "--num_workers", "0", "--device", "cpu", "--optimizer", "logreg", "--l2", "0.05"]  # fmt: skip
    results = run(argv, tmp_path / "run")
    ((vectors, labels, strength, probe, _),) = fits
    scaled = StandardScaler().fit_transform(vectors)
    for label, weight, bias in zip(labels.T, *probe.classifier.parameters(), strict=True):
        if 0 < label.sum() < len(label):
            C = 1 / (strength * labels.size)
            judge = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(scaled, label)
            np.testing.assert_allclose(weight.detach(), judge.coef_[0], atol=1e-3)
            assert bias.item() == pytest.approx(judge.intercept_[0], abs=1e-3)
    assert "knn" not in results
    with pytest.raises(ValueError, match="--shots needs one label per image"):
        run(argv, tmp_path / "shots", "--shots", 1)


def test_draws_of_few_images_are_balanced_nested_and_repeatable(command, fits, tmp_path, capsys):
    flags = ["--cls_features", "cls", "abmilp", "--l2", 0.1, "--shots", 1, 3, "--episodes", 4]
    results = run(command, tmp_path / "run", *flags)
    assert len(fits) == 2 * (1 + 2 * 4)
    for vectors, labels, *_ in fits[2:]:
        assert len(vectors) in (3, 9) and set(np.bincount(labels)) == {len(labels) // 3}
    small, large = ({tuple(row) for row in fits[2 + first][0].round(9)} for first in (0, 8))
    assert small < large
    for probe in results["probes"].values():
        for few in probe["few_shots"].values():
            assert len(few["each"]) == len(few["l2"]) == 4 and few["mean"] == pytest.approx(np.mean(few["each"]))
            spread = stats.sem(few["each"])
            expected = stats.t.interval(0.95, 3, few["mean"], spread) if spread else [few["mean"]] * 2
            assert few["interval"] == pytest.approx(expected)
    assert "abmilp/block2/logreg/seed0, 3 images per class: top-1 " in capsys.readouterr().out
    draws = [images for images, *_ in fits[2:10:2]]
    assert run(command, tmp_path / "again", *flags)["probes"] == results["probes"]
    assert all(map(np.array_equal, draws, (images for images, *_ in fits[20:28:2])))
    run([*command, "--seed", "1"], tmp_path / "other", *flags)
    assert not all(map(np.array_equal, draws, (images for images, *_ in fits[38:46:2])))
    with pytest.raises(ValueError, match="9 images per class: a class has only 8 training images"):
        run(command, tmp_path / "many", "--l2", 0.1, "--shots", 9)


def test_a_stopped_run_continues_with_the_next_fit_to_the_same_bits(command, fits, tmp_path, monkeypatch):
    flags = ["--cls_features", "cls", "abmilp", "--l2", 0.1, 1, "--shots", 2, "--episodes", 2]
    whole = run(command, tmp_path / "whole", *flags)
    done = len(fits)
    with monkeypatch.context() as patch, pytest.raises(signals.Stopped, match="saved after 3 of 6 steps"):
        patch.setattr(signals, "requested", lambda: 15 * (len(fits) >= done + 7))  # in the third step, of two fits
        run(command, tmp_path / "run", *flags)
    again = run([*command, "--resume", "auto"], tmp_path / "run", *flags)
    assert again["probes"] == whole["probes"]
    for name, state in states(tmp_path / "whole").items():
        assert all(torch.equal(value, states(tmp_path / "run")[name][key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "logreg", "lars"], "--optimizer logreg lars: logreg has no epochs; give it a run of its own"),
        (["--optimizer", "sgd", "--shots", "1", "2"], "--shots 1 2 needs --optimizer logreg"),
        (["--l2", "0"], "--l2: must be a number > 0, got '0'"),
    ],
)
def test_contradictions_are_one_line(command, flags, message, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        run(command, tmp_path / "run", *flags)
    assert message in str(error.value) + capsys.readouterr().err


# ---- results on little data


def test_probes_that_learned_nothing_are_flagged_in_log_results_and_predictions(probe_command, tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), "abc", range(12)):
        (tmp_path / "noise" / split / label).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / split / label / f"{number}.png")
    flags = ["--data_path", tmp_path / "noise", "--batch_size", 12, "--epochs", 1, "--blr", 0.1, "--save_predictions"]
    (probe,) = run(probe_command, tmp_path / "run", *flags)["probes"].values()
    reason = probe["learned_nothing"]
    assert "is not 5 % below 1.099, that of the class frequencies" in reason
    assert f"cls/block2/blr0.1/seed0 learned nothing: {reason}" in capsys.readouterr().out
    (facts,) = read_predictions(tmp_path / "run").facts["probes"].values()
    assert facts["learned_nothing"] == reason


def test_prior_loss_and_guessing_by_their_definitions():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    shares = np.array([0.5, 0.3, 0.2])
    assert prior_loss(np.arange(50) % 5) == pytest.approx(np.log(5))
    assert prior_loss(labels) == pytest.approx(-(shares * np.log(shares)).sum())
    several = np.array([[1, 0], [0, 0], [1, 0], [1, 0]], np.uint8)
    assert prior_loss(several) == pytest.approx(stats.entropy([0.75, 0.25]) / 2)
    high = 100 * stats.binomtest(50, 100).proportion_ci(method="exact").high  # of the most frequent class
    assert guessing(50.0, labels, "top1") and guessing(10.0, labels, "top1") and guessing(high - 1, labels, "top1")
    assert guessing(high + 1, labels, "top1") is None and guessing(1.0, several, "map") is None
    assert guessing(40.0, labels, "per_class") and guessing(46.0, labels, "per_class") is None


def test_a_run_of_few_steps_proposes_a_command_that_runs(probe_command, tmp_path, capsys):
    run([*probe_command, "--return_block", "1"], tmp_path / "run", "--batch_size", 8, "--epochs", 1)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "only 3 optimizer steps" in line)
    words = shlex.split(line[line.index("python main_linprobe.py") :])
    main_linprobe.main(parse(main_linprobe.get_args_parser(), words[2:]))
    results = json.loads((tmp_path / "run_small" / "results.json").read_text())
    assert list(results["probes"]) == ["cls/block1/logreg/seed0"] and results["n_val"] == 6
    assert "optimizer steps" not in capsys.readouterr().out


def test_neighbours_on_cached_features_are_those_of_another_pass(probe_command, tmp_path, monkeypatch):
    flags = ["--batch_size", 8, "--epochs", 1, "--cls_features", "cls", "abmilp", "--crop", "center"]
    expected = run(probe_command, tmp_path / "plain", *flags, "--knn", 1, 5, 20)["knn"]
    assert run(probe_command, tmp_path / "cached", *flags, "--cache_views", 1)["knn"] == expected
    assert "knn" not in run(probe_command, tmp_path / "without", *flags)
