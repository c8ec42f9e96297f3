"""An aggregation analysis that is stopped, killed or moved, and resumed, gives the numbers of the uninterrupted one."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from interruptions import Killed, after_calls, analysed, changed, checkpoints, differences, in_processes, kill, run
from PIL import Image

import main_linprobe
from aggregation import rules
from cli.console import parse
from data_sets.demo import generate
from util import signals

IMAGES, BATCH = 7, 2  # 4 batches in each of the two passes
PROGRAM = "main_analyze_aggregation"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Flags of an analysis of fixed rules and trained probes, with boxes in a pass of their own."""
    folder = tmp_path_factory.mktemp("inputs")
    data, probes = folder / "data", folder / "probes"
    generate(data, 20, 11, workers=1)
    common = ["--data_path", data, "--amp", "float32", "--device", "cpu", "--num_workers", "0"]
    argv = [*common, "--model", "vit_demo_patch8", "--cls_features", "abmilp", "--epochs", "1", "--warmup_epochs", "0",
            "--batch_size", "10", "--output_dir", probes]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    words = [*common, "--probes", probes, "--boxes", data / "boxes.csv", "--num_images", IMAGES, "--batch_size", BATCH,
             "--loc_step", "0.05", "--loc_workers", "0", "--loc_map_heads", "best", "--num_examples", "2"]  # fmt: skip
    return list(map(str, words))


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(PROGRAM, command, folder) == 0
    return analysed(folder)


@pytest.fixture
def after_batch(monkeypatch):
    """after_batch(number, action): do something once, after so many batches of this start."""
    return after_calls(monkeypatch, rules, "vectors_of")


def test_an_analysis_stopped_in_both_passes_is_the_uninterrupted_one(command, whole, tmp_path, after_batch, capsys):
    stands = [
        (1, "vectors", 2, "0-2", 0),
        (3, "boxes", 0, "0", 2),
        (2, "boxes", 4, "1-4", 0),
        (1, "boxes", 6, "1-6", 2),
    ]
    for batches, view, seen, place, workers in stands:
        after_batch(batches, lambda: signal.raise_signal(signal.SIGTERM))
        code = run(PROGRAM, command, tmp_path, "--resume", "auto", "--loc_workers", workers)
        error = capsys.readouterr().err
        assert code == signals.EXIT_STOPPED and error.count("\n") == 1, error
        assert f"stopped by SIGTERM: saved after {seen} of 7 images ({view}) in {tmp_path}" in error
        assert checkpoints(tmp_path)[-1] == f"checkpoint-{place}.pth" and not (tmp_path / "aggregation.json").exists()
    for more in ([], ["--num_workers", 1], ["--num_examples", 2]):  # to its end, and the results twice again
        assert run(PROGRAM, command, tmp_path, "--resume", "auto", *more) == 0
        assert differences(analysed(tmp_path), whole) == []
    assert checkpoints(tmp_path) == ["checkpoint-1.pth"]
    assert "the analysis is complete: only its results are written again" in capsys.readouterr().out
    assert run(PROGRAM, command, tmp_path) == 2
    assert "already holds results" in capsys.readouterr().err


def test_an_analysis_that_is_killed_repeats_the_batches_that_were_lost(command, whole, tmp_path, after_batch):
    after_batch(6, kill)
    with pytest.raises(Killed):
        run(PROGRAM, command, tmp_path, "--save_every_minutes", 1e-9)
    assert checkpoints(tmp_path) == ["checkpoint-0.pth", "checkpoint-1-2.pth"]
    assert run(PROGRAM, command, tmp_path, "--resume", "auto") == 0
    assert differences(analysed(tmp_path), whole) == []


def test_another_number_of_processes_goes_on(command, whole, tmp_path, after_batch):
    after_batch(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(PROGRAM, command, tmp_path / "run") == signals.EXIT_STOPPED
    words = [*command, "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    after_batch(9, kill)
    assert in_processes(2, PROGRAM, words, tmp_path / "output") == [0, 0], (tmp_path / "output").read_text()
    two, one = (kept["files"]["aggregation.json"] for kept in (analysed(tmp_path / "run"), whole))
    assert two["images"] == IMAGES and two["localization"] == one["localization"]
    for mine, expected in zip(two["rules"], one["rules"], strict=True):
        assert mine["entropy"] == pytest.approx(expected["entropy"], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("place", "change", "told"),
    [
        (3, lambda found: found["moments"].update(mean=torch.zeros(3)), "moments of another shape"),
        (6, lambda found: found.update(found=torch.zeros(1, 2, 3)), "found has the shape (1, 2, 3)"),
        (6, lambda found: found.pop("found"), "does not fit this run"),
    ],
)
def test_what_does_not_fit_is_named_and_the_checkpoint_before_it_used(
    place, change, told, command, whole, tmp_path, after_batch, capsys
):
    after_batch(place, kill)
    with pytest.raises(Killed):
        run(PROGRAM, command, tmp_path, "--save_every_minutes", 1e-9)
    newest = tmp_path / checkpoints(tmp_path)[-1]
    changed(lambda state: change(state["recorders"][0]))(newest)
    assert run(PROGRAM, command, tmp_path, "--resume", "auto") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "trying the checkpoint before it" in line)
    assert told in line and newest.name in line
    assert differences(analysed(tmp_path), whole) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--resume", "auto", "--rules", "pos"], "rules was None, is ['pos']"),
        (["--resume", "auto", "--kl_direction", "col_row"], "kl_direction was row_col, is col_row"),
        ([], "already holds a run (checkpoint-0-4.pth): continue it with --resume auto"),
        (["--resume", "auto", "--images", "nowhere.png"], "cannot read image nowhere.png"),
    ],
    ids=" ".join,
)
def test_another_analysis_is_refused(more, told, command, tmp_path, after_batch, capsys):
    after_batch(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(PROGRAM, command, tmp_path) == signals.EXIT_STOPPED
    capsys.readouterr()
    assert run(PROGRAM, command, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert checkpoints(tmp_path) == ["checkpoint-0-4.pth"]


def other_image(data, probes):
    Image.new("RGB", (72, 72)).save(min((data / "val").rglob("*.png")))


def other_box(data, probes):
    rows = (data / "boxes.csv").read_text().splitlines()
    rows[1:] = [row.rsplit(",", 1)[0] + ",71" for row in rows[1:]]
    (data / "boxes.csv").write_text("\n".join(rows))


def other_scores(data, probes):
    (probes / "results.json").write_text((probes / "results.json").read_text().replace('"top1": ', '"top1": 1'))


@pytest.mark.parametrize(
    ("change", "name"), [(other_image, "test images"), (other_box, "boxes"), (other_scores, "scores of the probes")]
)
def test_other_inputs_are_another_analysis(change, name, command, tmp_path, after_batch, capsys):
    source = Path(command[command.index("--data_path") + 1]).parent
    shutil.copytree(source, tmp_path / "inputs")
    words = [word.replace(str(source), str(tmp_path / "inputs")) for word in command]
    after_batch(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(PROGRAM, words, tmp_path / "run") == signals.EXIT_STOPPED
    change(tmp_path / "inputs" / "data", tmp_path / "inputs" / "probes")
    assert run(PROGRAM, words, tmp_path / "run", "--resume", "auto") == 2
    assert f"{name} was" in capsys.readouterr().err
