"""What training and analyses share: checkpoints on time and on request, and resumption."""

import abc
import contextlib
import time
from collections.abc import Iterator, Set
from typing import Any

from runtime.folder import LOAD_ERRORS, AnotherRun, RunFolder
from util import signals
from util.distributed import barrier, leave, rank


class Resumable(abc.ABC):
    """A run with a `position` (what it counts, smaller units within larger ones) that checkpoints bring back."""

    first_position = (0, 0)  # where nothing has been computed that a checkpoint would keep

    def __init__(self, program: str, folder: RunFolder, identity: dict[str, Any], save_every_minutes: float):
        """identity: plain data that must be equal when the run is resumed, and on all its processes."""
        self.program, self.folder, self.identity = program, folder, identity
        self.save_every_minutes = save_every_minutes
        self.saved_position: tuple[int, int] | None = None  # of the newest checkpoint in the folder
        self.saved_at = time.monotonic()

    @property
    @abc.abstractmethod
    def position(self) -> tuple[int, int]:
        """Epoch and optimizer steps, or pass and images, that are completed."""

    @abc.abstractmethod
    def done_so_far(self) -> str:
        """The position, for the line about the saved run."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the position; every process must call it."""

    @property
    def overdue(self) -> bool:
        return 0 < self.save_every_minutes <= (time.monotonic() - self.saved_at) / 60

    def _write(self, index: int, state: dict[str, Any], step: int | None, keep: int = 2) -> None:
        self.folder.save_checkpoint(index, {**state, "identity": self.identity}, keep, step)
        barrier(writing=True)
        self.saved_position, self.saved_at = self.position, time.monotonic()

    def stoppable(self) -> contextlib.AbstractContextManager[None]:
        """In this block, requests to stop wait until the program asks for them; then the run is saved.

        An evaluation that is abandoned is repeated when the run is resumed.
        """
        return signals.saving(self._save_for_later, rank() == 0)

    def _save_for_later(self) -> str:
        if self.folder.read_path is None:
            return "nothing saved, because --output_dir is empty"
        if self.saved_position is None and self.position == self.first_position:
            return "at the very start, with nothing to save"
        if self.saved_position != self.position:
            self.save()
        barrier(writing=True)  # the first process to end takes the others along
        leave()
        where = self.folder.read_path
        return f"saved after {self.done_so_far()} in {where}; continue with the same command and --resume auto"

    @contextlib.contextmanager
    def _checking(self, state: dict[str, Any], expected: Set[str]) -> Iterator[None]:
        """For the block that restores a state: ValueError where its entries or their content are not this program's."""
        if missing := {"step", "identity", *expected} - state.keys():
            raise ValueError(f"not a checkpoint of {self.program} (no {', '.join(sorted(missing))})")
        try:
            yield
        except AnotherRun:
            raise
        except LOAD_ERRORS as error:
            raise ValueError(f"the checkpoint does not fit this run: {error}") from error


def check_identity(now: dict[str, Any], before: dict[str, Any], advice: str = "name another --output_dir") -> None:
    """Compare what makes a run this run with what its checkpoint has. AnotherRun names every difference.

    A name that only one of the two has is not compared: flags come and go between versions.
    """
    differing = [name for name in now if name in before and before[name] != now[name]]
    if differing:
        changed = "; ".join(f"{name} was {before[name]}, is {now[name]}" for name in differing)
        raise AnotherRun(f"--resume: this is another run ({changed}): {advice}")
