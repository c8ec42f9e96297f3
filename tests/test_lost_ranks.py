"""Ranks that die, hang or never come, and signals while ranks wait for each other: bounded, named, one line."""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from interruptions import finish, flags, launch

from util import distributed
from util.signals import EXIT_STOPPED


@pytest.fixture
def ranks(image_folder, tmp_path, monkeypatch):
    """Ranks of a pretraining of many epochs, as forks of this process: ranks(size, *flags) starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(distributed, "LAST_WORDS", 1)
    children = []

    def start(size, *more, of=None):
        argv = [*flags("main_pretrain", image_folder, None), "--batch_size", "4", "--epochs", "500",
                "--output_dir", str(tmp_path / "run"), *more]  # fmt: skip
        where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(size) if of is None else of:
            children.append(launch("main_pretrain", argv, tmp_path / f"{rank}", {**where, "RANK": str(rank)}))
        return children

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def printed(folder, rank):
    return (folder / f"{rank}").read_text() if (folder / f"{rank}").exists() else ""


def until(folder, rank, text, seconds=30):
    end = time.monotonic() + seconds
    while text not in printed(folder, rank):
        assert time.monotonic() < end, printed(folder, rank)
        time.sleep(0.02)


def errors(folder, rank):
    return [line for line in printed(folder, rank).splitlines() if line.startswith(Path(sys.argv[0]).name + ": ")]


@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_is_named_in_one_line(how, victim, ranks, tmp_path):
    """SIGSTOP is the same as a node that hangs; the exit code of the others tells a requeue to try again."""
    children = ranks(2, "--dist_timeout", "60", "2", "3")
    until(tmp_path, 0, "epoch 1:")
    os.kill(children[victim], how)
    began, other = time.monotonic(), 1 - victim
    code = finish(children[other])
    assert time.monotonic() - began < 15
    lines = errors(tmp_path, other)
    assert len(lines) == 1 and f"rank {victim}" in lines[0], lines
    if how == signal.SIGSTOP:
        assert code == EXIT_STOPPED
    else:
        assert code == 1
    assert victim == 0 or "(last heard at epoch " in lines[0]


def test_of_three_ranks_only_the_hung_one_is_named_and_only_once(ranks, tmp_path):
    children = ranks(3, "--dist_timeout", "60", "2", "3")
    until(tmp_path, 0, "epoch 0:")
    os.kill(children[2], signal.SIGSTOP)
    assert [finish(child) for child in children[:2]] == [EXIT_STOPPED] * 2
    (line,) = errors(tmp_path, 0)
    assert "rank 2 (last heard" in line and "rank 1" not in line and errors(tmp_path, 1) == []


def test_a_rank_that_never_joins_is_named(ranks, tmp_path):
    children = ranks(3, "--dist_timeout", "2", of=[0, 2])
    assert finish(children[0]) == EXIT_STOPPED
    (line,) = errors(tmp_path, 0)
    assert "rank 1 of 3 has not joined at 127.0.0.1:" in line and "within 2 s" in line


def test_a_rank_that_joins_late_is_waited_for(ranks, tmp_path):
    first = list(ranks(2, "--epochs", "1", "--warmup_epochs", "0", of=[0]))
    time.sleep(2)
    second = ranks(2, "--epochs", "1", "--warmup_epochs", "0", of=[1])[1]
    assert [finish(first[0]), finish(second)] == [0, 0]


@pytest.mark.parametrize("present", [0, 1])
def test_a_signal_while_ranks_join_ends_them(present, ranks, tmp_path):
    (child,) = ranks(2, of=[present])
    time.sleep(2)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert finish(child) == EXIT_STOPPED and time.monotonic() - began < 7  # 5 on an idle machine


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_rank_waits_for_one_that_hangs_ends_it(number, ranks, tmp_path):
    children = ranks(2)
    until(tmp_path, 0, "epoch 1:")
    os.kill(children[1], signal.SIGSTOP)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(children[0], number)
    assert finish(children[0]) == EXIT_STOPPED and time.monotonic() - began < 7  # 5 on an idle machine
    (line,) = errors(tmp_path, 0)
    assert "another rank does not answer" in line


def test_a_signal_to_all_ranks_is_saved_by_all(ranks, tmp_path):
    children = ranks(2)
    until(tmp_path, 0, "epoch 1:")
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert [finish(child) for child in children] == [EXIT_STOPPED] * 2
    assert "saved after" in errors(tmp_path, 0)[0] and errors(tmp_path, 1) == []


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK is set but WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "RANK is set but MASTER_ADDR is not"),
        ({"RANK": "x"}, "must be integers"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE"),
        ({"MASTER_PORT": "123456"}, "MASTER_PORT from 1 to 65535"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK >= 0"),
    ],
)
def test_an_environment_that_describes_no_rank_is_refused(change, message, monkeypatch):
    for name, value in {**ENVIRONMENT, **change}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message), distributed.distributed("cpu"):
        pass


def test_a_port_that_is_taken_is_named(ranks, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {**ENVIRONMENT, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"port .* of 127.0.0.1 is taken"), distributed.distributed("cpu"):
            pass
