"""Send a program of this project to SLURM, or run it here, and requeue it where it is pre-empted or out of time.

Flags that are not the launcher's are the program's. The run folder is --job_dir; every start continues its newest
checkpoint (--resume auto), so a requeued job goes on where it stopped. Jobs run a copy of the code as it is now, and
in the folder where they were submitted.

examples:
    # probes on a node of four GPUs
    python submitit_linprobe.py --job_dir runs/mae_b --nodes 1 --ngpus 4 --partition gpu \\
        --model vit_base_patch16 --finetune mae_vit_base_patch16 --cls_features cls pos abmilp \\
        --batch_size 2048 --accum_iter 2 --data_path $IMAGENET

    # an array of jobs, each in a folder of its own; shown, not submitted
    python submitit_linprobe.py --job_dir runs/seeds --ngpus 4 --sweep seed 0 1 2 --dry_run \\
        --finetune mae_vit_base_patch16 --data_path $IMAGENET

    # another program, on two nodes
    python submitit_linprobe.py --main main_pretrain --job_dir runs/mae_small --nodes 2 --ngpus 8 \\
        --batch_size 256 --data_path $IMAGENET
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import submitit
import torch
from submitit.core.utils import FailedJobError, pickle_load

from cli.arguments import Parser, check_files, identity, parse, run_main
from runtime.folder import ROOT, AnotherRun, RunFolder
from runtime.jobs import GONE, Task, state_of
from runtime.resumable import check_identity
from runtime.snapshot import take_snapshot
from util import signals

PROGRAMS = sorted(path.stem for path in ROOT.glob("main_*.py"))
WARNING = 120  # seconds between SLURM's signal and the end of a job's time
REQUEUES = 100  # after as many time-outs, something is wrong
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "STOPPED", GONE,
}  # fmt: skip
OTHERS = re.compile(r"submitit |srun: |slurmstepd|\d\d:\d\d:\d\d Submitted job triggered")  # in a job's log


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to run")
    what.add_argument("--main", choices=PROGRAMS, default="main_linprobe", help="program to run")
    what.add_argument("--job_dir", required=True, type=Path,
                      help="run folder; logs go to its jobs/, the copy of the code to its code/")  # fmt: skip
    what.add_argument("--sweep", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"),
                      help="one job for each value, in a folder of its own: seed 0 1 2; "
                      "model,finetune A,a.pth B,b.pth; given several times, for each combination")  # fmt: skip
    what.add_argument("--dry_run", action="store_true", help="print the sbatch script and the commands; submit nothing")
    what.add_argument("--wait", action="store_true", help="stay until the jobs have ended, and print their outcome")
    what.add_argument("--no_snapshot", action="store_true", help="run the code in place, with its later changes")
    what.add_argument("--remote_paths", action="store_true", help="files lie where this machine does not see them")

    job = parser.add_argument_group("job")
    job.add_argument("--cluster", choices=["slurm", "local"], default=None, help="default: SLURM where there is one")
    job.add_argument("--nodes", default=1, type=int, help="machines")
    job.add_argument(
        "--ngpus", default=None, type=int,
        help="GPUs and processes per node (default: 8, MAE's; here with --cluster local: what there is); 0: the CPU",
    )  # fmt: skip
    job.add_argument("--tasks_per_node", default=None, type=int, help="processes per node, where it is not --ngpus")
    job.add_argument("--cpus_per_task", default=10, type=int, help="CPU cores of each process")
    job.add_argument("--mem_gb", default=None, type=float, help="memory per node")
    job.add_argument("--timeout", default=4320, type=int, help="minutes until the job is requeued")
    job.add_argument("--partition", default=None, help="SLURM's, where it has several")
    job.add_argument("--account", default=None, help="that is charged")
    job.add_argument("--qos", default=None, help="quality of service")
    job.add_argument("--constraint", default=None, help="feature that nodes must have")
    job.add_argument("--comment", default=None, help="in SLURM's records")
    job.add_argument("--parallel", default=256, type=int, help="jobs of a sweep that run at a time")
    job.add_argument("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="any other option of sbatch")
    old = parser.add_argument_group("accepted for old commands")
    old.add_argument("--use_volta32", action="store_const", const="volta32gb", dest="constraint",
                     help="MAE's: --constraint volta32gb")  # fmt: skip
    return parser


class Planned(NamedTuple):
    """One job of a submission."""

    folder: Path
    argv: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# what is to be run, checked
# ---------------------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, argv: list[str]) -> list[Planned]:
    """The jobs that the arguments ask for, each with what its program is told; ValueError where it would refuse."""
    choices = [[(sweep[0], value) for value in sweep[1:]] for sweep in args.sweep]
    if not all(choices):
        raise ValueError(f"--sweep {args.sweep[choices.index([])][0]}: write the values after the flag")
    jobs = []
    for chosen in itertools.product(*choices):
        words = [word for names, values in chosen for word in swept(names, values)]
        name = "_".join(f"{names}={values}" for names, values in chosen)
        folder = args.job_dir.resolve() / re.sub(r"[^\w.,=+-]+", "_", name)
        jobs.append(Planned(folder, program_arguments(args, [*argv, *words], folder)))
    folders = [job.folder for job in jobs]
    if len(set(folders)) < len(folders):
        raise ValueError("--sweep: two of its jobs would share a folder; write every value once")
    return jobs


def swept(names: str, values: str) -> list[str]:
    """["--seed", "0"] for seed and 0; several flags at once are separated by commas, and so are their values."""
    flags = names.split(",")
    parts = values.split(",") if len(flags) > 1 else [values]
    if len(parts) != len(flags):
        raise ValueError(f"--sweep {names} {values}: it names {len(flags)} flags and {len(parts)} values")
    return [word for flag, part in zip(flags, parts, strict=True) for word in (f"--{flag.lstrip('-')}", part)]


def program_arguments(args: argparse.Namespace, argv: list[str], folder: Path) -> list[str]:
    """The launcher's own settings, then the user's, as far as this machine can tell fit to run."""
    module = importlib.import_module(args.main)
    parser = module.get_args_parser()
    parser.beside = list(get_args_parser()._option_string_actions)
    own = ["--output_dir", str(folder), "--resume", "auto"]
    if gpus_per_node(args) == 0:
        own += ["--device", "cpu"]
    argv = [*own, *argv]
    told = parse(parser, argv)
    if told.output_dir != str(folder):
        raise ValueError(
            f"--output_dir {told.output_dir}: the run folder is --job_dir, or a folder in it; leave it out"
        )
    check = getattr(module, "settle", None) or getattr(module, "check", None)
    if check is not None:
        check(told)
    check_files(told, args.remote_paths)
    if told.resume == "auto" and RunFolder(folder).checkpoints() and (folder / "args.json").exists():
        try:
            check_identity(identity(told), json.loads((folder / "args.json").read_text())["args"])
        except AnotherRun as error:
            raise ValueError(str(error).replace("--output_dir", "--job_dir")) from error
    return argv


def gpus_per_node(args: argparse.Namespace) -> int:
    if args.ngpus is not None:
        return args.ngpus
    return torch.cuda.device_count() if args.cluster == "local" else 8


def settle(args: argparse.Namespace) -> None:
    """Choose the cluster, and refuse what no job can be; ValueError."""
    if args.cluster is None:
        args.cluster = "slurm" if args.dry_run or shutil.which("sbatch") else "local"
    if args.cluster == "slurm" and not (args.dry_run or shutil.which("sbatch")):
        raise ValueError("--cluster slurm: there is no sbatch here; --cluster local runs the job on this machine")
    if args.cluster == "local" and args.nodes > 1:
        raise ValueError(f"--nodes {args.nodes}: --cluster local is this one machine")
    if "%" in str(args.job_dir):
        raise ValueError(f"--job_dir {args.job_dir}: SLURM replaces % and what follows it; write the folder itself")
    if args.timeout * 60 <= WARNING:
        raise ValueError(f"--timeout {args.timeout}: a job is asked to stop {WARNING} seconds before its time is up")
    if bad := [pair for pair in args.slurm if "=" not in pair]:
        raise ValueError(f"--slurm {bad[0]}: write NAME=VALUE, as in --slurm exclude=node3")


# ---------------------------------------------------------------------------------------------------------------------
# submission
# ---------------------------------------------------------------------------------------------------------------------


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which also works where there is no SLURM: as long as nothing is submitted."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """What would go to sbatch."""
        self.parameters["map_count"] = jobs if jobs > 1 else None
        return self._make_submission_file_text(self._submitit_command_str, "")


def build_executor(args: argparse.Namespace, code: Path) -> SlurmExecutor | submitit.LocalExecutor:
    """code: the folder of the modules that the job runs."""
    # -P: not those of the folder where it is submitted, which python -m would put first
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable, "-P"])
    gpus, folder = gpus_per_node(args), args.job_dir.resolve() / "jobs"
    tasks = args.tasks_per_node or max(gpus, 1)
    if args.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES, python=python)
        local.update_parameters(
            timeout_min=args.timeout, gpus_per_node=gpus, tasks_per_node=tasks, signal_delay_s=WARNING,
            stderr_to_stdout=True,
        )  # fmt: skip
        return local
    slurm = SlurmExecutor(folder, max_num_timeout=REQUEUES, python=python)
    slurm.update_parameters(
        job_name=args.main, nodes=args.nodes, ntasks_per_node=tasks, gpus_per_node=gpus or None,
        cpus_per_task=args.cpus_per_task, mem=None if args.mem_gb is None else f"{round(args.mem_gb * 1024)}M",
        time=args.timeout, signal_delay_s=WARNING, partition=args.partition, account=args.account, qos=args.qos,
        constraint=args.constraint, comment=args.comment, wckey=None, stderr_to_stdout=True,
        array_parallelism=args.parallel,
        # since 22.05, srun does not know what sbatch was told; and a process that fails leaves others that wait for it
        srun_args=[f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True, **dict(pair.split("=", 1) for pair in args.slurm)},
    )  # fmt: skip
    return slurm


def submit(args: argparse.Namespace, planned: list[Planned]) -> list[submitit.Job]:
    """Hand the jobs over: an array where they are several. ValueError with SLURM's own words where it refuses."""
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


# ---------------------------------------------------------------------------------------------------------------------
# outcome
# ---------------------------------------------------------------------------------------------------------------------


def results(job: submitit.Job) -> list[tuple[str, str, Path]]:
    """("success" or "error", its text, log) of the processes that came to an end; those that tell why come first."""
    paths = [job.task(rank).paths for rank in range(job.num_tasks)]
    found = [(*pickle_load(path.result_pickle), path.stdout) for path in paths if path.result_pickle.exists()]
    return sorted(found, key=lambda result: (result[0] != "error", "another process is gone" in str(result[1])))


def state(job: submitit.Job) -> str:
    """In SLURM's words, on one machine too; STOPPED: as requested, and not put back."""
    if isinstance(job, submitit.LocalJob):
        if not job.done():
            return "RUNNING"
    else:
        known = state_of(job.job_id)
        if known == GONE:  # the accounts may know, where they are kept
            known = job.get_info(mode="force").get("State", GONE).split()[0]
        if known != GONE:
            return known or "UNKNOWN"
    outcomes = [outcome for outcome, *_ in results(job)]
    if "error" in outcomes:
        return "FAILED"
    if len(outcomes) == job.num_tasks:
        return "COMPLETED"
    return "STOPPED" if isinstance(job, submitit.LocalJob) else GONE


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
                stop.told = "the jobs go on"
            raise
        pause = min(1.2 * pause, 30 if isinstance(jobs[0], submitit.SlurmJob) else 1)


def failure(job: submitit.Job, lines: int = 5) -> str:
    """What the process that failed has said last."""
    found = [log for outcome, _, log in results(job) if outcome == "error"]
    log = next(iter([*found, job.paths.stdout]))
    text = [line for line in (log.read_text(errors="replace").splitlines() if log.exists() else []) if line.strip()]
    if found:  # the program has told its error; what others say of its end only hides it
        text = [line for line in text if not OTHERS.match(line)]
    return "\n".join([f"the last lines of {log}:", *(f"    {line}" for line in text[-lines:])])


def main(args: argparse.Namespace) -> None:
    settle(args)
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


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The launcher's arguments; `argv` of them are the program's."""
    args, rest = get_args_parser().parse_known_args(argv)
    return argparse.Namespace(**vars(args), argv=rest)


if __name__ == "__main__":
    run_main(main, command_line())
