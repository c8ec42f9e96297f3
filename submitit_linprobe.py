"""Submit a program of this project to SLURM, or run it here; requeue it when it is pre-empted or out of time."""

import argparse

from cli.console import checked, run_main
from cli.launcher import WARNING, Planned, check, command_line, gpus_per_node, plan

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    ARGS = checked(command_line(), check, lambda args: plan(args, args.argv))

import contextlib
import io
import os
import re
import shlex
import sys
import time
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, pickle_load

from runtime.jobs import GONE, Task, state_of
from runtime.provenance import ROOT, take_snapshot
from util import signals

REQUEUES = 100  # after as many time-outs, something is wrong
ENDED = {GONE, "COMPLETED", "STOPPED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "PREEMPTED"}
OTHERS = re.compile(r"submitit |srun: |slurmstepd|\d\d:\d\d:\d\d Submitted job triggered")  # in a job's log


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which also works where there is no SLURM: as long as nothing is submitted."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """The script for sbatch."""
        self.parameters["map_count"] = jobs if jobs > 1 else None
        return self._make_submission_file_text(self._submitit_command_str, "")


def build_executor(args: argparse.Namespace, code: Path) -> SlurmExecutor | submitit.LocalExecutor:
    """code: the folder of the modules that the job runs."""
    # -P: not those of the folder where it is submitted, which python -m would put first
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable, "-P"])
    gpus, folder = gpus_per_node(args), args.job_dir.resolve() / "jobs"
    tasks = args.tasks_per_node or max(gpus, 1)
    both = {"signal_delay_s": WARNING, "stderr_to_stdout": True}
    if args.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES, python=python)
        local.update_parameters(timeout_min=args.timeout, gpus_per_node=gpus, tasks_per_node=tasks, **both)
        return local
    slurm = SlurmExecutor(folder, max_num_timeout=REQUEUES, python=python)
    same = ("nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "comment")
    slurm.update_parameters(
        **{name: getattr(args, name) for name in same},
        **both,
        job_name=args.main,
        ntasks_per_node=tasks,
        gpus_per_node=gpus or None,
        mem=None if args.mem_gb is None else f"{round(args.mem_gb * 1024)}M",
        time=args.timeout,
        wckey=None,
        array_parallelism=args.parallel,
        # since 22.05, srun does not know sbatch's options; and a process that fails leaves others that wait for it
        srun_args=[f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True, **dict(pair.split("=", 1) for pair in args.slurm)},
    )
    return slurm


def submit(args: argparse.Namespace, planned: list[Planned]) -> list[submitit.Job]:
    """Submit the jobs, several as an array. ValueError with SLURM's message where it refuses them."""
    code = ROOT
    if not args.no_snapshot:
        code = take_snapshot(args.job_dir.resolve() / "code")
        print(f"code: {code}")
    executor = build_executor(args, code)
    folder = args.job_dir.resolve() / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints the error that it raises
            jobs = executor.submit_array([Task(args.main, job.argv) for job in planned])
    except FailedJobError as error:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise ValueError(f"SLURM refuses the job: {error}") from error
    for path in folder.glob(".submission_file_*"):  # links to what has a name by now
        path.unlink()
    for job, entry in zip(jobs, planned, strict=True):
        print(f"job {job.job_id}: {state(job)}, run folder {entry.folder}, log {job.paths.stdout}")
    return jobs


def results(job: submitit.Job) -> list[tuple[str, str, Path]]:
    """("success" or "error", its text, log) of the processes that ended; those that lost another one come last."""
    paths = [job.task(rank).paths for rank in range(job.num_tasks)]
    ended = [(*pickle_load(path.result_pickle), path.stdout) for path in paths if path.result_pickle.exists()]
    return sorted(ended, key=lambda result: (result[0] != "error", "has ended, while rank" in str(result[1])))


def state(job: submitit.Job) -> str:
    """SLURM's name of the state, also for local jobs; STOPPED: ended on request, and not requeued."""
    local = isinstance(job, submitit.LocalJob)
    known = (GONE if job.done() else "RUNNING") if local else state_of(job.job_id)
    if known == GONE and not local:  # the accounts may know, where they are kept
        known = job.get_info(mode="force").get("State", GONE).split()[0]
    if known != GONE:
        return known or "UNKNOWN"
    outcomes = [outcome for outcome, *_ in results(job)]
    if "error" in outcomes:
        return "FAILED"
    ended = "STOPPED" if local else GONE
    return "COMPLETED" if len(outcomes) == job.num_tasks else ended


def wait(jobs: list[submitit.Job]) -> bool:
    """Print the states of the jobs as they change, until all have ended. Whether all are COMPLETED."""
    states, pause = {job.job_id: "" for job in jobs}, 0.5
    while True:
        for job in jobs:
            if states[job.job_id] not in ENDED and (now := state(job)) != states[job.job_id]:
                states[job.job_id] = now
                print(f"job {job.job_id}: {now}", flush=True)
                if now in ENDED - {"COMPLETED"}:
                    print(failure(job), file=sys.stderr)
        if ENDED.issuperset(states.values()):
            return set(states.values()) == {"COMPLETED"}
        try:
            time.sleep(pause)
        except signals.Stopped as stop:
            if isinstance(jobs[0], submitit.SlurmJob):
                stop.outcome = "the jobs go on"
            raise
        pause = min(1.2 * pause, 30 if isinstance(jobs[0], submitit.SlurmJob) else 1)


def failure(job: submitit.Job) -> str:
    """The last five lines of the log of the process that failed."""
    failed = [log for outcome, _, log in results(job) if outcome == "error"]
    log = [*failed, job.paths.stdout][0]
    text = [line for line in (log.read_text(errors="replace").splitlines() if log.exists() else []) if line.strip()]
    if failed:  # the program has printed its error; messages of others about its end only hide it
        text = [line for line in text if not OTHERS.match(line)]
    return "\n".join([f"the last lines of {log}:", *(f"    {line}" for line in text[-5:])])


def main(args: argparse.Namespace) -> None:
    check(args)
    planned = plan(args, args.argv)
    if args.dry_run:
        if args.cluster == "slurm":
            code = ROOT if args.no_snapshot else take_snapshot(args.job_dir.resolve() / "code", write=False)
            print(build_executor(args, code).script(len(planned)))
        for job in planned:
            print(f"# every process runs: {shlex.join(['python', f'{args.main}.py', *job.argv])}")
        return
    if args.cluster == "local" and len(planned) > 1:  # they would share the GPUs
        good = [wait(submit(args, [job])) for job in planned]
    else:
        jobs = submit(args, planned)
        good = [wait(jobs)] if args.wait else []
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, ARGS)
