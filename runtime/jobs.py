"""A job: what each of its processes runs, and how it comes back after a stop.

It imports little: until submitit has read the Task, a signal would end the job.
"""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

import submitit
from submitit.core.utils import JobPaths
from submitit.helpers import DelayedSubmission

from util import signals

GONE = "GONE"  # from the queue
ATTEMPTS = 5  # to ask SLURM: what ends a job is sent several times within moments, and ends the messenger, too
REQUEUE_WAIT = 60  # seconds that processes leave the one that puts the job back, which ends them
MAX_RESTARTS = 20  # of a job whose ranks lose each other


class JobFailed(RuntimeError):
    """The program has ended with an error, which it has printed already."""


@dataclasses.dataclass
class Task:
    """What every process of a job runs. submitit's signal handlers give way to the program's own while it runs: so a
    request to stop ends it between two steps, saved, and only then the job is put back into the queue."""

    program: str
    argv: list[str]

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into the queue: the same again, which resumes."""
        return DelayedSubmission(self)

    def __call__(self) -> None:
        from cli.console import parse, run_main
        from util.rendezvous import rendezvous_port

        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of an earlier start
        if job.name() == "local" and job.num_tasks > 1:  # on SLURM, util.rendezvous knows
            ranks = {"RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rendezvous_port(int(job.job_id))}
            os.environ.update({name: str(value) for name, value in (ranks | where).items()})
        sys.argv = [f"{self.program}.py", *self.argv]  # what records and errors name
        sys.excepthook = lambda kind, *rest: None if kind is JobFailed else sys.__excepthook__(kind, *rest)
        try:
            module = importlib.import_module(self.program)
            run_main(module.main, parse(module.get_args_parser(), self.argv))
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)  # nothing is left to stop, and Python's end would be a failure
        except SystemExit as end:
            if isinstance(end.__cause__, signals.Stopped):
                come_back(job, end.__cause__)
            if end.code == signals.EXIT_STOPPED and job.name() == "slurm":
                replace_lost_ranks(job, end.__cause__)
            if end.code:
                raise JobFailed(str(end.__cause__ or f"exit code {end.code}")) from None


def come_back(job: submitit.JobEnvironment, stop: signals.Stopped) -> NoReturn:
    """End a process that was asked to stop, and requeue its job where the signal meant that.

    Pre-emption and the user's scancel both come as SIGTERM. But SLURM calls a job that it cancels, or puts back by
    itself, COMPLETING by then, and one that it only warns RUNNING; and to requeue a job that its user cancels
    would bring it back to life. On one machine, SIGTERM and Ctrl-C mean the end, SIGUSR2 is submitit's time-out.
    """
    on_slurm = job.name() == "slurm"
    wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) if on_slurm else (signal.SIGUSR2,)
    known = state_of(job.job_id) if on_slurm else "RUNNING"
    if stop.number not in wanted:
        _leave(job, "ended")
    if known not in ("RUNNING", None):
        _leave(job, f"{known} already: SLURM goes on with it")
    if job.global_rank != 0:
        if on_slurm:  # where a process that ends takes the others along
            _wait_for_requeue()
        _leave(job)
    # each process removes what an earlier start has left, so that an error is of this start
    paths = [JobPaths(os.environ["SUBMITIT_FOLDER"], job.job_id, rank) for rank in range(job.num_tasks)]
    if any(path.result_pickle.exists() for path in paths):  # SLURM ends the others with the signal of a pre-emption
        _leave(job, "ended, because another of its processes has failed")
    print(f"job {job.job_id} goes back into the queue", file=sys.stderr)
    try:
        signal.raise_signal(getattr(signal, f"SIG{job.USR_SIG}"))  # submitit's handler: checkpoint, requeue, exit
    except (subprocess.SubprocessError, OSError) as error:
        if state_of(job.job_id) == "RUNNING":  # else it is there, and scontrol was ended together with the job
            _leave(job, f"cannot go back into the queue ({error}): submit it again to continue")
    _leave(job)


def replace_lost_ranks(job: submitit.JobEnvironment, error: BaseException) -> NoReturn:
    """End a process whose other ranks do not answer; the one that reports it requeues the job, perhaps on other nodes.
    submitit would leave that to rank 0, which may be the lost rank."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if restarts >= MAX_RESTARTS:
        raise JobFailed(f"{error}, after {restarts} restarts") from None
    if getattr(error, "reported_here", True):
        print(f"job {job.job_id} goes back into the queue", file=sys.stderr)
        subprocess.run(["scontrol", "requeue", job.job_id], timeout=60, check=False)
    _wait_for_requeue()
    _leave(job)


def _wait_for_requeue() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(REQUEUE_WAIT)


def _leave(job: submitit.JobEnvironment, why: str = "") -> NoReturn:
    if why and job.global_rank == 0:
        print(f"job {job.job_id}: {why}", file=sys.stderr)
    sys.exit(signals.EXIT_STOPPED)


def state_of(job_id: str) -> str | None:
    """What SLURM calls a job of the queue, or one that has ended a moment ago; GONE where it knows none; None where it
    does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job_id]
    for _ in range(ATTEMPTS):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode >= 0:
            break
    if answer.stdout.split():
        return answer.stdout.split()[0]
    return GONE if answer.returncode == 0 or "Invalid job id" in answer.stderr else None
