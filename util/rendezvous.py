"""How the processes of a run find each other: from torchrun's or SLURM's environment to one store that all share."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from util.lazy import lazy

dist = lazy("torch.distributed")
GRACE = 10  # seconds that the other ranks wait longer than rank 0, which reports who is missing


class NotJoined(RuntimeError):
    """Other processes have not come; the same command may succeed later."""


class Address(NamedTuple):
    """Of this process among those of its run, and of the store where they meet."""

    rank: int
    size: int
    host: str
    port: int
    serves: bool  # whether this process opens the port


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set for a process that srun has started with others; {} for any other process.

    SLURM_PROCID and SLURM_NTASKS are there in a batch script and in the shell of salloc, too, where one process runs;
    only a step has a number of tasks. A terminal (srun --pty) belongs to a user, who starts programs one by one.
    """
    remedy = "start the processes with srun, or unset SLURM_STEP_NUM_TASKS"
    try:
        size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
        if size == 1 or "SLURM_PTY_PORT" in environment:
            return {}
        # the first of "gpu[03-05,7]-a,login1" is gpu03-a; on a single node, its name need not be known to any resolver
        first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
        job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
        return {
            "MASTER_ADDR": "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else first,
            "MASTER_PORT": str(rendezvous_port(job, step)),
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": environment["SLURM_LOCALID"],
        }
    except KeyError as error:
        raise ValueError(f"SLURM_STEP_NUM_TASKS is set but {error.args[0]} is not: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"the numbers of SLURM's job, step and tasks must be integers ({error}): {remedy}") from error


def rendezvous_port(job: int, step: int = 0) -> int:
    """A port that all processes of a job know and that jobs on the same node do not share, below the system's ephemeral
    ports (32768 on Linux)."""
    return 10000 + (job + 997 * step) % 20000


def address(dist_url: str, environment: Mapping[str, str]) -> Address:
    """The address that the environment describes. ValueError where it is incomplete or contradictory."""
    url = urlsplit(dist_url)
    if url.scheme not in ("env", "tcp"):
        raise ValueError(f"--dist_url {dist_url}: write env:// or tcp://HOST:PORT")
    try:
        of_url = {"MASTER_ADDR": url.hostname, "MASTER_PORT": url.port or 0} if url.scheme == "tcp" else {}
        given = {"LOCAL_RANK": 0, **environment, **of_url}
        values = {name: int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        rank, size, local_rank, port, host = *values.values(), given["MASTER_ADDR"]
    except KeyError as error:
        remedy = "start the processes with torchrun or srun, or unset RANK"
        raise ValueError(f"RANK is set but {error.args[0]} is not: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be integers ({error})") from error
    if not (0 <= rank < size and local_rank >= 0 and host and 0 < port < 2**16):
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{shown}: RANK must be below WORLD_SIZE, LOCAL_RANK >= 0, MASTER_PORT from 1 to 65535")
    of_agent = url.scheme == "env" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Address(rank, size, host, port, rank == 0 and not of_agent)


def meet(here: Address, seconds: float) -> dist.Store:
    """A store for exactly the processes that run now. NotJoined, naming those that have not come within the time."""
    end = time.monotonic() + seconds
    store = _open(here, end)
    # torchrun may keep its store when it restarts a run, and one of its agents may have restarted more often than
    # another: so rank 0 opens a new session, which goes ahead with the processes that have signed in, and no others
    mine = session = uuid.uuid4().hex
    if here.rank == 0:
        store.set("session", mine)
    while True:
        if here.rank:
            if store.check(["session"]):
                session = store.get("session").decode()
                store.set(f"{session}/{here.rank}", mine)
                if store.check([f"{session}/go"]) and mine in store.get(f"{session}/go").decode():
                    break
        else:
            others = [f"{mine}/{rank}" for rank in range(1, here.size)]
            if not others or store.check(others):
                store.set(f"{mine}/go", " ".join(store.get(other).decode() for other in others))
                break
        if time.monotonic() > end + GRACE * (here.rank > 0):
            missing = [str(r) for r in range(1, here.size) if not store.check([f"{session}/{r}"])] or ["0"]
            raise NotJoined(
                f"rank {', '.join(missing)} of {here.size} has not joined at {here.host}:{here.port} within "
                f"{seconds:g} s: is it running, and may it reach that port? --dist_timeout allows more time"
            )
        time.sleep(0.05)
    return dist.PrefixStore(session, store)


def _open(here: Address, end: float) -> dist.TCPStore:
    """The store of the run, served by rank 0 or by torchrun."""
    while not here.serves:  # not left to torch, which warns at every attempt and cannot be interrupted
        try:
            socket.create_connection((here.host, here.port), timeout=1).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise NotJoined(f"rank 0 does not answer at {here.host}:{here.port} ({error})") from error
            time.sleep(0.1)
    wait = timedelta(seconds=max(end - time.monotonic(), 1))
    try:
        return dist.TCPStore(here.host, here.port, None, here.serves, wait, wait_for_workers=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise NotJoined(f"{here.host}:{here.port} cannot be reached: is it rank 0's host and port?") from error
        taken = f"port {here.port} of {here.host} is taken by another program"
        raise ValueError(f"{taken}: choose another MASTER_PORT") from error


def interruptible(seconds: float, function: Callable, *arguments: Any, **options: Any) -> Any:
    """The result of a function that blocks in compiled code, while signals are still handled. TimeoutError if it takes
    longer; it then goes on in a thread of its own."""
    outcome: Future = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while not outcome.done():
        if time.monotonic() > end:
            raise TimeoutError(f"no answer within {seconds:g} s")
        thread.join(0.1)
    return outcome.result()
