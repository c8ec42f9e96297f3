"""The folder of a run: what was asked (args.json), what happened (log.txt, trackers), and its checkpoints."""

import contextlib
import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from encoders.load import save_encoder
from runtime.processes import require_same_run
from runtime.trackers import Service, TensorBoard
from util import distributed
from util.files import atomic_path, digest, disk_error, remove_leftovers, to_json, write_atomically, write_json
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


class RunFolder:
    """Records of one run; only rank 0 writes, and makes the folder when it does. An empty `path` keeps nothing."""

    def __init__(
        self, path: str | os.PathLike, log_dir: str | os.PathLike | None = None, track: Sequence[str] = ("tensorboard",)
    ):
        """track: of runtime.trackers.TRACKERS; log_dir: of TensorBoard, by default `path`."""
        self.path = Path(path) if path and distributed.rank() == 0 else None
        self.track, self.trackers = track, []
        self.read_path = Path(path) if path else None
        self.log_dir = Path(log_dir) if log_dir else self.path
        self.kept: list[Path] = []  # checkpoints that this process wrote or read, oldest first
        self.lock: IO | None = None  # held while this process writes here

    def claim(self) -> None:
        """Make the folder this process's own, until that ends or closes it, and clear what killed ones left
        half-written. ValueError where another process writes here, or the folder cannot be written.
        """
        if self.path is None:
            return
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / LOCK, "w")  # noqa: SIM115
        try:
            # a record lock: loader workers do not inherit it, so that it ends with this process, however that ends
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"--output_dir {self.path}: another process writes there: wait for its end, or name another folder"
                ) from error  # else a file system that has no locks
        with self._writing():
            remove_leftovers(self.path, FILES)

    def start(self, record: dict[str, Any], name: str = "args.json", purge_step: int | None = None) -> None:
        """Write what was asked, with its provenance, and open the trackers. ValueError where that is not possible.

        purge_step: the first step that is measured now: TensorBoard forgets older values from there on.
        """
        self.claim()
        self.write(name, record)
        if self.path is not None:
            with self._writing("--log_dir", self.log_dir):
                boards = [TensorBoard(self.log_dir, purge_step)] if "tensorboard" in self.track else []
            services = [Service(name, self.path, record) for name in self.track if name != "tensorboard"]
            self.trackers = [*boards, *services]

    def write(self, name: str, value: Any) -> None:
        """Write JSON into the folder, made if need be. ValueError where that is not possible."""
        if self.path is not None:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / name, value)

    def save_encoder(self, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write encoder.safetensors, which every program takes as --finetune. ValueError where that is not possible."""
        self.save_tensors("encoder.safetensors", state, metadata)

    def save_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write tensors as a safetensors file. ValueError where that is not possible."""
        if self.path is not None:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                save_encoder(self.path / name, tensors, metadata)

    @contextlib.contextmanager
    def _writing(self, flag: str = "--output_dir", path: Path | None = None) -> Iterator[None]:
        """A disk that is full or may not be written is the user's to mend: ValueError, one line."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            trouble = disk_error(error)
            if trouble is None and not isinstance(error, SafetensorError):
                raise
            kept = f"; {self.kept[-1]} is whole" if self.kept and self.kept[-1].exists() else ""
            raise ValueError(f"{flag} {path or self.path} cannot be written: {trouble or error}{kept}") from error

    def log_line(self, record: dict[str, Any]) -> None:
        """One line of JSON in log.txt (an epoch's figures, MAE's convention), in place of this epoch's and later ones.

        So a resumed run repeats no line, and a line that a kill cut short is gone.
        """
        if self.path is None:
            return
        log_file = self.path / "log.txt"
        earlier = []
        with self._writing():
            for line in log_file.read_text(errors="replace").splitlines() if log_file.exists() else []:
                with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                    if json.loads(line)["epoch"] < record["epoch"]:
                        earlier.append(line)
            write_atomically(log_file, "".join(f"{line}\n" for line in [*earlier, to_json(record)]).encode())

    def last_line(self) -> dict[str, Any] | None:
        """What log_line has written last, perhaps before this process; None where there is nothing."""
        log_file = self.path and self.path / "log.txt"
        lines = log_file.read_text().splitlines() if log_file and log_file.exists() else []
        return json.loads(lines[-1]) if lines else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            with self._writing("--log_dir", self.log_dir):
                tracker.scalars(values, step)

    def image(self, name: str, pixels: numpy.ndarray, step: int) -> None:
        """pixels: (h,w,3) in [0,1]."""
        for tracker in self.trackers:
            with self._writing("--log_dir", self.log_dir):
                tracker.image(name, pixels, step)

    def close(self, figures: Iterable[Path] = ()) -> None:
        """figures: those that the trackers get beside the folder's own."""
        for tracker in self.trackers:
            with self._writing("--log_dir", self.log_dir):
                tracker.finish(self.path, [*self.path.glob("*.png"), *figures])
        if self.lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self.lock.close()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this folder, newest first."""
        if self.read_path is None:
            return []
        found = [path for path in self.read_path.glob("checkpoint-*.pth") if _position(path) is not None]
        return sorted(found, key=_position, reverse=True)

    def save_checkpoint(self, epoch: int, state: dict[str, Any], keep: int = 2, step: int | None = None) -> None:
        """Write checkpoint-<epoch>.pth, or checkpoint-<epoch>-<step>.pth after `step` optimizer steps of the epoch,
        whole; then remove all but it and the `keep` - 1 before it. ValueError where that is not possible.

        Later ones are left from before an earlier state was resumed, and "auto" must not take them for this run's;
        unread ones may be damaged, and do not count among those kept.
        """
        if self.path is None:
            return
        target = self.path / (f"checkpoint-{epoch}.pth" if step is None else f"checkpoint-{epoch}-{step}.pth")
        with self._writing():
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

        restore: takes the state over; its ValueError says that it does not fit, and "auto" then goes on to the one
        before; AnotherRun is final. None for a fresh start, which "auto" is where there is no checkpoint yet.
        ValueError where no checkpoint of the run is good, and, unless evaluate_only, for what would write over another
        run. Rank 0 chooses, the others take the same file.
        """
        if not evaluate_only:
            self.refuse_overwriting(resume)
        chosen, error = None, None
        if distributed.rank() == 0:
            try:
                chosen, state = self._newest_good(restore) if resume == "auto" else _load(resume, restore)
            except ValueError as problem:
                error = problem
        chosen, text = distributed.from_main((chosen, error and str(error)))
        if text is not None:
            raise error or ValueError(text)
        if chosen is None:
            return None
        if distributed.world_size() > 1:  # each node may have a file of that name
            try:
                if distributed.rank() != 0:
                    _, state = _load(chosen, restore)
                content = digest(state)
            except ValueError as problem:
                content = str(problem)
            require_same_run({f"checkpoint {chosen}": content})
        if self.read_path is not None and Path(chosen).resolve().parent == self.read_path.resolve():
            self.kept = [self.read_path / Path(chosen).name]
        log.info("%s from %s", "evaluating" if evaluate_only else "resuming", chosen)
        return state

    def _newest_good(self, restore: Callable[[dict[str, Any]], None]) -> tuple[str | None, dict[str, Any] | None]:
        for path in self.checkpoints():
            try:
                return _load(str(path), restore)
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

    def refuse_other_programs(self) -> None:
        """ValueError where the folder holds a run of another main: its record, args.json, would be lost."""
        mine, theirs = Path(sys.argv[0]).name, ""
        if self.read_path is not None:
            with contextlib.suppress(OSError, *LOAD_ERRORS):
                theirs = json.loads((self.read_path / "args.json").read_text())["command"].split()[0]
        if mine != theirs and mine.startswith("main_") and theirs.startswith("main_"):
            raise ValueError(f"--output_dir {self.read_path} holds a run of {theirs}: name another folder")

    def refuse_overwriting(self, resume: str) -> None:
        """A run may continue in its own folder only; ValueError."""
        self.refuse_other_programs()
        own = resume == "auto" or (resume and Path(resume).resolve().parent == Path(self.read_path or "").resolve())
        if self.read_path is None or own:
            return
        for trace in (*self.checkpoints(), self.read_path / "log.txt"):
            if trace.exists():
                raise ValueError(
                    f"--output_dir {self.read_path} already holds a run ({trace.name}): continue it with "
                    "--resume auto, or name another folder"
                )


class AnotherRun(ValueError):
    """A good checkpoint, of a run with other settings: no older one would help."""


def _position(path: Path) -> tuple[int, float] | None:
    """(5, infinity) for checkpoint-5.pth, (5, 120) for checkpoint-5-120.pth; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-(\d+))?\.pth", path.name)
    return match and (int(match[1]), float(match[2] or "inf"))


def _load(path: str, restore: Callable[[dict[str, Any]], None]) -> tuple[str | None, dict[str, Any] | None]:
    if not path:
        return None, None
    state = load_checkpoint(Path(path))
    try:
        restore(state)
    except AnotherRun:
        raise
    except ValueError as error:
        raise ValueError(f"--resume: {path}: {error}") from error
    return path, state


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the digest of its content, by which load_checkpoint knows it: torch reads damaged bytes as they
    are, without a look at the checksums that a zip file has."""
    return {**state, "sha256": digest(state)}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that RunFolder.save_checkpoint wrote. ValueError for any other file, and for a damaged one."""
    state = load_plain(path)
    if not (isinstance(state, dict) and isinstance(state.get("epoch"), int)):
        raise ValueError(f"{path} is not the checkpoint of a run: it names no epoch")
    seal = state.pop("sha256", None)
    if seal is None:
        raise ValueError(f"{path} is not the checkpoint of a run: it has no sha256 of its content")
    try:
        whole = seal == digest(state)
    except TypeError:
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: its content is not what was saved")
    return state
