"""What the training loop decides by."""

import math
import platform

import pytest
import torch

from util.finite import all_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_single_value_that_is_not_finite_is_found(value, place):
    tensors = [torch.randn(300, 70), torch.randn(5)]
    assert all_finite(tensors)
    tensors[place][-1] = value
    assert not all_finite(tensors)


def test_infinities_of_both_signs_do_not_cancel():
    assert not all_finite([torch.tensor([math.inf, 1.0, -math.inf])])


def test_large_and_tiny_gradients_are_finite():
    assert all_finite([torch.full((1000, 1000), 1e30), torch.full((3,), 1e-44), torch.zeros(0)])
    assert all_finite([torch.full((1000, 1000), 6e4, dtype=torch.float16)])


FAULTS = """
import resource, sys
sys.path.insert(0, ".")
import torch
from cli.session import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of another C library")
def test_freed_memory_is_not_fetched_again_from_the_system(run_program, tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    faults = {word: int(run_program(tmp_path / "faults.py", word).stdout) for word in ("return", "keep")}
    assert faults["return"] > 2**23 * 4 / 4096 / 2 and faults["keep"] < 100
