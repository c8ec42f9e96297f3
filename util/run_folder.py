"""The folder of a run: what was asked (args.json), what happened (log.txt, TensorBoard), and its checkpoints."""

import argparse
import json
import os
import platform
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
from util.files import atomic_path, write_atomically, write_json
from util.progress import log

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Where a number comes from: command, commit, versions, hardware."""

    def git(*command: str) -> str | None:
        result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    """Records of one run; only rank 0 writes. An empty `path` keeps nothing."""

    def __init__(self, path: str | os.PathLike, log_dir: str | os.PathLike | None = None):
        self.path = Path(path) if path and distributed.rank() == 0 else None
        self.board: SummaryWriter | None = None
        self.read_path = Path(path) if path else None
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
        self.log_dir = Path(log_dir) if log_dir else self.path

    def start(self, record: dict[str, Any], name: str = "args.json") -> None:
        """Write what was asked, with its provenance, and open TensorBoard."""
        if self.path is not None:
            write_json(self.path / name, record)
            self.board = SummaryWriter(log_dir=str(self.log_dir))

    def write(self, name: str, value: Any) -> None:
        if self.path is not None:
            write_json(self.path / name, value)

    def log_line(self, record: dict[str, Any]) -> None:
        """Append one line of JSON to log.txt (an epoch's figures, MAE's convention)."""
        if self.path is not None:
            with open(self.path / "log.txt", "a") as file:
                file.write(json.dumps(record) + "\n")

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
        found = self.read_path.glob("checkpoint-*.pth")
        return sorted(found, key=lambda path: int(path.stem.split("-")[1]), reverse=True)

    def save_checkpoint(self, epoch: int, state: dict[str, Any], keep: int = 2) -> None:
        """Write checkpoint-<epoch>.pth whole, then remove all but the newest `keep`."""
        if self.path is None:
            return
        with atomic_path(self.path / f"checkpoint-{epoch}.pth") as temporary:
            torch.save({"epoch": epoch, **state}, temporary)
        for old in self.checkpoints()[keep:]:
            old.unlink()

    def find_checkpoint(self, resume: str) -> dict[str, Any] | None:
        """The state to resume from: a path, "auto" for the newest readable one of this folder, "" for a fresh start.

        A fresh start in a folder that holds a run is refused: it would write over that run.
        """
        if resume == "auto":
            for path in self.checkpoints():
                try:
                    state = load_plain(path)
                except ValueError as error:
                    log.warning("%s; trying the checkpoint before it", error)
                    continue
                log.info("resuming from %s", path)
                self._cut_log(state["epoch"])
                return state
            return None
        if resume:
            state = load_plain(Path(resume))
            self._cut_log(state["epoch"])
            return state
        if self.checkpoints():
            raise ValueError(
                f"--output_dir {self.read_path} already holds a run ({self.checkpoints()[0].name}): continue it with "
                "--resume auto, or name another folder"
            )
        return None

    def _cut_log(self, epoch: int) -> None:
        """Drop the lines of log.txt that the resumed run will write again."""
        if self.path is None or not (self.path / "log.txt").exists():
            return
        lines = (self.path / "log.txt").read_text().splitlines()
        kept = [line + "\n" for line in lines if json.loads(line)["epoch"] <= epoch]
        write_atomically(self.path / "log.txt", "".join(kept).encode())


def load_plain(path: Path) -> dict[str, Any]:
    """A torch file of tensors and plain containers; nothing else in it is executed. ValueError names the trouble."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        # MAE's checkpoints carry their arguments; a Namespace only takes attributes when it is rebuilt
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors: {str(error).splitlines()[0]}") from error
