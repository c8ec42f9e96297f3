"""Two nodes, emulated by two network namespaces with a cable between them: the same run, and the faults of networks.

    python -m pytest -m nodes tests/test_nodes.py

Needs root and `ip`; skipped elsewhere. A node is a namespace with one rank, forked from this process or from an agent
of torchrun there, as `torchrun --nnodes 2 --node-rank N --master-addr NODE0 --rdzv-conf timeout=60` starts it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from interruptions import (
    PROGRAMS,
    agent,
    analysed,
    differences,
    finish,
    flags,
    in_processes,
    launch,
    offspring,
    outcome,
)

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
    """start(program, argv, ranks, same=False): processes of a run, each on a node of its own or all on the first; their
    ids, or with agents=True those of the agents that start them."""
    monkeypatch.setattr(distributed, "LAST_WORDS", 1)
    running, ports = [], iter(range(29500, 29600))

    def begin(program, argv, ranks=(0, 1), same=False, port=None, swapped=False, agents=False):
        port = port or next(ports)
        children = []
        for rank in ranks:
            node = 0 if same else rank ^ swapped
            where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0 if same else int(swapped)],
                     "MASTER_PORT": str(port)}  # fmt: skip
            words, output = list(map(str, argv)), tmp_path / f"{rank}"
            if not agents:
                children.append(launch(program, words, output, where, lambda node=node: enter(node)))
                continue
            static = {"rdzv_backend": "static", "rdzv_endpoint": f"{where['MASTER_ADDR']}:{port}",
                      "rdzv_configs": {"rank": rank, "timeout": 60}}  # fmt: skip
            children.append(agent(program, words, output, 1, lambda node=node: enter(node), nodes=2, **static))
        running.extend(children)
        return children

    def enter(node):
        os.environ["GLOO_SOCKET_IFNAME"] = CABLE
        with open(f"/var/run/netns/{nodes[node]}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET

    yield begin
    for child in running:
        kill_node(child)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def kill_node(process):
    """A rank, or an agent with what it has started."""
    for each in (process, *offspring(process)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


@pytest.fixture(scope="module")
def command(image_folder, pretrained):
    """{program: flags}"""
    commands = {name: [*flags(name, image_folder, pretrained), "--batch_size", "4"] for name in PROGRAMS}
    commands["main_analyze_attention"] = [
        "--data_path", image_folder, "--model", "vit_demo_patch8", "--finetune", pretrained, "--input_size", 32,
        "--amp", "float32", "--device", "cpu", "--num_workers", 0, "--batch_size", 2, "--save_every_minutes", 1e-9,
        "--metrics", "cls_self_attention", "--num_examples", 0,
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
    for name, how in (("one", {"same": True}), ("two", {}), ("agents", {"agents": True})):
        children = start(program, [*command[program], "--output_dir", tmp_path / name], **how)
        assert [finish(child) for child in children] == [0, 0], printed(tmp_path, 0)
        assert differences(left(tmp_path / name), left(tmp_path / "one")) == []


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Flags of a pretraining, and its folder if nothing happens: of two processes on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    argv = [*map(str, command["main_pretrain"]), "--epochs", "8", "--save_every_steps", "1"]
    assert in_processes(2, "main_pretrain", [*argv, "--output_dir", str(folder)], folder / "output") == [0, 0]
    return [*argv, *LOST, "--resume", "auto"], folder


@pytest.fixture
def pretraining(start, whole, tmp_path):
    """pretraining(agents): process ids of a run on two nodes that has trained an epoch, and its flags."""

    def begin(agents):
        argv = [*whole[0], "--output_dir", tmp_path / "run"]
        children = start("main_pretrain", argv, agents=agents)
        until(tmp_path, "epoch 0:")
        return children, argv

    return begin


def check_resumed(start, argv, whole, tmp_path, **how):
    assert [finish(child) for child in start("main_pretrain", argv, **how)] == [0, 0], printed(tmp_path, 0)
    assert differences(outcome(tmp_path / "run"), outcome(whole[1])) == []


@pytest.mark.parametrize("agents", [False, True])
def test_a_cable_that_is_unplugged_ends_both_nodes_and_loses_nothing(
    agents, nodes, start, pretraining, whole, tmp_path
):
    children, argv = pretraining(agents)
    ip("-n", nodes[1], "link", "set", CABLE, "down")
    began = time.monotonic()
    codes = [finish(child) for child in children]
    ip("-n", nodes[1], "link", "set", CABLE, "up")
    assert codes == [1 if agents else EXIT_STOPPED] * 2 and time.monotonic() - began < 30
    for rank in range(2):
        (line,) = (line for line in printed(tmp_path, rank).splitlines() if "--resume auto" in line)
        assert f"rank {1 - rank}" in line
    check_resumed(start, argv, whole, tmp_path, agents=agents)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("agents", [False, True])
def test_a_node_that_is_killed_is_replaced_by_another(agents, victim, start, pretraining, whole, tmp_path):
    children, argv = pretraining(agents)
    kill_node(children[victim])
    began = time.monotonic()
    assert finish(children[1 - victim]) == 1 and time.monotonic() - began < 30
    assert f"rank {victim}" in printed(tmp_path, 1 - victim) and "--resume auto" in printed(tmp_path, 1 - victim)
    check_resumed(start, argv, whole, tmp_path, swapped=not agents)  # rank 0 on the other node


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_of_an_agent_that_is_killed_finish_or_end(victim, start, pretraining, whole, tmp_path):
    """The other agent waits for the killed one, up to 300 seconds, before it ends."""
    children, argv = pretraining(agents=True)
    ranks = [rank for child in children for rank in offspring(child)]
    os.kill(children[victim], signal.SIGKILL)
    end = time.monotonic() + 90
    while any(Path(f"/proc/{rank}/exe").exists() for rank in ranks):
        assert time.monotonic() < end, "ranks live on without their agent"
        time.sleep(0.1)
    kill_node(children[1 - victim])
    check_resumed(start, argv, whole, tmp_path)


@pytest.mark.parametrize("agents", [False, True])
def test_a_node_that_joins_late_is_waited_for(agents, start, command, tmp_path):
    argv = [*command["main_pretrain"], "--epochs", "1", "--output_dir", tmp_path / "run"]
    first = start("main_pretrain", argv, ranks=[0], port=29700, agents=agents)
    time.sleep(3)
    second = start("main_pretrain", argv, ranks=[1], port=29700, agents=agents)
    assert [finish(child) for child in first + second] == [0, 0], printed(tmp_path, 0)
