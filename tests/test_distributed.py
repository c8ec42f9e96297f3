"""The collectives on two processes, and the choice of the device."""

import pytest
import torch

from util.distributed import GradientMean, agree, distributed, from_main, gather_rows

TWO_PROCESSES = """
import time
import torch
from util import distributed as module
from util.distributed import *

with distributed("cpu") as world:
    r = world.rank
    assert world == (r, 2, torch.device("cpu")) and (rank(), world_size()) == (r, 2)
    assert [value.tolist() for value in gather_tensors(torch.tensor([r, 5]))] == [[0, 5], [1, 5]]
    rows = gather_rows(10 * r + torch.arange(3 + r)[:, None])
    assert rows.tolist() == [[0], [1], [2], [10], [11], [12], [13]]
    assert gather_rows(torch.zeros(2 * r, 4)).shape == (2, 4)
    assert agree(r, 5 - r) == [1, 5] and from_main({"rank": r}) == {"rank": 0}
    first, unused, second = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), 3, ()))
    first.grad, second.grad = torch.full((2, 2), float(r)), torch.tensor(4.0 * r)
    mean = GradientMean([first, unused, second], micro_steps=1)
    mean.add(torch.tensor([r, 3.0]))
    assert mean.take().tolist() == [0.5, 3]
    assert (first.grad == 0.5).all() and unused.grad is None and second.grad == 2
    module._contact.limit, module.BEAT = 0.5, 1  # rank 0 works for longer than the limit, and lives
    if r == 0:
        with alone():
            time.sleep(6)
    barrier()
assert world_size() == 1
"""


def test_two_processes_exchange_what_they_should(run_ranks, tmp_path):
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    result = run_ranks(tmp_path / "program.py")
    assert result.returncode == 0, result.stderr


# what is left of the threads when a program ends, in both of its processes
THREADS = """
import importlib, os, sys
from pathlib import Path
from cli.console import parse, run_main
from data_sets.loader import Watched

def left():
    return {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}

program, stop, *words = sys.argv[1:]
if stop == "stop":  # at the first batch of every loader
    import signal
    go = Watched.__iter__
    def stopping(watched):
        for batch in go(watched):
            signal.raise_signal(signal.SIGTERM)
            yield batch
    Watched.__iter__ = stopping
module, code = importlib.import_module(program), 0
try:
    run_main(module.main, parse(module.get_args_parser(), words))
except SystemExit as end:
    code = end.code
threads = {name for name in left() if "gloo" in name}
assert code == (85 if stop == "stop" else 0) and not threads, (code, threads)
"""


@pytest.mark.parametrize(("program", "stop"), [("main_linprobe", "stop"), ("main_analyze_attention", "end")])
def test_no_thread_of_the_process_group_is_left_when_python_ends(program, stop, run_program, tmp_path, image_folder):
    """One that is may abort the process (PyTorch's issue 190489), which was seen once in some hundred runs."""
    (tmp_path / "program.py").write_text(THREADS)
    words = ["--data_path", image_folder, "--model", "vit_demo_patch8", "--input_size", 32, "--amp", "float32",
             "--num_workers", 0, "--batch_size", 2, "--output_dir", tmp_path / "run"]  # fmt: skip
    words += ["--epochs", 1, "--warmup_epochs", 0] if program == "main_linprobe" else []
    result = run_program(tmp_path / "program.py", program, stop, *words, processes=2)
    assert result.returncode == 0, result.stderr


def test_one_process_needs_no_exchange():
    rows, parameter = torch.arange(3), torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    mean = GradientMean([parameter], micro_steps=1)
    mean.add(torch.tensor([2.0]))
    assert mean.take() == 2 and parameter.grad == 1
    assert gather_rows(rows) is rows and agree(7) == [7] and from_main(rows) is rows


def test_a_mean_gradient_does_not_depend_on_the_split_of_the_batch():
    parameter = torch.nn.Parameter(torch.zeros(1000))
    chunks = torch.randn(8, 1000) * torch.logspace(-6, 6, 8)[:, None]
    means = []
    for order in (range(8), [0, 2, 4, 6, 1, 3, 5, 7]):  # as one process takes the chunks, and as two do
        mean = GradientMean([parameter], micro_steps=8)
        for index in order:
            parameter.grad = chunks[index].clone()
            mean.add(torch.zeros(1))
        mean.take()
        means.append(parameter.grad)
    assert means[0].equal(means[1])


@pytest.mark.parametrize("device", ["gpu", "tpu:0", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"--device {device}: write cuda, cpu or auto"), distributed(device):
        pass


def test_cuda_is_refused_where_there_is_none_and_auto_is_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:1: this machine shows no CUDA device"), distributed("cuda:1"):
        pass
    with distributed("auto") as world:
        assert world == (0, 1, torch.device("cpu")) and world.rank == 0
