"""Interrupt short runs at random moments and see that each, resumed, ends as the uninterrupted run, to the bit.

    OMP_NUM_THREADS=1 python tests/kill_sweep.py --kills 64 --record sweep.md

KINDS says how. Half of the moments are anywhere in the run, start included, and half are in the writing of a
checkpoint. A program, not a test: it takes hours on two cores. Exit code 1 where a run differs.
"""

import argparse
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from interruptions import ENVIRONMENT, PROGRAMS, ROOT, analysed, differences, finish, launch, outcome

from data_sets.demo import generate


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


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


# name -> (processes, loader workers, what is done to the process ids)
KINDS: dict[str, tuple[int, int, Callable]] = {
    "SIGKILL": (1, 0, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),
    "SIGKILL, 3 workers": (1, 3, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),
    "SIGTERM, 1 worker": (1, 1, lambda pids, data, draw: send(pids[0], signal.SIGTERM)),
    "storm of signals": (1, 1, storm),
    "a worker is killed": (1, 2, kill_worker),
    "the data vanish and return": (1, 0, hide_data),
    "one of two ranks is killed": (2, 0, lambda pids, data, draw: send(draw.choice(pids), signal.SIGKILL)),
    "one of two ranks is stopped": (2, 0, stop_one),
    "torchrun is killed": (0, 0, lambda pids, data, draw: send(pids[0], signal.SIGKILL)),  # 0: two, under torchrun
}


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def begin(program: str, argv: list[str], processes: int, output: Path) -> list[int]:
    """Process ids of the ranks, or of torchrun."""
    if processes == 1:
        return [launch(program, argv, output)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if processes == 0:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", port]
        with open(output, "a") as file:
            started = subprocess.Popen(
                [*command, str(ROOT / f"{program}.py"), *argv], env=ENVIRONMENT, cwd=ROOT, stdout=file, stderr=file
            )
        return [started.pid]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [launch(program, argv, output, {**common, "RANK": str(rank)}) for rank in range(processes)]


def interrupt(pids: list[int], folder: Path, seconds: float, kind: str, draw: random.Random, data: Path) -> list[int]:
    """Do it at a random moment of a run that takes so many seconds, or while it writes a checkpoint; exit codes."""
    until = time.monotonic() + draw.uniform(0, seconds)
    while time.monotonic() < until and not ended(pids[0]):
        time.sleep(0.005)
    if draw.random() < 0.5:
        while not ended(pids[0]) and not any(folder.glob(".checkpoint-*.tmp")):
            time.sleep(0)
        time.sleep(draw.uniform(0, 0.01))
    ranks = [child for pid in pids for child in children(pid)] if kind == "torchrun is killed" else []
    KINDS[kind][2](pids, data, draw)
    codes = [finish(pid) for pid in pids]
    end = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # they end by themselves, or finish the run
        assert time.monotonic() < end, "ranks live on without their torchrun"
        time.sleep(0.1)
    return codes


def sweep(program: str, base: list[str], kills: int, work: Path, seed: int, report: Callable[[str], None]) -> bool:
    """One line per kind; whether all runs ended as the reference."""
    left, fine = (outcome if program in PROGRAMS else analysed), True
    rows = {kind: Counter() for kind in KINDS}
    references: dict[int, tuple[dict, float]] = {}
    draw = random.Random(f"{program} {seed}")
    for index in range(kills):
        kind = list(KINDS)[index % len(KINDS)]
        processes, workers, _ = KINDS[kind]
        argv = [*base, "--num_workers", str(workers), "--batch_size", "8" if processes == 1 else "4"]
        size = 1 if processes == 1 else 2
        if size not in references:
            folder, start = work / f"{program}-whole-{size}", time.monotonic()
            codes = [finish(pid) for pid in begin(program, [*argv, "--output_dir", str(folder)], size, work / "output")]
            assert not any(codes), (work / "output").read_text()
            references[size] = left(folder), time.monotonic() - start
        expected, seconds = references[size]
        folder = work / f"{program}-{index}"
        argv += ["--output_dir", str(folder), "--resume", "auto", "--dist_timeout", "30", "3", "60"]
        seconds += 15 * (processes == 0)
        codes = interrupt(begin(program, argv, processes, work / "output"), folder, seconds, kind, draw, work / "data")
        resumed = any(folder.glob("checkpoint-*.pth"))
        again = [finish(pid) for pid in begin(program, argv, size, work / "output")]
        wrong = differences(left(folder), expected) if not any(again) else [f"exit codes {again}"]
        rows[kind].update(runs=1, interrupted=int(any(codes)), resumed=int(resumed), identical=int(not wrong))
        if wrong:
            fine = False
            report(f"{folder}, {kind}: exit codes {codes} and {again}; {wrong[:5]}; see {work / 'output'}")
    for kind, row in rows.items():
        report("| " + " | ".join([program.removeprefix("main_"), kind, *(str(row[name]) for name in COLUMNS)]) + " |")
    return fine


COLUMNS = ("runs", "interrupted", "resumed", "identical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=64, help="runs of each program that are interrupted")
    programs = [*PROGRAMS, "main_analyze_attention", "main_analyze_aggregation"]
    parser.add_argument("--programs", nargs="+", default=programs, choices=programs)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, default=None, help="file that gets the lines as they come")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def report(line: str) -> None:
        print(line, flush=True)
        if args.record:
            with open(args.record, "a") as file:
                file.write(f"{line}\n")

    fine = True
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate(work / "data", 96, 40, workers=1)
        report("| program | interruption | " + " | ".join(COLUMNS) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
        for program in args.programs:
            importlib.import_module(program)
            base = ["--model", "vit_demo_patch8", "--data_path", str(work / "data"), "--amp", "float32",
                    "--device", "cpu"]  # fmt: skip
            if program == "main_analyze_attention":
                base += ["--metrics", "all", "--save_every_minutes", "1e-9"]
            elif program == "main_analyze_aggregation":
                base += ["--boxes", str(work / "data" / "boxes.csv"), "--save_every_minutes", "1e-9"]
            else:
                base += [*PROGRAMS[program], "--epochs", "3", "--warmup_epochs", "1", "--save_every_steps", "3"]
            if program != "main_pretrain":
                base += ["--finetune", str(ROOT / "demo" / "mae.safetensors")]
            fine = sweep(program, base, args.kills, work, args.seed, report) and fine
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
