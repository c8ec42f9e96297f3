"""Send a program of this project to SLURM, or run it here, and requeue it where it is pre-empted or out of time.

    python submitit_linprobe.py --job_dir runs/mae_b --nodes 1 --ngpus 4 --partition gpu \\
        --model vit_base_patch16 --finetune mae_vit_base_patch16 --cls_features cls pos abmilp \\
        --batch_size 2048 --accum_iter 2 --data_path $IMAGENET

Flags that are not the launcher's are the program's. The run folder is --job_dir; every start continues its newest
checkpoint (--resume auto), so a requeued job goes on where it stopped.
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit
import torch
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from util.arguments import Parser, parse

PROGRAMS = ("main_linprobe", "main_pretrain", "main_finetune")


@dataclass
class Task:
    """What every process of the job runs."""

    program: str
    argv: list[str]

    def __call__(self) -> None:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        module = importlib.import_module(self.program)
        module.main(parse(module.get_args_parser(), self.argv))

    def checkpoint(self, *args: object) -> DelayedSubmission:
        """submitit calls this on pre-emption and time-out: the same again, which resumes."""
        return DelayedSubmission(self)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--main", choices=PROGRAMS, default="main_linprobe", help="program to run")
    parser.add_argument("--job_dir", required=True, type=Path, help="run folder; submitit's files go to its jobs/")
    parser.add_argument("--cluster", choices=["slurm", "local"], default=None, help="default: SLURM where there is one")
    parser.add_argument("--nodes", default=1, type=int)
    parser.add_argument(
        "--ngpus",
        default=None,
        type=int,
        help="GPUs and processes per node (default: 8, MAE's; here with --cluster local: what there is); 0: the CPU",
    )
    parser.add_argument("--ntasks", default=None, type=int, help="processes per node, where it is not --ngpus")
    parser.add_argument("--cpus_per_task", default=10, type=int)
    parser.add_argument("--timeout", default=4320, type=int, help="minutes until the job is requeued")
    parser.add_argument("--partition", default=None)
    parser.add_argument("--account", default=None)
    parser.add_argument("--constraint", default=None)
    parser.add_argument("--comment", default=None)
    parser.add_argument("--use_volta32", action="store_const", const="volta32gb", dest="constraint", help="MAE's flag")
    parser.add_argument("--wait", action="store_true", help="stay until the job has ended, and print its outcome")
    return parser


def gpus_per_node(args: argparse.Namespace) -> int:
    if args.ngpus is not None:
        return args.ngpus
    return torch.cuda.device_count() if args.cluster == "local" else 8


def submit(args: argparse.Namespace, argv: list[str]) -> submitit.Job:
    """Check the program's arguments, then submit the job."""
    argv = [*argv, "--output_dir", str(args.job_dir), "--resume", "auto"]
    parse(importlib.import_module(args.main).get_args_parser(), argv)  # a wrong flag is told here, not in the queue
    gpus = gpus_per_node(args)
    executor = submitit.AutoExecutor(
        folder=args.job_dir / "jobs" / "%j", cluster=args.cluster, slurm_max_num_timeout=100
    )
    slurm = {
        "partition": args.partition,
        "account": args.account,
        "constraint": args.constraint,
        "comment": args.comment,
    }
    executor.update_parameters(
        name=args.main,
        nodes=args.nodes,
        tasks_per_node=args.ntasks or max(gpus, 1),
        gpus_per_node=gpus,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.timeout,
        slurm_signal_delay_s=120,
        **{f"slurm_{name}": value for name, value in slurm.items() if value is not None},
    )
    return executor.submit(Task(args.main, argv))


def main() -> None:
    args, argv = get_args_parser().parse_known_args()
    job = submit(args, argv)
    print(f"job {job.job_id}: run folder {args.job_dir}, output {job.paths.stdout}")
    if args.wait:
        job.wait()
        print(f"job {job.job_id}: {job.state}")
        if error := job.exception():
            print(error, file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
