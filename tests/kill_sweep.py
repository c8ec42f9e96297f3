"""Interrupt short runs at random moments and see that each, resumed, ends as the uninterrupted run, to the bit.

    OMP_NUM_THREADS=1 python tests/kill_sweep.py --kills 64 --record sweep.md

KINDS says how. Half of the moments are anywhere in the run, start included, and half are in and around the writing of a
checkpoint. Programs and kinds take turns, and the record is written after every kill, so that the sweep may be ended at
any time. A program, not a test: 64 kills of each take an hour on two cores. Exit code 1 where a run differs.
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the programs do

import torch
from interruptions import (
    PROGRAMS,
    ROOT,
    agent,
    analysed,
    children,
    differences,
    finish,
    free_port,
    launch,
    offspring,
    outcome,
)

from data_sets.demo import generate


def send(pid: int, *numbers: int) -> None:
    for number in numbers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def kill_worker(pids: list[int], data: Path, draw: random.Random) -> None:
    workers = children(pids[0])
    send(draw.choice(workers) if workers else pids[0], signal.SIGKILL)


def hide_data(pids: list[int], data: Path, draw: random.Random) -> None:
    hidden = data.with_name("hidden")
    data.rename(hidden)
    end = time.monotonic() + 20
    while time.monotonic() < end and not ended(pids[0]):
        time.sleep(0.05)
    send(pids[0], signal.SIGTERM)  # it has read all images before
    hidden.rename(data)


def storm(pids: list[int], data: Path, draw: random.Random) -> None:
    for number in draw.choices([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], k=20):
        send(pids[0], number)
        time.sleep(draw.uniform(0, 0.02))


def stop_one(pids: list[int], data: Path, draw: random.Random) -> None:
    """The other rank ends by itself; then the stopped one is killed."""
    victim = draw.randrange(2)
    send(pids[victim], signal.SIGSTOP)
    end = time.monotonic() + 60
    while time.monotonic() < end and not ended(pids[1 - victim]):
        time.sleep(0.05)
    send(pids[victim], signal.SIGKILL)


ANALYSES = {
    "main_analyze_attention": ["--save_every_minutes", "1e-9"],
    "main_analyze_aggregation": ["--boxes", "boxes.csv", "--loc_workers", "1", "--save_every_minutes", "1e-9"],
}
# name -> (processes, loader workers, what is done to the process ids)
KINDS: dict[str, tuple[int, int, Callable]] = {
    "SIGKILL": (1, 0, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),
    "one of two ranks is killed": (2, 0, lambda pids, data, draw: send(draw.choice(pids), signal.SIGKILL)),
    "the agent of two ranks is killed": (0, 0, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),
    "a worker is killed": (1, 2, kill_worker),
    "one of two ranks is stopped": (2, 0, stop_one),
    "SIGTERM, 1 worker": (1, 1, lambda pids, data, draw: send(pids[0], signal.SIGTERM)),
    "the data vanish and return": (1, 0, hide_data),
    "storm of signals": (1, 1, storm),
    "SIGKILL, 3 workers": (1, 3, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),
}


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def begin(program: str, argv: list[str], processes: int, output: Path) -> list[int]:
    """Process ids of the ranks, or (processes=0) of the agent that starts two."""
    if processes == 0:
        return [agent(program, argv, output, 2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")]
    if processes == 1:
        return [launch(program, argv, output)]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [launch(program, argv, output, {**common, "RANK": str(rank)}) for rank in range(processes)]


def interrupt(pids: list[int], folder: Path, seconds: float, kind: str, draw: random.Random, data: Path) -> list[int]:
    """Do it at a random moment of a run that takes so many seconds, or around the next checkpoint; exit codes."""
    until = time.monotonic() + draw.uniform(0, seconds)
    while time.monotonic() < until and not ended(pids[0]):
        time.sleep(0.005)
    if draw.random() < 0.5:
        while not ended(pids[0]) and not any(folder.glob(".checkpoint-*.tmp")):
            time.sleep(0)
        time.sleep(draw.choice((0, draw.uniform(0, 0.01), draw.uniform(0, 0.1))))
    ranks = offspring(pids[0]) if kind == "the agent of two ranks is killed" else []
    KINDS[kind][2](pids, data, draw)
    codes = [finish(pid) for pid in pids]
    end = time.monotonic() + 300
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # they end by themselves, or finish the run
        assert time.monotonic() < end, "ranks live on without their agent"
        time.sleep(0.1)
    return codes


class Sweep:
    """Runs of the programs in `work`, compared with uninterrupted ones of as many processes."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed, self.output = work, seed, work / "output"
        self.references: dict[tuple[str, int], tuple[dict, float]] = {}

    def base(self, program: str) -> list[str]:
        data = self.work / "data"
        flags = ["--model", "vit_demo_patch8", "--data_path", str(data), "--amp", "float32", "--device", "cpu"]
        if program != "main_pretrain":
            flags += ["--finetune", str(ROOT / "demo" / "mae.safetensors")]
        if program in ANALYSES:
            return [*flags, *(str(data / flag) if flag == "boxes.csv" else flag for flag in ANALYSES[program])]
        return [*flags, *PROGRAMS[program], "--epochs", "3", "--warmup_epochs", "1", "--save_every_steps", "2"]

    def __call__(self, program: str, kind: str, index: int) -> tuple[Counter, str]:
        """Interrupt one run and resume it: what to count, and what was wrong."""
        left, draw = (outcome if program in PROGRAMS else analysed), random.Random(f"{program} {index} {self.seed}")
        processes, workers, _ = KINDS[kind]
        size = 1 if processes == 1 else 2
        argv = [*self.base(program), "--num_workers", str(workers), "--batch_size", str(8 // size)]
        if (program, size) not in self.references:
            folder, start = self.work / f"{program}-whole-{size}", time.monotonic()
            codes = [finish(pid) for pid in begin(program, [*argv, "--output_dir", str(folder)], size, self.output)]
            assert not any(codes), self.output.read_text()
            self.references[program, size] = left(folder), time.monotonic() - start
        expected, seconds = self.references[program, size]
        folder = self.work / f"{program}-{index}"
        argv += ["--output_dir", str(folder), "--resume", "auto"]
        started = begin(program, [*argv, "--dist_timeout", "30", "3", "10"], processes, self.output)
        codes = interrupt(started, folder, seconds, kind, draw, self.work / "data")
        resumed = any(folder.glob("checkpoint-*.pth"))
        again = [finish(pid) for pid in begin(program, argv, size, self.output)]
        wrong = differences(left(folder), expected) if not any(again) else [f"exit codes {again}"]
        counts = Counter(runs=1, interrupted=int(any(codes)), resumed=int(resumed), identical=int(not wrong))
        return counts, f"{folder}, {kind}: exit codes {codes}; {wrong[:5]}; see {self.output}" if wrong else ""


COLUMNS = ("runs", "interrupted", "resumed", "identical")


def table(rows: dict[tuple[str, str], Counter]) -> str:
    lines = ["| program | interruption | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (program, kind), row in sorted(rows.items()):
        values = [program.removeprefix("main_"), kind, *(str(row[name]) for name in COLUMNS)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=64, help="runs of each program that are interrupted")
    programs = [*PROGRAMS, *ANALYSES]
    parser.add_argument("--programs", nargs="+", default=programs, choices=programs)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, default=None, help="file of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], Counter] = {}
    faults = []
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name) / "data", 48, 24, workers=1)
        for program in args.programs:
            importlib.import_module(program)
        sweep = Sweep(Path(name), args.seed)
        for index, (number, program) in itertools.product(range(args.kills), enumerate(args.programs)):
            kind = list(KINDS)[(index + number) % len(KINDS)]
            counts, wrong = sweep(program, kind, index)
            rows.setdefault((program, kind), Counter()).update(counts)
            faults += [wrong] * bool(wrong)
            print(index, program, kind, dict(counts), wrong, flush=True)
            if args.record:
                args.record.write_text("\n".join([table(rows), *faults]))
    print(table(rows))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
