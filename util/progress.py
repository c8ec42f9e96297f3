"""Progress bars on a terminal, silence in log files; one logger for everything else."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterable

from tqdm import tqdm

from util import distributed
from util.files import without_credentials
from util.lazy import lazy

torch = lazy("torch")

log = logging.getLogger("beyond_cls")


class WithoutCredentials(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def setup_logging() -> None:
    """Messages to standard output, without secrets of URLs; ranks other than 0 only warn."""
    logging.basicConfig(stream=sys.stdout, force=True)
    logging.root.handlers[0].setFormatter(WithoutCredentials("%(asctime)s %(message)s", "%H:%M:%S"))
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


def progress(iterable: Iterable, description: str, total: int | None = None, unit: str = "batch") -> tqdm:
    """`iterable` with a bar on rank 0 when standard error is a terminal."""
    quiet = distributed.rank() != 0 or not sys.stderr.isatty()
    return tqdm(iterable, desc=description, total=total, unit=unit, disable=quiet, dynamic_ncols=True, leave=False)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has taken at most so far: of the GPU's memory, or of the machine's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30
