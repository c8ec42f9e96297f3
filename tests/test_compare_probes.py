"""Comparison of probes by their predictions: scipy's intervals, and predictions that are those of the run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import compare_probes

from encoders.load import save_encoder
from probing.predictions import FILE, read_predictions
from util.files import to_json

LABELS = torch.arange(60) % 4


def write(folder, said, labels=LABELS, headline="top1", chosen=None, marks=None, **facts):
    """A run's predictions; said: {(head, seed): tensor}; chosen: the head that is marked so; marks: of other kinds."""
    marks = {head: {} if chosen is None else {"chosen": head == chosen} for head, _ in said} | (marks or {})
    probes = {f"{head}/block1/blr0.1/seed{seed}": {"seed": seed, **marks[head]} for head, seed in said}
    tensors = {"index": torch.arange(len(labels)), "labels": labels}
    for name, one in zip(probes, said.values(), strict=True):
        tensors |= {f"output/{name}": one, f"loss/{name}": torch.zeros(len(labels))}
    facts = {"probes": probes, "headline": headline, "test_images": "a", **facts}
    folder.mkdir()
    metadata = {"facts": to_json(facts)}
    save_encoder(folder / FILE, tensors, metadata)
    return folder


def guesses(share, seed):
    """(n,4) classes from the best guess on, of which that share is right."""
    random = np.random.default_rng(seed)
    right = torch.from_numpy(random.random(len(LABELS)) < share)
    first = torch.where(right, LABELS, (LABELS + 1) % 4)
    return torch.stack([(first + i) % 4 for i in range(4)], dim=1).to(torch.int32)


def compared(words, capsys, *flags):
    args = compare_probes.get_args_parser().parse_args([*map(str, words), *flags])
    compare_probes.main(args)
    return capsys.readouterr().out


def test_intervals_are_scipys(tmp_path, capsys):
    said = {(head, seed): guesses(share, 10 * seed + k) for k, (head, share) in enumerate((("cls", 0.5), ("pos", 0.7)))
            for seed in range(3)}  # fmt: skip
    run = write(tmp_path / "run", said)
    compared([run], capsys, "--output", str(tmp_path / "out.json"), "--confidence", "0.9")
    cls, pos = json.loads((tmp_path / "out.json").read_text())["probes"]
    hits = {key: 100 * (one[:, 0] == LABELS).double().numpy() for key, one in said.items()}
    means = {head: np.array([hits[head, seed].mean() for seed in range(3)]) for head in ("cls", "pos")}
    images = {head: np.mean([hits[head, seed] for seed in range(3)], axis=0) for head in ("cls", "pos")}
    assert cls["each"] == pytest.approx(means["cls"]) and pos["difference"] == pytest.approx(
        means["pos"].mean() - means["cls"].mean()
    )
    for found, values in (
        (pos["over_images"], images["pos"]), (pos["over_seeds"], means["pos"]),
        (pos["difference_over_images"], images["pos"] - images["cls"]),
        (pos["difference_over_seeds"], means["pos"] - means["cls"]),
    ):  # fmt: skip
        assert found == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.9), rel=1e-9)


def test_bootstrap_of_a_mean_is_students_interval(tmp_path, capsys):
    """per_class of balanced classes is nearly a mean over images."""
    run = write(tmp_path / "run", {("cls", 0): guesses(0.5, 1), ("pos", 0): guesses(0.8, 2)}, headline="per_class")
    other = write(tmp_path / "other", {("cls", 0): guesses(0.5, 1), ("pos", 0): guesses(0.8, 2)})
    for folder, name in ((run, "a"), (other, "b")):
        compared([folder], capsys, "--output", str(tmp_path / f"{name}.json"))
    resampled, student = (json.loads((tmp_path / f"{name}.json").read_text())["probes"] for name in "ab")
    for ours, theirs in zip(resampled, student, strict=True):
        assert ours["each"] == pytest.approx(theirs["each"])
        assert ours["over_images"] == pytest.approx(theirs["over_images"], abs=3)
    assert resampled[1]["difference_over_images"] == pytest.approx(student[1]["difference_over_images"], abs=3)


def test_several_labels_are_compared_by_their_metric(tmp_path, capsys):
    random = torch.Generator().manual_seed(0)
    labels = (torch.rand(40, 3, generator=random) < 0.4).to(torch.uint8)
    said = {("cls", 0): torch.randn(40, 3, generator=random), ("pos", 0): labels.float() - 0.5}
    run = write(tmp_path / "run", said, labels, "map")
    assert "| pos/block1/blr0.1 | 1 | 100.00 |" in compared([run], capsys, "--resamples", "20")


@pytest.mark.parametrize(
    ("vary", "note"),
    [
        (["weights", "order", "views"], "seeds vary initial weights, data order and augmentation"),
        (["weights"], "seeds vary initial weights only"),
    ],
)
def test_what_seeds_vary_is_stated_under_the_table(vary, note, tmp_path, capsys):
    several = write(tmp_path / "run", {("cls", seed): guesses(0.5, seed) for seed in range(3)}, seeds_vary=vary)
    single = write(tmp_path / "single", {("cls", 0): guesses(0.5, 0)}, seeds_vary=vary)
    assert note in compared([several], capsys) and "seeds vary" not in compared([single], capsys)


def test_runs_of_one_label_join_their_seeds(tmp_path, capsys):
    runs = [write(tmp_path / name, {("cls", 0): guesses(0.5, seed)}) for seed, name in enumerate("ab")]
    assert "| cls/block1/blr0.1 | 2 |" in compared([f"MAE={run}" for run in runs], capsys)
    assert "| b: cls/block1/blr0.1 | 1 |" in compared(runs, capsys)


def test_the_chosen_probes_alone_are_shown_unless_all_are_asked_for(tmp_path, capsys):
    said = {(head, seed): guesses(0.5, seed) for head in ("cls", "pos") for seed in range(3)}
    run = write(tmp_path / "run", said, chosen="pos")
    text = compared([run], capsys)
    assert "| pos/block1/blr0.1 (chosen) | 3 |" in text and "cls/" not in text and "differences to pos/block1" in text
    with pytest.raises(ValueError, match=r"--baseline cls.* pos/block1/blr0\.1$"):
        compared([run], capsys, "--baseline", "cls/block1/blr0.1")
    text = compared([run], capsys, "--all", "--baseline", "cls/block1/blr0.1")
    assert "| pos/block1/blr0.1 (chosen) | 3 |" in text and "| cls/block1/blr0.1 | 3 |" in text
    assert "chosen: best optimizer and rate for its head and block on held-out images" in text


def test_no_conclusion_is_drawn_from_probes_that_learned_nothing(tmp_path, capsys):
    said = {("cls", 0): guesses(0.25, 1), ("pos", 0): guesses(0.7, 2), ("ap1", 0): guesses(0.9, 3)}
    run = write(tmp_path / "run", said)
    text = compared([run], capsys)  # the baseline's score is that of guessing
    rows = [line.split(" | ") for line in text.splitlines() if "/block1" in line and line.startswith("|")]
    assert rows[0][0] == "| cls/block1/blr0.1 (learned nothing)" and all(row[6] == row[7] == "–" for row in rows)
    assert "no conclusion about cls/block1/blr0.1: test top-1" in text
    text = compared([run], capsys, "--baseline", "pos/block1/blr0.1")
    differences = [line.split(" | ")[6] for line in text.splitlines() if line.startswith("| ")][1:]
    assert differences[:2] == ["–", "–"] and float(differences[2]) > 5
    marked = write(tmp_path / "marked", said, marks={"pos": {"learned_nothing": "training loss 1.09"}})
    assert "no conclusion about pos/block1/blr0.1: training loss 1.09" in compared([marked], capsys)


@pytest.mark.parametrize(("seeds", "note"), [(1, "a single seed has no"), (2, "two seeds say little"), (3, None)])
def test_few_seeds_are_said_to_be_few(seeds, note, tmp_path, capsys):
    text = compared([write(tmp_path / "run", {("cls", seed): guesses(0.5, seed) for seed in range(seeds)})], capsys)
    assert (note is None or note in text) and text.count(" interval") == (note is not None)
    (row,) = [line for line in text.splitlines() if line.startswith("| cls/")]
    assert (row.split(" | ")[5] == "–") == (seeds < 3) and (row.split(" | ")[3] == "–") == (seeds < 2)


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    run = write(tmp_path / "run", {("cls", 0): guesses(0.5, 0)})
    other = write(tmp_path / "other", {("cls", 0): guesses(0.5, 0)}, test_images="b")
    with pytest.raises(ValueError, match="was tested on other images"):
        compared([run, other], capsys)
    with pytest.raises(ValueError, match="is named twice"):
        compared([run, run], capsys)
    with pytest.raises(ValueError, match=r"--baseline pos: choose one of cls/block1/blr0\.1"):
        compared([run], capsys, "--baseline", "pos")
    with pytest.raises(ValueError, match=r"no such file; main_linprobe\.py --save_predictions writes it"):
        compared([tmp_path], capsys)
    content = (run / FILE).read_bytes()
    for damaged in (content[:-8] + bytes(8), content.replace(b"top1", b"top5")):  # predictions, facts
        (run / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_predictions(run)
