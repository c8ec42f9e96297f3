"""Memory that is freed and asked for again, counted in page faults of a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from util.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4):  # glibc finds the places of aligned blocks again after some rounds
    faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_that_is_taken_a_second_time_costs_no_page_faults():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    )
    assert kept < 100 < returned  # 256 MiB are 65,536 small pages, or 128 large ones
