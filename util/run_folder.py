"""The folder of a run: what was asked (args.json), what happened (log.txt, TensorBoard), and its checkpoints."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from util import distributed
from util.files import atomic_path, to_json, write_atomically, write_json
from util.progress import log
from util.safe_load import load_plain

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Where a number comes from: command, commit, versions, hardware."""

    def git(*command: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # a machine without git
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }


class RunFolder:
    """Records of one run; only rank 0 writes, and makes the folder when it does. An empty `path` keeps nothing."""

    def __init__(self, path: str | os.PathLike, log_dir: str | os.PathLike | None = None):
        self.path = Path(path) if path and distributed.rank() == 0 else None
        self.board: SummaryWriter | None = None
        self.read_path = Path(path) if path else None
        self.log_dir = Path(log_dir) if log_dir else self.path

    def start(self, record: dict[str, Any], name: str = "args.json") -> None:
        """Write what was asked, with its provenance, and open TensorBoard. ValueError where that is not possible."""
        self.write(name, record)
        if self.path is not None:
            try:
                self.board = SummaryWriter(log_dir=str(self.log_dir))
            except OSError as error:
                raise ValueError(f"--log_dir {self.log_dir} cannot be written: {error}") from error

    def write(self, name: str, value: Any) -> None:
        """Write JSON into the folder, made if need be. ValueError where that is not possible."""
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / name, value)
            except OSError as error:
                raise ValueError(f"--output_dir {self.path} cannot be written: {error}") from error

    def log_line(self, record: dict[str, Any]) -> None:
        """One line of JSON in log.txt (an epoch's figures, MAE's convention), in place of this epoch's and later ones.

        So a resumed run repeats no line, and a line that a kill cut short is gone.
        """
        if self.path is None:
            return
        log_file = self.path / "log.txt"
        earlier = []
        for line in log_file.read_text().splitlines() if log_file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["epoch"] < record["epoch"]:
                    earlier.append(line)
        write_atomically(log_file, "".join(f"{line}\n" for line in [*earlier, to_json(record)]).encode())

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this folder, newest first."""
        if self.read_path is None:
            return []
        found = [path for path in self.read_path.glob("checkpoint-*.pth") if _epoch_of(path) is not None]
        return sorted(found, key=_epoch_of, reverse=True)

    def save_checkpoint(self, epoch: int, state: dict[str, Any], keep: int = 2) -> None:
        """Write checkpoint-<epoch>.pth whole, then remove all but it and the `keep` - 1 before it.

        Later ones are left from before an earlier epoch was resumed: "auto" must not take them for this run's.
        """
        if self.path is None:
            return
        with atomic_path(self.path / f"checkpoint-{epoch}.pth") as temporary:
            torch.save({"epoch": epoch, **state}, temporary)
        known = self.checkpoints()
        current = [_epoch_of(path) for path in known].index(epoch)
        for old in known[:current] + known[current + keep :]:
            old.unlink()

    def find_checkpoint(self, resume: str, evaluate_only: bool = False) -> dict[str, Any] | None:
        """The state to resume from: a path, "auto" for the newest readable one of this folder, "" for a fresh start.

        None for a fresh start, which "auto" is where there is no checkpoint yet. ValueError where no checkpoint of the
        run can be read, and, unless evaluate_only, for what would write over another run.
        """
        if resume == "auto":
            return self._newest_checkpoint()
        if not evaluate_only:
            self._refuse_overwriting(resume)
        return load_checkpoint(Path(resume)) if resume else None

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        for path in self.checkpoints():
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                log.warning("%s; trying the checkpoint before it", error)
                continue
            log.info("resuming from %s", path)
            return state
        if self.checkpoints():
            raise ValueError(f"no checkpoint of {self.read_path} can be read: remove them to start the run anew")
        return None

    def _refuse_overwriting(self, resume: str) -> None:
        """A run may continue in its own folder only."""
        if self.read_path is None or (resume and Path(resume).resolve().parent == self.read_path.resolve()):
            return
        for trace in (*self.checkpoints(), self.read_path / "log.txt"):
            if trace.exists():
                raise ValueError(
                    f"--output_dir {self.read_path} already holds a run ({trace.name}): continue it with "
                    "--resume auto, or name another folder"
                )


def _epoch_of(path: Path) -> int | None:
    """5 for checkpoint-5.pth; None for other names."""
    number = path.stem.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that RunFolder.save_checkpoint wrote. ValueError for any other file."""
    state = load_plain(path)
    if not (isinstance(state, dict) and isinstance(state.get("epoch"), int)):
        raise ValueError(f"{path} is not the checkpoint of a run: it names no epoch")
    return state
