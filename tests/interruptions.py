"""Helpers of what tests interruptions: short runs of the three programs, stopped and compared."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.arguments import parse, run_main

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CLOCK = {"images_per_second", "data_wait", "seconds", "waited"}  # what depends on it, and nothing else may
PROGRAMS = {
    "main_linprobe": ["--cls_features", "cls", "abmilp", "--blr", "1", "20", "--final_norm"],
    "main_pretrain": ["--norm_pix_loss"],
    "main_finetune": ["--clip_grad", "1", "--drop_path", "0.3", "--aa", "rand-m9-mstd0.5-inc1"],
}  # every one with all the randomness that its recipe has


def flags(program: str, data: Path, weights: Path | None) -> list[str]:
    """A run of 3 epochs on the CPU; for main_pretrain, which takes none, without the weights."""
    words = [
        *PROGRAMS[program], "--model", "vit_demo_patch8", "--input_size", "32", "--data_path", str(data),
        "--epochs", "3", "--warmup_epochs", "1", "--amp", "float32", "--device", "cpu", "--num_workers", "0",
    ]  # fmt: skip
    return words if program == "main_pretrain" else [*words, "--finetune", str(weights)]


def run(program: str, command: list[str], folder: Path, *more: object) -> int:
    """The exit code of a program that runs in this process."""
    module = importlib.import_module(program)
    try:
        args = parse(module.get_args_parser(), [*command, "--output_dir", str(folder), *map(str, more)])
        run_main(module.main, args)
    except SystemExit as stop:
        return stop.code
    return 0


def start(program: str, *words: object, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes,
                "--max-restarts", restarts]  # fmt: skip
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / f"{program}.py", *words]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """AssertionError where the process ends, or the time, before the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def end(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; whatever is left of the process group is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def without_clock(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_clock(inner) for key, inner in value.items() if key not in CLOCK}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def differences(one: object, two: object, place: str = "") -> list[str]:
    """Where two states are not the same to the bit."""
    if isinstance(one, torch.Tensor):
        same = one.shape == two.shape and one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
        return [] if same else [place]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [found for key in one for found in differences(one[key], two[key], f"{place}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [f"{place}: {len(one)} and {len(two)}"]
        pairs = zip(one, two, strict=True)
        return [found for i, (a, b) in enumerate(pairs) for found in differences(a, b, f"{place}/{i}")]
    return [] if one == two or (one != one and two != two) else [f"{place}: {one} and {two}"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: {tag: its steps and values}."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def outcome(folder: Path) -> dict:
    """All that a run leaves but for what the clock and the command line say of it."""
    newest = max(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime_ns)
    state = torch.load(newest, weights_only=True)
    found = {
        "newest": newest.name,
        "checkpoint": without_clock({key: state[key] for key in state.keys() - {"args", "sha256"}}),
        "log": [without_clock(json.loads(line)) for line in (folder / "log.txt").read_text().splitlines()],
        "scalars": scalars(folder),
        "leftovers": sorted(path.name for path in folder.glob(".*")),
    }
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        found["results"] = without_clock({key: results[key] for key in results.keys() & {"probes", "last"}})
    if (folder / "encoder.safetensors").exists():
        found["encoder"] = (folder / "encoder.safetensors").read_bytes()
    return found
