"""The collectives on two processes, and the choice of the device."""

import pytest
import torch

from util.distributed import average_gradients, distributed, gather_rows, mean_over_ranks

TWO_PROCESSES = """
import torch
from util.distributed import *

with distributed("cpu") as world:
    r = world.rank
    assert world == (r, 2, torch.device("cpu")) and (rank(), world_size()) == (r, 2)
    assert [value.tolist() for value in gather_tensors(torch.tensor([r, 5]))] == [[0, 5], [1, 5]]
    rows = gather_rows(10 * r + torch.arange(3 + r)[:, None])
    assert rows.tolist() == [[0], [1], [2], [10], [11], [12], [13]]
    assert gather_rows(torch.zeros(2 * r, 4)).shape == (2, 4)
    assert mean_over_ranks(torch.tensor(float(r))) == 0.5
    first, unused, second = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), 3, ()))
    first.grad, second.grad = torch.full((2, 2), float(r)), torch.tensor(4.0 * r)
    average_gradients([first, unused, second])
    assert (first.grad == 0.5).all() and unused.grad is None and second.grad == 2
    barrier()
assert world_size() == 1
"""


def test_two_processes_exchange_what_they_should(run_program, tmp_path):
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    result = run_program(tmp_path / "program.py", processes=2)
    assert result.returncode == 0, result.stderr


def test_one_process_needs_no_exchange():
    rows, parameter = torch.arange(3), torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    average_gradients([parameter])
    assert gather_rows(rows) is rows and mean_over_ranks(torch.tensor(2.0)) == 2 and parameter.grad == 1


@pytest.mark.parametrize("device", ["gpu", "tpu:0", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"--device {device}: write cuda, cpu or auto"), distributed(device):
        pass


def test_cuda_is_refused_where_there_is_none_and_auto_is_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:1: this machine shows no CUDA device"), distributed("cuda:1"):
        pass
    with distributed("auto") as world:
        assert world == (0, 1, torch.device("cpu")) and world.is_main
