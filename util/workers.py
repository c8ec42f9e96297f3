"""Worker processes of loaders: whether this machine can run them, and what their failures mean."""

import contextlib
import os
import re
import resource
import socket
from multiprocessing.util import get_temp_dir

WAIT = 600  # seconds for a batch
NO_WORKERS = "--num_workers 0 loads images without worker processes"
FAILURES = {  # pattern of an error -> what it means
    r"Bus error|</torch_.*No space left on device": "/dev/shm is full: fewer --num_workers, a smaller --batch_size, or "
    "docker run --shm-size",
    "Too many open files": f"too many open files for the loader's workers: raise ulimit -n; {NO_WORKERS}",
    "DataLoader timed out": f"the loader's workers live but have delivered nothing for {WAIT} s; {NO_WORKERS}",
}


class DeadWorker(RuntimeError):
    """A worker process, of a loader or of an evaluation, has ended or delivers nothing."""


def check_workers(count: int) -> None:
    """ValueError where so many workers could not pass their batches to the program: they would only log tracebacks."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = len(os.listdir("/proc/self/fd")) + 16 * (1 + count)
    if 0 <= hard < needed:
        raise ValueError(f"{count} workers need {needed} open files, ulimit -n is {hard}: raise it; {NO_WORKERS}")
    folder = os.environ.get("TMPDIR", "/tmp")
    try:
        folder = get_temp_dir()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.bind(f"{folder}/listener-probe")
        os.unlink(f"{folder}/listener-probe")
    except OSError as error:
        advice = f"set TMPDIR to a short path that can be written; {NO_WORKERS}"
        raise ValueError(f"loader workers cannot make sockets in {folder} ({error}): {advice}") from error


def worker_failure(error: BaseException) -> DeadWorker | None:
    """The one-line error of a worker's failure that PyTorch reports; None for other errors."""
    text = " ".join(str(error).split())
    for pattern, meaning in FAILURES.items():
        if re.search(pattern, text):
            return DeadWorker(meaning)
    return DeadWorker(text) if "DataLoader worker (pid" in text else None
