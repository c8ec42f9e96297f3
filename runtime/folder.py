"""The folder of a run: its arguments (args.json), its course (log.txt, trackers) and its checkpoints."""

import contextlib
import fcntl
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from torch import Tensor

from encoders.load import save_encoder
from runtime.trackers import Service, TensorBoard
from util import distributed
from util.files import atomic_path, digest, disk_error, no_link, to_json, write_atomically, write_json
from util.progress import log
from util.safe_load import load_plain

# raised, also inside torch, by loading a state with unexpected content
LOAD_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)
LOCK = ".lock"
# of a run, as a pattern
FILES = (
    r"(args|results|attention|aggregation|tsne|trackers)\.json|log\.txt|(encoder|predictions|examples)\.safetensors"
    r"|checkpoint-\d+(-\d+)?\.pth|\w+\.(png|pdf)"
)


def writes(method: Callable, attribute: str = "path") -> Callable:
    """A method that only rank 0 of a run with a folder runs. An unwritable or full disk is a ValueError, one line."""

    @functools.wraps(method)
    def guarded(self: "RunFolder", *arguments: Any, **options: Any) -> None:
        if self.path is None:
            return
        try:
            method(self, *arguments, **options)
        except (OSError, RuntimeError) as error:
            if (cause := disk_error(error)) is None:
                raise
            kept = f"; {self.kept[-1]} is whole" if self.kept and self.kept[-1].exists() else ""
            flag = {"path": "--output_dir", "log_dir": "--log_dir"}[attribute]
            message = f"{flag} {getattr(self, attribute)} cannot be written: {cause}{kept}"
            raise ValueError(message) from error

    return guarded


logs = functools.partial(writes, attribute="log_dir")  # to --log_dir


class RunFolder:
    """Records of one run; only rank 0 writes, and makes the folder when it does. An empty `path` keeps nothing."""

    def __init__(
        self, path: str | os.PathLike, log_dir: str | os.PathLike | None = None, track: Sequence[str] = ("tensorboard",)
    ):
        """track: of runtime.trackers.TRACKERS; log_dir: of TensorBoard, by default `path`."""
        self.read_path = Path(path) if path else None
        self.path = self.read_path if distributed.rank() == 0 else None
        self.track, self.trackers = track, []
        self.log_dir = Path(log_dir) if log_dir else self.path
        self.kept: list[Path] = []  # checkpoints that this process wrote or read, oldest first
        self.lock: IO | None = None  # open while this process writes here

    @writes
    def claim(self) -> None:
        """Make the folder this process's own, until that ends or closes it, and remove what killed processes left
        half-written. ValueError where another process writes here, or the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / LOCK, "a", opener=no_link)  # noqa: SIM115  (closed with this object, at the latest)
        try:
            # a record lock: loader workers do not inherit it, so that it ends with this process, however that ends
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            message = "another process writes there: wait for its end, or name another folder"
            raise ValueError(f"--output_dir {self.path}: {message}") from error
        except OSError:  # a file system that has no locks
            pass
        for path in self.path.glob(".*.tmp"):
            if re.fullmatch(rf"\.({FILES})\.\w{{8}}\.tmp", path.name):  # as util.files.atomic_path names them
                path.unlink(missing_ok=True)

    def start(self, record: dict[str, Any], name: str = "args.json", purge_step: int | None = None) -> None:
        """Write the arguments with their provenance, and open the trackers. ValueError where that is not possible.

        purge_step: the first step that is measured now: TensorBoard forgets older values from there on.
        """
        self.claim()
        self.write(name, record)
        self._open_trackers(record, purge_step)

    @logs
    def _open_trackers(self, record: dict[str, Any], purge_step: int | None) -> None:
        boards = [TensorBoard(self.log_dir, purge_step)] if "tensorboard" in self.track else []
        self.trackers = [*boards, *(Service(name, self.path, record) for name in self.track if name != "tensorboard")]

    @writes
    def write(self, name: str, value: Any) -> None:
        """Write JSON into the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / name, value)

    @writes
    def save_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write safetensors; every program takes encoder.safetensors as --finetune."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_encoder(self.path / name, tensors, metadata)

    @writes
    def log_line(self, record: dict[str, Any]) -> None:
        """One line of JSON in log.txt (an epoch's figures, MAE's convention), in place of this epoch's and later ones.

        So a resumed run repeats no line, and a line that a kill cut short is gone.
        """
        earlier = []
        for line in self._log_lines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError, RecursionError):
                if json.loads(line)["epoch"] < record["epoch"]:
                    earlier.append(line)
        content = "".join(f"{line}\n" for line in [*earlier, to_json(record)])
        write_atomically(self.path / "log.txt", content.encode())

    def _log_lines(self) -> list[str]:
        log_file = self.path and self.path / "log.txt"
        return log_file.read_text("utf-8", "replace").splitlines() if log_file and log_file.exists() else []

    def last_line(self) -> dict[str, Any] | None:
        """What log_line has written last, perhaps before this process; None where there is nothing."""
        lines = self._log_lines()
        try:
            return json.loads(lines[-1]) if lines else None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path / 'log.txt'} is damaged: {error}") from error

    @logs
    def scalars(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.scalars(values, step)

    @logs
    def image(self, name: str, pixels: numpy.ndarray, step: int) -> None:
        """pixels: (h,w,3) in [0,1]."""
        for tracker in self.trackers:
            tracker.image(name, pixels, step)

    @logs
    def close(self, figures: Iterable[Path] = ()) -> None:
        """figures: those that the trackers get beside the folder's own."""
        for tracker in self.trackers:
            tracker.finish(self.path, [*self.path.glob("*.png"), *figures])
        if self.lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self.lock.close()

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this folder, newest first."""
        paths = self.read_path.glob("checkpoint-*.pth") if self.read_path else ()
        return sorted((path for path in paths if _position(path) and path.is_file()), key=_position, reverse=True)

    @writes
    def save_checkpoint(self, epoch: int, state: dict[str, Any], keep: int = 2, step: int | None = None) -> None:
        """Write checkpoint-<epoch>.pth, or checkpoint-<epoch>-<step>.pth after `step` optimizer steps of the epoch,
        whole; then remove all but it and the `keep` - 1 before it.

        Later ones are left from before an earlier state was resumed, and "auto" must not take them for this run's;
        unread ones may be damaged, and do not count among those kept.
        """
        target = self.path / (f"checkpoint-{epoch}.pth" if step is None else f"checkpoint-{epoch}-{step}.pth")
        for tracker in self.trackers:
            tracker.flush()  # what happened before this state is on record, too
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            torch.save(sealed({"epoch": epoch, "step": step, **state}), file)
        earlier = [path for path in self.kept if path != target and _position(path) < _position(target)]
        self.kept = [*earlier, target][-keep:]
        for path in self.checkpoints():
            if path not in self.kept:
                path.unlink(missing_ok=True)

    def find_checkpoint(
        self, resume: str, evaluate_only: bool = False, restore: Callable[[dict[str, Any]], None] = lambda state: None
    ) -> dict[str, Any] | None:
        """The state to resume from: a path, "auto" for the newest good one of this folder, "" for a fresh start.

        restore: takes the state over; its ValueError says that it does not fit, and "auto" then tries the one before;
        AnotherRun is final. None for a fresh start, which "auto" is where there is no checkpoint yet. ValueError where
        no checkpoint of the run is good, and, unless evaluate_only, for what would write over another run. Rank 0
        chooses, the others take the same file.
        """
        if not evaluate_only:
            self.refuse_overwriting(resume)
        chosen = state = error = None
        if distributed.rank() == 0:
            try:
                chosen, state = self._newest_good(resume, restore)
            except ValueError as problem:
                error = problem
        chosen, message = distributed.from_main((chosen, error and str(error)))
        if message is not None:
            raise error or distributed.everywhere_raised(message)
        if chosen is None:
            return None
        if distributed.world_size() > 1:  # each node may have a file of that name
            try:
                state = state or _load(chosen, restore)
                content = digest(state)
            except ValueError as problem:
                content = str(problem)
            distributed.require_equal({f"checkpoint {chosen}": content})
        if self.read_path is not None and Path(chosen).resolve().parent == self.read_path.resolve():
            self.kept = [self.read_path / Path(chosen).name]
        log.info("%s from %s", "evaluating" if evaluate_only else "resuming", chosen)
        return state

    def _newest_good(self, resume: str, restore: Callable) -> tuple[str | None, dict[str, Any] | None]:
        if resume != "auto":
            return (resume, _load(resume, restore)) if resume else (None, None)
        for path in self.checkpoints():
            try:
                return str(path), _load(str(path), restore)
            except AnotherRun:
                raise
            except ValueError as error:
                log.warning("%s; trying the checkpoint before it", " ".join(str(error).split()))
        if self.checkpoints():
            raise ValueError(f"no checkpoint of {self.read_path} can be read: remove them to start the run anew")
        return None, None

    def refuse_results(self, pattern: str) -> None:
        """ValueError where the folder holds files of these names: an analysis writes into it once."""
        if self.path is not None and any(self.path.glob(pattern)):
            raise ValueError(f"--output_dir {self.path} already holds results: name another folder, or remove it")

    def refuse_overwriting(self, resume: str) -> None:
        """A run may continue in its own folder only, and none in another program's; ValueError."""
        folder, mine, theirs = self.read_path, Path(sys.argv[0]).name, ""
        if folder is None:
            return
        with contextlib.suppress(OSError, *LOAD_ERRORS):
            theirs = json.loads((folder / "args.json").read_text("utf-8"))["command"].split()[0]
        if mine != theirs and mine.startswith("main_") and theirs.startswith("main_"):
            raise ValueError(f"--output_dir {folder} holds a run of {theirs}: name another folder")
        traces = [path for path in (*self.checkpoints(), folder / "log.txt") if path.exists()]
        if traces and resume != "auto" and not (resume and Path(resume).resolve().parent == folder.resolve()):
            message = f"already holds a run ({traces[0].name}): continue it with --resume auto, or name another folder"
            raise ValueError(f"--output_dir {folder} {message}")


class AnotherRun(ValueError):
    """A good checkpoint, of a run with other settings: no older one would help."""


def _position(path: Path) -> tuple[int, float] | None:
    """(5, infinity) for checkpoint-5.pth, (5, 120) for checkpoint-5-120.pth; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", path.name)
    return match and (int(match[1]), float(match[2] or "inf"))


def _load(path: str, restore: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    state = load_checkpoint(Path(path))
    try:
        restore(state)
    except AnotherRun:
        raise
    except ValueError as error:
        raise ValueError(f"--resume: {path}: {error}") from error
    return state


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the digest of its content, by which load_checkpoint knows it: torch reads damaged bytes as they
    are, without a look at the checksums that a zip file has."""
    return {**state, "sha256": digest(state)}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that RunFolder.save_checkpoint wrote. ValueError for any other file, and for a damaged one."""
    state = load_plain(path)
    if not (isinstance(state, dict) and isinstance(state.get("epoch"), int) and "sha256" in state):
        raise ValueError(f"{path} is not the checkpoint of a run: it has no epoch, or no sha256 of its content")
    seal = state.pop("sha256")
    try:
        intact = seal == digest(state)
    except (TypeError, RecursionError, UnicodeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its content is not what was saved")
    return state
