"""The processes of a run, which must compute the same thing."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

from runtime.provenance import code_digest, hardware
from util.distributed import Timeouts, World, distributed, gather_objects, require_equal
from util.progress import log, setup_logging


def installed_versions() -> dict[str, str]:
    """Without importing the packages, which takes seconds."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


@contextlib.contextmanager
def process_group(device: str, dist_url: str, timeouts: Timeouts, arguments: dict[str, Any]) -> Iterator[World]:
    """Join the processes of the run, see util.distributed.distributed, and set up the log.

    ValueError on all of them where `arguments`, the code or the versions of libraries are not the same everywhere.
    """
    with distributed(device, dist_url, timeouts) as world:
        setup_logging()
        if world.size > 1:
            require_equal(
                {"code": code_digest(), **installed_versions(), **arguments},
                "start every process with the same command and the same installation",
            )
            machines = {str(machine) for machine in gather_objects(hardware(world.device))}
            if len(machines) > 1 and world.is_main:
                log.warning("results may differ in the last digits, because the processes run on %s", machines)
        yield world


def require_same_run(identity: dict[str, Any]) -> None:
    """ValueError on all processes where data, weights or whatever else defines the run is not the same everywhere."""
    require_equal(identity, "give every process the same copies of data, weights and checkpoints")
