"""An analysis that is stopped, killed or moved, and resumed, gives the numbers of the uninterrupted one to the bit."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from interruptions import ENVIRONMENT, ROOT, Killed, after_calls, analysed, changed, checkpoints, differences, kill, run
from PIL import Image, ImageOps

import main_analyze_attention as program
from attention.measure import Recorder
from util import signals

IMAGES, BATCH = 7, 2  # 4 batches for each of the two encoders


@pytest.fixture(scope="module")
def command(image_folder):
    """Flags of two encoders, with metrics of every kind: of attention, of tokens, over images; and a t-SNE."""
    return [
        "--data_path", str(image_folder), "--model", "vit_demo_patch8", "--input_size", "32", "--amp", "float32",
        "--device", "cpu", "--num_workers", "0", "--batch_size", str(BATCH), "--finetune", "", "", "--label", "a", "b",
        "--metrics", "cls_patch_entropy", "patch_log_amplitude", "image_log_singular_values", "--tsne_blocks", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Figures are drawn by tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "draw_figures", lambda found, folder: (folder / "attention.png").write_text(str(found)))
        patch.setattr(program, "draw_token_maps", lambda tsne, label, path: path.write_text(label))
        yield


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run("main_analyze_attention", command, folder) == 0
    return found(folder)


def found(folder):
    """What is in the folder; figures hold results, so that they are compared there."""
    return {**analysed(folder), "figures": sorted(path.name for path in folder.rglob("*.png"))}


@pytest.fixture
def after_batch(monkeypatch):
    """after_batch(number, action): do something once, after so many batches of this start."""
    return after_calls(monkeypatch, Recorder, "add")


def test_an_analysis_of_other_pixels_is_another_one(command, image_folder, tmp_path, after_batch, capsys):
    """Names and sizes of the images are equal, and so is the number of images."""
    shutil.copytree(image_folder, tmp_path / "images")
    command = [*command, "--data_path", str(tmp_path / "images")]
    after_batch(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("main_analyze_attention", command, tmp_path / "run", "--resume", "auto") == signals.EXIT_STOPPED
    path = sorted((tmp_path / "images").rglob("val/*/*.png"))[-1]
    ImageOps.invert(Image.open(path)).save(path)
    capsys.readouterr()
    assert run("main_analyze_attention", command, tmp_path / "run", "--resume", "auto") == 2
    assert "images was" in capsys.readouterr().err


# ---- stopped and killed


def test_an_analysis_stopped_after_any_batch_again_and_again_is_the_uninterrupted_one(
    command, whole, tmp_path, after_batch, capsys
):
    folder, stands = tmp_path / "run", ["0-2", "0-7", "1-4", "1-6"]
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    for batches, number, place in zip((1, 3, 2, 1), numbers, stands, strict=True):
        after_batch(batches, lambda number=number: signal.raise_signal(number))
        code = run("main_analyze_attention", command, folder, "--resume", "auto")
        error = capsys.readouterr().err
        assert code == signals.EXIT_STOPPED and error.count("\n") == 1, error
        encoder, seen = map(int, place.split("-"))
        assert (
            f"stopped by {signal.Signals(number).name}: saved after {seen} of 7 images (encoder {'ab'[encoder]})"
            in error
        )
        assert checkpoints(folder)[-1] == f"checkpoint-{place}.pth"
        assert not any(folder.glob("*/attention.json"))
        torch.manual_seed(batches)  # the state of the process has no say
    assert run("main_analyze_attention", command, folder, "--resume", "auto", "--num_workers", 1) == 0
    assert differences(found(folder), whole) == []
    assert checkpoints(folder) == ["checkpoint-1.pth"]


def test_the_seconds_of_a_pass_are_those_of_all_its_starts(command, tmp_path, after_batch):
    for batches in (1, 2):
        after_batch(batches, lambda: (time.sleep(2), signal.raise_signal(signal.SIGTERM)))
        assert run("main_analyze_attention", command, tmp_path, "--resume", "auto") == signals.EXIT_STOPPED
    assert checkpoints(tmp_path)[-1] == "checkpoint-0-6.pth"
    assert run("main_analyze_attention", command, tmp_path, "--resume", "auto") == 0
    seconds = [json.loads((tmp_path / label / "attention.json").read_text())["seconds"] for label in ("a", "b")]
    assert seconds[0] > 4 > seconds[1]


def test_an_analysis_that_is_killed_repeats_the_batches_that_were_lost(command, whole, tmp_path, after_batch):
    after_batch(6, kill)
    with pytest.raises(Killed):
        run("main_analyze_attention", command, tmp_path / "run", "--save_every_minutes", 1e-9)
    assert checkpoints(tmp_path / "run") == ["checkpoint-0.pth", "checkpoint-1-2.pth"]
    assert run("main_analyze_attention", command, tmp_path / "run", "--resume", "auto") == 0
    assert differences(found(tmp_path / "run"), whole) == []


@pytest.mark.parametrize(("name", "ends"), [("token_map", 85), ("draw_token_maps", 0), ("draw_figures", 0)])
def test_a_signal_behind_the_pass_loses_nothing(name, ends, command, whole, tmp_path, monkeypatch):
    """t-SNE takes long, and is abandoned; the writing of the results is not."""
    call = getattr(program, name)
    with monkeypatch.context() as patch:
        patch.setattr(program, name, lambda *args: (signal.raise_signal(signal.SIGTERM), call(*args))[1])
        assert run("main_analyze_attention", command, tmp_path, "--resume", "auto") == ends
    assert checkpoints(tmp_path) == (["checkpoint-0-7.pth"] if ends else ["checkpoint-1.pth"])
    assert run("main_analyze_attention", command, tmp_path, "--resume", "auto") == 0
    assert differences(found(tmp_path), whole) == []


def test_results_that_a_kill_cut_short_are_written_again_and_so_are_complete_ones(
    command, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "draw_token_maps", lambda *args: kill())
        run("main_analyze_attention", command, tmp_path)
    assert (tmp_path / "a" / "attention.json").exists() and not (tmp_path / "b" / "attention.json").exists()
    monkeypatch.setattr(program, "measure", None)
    for _ in range(2):
        (tmp_path / ".attention.png.abcd1234.tmp").touch()
        assert run("main_analyze_attention", command, tmp_path, "--resume", "auto") == 0
        assert "the analysis is complete: only its results are written again" in capsys.readouterr().out
        assert differences(found(tmp_path), whole) == []


@pytest.mark.parametrize(
    ("place", "name"), [("main_analyze_attention", "frozen_encoder"), ("attention.measure", "Watched")]
)
def test_a_signal_before_the_first_batch_leaves_a_folder_that_can_be_used(
    place, name, command, whole, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(place)
    call = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *a, **k: (signal.raise_signal(signal.SIGTERM), call(*a, **k))[1])
        assert run("main_analyze_attention", command, tmp_path) == signals.EXIT_STOPPED
    assert "nothing to save" in capsys.readouterr().err
    assert run("main_analyze_attention", command, tmp_path) == 0
    assert differences(found(tmp_path), whole) == []


def test_damaged_images_and_batches_of_nothing_else_do_not_shift_the_place(
    command, image_folder, tmp_path, after_batch
):
    shutil.copytree(image_folder / "val", tmp_path / "images")
    for index in (1, 2, 3):  # of the sorted images: the second batch is of nothing else
        sorted((tmp_path / "images").rglob("*.png"))[index].write_bytes(b"no image")
    words = [*command, "--data_path", str(tmp_path / "images"), "--on_bad_image", "skip"]
    assert run("main_analyze_attention", words, tmp_path / "whole") == 0
    for batches in (1, 2):
        after_batch(batches, lambda: signal.raise_signal(signal.SIGTERM))
        folder = tmp_path / f"run{batches}"
        assert run("main_analyze_attention", words, folder) == signals.EXIT_STOPPED
        assert checkpoints(folder) == [f"checkpoint-0-{2 if batches == 1 else 6}.pth"]
        assert run("main_analyze_attention", words, folder, "--resume", "auto") == 0
        assert differences(found(folder), found(tmp_path / "whole")) == []


def test_images_of_which_none_can_be_read_are_one_line(command, image_folder, tmp_path, capsys):
    (tmp_path / "images" / "red").mkdir(parents=True)
    (tmp_path / "images" / "red" / "0.png").write_bytes(b"no image")
    words = [*command[:-2], "--data_path", str(tmp_path / "images"), "--on_bad_image", "skip"]
    assert run("main_analyze_attention", words, tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith("a: none of the images can be read\n")


# ---- several processes

PROCESSES = """
import json, signal, sys, torch
from pathlib import Path
import main_analyze_attention
from attention import measure
main_analyze_attention.draw_figures = lambda results, folder: None
from PIL import Image, ImageOps
from interruptions import in_processes
from util import distributed
torch.set_num_threads(1)
argv, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
program, output = "main_analyze_attention", folder / "output"

def go(name, processes=2):
    words = [*argv, "--output_dir", str(folder / name), "--resume", "auto"]
    return in_processes(processes, program, words, output)

add, count = measure.Recorder.add, []
def stop(recorder, observed):
    add(recorder, observed)
    count.append(1)
    if len(count) == 3 and distributed.rank() == 1:  # of 2 batches of an encoder: in its second pass
        signal.raise_signal(signal.SIGTERM)

assert go("whole") == [0, 0], output.read_text()
measure.Recorder.add = stop
assert go("run") == [85, 85], output.read_text()
measure.Recorder.add = add
(folder / "moved").mkdir()
for path in (folder / "run").glob("*.pth"):
    (folder / "moved" / path.name).write_bytes(path.read_bytes())
assert go("run") == [0, 0], output.read_text()
assert go("moved", 1) == [0], output.read_text()
"""


def test_all_processes_stop_at_the_same_batch_and_another_number_of_them_goes_on(command, whole, tmp_path):
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, json.dumps(command[:-2]), tmp_path],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output").read_text().count("stopped by SIGTERM: saved after 4 of 7 images (encoder b)") == 1
    two = analysed(tmp_path / "whole")
    assert differences(analysed(tmp_path / "run"), two) == []
    for other in (analysed(tmp_path / "moved"), two):
        for label in "ab":
            for name, metric in whole["files"][f"{label}/attention.json"]["metrics"].items():
                for expected, block in zip(
                    metric["blocks"], other["files"][f"{label}/attention.json"]["metrics"][name]["blocks"], strict=True
                ):
                    assert block["count"] == expected["count"] == IMAGES
                    np.testing.assert_allclose(block["mean"], expected["mean"], rtol=1e-6)


# ---- checkpoints that are not what they should be


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """{name: content} of an analysis that was killed within the pass of its second encoder."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        after_calls(patch, Recorder, "add")(7, kill)
        run("main_analyze_attention", command, folder, "--save_every_minutes", 1e-9)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


BAD = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cannot be read as a file of tensors"),
    "another program's": (changed(lambda s: s.pop("recorders")), "not a checkpoint of main_analyze_attention.py"),
    "wrong place": (changed(lambda s: s.update(step=8)), "it stands at image 8 of pass 1, with 1 results"),
    "no place": (changed(lambda s: s.update(step="x")), "does not fit this run"),
    "a result too many": (changed(lambda s: s["results"].append(["b", {}])), "with 2 results"),
    "other results": (changed(lambda s: s.update(results=[["encoder c", {}]])), "its results are of other passes"),
    "no results": (changed(lambda s: s.update(results=[7])), "does not fit this run"),
    "no recorder": (changed(lambda s: s.update(recorders=[])), "the state of no process"),
    "strange recorder": (changed(lambda s: s.update(recorders=[{"a": 1}])), "does not fit this run"),
    "cut moments": (
        changed(lambda s: s["recorders"][0]["moments"].update(mean=torch.zeros(3))), "its moments are not of"
    ),
    "no seconds": (changed(lambda s: s.update(seconds=None)), "does not fit this run"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(
    bad, stopped, command, whole, tmp_path, monkeypatch, capsys
):
    damage, reason = BAD[bad]
    for name, content in stopped.items():
        (tmp_path / name).write_bytes(content)
    assert checkpoints(tmp_path) == ["checkpoint-1-2.pth", "checkpoint-1-4.pth"]
    damage(tmp_path / "checkpoint-1-4.pth")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "measure", lambda *args: kill())
        run("main_analyze_attention", command, tmp_path, "--resume", "auto")
    told = capsys.readouterr().out
    (warning,) = (line for line in told.splitlines() if "trying the checkpoint before it" in line)
    assert reason in warning and "checkpoint-1-4.pth" in warning
    assert f"resuming from {tmp_path / 'checkpoint-1-2.pth'}" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--resume", "auto", "--num_images", "6"], "num_images was None, is 6"),
        (["--resume", "auto", "--seed", "1"], "seed was 0, is 1"),
        (["--resume", "auto", "--label", "a", "c"], "label was"),
        ([], "already holds a run (checkpoint-1-4.pth): continue it with --resume auto"),
        (["--save_every_minutes", "-1"], "--save_every_minutes: must be a number >= 0"),
    ],
    ids=" ".join,
)
def test_another_analysis_is_refused_and_changes_nothing(more, told, stopped, command, tmp_path, capsys):
    for name, content in stopped.items():
        (tmp_path / name).write_bytes(content)
    assert run("main_analyze_attention", command, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == stopped


def test_another_folder_goes_on_from_a_checkpoint_that_is_named(stopped, command, whole, tmp_path, after_batch):
    for name, content in stopped.items():
        (tmp_path / name).write_bytes(content)
    words = ["--resume", tmp_path / "checkpoint-1-2.pth"]
    after_batch(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("main_analyze_attention", command, tmp_path / "fork", *words) == signals.EXIT_STOPPED
    assert checkpoints(tmp_path / "fork") == ["checkpoint-1-4.pth"]
    assert run("main_analyze_attention", command, tmp_path / "fork", "--resume", "auto") == 0
    assert differences(found(tmp_path / "fork"), whole) == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == stopped
