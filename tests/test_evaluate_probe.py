"""Trained probes on other test sets of their classes: layouts as distributed, calibration, corruptions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassCalibrationError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import evaluate_probe

import main_linprobe
from cli.console import parse
from data_sets.imagenet import ALEXNET_ERRORS, wnids
from data_sets.table import build_dataset
from encoders.load import load_plain_or_safetensors

WNIDS = wnids()[:4]  # labels 0 to 3
COLOURS = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 20]])


def draw(folder, label, count, noise=60, frame=0):
    folder.mkdir(parents=True)
    random = np.random.default_rng(stable := label * 1000 + count + noise)
    for number in range(count):
        pixels = np.clip(COLOURS[label] + random.normal(0, noise, (40, 40, 3)), 0, 255).astype(np.uint8)
        if frame:
            pixels = np.pad(pixels, ((frame, frame), (frame, frame), (0, 0)))
            pixels[[*range(frame), *range(-frame, 0)]] = [255, 0, 0]
        Image.fromarray(pixels).save(folder / f"{stable}_{number}.png")


@pytest.fixture
def finished(tiny, tmp_path):
    for split, count in (("train", 8), ("val", 3)):
        for label, wnid in enumerate(WNIDS):
            draw(tmp_path / "data" / split / wnid, label, count + (split == "val"))
    flags = f"--model {tiny} --optimizer logreg --l2 0.1 --amp float32 --cls_features cls pos --num_workers 0"
    argv = [*flags.split(), "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))
    return tmp_path / "run"


def evaluated(run, dataset, folder, *flags):
    argv = [run, "--dataset", dataset, "--data_path", folder, "--num_workers", 0, "--output", folder / "scores.json"]
    evaluate_probe.main(evaluate_probe.get_args_parser().parse_args([*map(str, argv), *flags]))
    return json.loads((folder / "scores.json").read_text())["probes"]


def make_layout(name, folder):
    """A miniature of a test set: 2 of the run's classes, in imagenet_sketch one that it does not know, too."""
    if name == "imagenet_v2":
        for label in (0, 2):
            draw(folder / "imagenetv2-matched-frequency-format-val" / str(label), label, 5)
    elif name == "objectnet":
        mappings = folder / "objectnet-1.0" / "mappings"
        for label, name in ((0, "air_freshener"), (2, "alarm_clock"), (3, "backpack")):
            draw(folder / "objectnet-1.0" / "images" / name, label, 5, frame=2)
        mappings.mkdir()
        content = {  # ObjectNet's alarm clock is two classes of ImageNet; it has no air freshener
            "folder_to_objectnet_label": {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock",
                                          "backpack": "Backpack"},
            "objectnet_to_imagenet_1k": {"Alarm clock": "digital clock; analog clock, dial", "Backpack": "backpack"},
            "pytorch_to_imagenet_2012_id": {"0": 3, "1": 0, "2": 1, "3": 2},
        }  # fmt: skip
        for name, value in content.items():
            (mappings / f"{name}.json").write_text(json.dumps(value))
        (mappings / "imagenet_to_label_2012_v2").write_text("digital clock\nanalog clock, dial\nbackpack\ntench\n")
    else:
        top = {"imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r", "imagenet_sketch": "sketch"}[name]
        for label in (0, 2):
            draw(folder / top / WNIDS[label], label, 5)
        if name == "imagenet_sketch":
            draw(folder / top / wnids()[900], 1, 3)


@pytest.mark.parametrize(
    ("name", "groups"),
    [(name, [[0], [2]]) for name in ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")]
    + [("objectnet", [[1, 2], [3]])],
)
def test_scores_are_those_of_the_logits_among_the_classes_of_the_set(name, groups, finished, tmp_path, capsys):
    make_layout(name, tmp_path / name)
    results = evaluated(finished, name, tmp_path / name, "--allow_subset")
    saved = load_plain_or_safetensors(tmp_path / name / "scores.safetensors")
    assert len(saved["labels"]) == 10 and saved["logits"].shape == (2, 10, 4)
    assert results.keys() == {"cls/block2/logreg/seed0", "pos/block2/logreg/seed0"}
    for scores, logits in zip(results.values(), saved["logits"].double(), strict=True):
        shares = torch.stack([logits.exp()[:, group].sum(1) for group in groups], dim=1)
        shares /= shares.sum(1, keepdim=True)
        answers = torch.stack([logits[:, group].amax(1) for group in groups], dim=1).argmax(1)
        assert (
            scores["top-1"] == pytest.approx(100 * (answers == saved["labels"]).double().mean().item())
            and scores["top-1"] > 60
        )
        assert scores["NLL"] == pytest.approx(-shares[range(10), saved["labels"]].log().mean().item())
        judge = MulticlassCalibrationError(2, n_bins=15, norm="l1")
        assert scores["ECE"] == pytest.approx(100 * judge(shares, saved["labels"]).item(), abs=1e-4)
    assert ("1 of 3 classes are not the run's" in capsys.readouterr().out) == (name == "imagenet_sketch")


def test_objectnets_frame_is_cut_off(tmp_path):
    make_layout("objectnet", tmp_path)
    images = build_dataset("objectnet", tmp_path, "val", allow_subset=True)
    assert images.classes == [f"{WNIDS[1]}+{WNIDS[2]}", WNIDS[3]] and len(images) == 10
    assert all(images[index][0].size == (40, 40) for index in range(10))


def test_corruption_error_is_relative_to_alexnets(finished, tmp_path):
    for name in ALEXNET_ERRORS:
        for severity in range(1, 6):
            for label in (1, 3):
                draw(tmp_path / "c" / "archive" / name / str(severity) / WNIDS[label], label, 1, noise=60 * severity)
    results = evaluated(finished, "imagenet_c", tmp_path / "c", "--allow_subset")
    saved = load_plain_or_safetensors(tmp_path / "c" / "scores.safetensors")
    for probe, scores in enumerate(results.values()):
        for name in ALEXNET_ERRORS:
            parts = [
                (saved[f"logits/{name}/{s}"][probe][:, [1, 3]].argmax(1), saved[f"labels/{name}/{s}"])
                for s in range(1, 6)
            ]
            assert scores[name] == pytest.approx(np.mean([100 * (a != b).double().mean() for a, b in parts]))
        expected = np.mean([scores[name] / error for name, error in ALEXNET_ERRORS.items()])
        assert scores["mCE"] == pytest.approx(expected)
    (tmp_path / "c" / "archive" / "fog" / "3").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"1 of 15 corruptions x 5 severities are missing, such as .*fog/3"):
        evaluated(finished, "imagenet_c", tmp_path / "c", "--allow_subset")


def test_mistakes_are_one_line(finished, tmp_path):
    draw(tmp_path / "other" / "val" / "cat", 0, 2)
    with pytest.raises(ValueError, match="none of its classes, such as cat, is a class of the run"):
        evaluated(finished, "image_folder", tmp_path / "other")
    make_layout("imagenet_a", tmp_path / "imagenet_a")
    with pytest.raises(ValueError, match="2 classes instead of 200"):
        evaluated(finished, "imagenet_a", tmp_path / "imagenet_a")
    with pytest.raises(ValueError, match=r"test set without training images: name it in scripts/evaluate_probe\.py"):
        build_dataset("imagenet_a", tmp_path / "imagenet_a", "train")
    results = json.loads((finished / "results.json").read_text())
    del results["class_names"]
    (finished / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"run/results.json is not of this version.* has no class_names"):
        evaluated(finished, "image_folder", tmp_path / "other")
