"""The records of a run: never over another run, and whole after any interruption."""

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from runtime.folder import RunFolder
from runtime.provenance import code_version, provenance
from runtime.trackers import date_back_event_files
from util.files import no_link


@pytest.fixture
def run(tmp_path):
    """A folder with epochs 0 to 3 of a run, of which the last two checkpoints are kept."""
    folder = RunFolder(tmp_path / "run")
    folder.write("args.json", {})
    for epoch in range(4):
        folder.log_line({"epoch": epoch, "loss": 1.0})
        folder.save_checkpoint(epoch, {"weights": torch.full((2,), float(epoch))})
    return folder


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def logged(folder):
    return [json.loads(line)["epoch"] for line in (folder.path / "log.txt").read_text().splitlines()]


def test_the_newest_checkpoints_are_kept_and_the_newest_is_resumed_which_changes_nothing(run):
    assert names(run) == ["args.json", "checkpoint-2.pth", "checkpoint-3.pth", "log.txt"]
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    state = run.find_checkpoint("auto")
    assert state["epoch"] == 3 and state["weights"].tolist() == [3, 3]
    assert run.find_checkpoint(str(run.path / "checkpoint-2.pth"))["epoch"] == 2
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_checkpoints_are_ordered_by_number_other_names_and_folders_ignored(run):
    (run.path / "checkpoint-best.pth").touch()
    (run.path / "checkpoint-77.pth").mkdir()
    run.save_checkpoint(10, {})
    assert [path.name for path in run.checkpoints()] == ["checkpoint-10.pth", "checkpoint-3.pth"]
    run.save_checkpoint(1, {})  # epoch 0 was resumed: later checkpoints are of an abandoned future
    assert run.find_checkpoint("auto")["epoch"] == 1


def test_a_folder_that_vanishes_is_not_said_to_hold_a_whole_checkpoint(run):
    shutil.rmtree(run.path)
    with pytest.raises(ValueError, match=r"run cannot be written: [^;]+$"):
        run.save_checkpoint(4, {})


def test_auto_resume_falls_back_from_a_truncated_checkpoint(run, caplog):
    newest = run.path / "checkpoint-3.pth"
    newest.write_bytes(newest.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "beyond_cls"):
        assert run.find_checkpoint("auto")["epoch"] == 2
    assert "checkpoint-3.pth cannot be read" in caplog.text


def test_auto_resume_does_not_start_over_where_no_checkpoint_can_be_read(run):
    for path in run.checkpoints():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be read"):
        run.find_checkpoint("auto")


@pytest.mark.parametrize("left", ["checkpoint-3.pth", "log.txt"])
def test_a_run_is_not_written_over(run, left):
    for name in names(run):
        if name != left:
            (run.path / name).unlink()
    with pytest.raises(ValueError, match=rf"already holds a run \({left}\): continue it with --resume auto"):
        run.find_checkpoint("")


def test_a_run_is_not_written_over_by_another_runs_checkpoint(run, tmp_path):
    other = RunFolder(tmp_path / "other")
    other.write("args.json", {})
    other.save_checkpoint(7, {})
    checkpoint = str(other.path / "checkpoint-7.pth")
    with pytest.raises(ValueError, match="already holds a run"):
        run.find_checkpoint(checkpoint)
    assert run.find_checkpoint(checkpoint, evaluate_only=True)["epoch"] == 7
    assert RunFolder(tmp_path / "fork").find_checkpoint(checkpoint)["epoch"] == 7


def test_a_resumed_run_repeats_no_line_and_drops_a_torn_one(run):
    with open(run.path / "log.txt", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert run.find_checkpoint(str(run.path / "checkpoint-2.pth"))["epoch"] == 2
    run.log_line({"epoch": 3, "loss": 0.5})
    assert logged(run) == [0, 1, 2, 3]
    assert json.loads((run.path / "log.txt").read_text().splitlines()[-1])["loss"] == 0.5


def test_a_failed_save_leaves_the_old_checkpoints(run, monkeypatch):
    def disk_full(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    before = names(run)
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left on device; .*checkpoint-3.pth is whole"):
        run.save_checkpoint(4, {})
    assert names(run) == before


def test_a_folder_is_made_by_its_first_record_and_an_empty_path_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "a" / "run")
    for run in (RunFolder(""), folder):
        assert run.find_checkpoint("") is None and run.find_checkpoint("auto") is None
        assert not any(tmp_path.iterdir())
        run.start({"x": 1})
        run.log_line({"epoch": 0})
        run.save_checkpoint(0, {})
        run.scalars({"loss": 0.5}, 0)
        run.close()
    assert json.loads((folder.path / "args.json").read_text()) == {"x": 1}
    assert any(name.startswith("events.out") for name in names(folder))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run").start({})
    with pytest.raises(ValueError, match=r"--log_dir .*file/logs cannot be written"):
        RunFolder(tmp_path / "run", tmp_path / "file" / "logs").start({})


def claimed_by_another_process(path):
    """What a child is told that claims the folder; "" where it may have it."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            RunFolder(path).claim()
        except ValueError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as told:
        return told.read()


def test_two_processes_do_not_write_in_one_folder_at_a_time(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start({})
    assert "another process writes there: wait for its end" in claimed_by_another_process(tmp_path)
    folder.close()
    assert claimed_by_another_process(tmp_path) == ""
    assert (tmp_path / ".lock").exists()  # the child did not close it,
    RunFolder(tmp_path).claim()  # and ended


def test_a_file_system_without_locks_does(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    RunFolder(tmp_path).claim()


def test_event_files_of_a_clock_that_was_ahead_sort_before_new_ones_in_their_old_order(tmp_path):
    now = int(time.time())
    for number, second in enumerate((now - 9, now - 1, now, now + 5, now + 3600)):
        (tmp_path / f"events.out.tfevents.{second}.host.1.{number}").touch()
    date_back_event_files(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[-1] for name in names] == list("01234") and int(names[-1].split(".")[3]) < time.time()
    assert names[0] == f"events.out.tfevents.{now - 9}.host.1.0"


@pytest.mark.parametrize(
    ("content", "message"),
    [({"model": {}}, "it has no epoch"), (torch.zeros(2), "it has no epoch"), (None, "there is no file")],
)
def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path / "run").find_checkpoint(str(path))


@pytest.mark.parametrize("resume", ["", "auto", "elsewhere.pth"])
def test_the_folder_of_another_program_is_refused(resume, tmp_path, monkeypatch):
    """Or its args.json would be lost, and the checkpoints be called unreadable."""
    (tmp_path / "args.json").write_text('{"command": "main_pretrain.py --epochs 3"}')
    monkeypatch.setattr(sys, "argv", ["main_linprobe.py"])
    with pytest.raises(ValueError, match=r"holds a run of main_pretrain\.py: name another folder"):
        RunFolder(tmp_path).find_checkpoint(resume)
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py"])
    assert RunFolder(tmp_path).find_checkpoint("auto") is None


def test_code_is_changed_by_programs_and_not_by_results(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    git("init", "-q")
    (tmp_path / "main.py").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setattr("runtime.provenance.ROOT", tmp_path)
    (tmp_path / "table1.md").write_text("| |")
    assert code_version()["dirty"] is False
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "new.py").write_text("2")
    assert code_version()["dirty"] is True


def test_provenance_is_known_without_git_too(monkeypatch):
    found = provenance(torch.device("cpu"))
    assert found["versions"]["torch"] == torch.__version__ and found["processes"] == 1
    monkeypatch.setenv("PATH", "")
    assert provenance(torch.device("cpu")) == {**found, "commit": None, "dirty": None}


@pytest.mark.parametrize("target", ["precious", "folder"])
def test_a_lock_that_is_a_link_is_not_followed(target, tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "run").claim()
    assert (tmp_path / "precious").read_text() == "data"


def test_files_that_are_links_are_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "run").mkdir()
    for name in ("args.json", "log.txt", "checkpoint-0.pth", "link"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    folder = RunFolder(tmp_path / "run")
    folder.write("args.json", {})
    folder.log_line({"epoch": 0})
    folder.save_checkpoint(0, {})
    with pytest.raises(OSError), open(tmp_path / "run" / "link", "ab", opener=no_link):
        pass  # what is written in place: cached features, benchmarks, locks
    assert (tmp_path / "precious").read_text() == "data" and folder.find_checkpoint("auto")["epoch"] == 0
