"""Two nodes, emulated by two network namespaces with a cable between them: the same run, and the faults of networks.

    python -m pytest -m nodes tests/test_nodes.py

Needs root and `ip`; skipped elsewhere. A node is a namespace with one process, forked from this one.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time

import pytest
from interruptions import PROGRAMS, analysed, differences, finish, flags, launch, outcome

from util import distributed
from util.signals import EXIT_STOPPED

pytestmark = pytest.mark.nodes
CABLE = "cable0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LOST = ["--dist_timeout", "60", "3", "12"]


def ip(*words, check=True):
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done.returncode == 0


@pytest.fixture(scope="module")
def nodes():
    """Names of the two namespaces."""
    names = [f"node{index}-{os.getpid()}" for index in range(2)]
    try:
        made = os.geteuid() == 0 and all(ip("netns", "add", name, check=False) for name in names)
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("two network namespaces need root and the command ip")
    try:
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.fixture
def start(nodes, tmp_path, monkeypatch):
    """start(program, argv, ranks, same=False): processes of a run, each on a node of its own or all on the first."""
    monkeypatch.setattr(distributed, "LAST_WORDS", 1)
    running, ports = [], iter(range(29500, 29600))

    def begin(program, argv, ranks=(0, 1), same=False, port=None, swapped=False):
        port = port or next(ports)
        children = []
        for rank in ranks:
            node = 0 if same else rank ^ swapped
            where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0 if same else int(swapped)],
                     "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": CABLE}  # fmt: skip
            child = launch(program, list(map(str, argv)), tmp_path / f"{rank}", where, lambda node=node: enter(node))
            children.append(child)
        running.extend(children)
        return children

    def enter(node):
        with open(f"/var/run/netns/{nodes[node]}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET

    yield begin
    for child in running:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.fixture(scope="module")
def command(image_folder, pretrained):
    """{program: flags}"""
    commands = {name: [*flags(name, image_folder, pretrained), "--batch_size", "4"] for name in PROGRAMS}
    commands["main_analyze_attention"] = [
        "--data_path", image_folder, "--model", "vit_demo_patch8", "--finetune", pretrained, "--input_size", 32,
        "--amp", "float32", "--device", "cpu", "--num_workers", 0, "--batch_size", 2, "--save_every_minutes", 1e-9,
    ]  # fmt: skip
    return commands


def printed(folder, rank):
    return (folder / f"{rank}").read_text() if (folder / f"{rank}").exists() else ""


def until(folder, text, seconds=60):
    end = time.monotonic() + seconds
    while text not in printed(folder, 0):
        assert time.monotonic() < end, printed(folder, 0)
        time.sleep(0.02)


@pytest.mark.parametrize("program", ["main_linprobe", "main_pretrain", "main_analyze_attention"])
def test_two_nodes_make_the_run_of_two_processes_on_one_node(program, start, command, tmp_path):
    left = outcome if program in PROGRAMS else analysed
    for name, same in (("one", True), ("two", False)):
        children = start(program, [*command[program], "--output_dir", tmp_path / name], same=same)
        assert [finish(child) for child in children] == [0, 0], printed(tmp_path, 0)
    assert differences(left(tmp_path / "two"), left(tmp_path / "one")) == []


@pytest.fixture
def pretraining(start, command, tmp_path):
    """A run on two nodes that has trained an epoch: (process ids, flags); and its result if nothing happened."""
    argv = [*command["main_pretrain"], "--epochs", "8", "--save_every_steps", "1", *LOST, "--resume", "auto"]
    whole = start("main_pretrain", [*argv, "--output_dir", tmp_path / "whole"])
    assert [finish(child) for child in whole] == [0, 0], printed(tmp_path, 0)
    (tmp_path / "0").unlink()
    argv += ["--output_dir", tmp_path / "run"]
    children = start("main_pretrain", argv)
    until(tmp_path, "epoch 0:")
    return children, argv


def check_resumed(start, argv, tmp_path, **where):
    assert [finish(child) for child in start("main_pretrain", argv, **where)] == [0, 0], printed(tmp_path, 0)
    assert differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


def test_a_cable_that_is_unplugged_ends_both_nodes_and_loses_nothing(nodes, start, pretraining, tmp_path):
    children, argv = pretraining
    ip("-n", nodes[1], "link", "set", CABLE, "down")
    began = time.monotonic()
    codes = [finish(child) for child in children]
    ip("-n", nodes[1], "link", "set", CABLE, "up")
    assert codes == [EXIT_STOPPED] * 2 and time.monotonic() - began < 30
    for rank in range(2):
        assert printed(tmp_path, rank).count(f"rank {1 - rank}") == 1 and "--resume auto" in printed(tmp_path, rank)
    check_resumed(start, argv, tmp_path)


def test_a_node_that_is_killed_is_replaced_by_another(start, pretraining, tmp_path):
    children, argv = pretraining
    os.kill(children[1], signal.SIGKILL)
    assert finish(children[0]) == 1 and "rank 1 (last heard at epoch" in printed(tmp_path, 0)
    check_resumed(start, argv, tmp_path, swapped=True)  # rank 0 on the other node


def test_a_node_that_joins_late_is_waited_for(start, command, tmp_path):
    argv = [*command["main_pretrain"], "--epochs", "1", "--output_dir", tmp_path / "run"]
    first = start("main_pretrain", argv, ranks=[0], port=29700)
    time.sleep(4)
    second = start("main_pretrain", argv, ranks=[1], port=29700)
    assert [finish(child) for child in first + second] == [0, 0], printed(tmp_path, 0)
