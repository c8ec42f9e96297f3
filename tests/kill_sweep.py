"""Interrupt short runs at random moments and see that each, resumed, ends as the uninterrupted run, to the bit.

    OMP_NUM_THREADS=1 python tests/kill_sweep.py --kills 64 --record sweep.md

KINDS says how, VARIANTS what runs. A third of the moments are anywhere in the run, start included, a third in and
around the writing of a checkpoint, and a third behind the checkpoint at the end of an epoch, a pass or an encoder.
Programs, kinds and variants take turns, and the record is written after every kill, so that the sweep may be ended at
any time. A program, not a test: 64 kills of each take an hour on one core. Exit code 1 where a run differs.
"""

import argparse
import importlib
import itertools
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the programs do

import torch
import torch.utils.tensorboard  # programs import it late
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

import util.plotting  # noqa: F401
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


ANALYSES = ("main_analyze_attention", "main_analyze_aggregation")
RATE, TOKENS = "--lr 2e-3", "--cls_features cls abmilp"
ORACLE = "--oracle {other} --oracle_model vit_demo_patch8"
NARROW = "--projector_width 32"  # the default's weights take most of the time
# what each program runs in turn; {data} and {out} are folders, {mae} and {other} are weights
VARIANTS = {
    "main_linprobe": [
        shlex.join(PROGRAMS["main_linprobe"]),
        f"{TOKENS} --val_fraction 0.25 --eval_every 2 --save_predictions --knn 1 5",
        f"{TOKENS} --cache_views 2 --cache_dir {{out}}.cache --seeds 0 1 --seeds_vary all",
        "--cls_features cls pos --optimizer logreg --val_fraction 0.25 --shots 1 --episodes 2",
        f"--cls_features cls dino {ORACLE} --optimizer lars sgd --accum_iter 2",
    ],
    "main_pretrain": [
        shlex.join(PROGRAMS["main_pretrain"]),
        f"{RATE} --contrastive_weight 1 {NARROW}",
        f"{RATE} --contrastive_weight 0.5 {NARROW} --accum_iter 2 --view_drop 0.5 --figure_every 1",
        f"{RATE} --norm_pix_loss --keep_decoder --figure_every 2",
    ],
    "main_finetune": [
        shlex.join(PROGRAMS["main_finetune"]),
        f"{RATE} --mixup 0.8 --cutmix 1 --smoothing 0.1 --reprob 0.5 --accum_iter 2",
        f"{RATE} --global_pool --color_jitter 0.4 --aa ''",
    ],
    "main_analyze_attention": [
        "--metrics cls_patch_entropy",
        "--finetune {mae} {other} --label a b --metrics cls_patch_entropy patch_log_amplitude",
    ],
    "main_analyze_aggregation": [
        "--boxes {data}/boxes.csv --loc_workers 1",
        f"--boxes {{data}}/boxes.csv --loc_workers 0 --loc_transform crop {ORACLE}",
        "--probes {probes}",
    ],
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


def interrupt(pids: list[int], folder: Path, whole: "Whole", kind: str, draw: random.Random, data: Path) -> list[int]:
    """Do it at a random moment, around the next checkpoint, or behind an epoch or pass; exit codes."""
    moment, epoch = draw.choice(("any", "writing", "between")), draw.randrange(whole.epochs)
    until = time.monotonic() + draw.uniform(0, whole.seconds)
    while moment != "between" and time.monotonic() < until and not ended(pids[0]):
        time.sleep(0.005)
    awaited = {"writing": ".checkpoint-*.tmp", "between": f"checkpoint-{epoch}.pth"}.get(moment)
    if awaited:
        while not ended(pids[0]) and not any(folder.glob(awaited)):
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


class Whole(NamedTuple):
    """An uninterrupted run: what it leaves, and how long it takes."""

    left: dict
    seconds: float
    epochs: int  # or passes


class Sweep:
    """Runs of the programs in `work`, compared with uninterrupted ones of as many processes."""

    def __init__(self, work: Path, seed: int):
        self.work, self.seed, self.output, self.data = work, seed, work / "output", work / "data"
        self.references: dict[tuple[str, int, int], Whole] = {}

    def command(self, program: str, variant: int) -> list[str]:
        flags = ["--model", "vit_demo_patch8", "--data_path", "{data}", "--amp", "float32", "--device", "cpu"]
        flags += ["--batch_size", "8"]
        if program != "main_pretrain":
            flags += ["--finetune", "{mae}"]
        if program in ANALYSES:
            flags += ["--save_every_minutes", "1e-9", "--num_examples", "1"]
        else:
            flags += ["--epochs", "3", "--warmup_epochs", "1", "--save_every_steps", "2"]
        return flags + shlex.split(VARIANTS[program][variant])

    def filled(self, argv: list[str], folder: Path) -> list[str]:
        weights = {"mae": ROOT / "demo" / "mae.safetensors", "other": ROOT / "demo" / "mae_tiny_imagenet.safetensors"}
        places = {**weights, "data": self.data, "out": folder, "probes": self.work / "probes"}
        return [*(flag.format(**places) for flag in argv), "--output_dir", str(folder)]

    def run(self, program: str, argv: list[str], size: int) -> None:
        codes = [finish(pid) for pid in begin(program, argv, size, self.output)]
        assert not any(codes), self.output.read_text()

    def whole(self, program: str, variant: int, size: int, argv: list[str]) -> Whole:
        key, left = (program, variant, size), outcome if program in PROGRAMS else analysed
        if key not in self.references:
            folder, start = self.work / f"{program}-{variant}-whole-{size}", time.monotonic()
            self.run(program, self.filled(argv, folder), size)
            epochs = 1 + max(int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*.pth"))
            self.references[key] = Whole(left(folder), time.monotonic() - start, epochs)
        return self.references[key]

    def __call__(self, program: str, kind: str, variant: int, index: int) -> tuple[Counter, str]:
        """Interrupt one run and resume it: what to count, and what was wrong."""
        draw, left = random.Random(f"{program} {index} {self.seed}"), outcome if program in PROGRAMS else analysed
        processes, workers, _ = KINDS[kind]
        size = 1 if processes == 1 else 2
        argv = [*self.command(program, variant), "--num_workers", str(workers), "--batch_size", str(8 // size)]
        whole = self.whole(program, variant, size, argv)
        folder = self.work / f"{program}-{index}"
        argv = [*self.filled(argv, folder), "--resume", "auto"]
        started = begin(program, [*argv, "--dist_timeout", "30", "3", "10"], processes, self.output)
        codes = interrupt(started, folder, whole, kind, draw, self.data)
        newest = max(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime_ns, default=Path())
        if (folder / "args.json").exists() and draw.random() < 0.5:
            argv = ["--args_from", str(folder / "args.json"), "--resume", "auto", "--dist_timeout", "300"]
        again = [finish(pid) for pid in begin(program, argv, size, self.output)]
        wrong = differences(left(folder), whole.left) if not any(again) else [f"exit codes {again}"]
        if not wrong:
            shutil.rmtree(folder)
        values = any(codes), newest.name, newest.stem.count("-") == 1, not wrong
        counts = Counter(runs=1, **{name: int(bool(value)) for name, value in zip(COLUMNS[1:], values, strict=True)})
        return counts, f"{folder}, {kind}: exit codes {codes}; {wrong[:5]}; see {self.output}" if wrong else ""


COLUMNS = ("runs", "interrupted", "resumed", "from the end of an epoch", "identical")


def table(rows: dict[tuple[str, str], Counter], what: str) -> str:
    lines = [f"| program | {what} | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (program, text), row in sorted(rows.items()):
        values = [program.removeprefix("main_"), text, *(str(row[name]) for name in COLUMNS)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=64, help="runs of each program that are interrupted")
    parser.add_argument("--programs", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, default=None, help="file of the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, variants = defaultdict(Counter), defaultdict(Counter)
    faults = []
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name) / "data", 32, 16, workers=1)
        for program in VARIANTS:
            importlib.import_module(program)
        sweep = Sweep(Path(name), args.seed)
        if "main_analyze_aggregation" in args.programs:
            sweep.run("main_linprobe", sweep.filled(sweep.command("main_linprobe", 0), Path(name) / "probes"), 1)
        for index, (number, program) in itertools.product(range(args.kills), enumerate(args.programs)):
            kind, variant = list(KINDS)[(index + number) % len(KINDS)], index % len(VARIANTS[program])
            counts, wrong = sweep(program, kind, variant, index)
            kinds[program, kind].update(counts)
            variants[program, f"`{VARIANTS[program][variant]}`"].update(counts)
            faults += [wrong] * bool(wrong)
            print(index, program, kind, variant, dict(counts), wrong, flush=True)
            tables = "\n".join([table(kinds, "interruption"), table(variants, "flags"), *faults])
            if args.record:
                args.record.write_text(tables)
    print(tables)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
