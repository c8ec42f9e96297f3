"""Runs of several processes, and processes that die: all of them stop together, say why once, and can go on."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interruptions import ENVIRONMENT, PROGRAMS, differences, end, flags, outcome, run, start, wait_until
from PIL import Image

from util import signals, workers
from util.signals import EXIT_STOPPED


@pytest.fixture(scope="module")
def commands(image_folder, pretrained):
    """{program: flags of a run with batches of 4 images}, 8 to an optimizer step."""
    return {program: [*flags(program, image_folder, pretrained), "--batch_size", "4"] for program in PROGRAMS}


def children(pid: int) -> list[int]:
    """Processes that another one has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def told(process, text):
    """Lines of a program, up to the one that has the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())


def test_all_processes_stop_at_the_same_step_and_another_number_of_them_goes_on(commands, tmp_path):
    """A signal to one of two; then one process ends what they began, as it would have from the start."""
    command = [*commands["main_pretrain"], "--epochs", "12"]
    two = start("main_pretrain", *command, "--output_dir", tmp_path / "run", processes=2)
    told(two, "epoch 0:")
    os.kill(children(two.pid)[-1], signal.SIGUSR1)
    code, _, error = end(two)
    assert code == 1  # torchrun's own
    assert error.count("main_pretrain.py: stopped by SIGUSR1: saved after") == 1
    assert f"exitcode  : {EXIT_STOPPED}" in error
    command += ["--accum_iter", "2"]
    for folder in ("run", "whole"):
        assert run("main_pretrain", command, tmp_path / folder, "--resume", "auto") == 0
    one, other = (outcome(tmp_path / folder)["checkpoint"]["model"] for folder in ("run", "whole"))
    compare(one, other)


@pytest.fixture(scope="module")
def worlds(commands, tmp_path_factory):
    """Folders of runs with the same effective batch: <program>-<number of processes>."""
    folder, jobs = tmp_path_factory.mktemp("worlds"), []
    for program in PROGRAMS:
        for processes in (1, 2, 4):
            split = ["--accum_iter", str(4 // processes), "--batch_size", "2", "--epochs", "2"]
            argv = [*commands[program], *split, "--output_dir", str(folder / f"{program}-{processes}")]
            if processes > 1:
                jobs.append(json.dumps([processes, program, argv, str(folder / "output")]))
            else:
                assert run(program, argv[:-2], folder / f"{program}-1") == 0
    program = Path(__file__).parent / "interruptions.py"
    done = subprocess.run(
        [sys.executable, program, *jobs], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_two_and_four_processes_make_the_same_run(program, worlds):
    one = outcome(worlds / f"{program}-1")
    for processes in (2, 4):
        other = outcome(worlds / f"{program}-{processes}")
        for part in ("log", "results"):
            compare(one.get(part), other.get(part))
        compare(one["checkpoint"], other["checkpoint"])


def compare(one, two):
    """Equal within 1e-6: tensors in norm, numbers relatively, counts and percentages exactly."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            compare(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            compare(a, b)
    elif isinstance(one, torch.Tensor):
        assert (one - two).double().norm() <= 1e-6 * one.double().norm()
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=1e-6, nan_ok=True)
    else:
        assert one == two


def test_a_process_that_dies_takes_the_others_along_and_a_restart_brings_the_run_back(commands, tmp_path):
    command = [*commands["main_linprobe"], "--epochs", "3", "--save_every_steps", "2", "--resume", "auto"]
    # two processes, too: how a test batch is rounded depends on its size, on CPUs without AVX-512
    assert end(start("main_linprobe", *command, "--output_dir", tmp_path / "whole", processes=2))[0] == 0
    process = start("main_linprobe", *command, "--output_dir", tmp_path / "run", processes=2, restarts=1)
    wait_until(lambda: any((tmp_path / "run").glob("checkpoint-*.pth")), process)
    began = time.monotonic()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, _, error = end(process)
    assert code == 0, error
    assert time.monotonic() - began < 60
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


def test_the_error_of_the_process_that_failed_is_on_the_screen_once(commands, image_folder, tmp_path):
    broken = tmp_path / "data"
    for split in ("train", "val"):
        for path in (image_folder / split).rglob("*.png"):
            copy = broken / path.relative_to(image_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    bad = next((broken / "train").rglob("*.png"))
    bad.write_bytes(b"no image")
    command = [*commands["main_linprobe"], "--data_path", broken, "--output_dir", tmp_path / "run"]
    began = time.monotonic()
    code, _, error = end(start("main_linprobe", *command, processes=2))
    assert code == 1 and time.monotonic() - began < 60
    assert error.count(f"main_linprobe.py: cannot read image {bad}") == 1
    assert "Traceback" not in error.split("torch/distributed")[0], error


def test_a_mistake_is_told_once_by_however_many_processes(commands, tmp_path):
    command = [*commands["main_pretrain"], "--output_dir", tmp_path / "run", "--data_path", "absent"]
    code, _, error = end(start("main_pretrain", *command, processes=2))
    assert code == 1 and error.count("main_pretrain.py: --data_path absent: there is no such folder") == 1


# ---- one process and its workers


def test_interrupts_reach_the_program_and_not_its_workers(commands, tmp_path):
    """Ctrl-C signals the whole group: the first saves, and the workers live until it has."""
    command = [*commands["main_linprobe"], "--epochs", "500", "--num_workers", "2", "--output_dir", tmp_path / "run"]
    process = start("main_linprobe", *command)
    told(process, "epoch 1:")
    workers = children(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)
    code, _, error = end(process)
    assert code == EXIT_STOPPED and "stopped by SIGINT: saved after" in error and error.count("\n") == 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_killed_worker_is_one_line(commands, tmp_path):
    command = [*commands["main_linprobe"], "--epochs", "500", "--num_workers", "2", "--output_dir", tmp_path / "run"]
    process = start("main_linprobe", *command)
    told(process, "epoch 1:")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, _, error = end(process, 60)
    assert code == 1 and error.count("\n") == 1 and "DataLoader worker" in error, error
    assert any((tmp_path / "run").glob("checkpoint-*.pth"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("getrlimit", lambda kind: (24, 24), "2 workers need .* open files, ulimit -n is 24"),
        ("get_temp_dir", lambda: "/tmp/" + 100 * "x", "cannot make sockets in /tmp/x.*set TMPDIR to a short path"),
        ("get_temp_dir", lambda: "/proc", "cannot make sockets in /proc .*; --num_workers 0"),
    ],
)
def test_workers_that_could_not_deliver_are_refused(name, value, message, monkeypatch):
    monkeypatch.setattr(workers.resource, "setrlimit", lambda kind, limits: None)
    monkeypatch.setattr(workers.resource if name == "getrlimit" else workers, name, value)
    with pytest.raises(ValueError, match=message):
        workers.check_workers(2)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", "/dev/shm is full"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...", "/dev/shm is full"),
        ("Too many open files. Communication with the workers is no longer possible", "raise ulimit -n"),
        ("DataLoader timed out after 600 seconds", "have delivered nothing for 600 s; --num_workers 0"),
        ("DataLoader worker (pid 7) exited unexpectedly", "DataLoader worker (pid 7) exited"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_a_worker_s_failure_means(text, meaning):
    failure = workers.worker_failure(RuntimeError(text))
    assert (meaning in str(failure)) if meaning else failure is None


def test_children_of_a_program_that_listens_can_be_terminated():
    """multiprocessing.Pool waits for ever where its workers do not end on SIGTERM."""
    with signals.listening():
        ours, its = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=lambda: (its.send("awake"), time.sleep(60)))
        child.start()
        ours.recv()  # Python forgets what arrives while a child starts
        child.terminate()
        child.join(30)
        assert child.exitcode == -signal.SIGTERM
        assert not signals.requested()


LEFT_OPEN = """
from util import signals
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.table import build_dataset
from data_sets.views import eval_transform
import sys
with signals.listening():
    images = KeyedDataset(build_dataset("image_folder", sys.argv[1], "val"), eval_transform(16), 0)
    loader = build_loader(images, EvaluationBatches(len(images), 2), num_workers=2)
    loader.itself = loader  # still there when the program ends
    print(len(list(loader)), len(list(loader)))
"""


def test_a_program_ends_although_workers_of_its_loader_still_run(tmp_path):
    for name in "ab":
        path = tmp_path / "val" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(path)
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path)]
    result = subprocess.run(
        command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1 1\n", "")
