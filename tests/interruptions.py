"""Helpers of what tests interruptions: short runs of the three programs, stopped and compared."""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import timm  # noqa: F401  (programs import these two late; forks would do so each)
import torch
import torch.distributed.nn
import torchvision.transforms.v2  # noqa: F401
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.console import parse, run_main
from runtime.folder import load_checkpoint, sealed

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# what depends on the clock and on the machine, and nothing else may
CLOCK = {"images_per_second", "data_wait", "memory_gib", "seconds", "waited", "elapsed", "finished"}
PROGRAMS = {
    "main_linprobe": ["--cls_features", "cls", "abmilp@4-5", "aim4", "--blr", "1", "20", "--final_norm"],
    "main_pretrain": ["--lr", "2e-3"],
    "main_finetune": ["--lr", "2e-3", "--clip_grad", "1", "--drop_path", "0.3", "--aa", "rand-m9-mstd0.5-inc1"],
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


class Killed(BaseException):
    """Ends a run on the spot, as SIGKILL does, and leaves the test alive."""


def kill() -> None:
    raise Killed


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the state in a checkpoint, and seals it again."""

    def damage(path: Path) -> None:
        state = load_checkpoint(path)
        change(state)
        torch.save(sealed(state), path)

    return damage


def after_calls(monkeypatch: pytest.MonkeyPatch, owner: object, method: str) -> Callable[[int, Callable], None]:
    """plan(number, action): do something once, after so many calls of a function from now on."""
    call, due, count = getattr(owner, method), {}, []

    def spy(*words: object) -> object:
        result = call(*words)
        count.append(1)
        if action := due.pop(len(count), None):
            action()
        return result

    def plan(number: int, action: Callable[[], object]) -> None:
        due.clear()
        count.clear()
        due[number] = action

    monkeypatch.setattr(owner, method, spy)
    return plan


def start(program: str, *words: object, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes,
                "--max-restarts", restarts]  # fmt: skip
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / f"{program}.py", *words]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch(
    program: str, argv: list[str], output: Path, environment: dict[str, str] | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> int:  # fmt: skip
    """Run a program in a fork of this process, which has imported everything already; its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update(environment or {})
        prepare()
        code = code_of(program, argv, output)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def redirect(output: Path) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (pytest has others)


def code_of(program: str, argv: list[str], output: Path) -> int:
    """Run a program in this process, which only goes on to end; its exit code."""
    redirect(output)
    code = 70
    try:
        module = importlib.import_module(program)
        run_main(module.main, parse(module.get_args_parser(), argv))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    return code


def agent(
    program: str, argv: list[str], output: Path, processes: int, prepare: Callable[[], object] = lambda: None,
    nodes: int = 1, **where: object,
) -> int:  # fmt: skip
    """Start torchrun's agent of a node in a fork of this process, and its ranks in forks of that; its process id.

    where: of torch's LaunchConfig."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # few tests need it

    if child := os.fork():
        return child
    code = 1
    try:
        redirect(output)
        prepare()
        config = LaunchConfig(nodes, nodes, processes, run_id="agents", start_method="fork", max_restarts=0, **where)
        elastic_launch(config, rank_of_agent)(program, argv, output)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def rank_of_agent(program: str, argv: list[str], output: Path) -> None:
    prctl, parent = ctypes.CDLL(None).prctl, os.getppid()
    prctl(1, 0)  # PR_SET_PDEATHSIG: processes that torchrun starts outlive it, and so do these forks
    code = code_of(program, argv, output)
    prctl(1, signal.SIGKILL)  # PyTorch's fork would wait for the agent
    if code or os.getppid() != parent:
        os._exit(code)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def offspring(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *offspring(child))]


def finish(child: int) -> int:
    """Its exit code; minus the signal's number where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(processes: int, program: str, argv: list[str], output: Path) -> list[int]:
    """Exit codes of a program in several processes, as torchrun starts them but without its cost."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [launch(program, argv, output, {**common, "RANK": str(rank)}) for rank in range(processes)]
    return [finish(child) for child in ranks]


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


def without_clock(value: object, clock: set[str] = CLOCK) -> object:
    if isinstance(value, dict):
        return {key: without_clock(inner, clock) for key, inner in value.items() if key not in clock}
    return [without_clock(inner, clock) for inner in value] if isinstance(value, list) else value


def differences(one: object, two: object, place: str = "") -> list[str]:
    """Where two states are not the same to the bit."""
    if type(one) is not type(two):
        return [f"{place}: {type(one).__name__} and {type(two).__name__}"]
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
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
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
        "leftovers": sorted(path.name for path in folder.glob(".*.tmp")),
    }
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        found["results"] = without_clock({key: results[key] for key in results.keys() & {"probes", "last", "knn"}})
    if (folder / "predictions.safetensors").exists():
        found["predictions"] = load_file(folder / "predictions.safetensors")
    if (folder / "encoder.safetensors").exists():
        found["encoder"] = (folder / "encoder.safetensors").read_bytes()
    return found


def analysed(folder: Path) -> dict:
    """All that an analysis leaves but for what the clock and the command line say of it."""
    return {
        "files": {
            str(path.relative_to(folder)): without_clock(json.loads(path.read_text()), CLOCK | {"command", "args"})
            for path in sorted(folder.rglob("*.json"))
        },
        "figures": {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.p[nd][gf]"))},
        "scalars": {path.name: scalars(path) for path in sorted(folder.iterdir()) if path.is_dir()},
        "leftovers": sorted(path.name for path in folder.glob(".*.tmp")),
    }


if __name__ == "__main__":  # [processes, program, arguments, file for the output], as JSON, any number of them
    torch.set_num_threads(1)
    for job in map(json.loads, sys.argv[1:]):
        codes = in_processes(*job)
        if any(codes):
            sys.exit(f"{job}: {codes}\n{Path(job[-1]).read_text()}")
