"""The processes of a run, which must compute the same thing."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from runtime.provenance import code_digest, hardware, versions
from util.distributed import Timeouts, World, distributed, gather_objects, require_equal
from util.progress import log, setup_logging


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next step: returning it to the system costs a page fault for each 4 KiB.

    Banks of [cls] probes train 1.7 times as fast on a CPU, a ViT-B 13 %. Of glibc; other C libraries have no mallopt.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors, too, come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def process_group(device: str, dist_url: str, timeouts: Timeouts, arguments: dict[str, Any]) -> Iterator[World]:
    """Join the processes of the run, see util.distributed.distributed, set up the log and the allocator.

    ValueError on all of them where `arguments`, the code or the versions of libraries are not the same everywhere.
    """
    keep_freed_memory()
    with distributed(device, dist_url, timeouts) as world:
        setup_logging()
        if world.size > 1:
            remedy = "start every process with the same command and the same installation"
            require_equal({"code": code_digest(), **versions(), **arguments}, remedy)
            machines = {str(machine) for machine in gather_objects(hardware(world.device))}
            if len(machines) > 1 and world.rank == 0:
                log.warning("results may differ in the last digits, because the processes run on %s", machines)
        yield world


def require_same_run(identity: dict[str, Any]) -> None:
    """ValueError on all processes where data, weights or whatever else defines the run is not the same everywhere."""
    require_equal(identity, "give every process the same copies of data, weights and checkpoints")
