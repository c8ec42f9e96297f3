"""Kill short runs at random moments and see that each, resumed, ends as the uninterrupted run, to the bit.

    OMP_NUM_THREADS=1 python tests/kill_sweep.py --probing 50 --pretraining 20 --finetuning 20 --analysis 20

SIGKILL and SIGTERM, with 0, 1 and 3 loader workers. Half of the moments are anywhere in the run, start included, and
half are in the writing of a checkpoint. A program, not a test: it takes minutes. Exit code 1 where a run differs.
"""

import argparse
import importlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from interruptions import PROGRAMS, ROOT, analysed, differences, finish, launch, outcome

from data_sets.demo import generate
from util.signals import EXIT_STOPPED


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def interrupt(child: int, number: int, folder: Path, seconds: float, in_writing: bool, draw: random.Random) -> None:
    """Send the signal at a random moment of a run that takes so many seconds, or while it writes a checkpoint."""
    until = time.monotonic() + draw.uniform(0, seconds)
    while time.monotonic() < until and not ended(child):
        time.sleep(0.001)
    while in_writing and not ended(child) and not any(folder.glob(".checkpoint-*.tmp")):
        pass
    if in_writing:
        time.sleep(draw.uniform(0, 0.01))
    if not ended(child):
        os.kill(child, number)


def sweep(program: str, number: int, kills: int, base: list[str], reference: Path, work: Path, seed: int) -> bool:
    """One line per number of workers; whether all runs ended as the reference."""
    left = outcome if program in PROGRAMS else analysed
    expected, fine = left(reference), True
    draw = random.Random(f"{program} {number} {seed}")
    took: dict[int, float] = {}
    rows: dict[int, dict[str, int]] = {}
    for index, workers in zip(range(kills), itertools.cycle((0, 1, 3)), strict=False):
        argv = [*base, "--num_workers", str(workers), "--resume", "auto"]
        if workers not in took:
            start = time.monotonic()
            finish(
                launch(
                    program, [*argv, "--output_dir", str(work / f"{program}-{number}-whole-{workers}")], work / "output"
                )
            )
            took[workers] = time.monotonic() - start
        folder = work / f"{program}-{number}-{index}"
        argv += ["--output_dir", str(folder)]
        child = launch(program, argv, work / "output")
        interrupt(child, number, folder, took[workers], index % 2 == 1, draw)
        code = finish(child)
        found = {
            "kills": code != 0,  # by the signal itself where the program did not listen yet
            "no checkpoint yet": not any(folder.glob("checkpoint-*.pth")),
            "half-written file": any(folder.glob(".*.tmp")),
            "within an epoch": len(list(folder.glob("checkpoint-*-*.pth"))) > 0,
        }
        again = finish(launch(program, argv, work / "output"))
        wrong = differences(left(folder), expected)
        found["identical"] = not wrong and again == 0 and code in (0, -number, EXIT_STOPPED)
        row = rows.setdefault(workers, dict.fromkeys(("runs", *found), 0))
        row["runs"] += 1
        for name, value in found.items():
            row[name] += value
        if not found["identical"]:
            fine = False
            print(f"{folder}: exit codes {code} and {again}; {wrong[:5]}; see {work / 'output'}")
    for workers, row in rows.items():
        name = f"{program.removeprefix('main_')}, {signal.Signals(number).name}, {workers} workers"
        print("| " + " | ".join([f"{name:34}", *(f"{value:>17}" for value in row.values())]) + " |", flush=True)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probing", type=int, default=50, help="runs of main_linprobe per signal")
    parser.add_argument("--pretraining", type=int, default=20, help="runs of main_pretrain per signal")
    parser.add_argument("--finetuning", type=int, default=20, help="runs of main_finetune per signal")
    parser.add_argument("--analysis", type=int, default=20, help="runs of each analysis per signal")
    parser.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGTERM"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["", "runs", "kills", "no checkpoint yet", "half-written file", "within an epoch", "identical"]
    fine = True
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate(work / "data", 96, 40, workers=1)
        print("| " + " | ".join([f"{columns[0]:34}", *(f"{column:>17}" for column in columns[1:])]) + " |")
        print("|" + "---|" * len(columns), flush=True)
        numbers = {
            "main_linprobe": args.probing, "main_pretrain": args.pretraining, "main_finetune": args.finetuning,
            "main_analyze_attention": args.analysis, "main_analyze_aggregation": args.analysis,
        }  # fmt: skip
        for program, kills in numbers.items():
            if not kills:
                continue
            importlib.import_module(program)
            base = ["--model", "vit_demo_patch8", "--data_path", str(work / "data"), "--amp", "float32",
                    "--device", "cpu", "--batch_size", "8"]  # fmt: skip
            if program == "main_analyze_attention":
                base += ["--metrics", "all", "--save_every_minutes", "1e-9"]
            elif program == "main_analyze_aggregation":
                base += ["--boxes", str(work / "data" / "boxes.csv"), "--save_every_minutes", "1e-9"]
            else:
                base += [*PROGRAMS[program], "--epochs", "3", "--warmup_epochs", "1", "--save_every_steps", "3"]
            if program != "main_pretrain":
                base += ["--finetune", str(ROOT / "demo" / "mae.safetensors")]
            reference = work / program
            launched = launch(program, [*base, "--num_workers", "0", "--output_dir", str(reference)], work / "output")
            if finish(launched) != 0:
                sys.exit((work / "output").read_text())
            for number in args.signals:
                number = signal.Signals[number]
                fine = sweep(program, number, kills, base, reference, work, args.seed) and fine
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
