"""What submitit_linprobe.py takes, flags and help in launcher.toml, and the jobs that this describes."""

import argparse
import importlib
import itertools
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from cli.arguments import check_files, identity, program_parser
from cli.console import Parser, parse, refuse
from util.files import reading, without_credentials
from util.lazy import lazy

torch = lazy("torch")

PROGRAMS = sorted(path.stem for path in Path(__file__).resolve().parent.parent.glob("main_*.py"))
WARNING = 120  # seconds between SLURM's signal and the end of a job's time


def get_args_parser() -> Parser:
    return program_parser("launcher", programs=PROGRAMS)


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The launcher's arguments; those of the program are in `argv`."""
    args, rest = get_args_parser().parse_known_args(argv)
    return argparse.Namespace(**vars(args), argv=rest)


def check(args: argparse.Namespace) -> None:
    """Choose the cluster, and refuse what no job can be; ValueError."""
    if args.cluster is None:
        args.cluster = "slurm" if args.dry_run or shutil.which("sbatch") else "local"
    absent = args.cluster == "slurm" and not (args.dry_run or shutil.which("sbatch"))
    refuse(absent, "--cluster slurm: sbatch is not installed here; --cluster local runs the job on this machine")
    refuse(args.cluster == "local" and args.nodes > 1, f"--nodes {args.nodes}: --cluster local is this one machine")
    folder = f"--job_dir {args.job_dir}"
    refuse("%" in folder, f"{folder}: SLURM replaces % and the letter after it; name a folder without %")
    notice = f"must exceed {WARNING} seconds, the notice before a job is stopped"
    refuse(args.timeout * 60 <= WARNING, f"--timeout {args.timeout}: {notice}")
    for pair in args.slurm:
        refuse("=" not in pair, f"--slurm {pair}: write NAME=VALUE, as in --slurm exclude=node3")


class Planned(NamedTuple):
    """One job of a submission."""

    folder: Path
    argv: list[str]


def plan(args: argparse.Namespace, argv: list[str]) -> list[Planned]:
    """The jobs to submit, each with its run folder and its program's arguments; ValueError where these are invalid."""
    jobs: list[Planned] = []
    for flag, *values in args.sweep:
        refuse(not values, f"--sweep {flag}: write the values after the flag")
    for combination in itertools.product(*([(flag, value) for value in values] for flag, *values in args.sweep)):
        extra = [text for flags, values in combination for text in sweep_arguments(flags, values)]
        name = "_".join(f"{flags}={values}" for flags, values in combination)
        folder = args.job_dir.resolve() / re.sub(r"[^\w.,=+-]+", "_", name)
        jobs.append(Planned(folder, program_arguments(args, [*argv, *extra], folder)))
    shared = len({job.folder for job in jobs}) < len(jobs)
    refuse(shared, "--sweep: two jobs would share a folder; write every value once")
    return jobs


def sweep_arguments(flags: str, values: str) -> list[str]:
    """("seed", "0") -> ["--seed", "0"]; ("a,b", "1,2") -> ["--a", "1", "--b", "2"]."""
    names = flags.split(",")
    parts = values.split(",") if len(names) > 1 else [values]
    if len(parts) != len(names):
        raise ValueError(f"--sweep {flags} {values}: it names {len(names)} flags and {len(parts)} values")
    return [text for name, part in zip(names, parts, strict=True) for text in (f"--{name.lstrip('-')}", part)]


def program_arguments(args: argparse.Namespace, argv: list[str], folder: Path) -> list[str]:
    """The program's arguments: those that the launcher sets, then the user's. ValueError where the program would refuse
    them, as far as this machine can tell."""
    program = parser_module(args.main)
    parser = program.get_args_parser()
    parser.other_flags = list(get_args_parser().flags)
    device = ["--device", "cpu"] if gpus_per_node(args) == 0 else []
    argv = ["--output_dir", str(folder), "--resume", "auto", *device, *argv]
    job = parse(parser, argv)
    if job.output_dir != str(folder):
        raise ValueError(f"--output_dir {job.output_dir}: leave it out; the run folder is --job_dir, or a folder in it")
    program.check(job)
    if secret := next((text for text in argv if without_credentials(text) != text), None):
        raise ValueError(
            f"{without_credentials(secret)}: the job would keep this URL's password or query string in its files: "
            "download it first, and name the file"
        )
    check_files(job, args.remote_paths)
    if job.resume == "auto" and (folder / "args.json").exists() and any(folder.glob("checkpoint-*.pth")):
        from runtime.resumable import AnotherRun, check_identity

        try:
            with reading(folder / "args.json", "the args.json of a job"):
                before = dict(json.loads((folder / "args.json").read_text("utf-8"))["args"])
            check_identity(identity(job), before)
        except AnotherRun as error:
            raise ValueError(str(error).replace("--output_dir", "--job_dir")) from error
    return argv


def parser_module(program: str) -> ModuleType:
    """The module with `get_args_parser` and `check` of a main."""
    return importlib.import_module(f"cli.{program.removeprefix('main_')}")


def gpus_per_node(args: argparse.Namespace) -> int:
    if args.ngpus is not None:
        return args.ngpus
    return torch.cuda.device_count() if args.cluster == "local" else 8
