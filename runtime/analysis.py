"""What analyses of images share: which images, and passes over them that can be stopped and gone on with."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from data_sets.table import build_dataset
from runtime.folder import MISFITS, AnotherRun, RunFolder
from runtime.processes import require_same_run
from runtime.resumable import check_identity
from util import signals
from util.distributed import agree, barrier, gather_objects, leave, rank, world_size
from util.progress import log
from util.seeding import stable_seed


def analysed_images(dataset: str, path: Path, allow_subset: bool) -> torch.utils.data.Dataset:
    """The validation images of a data set, or all of a plain folder of class folders."""
    is_plain = dataset == "image_folder" and not any((path / split).exists() for split in ("train", "val"))
    return build_dataset(dataset, path, "." if is_plain else "val", allow_subset)


def subset(length: int, num_images: int | None, seed: int) -> list[int]:
    """Indices to analyse, in order: all, or a random subset that is a function of the seed."""
    if num_images is None:
        return list(range(length))
    if not 1 <= num_images <= length:
        raise ValueError(f"--num_images {num_images}, but there are {length} images: choose from 1 to {length}")
    generator = torch.Generator().manual_seed(stable_seed("subset", seed))
    return torch.randperm(length, generator=generator)[:num_images].sort().values.tolist()


class Record(Protocol):
    """What a pass gathers from the images of one process."""

    def state(self) -> dict[str, Any]:
        """What another is made of that goes on from here: tensors and plain data."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


class Progress(Generic[AnyRecord]):
    """How far an analysis has come in its passes over the images, and its checkpoints.

    checkpoint-<pass>-<images>.pth stands within a pass, counted from 0; checkpoint-<pass>.pth behind it. The images
    that were seen are always the first ones, so another number of processes can go on with the others; it gives the
    same numbers, to rounding.
    """

    def __init__(
        self,
        program: str,
        folder: RunFolder,
        results: str,
        identity: dict[str, Any],
        passes: Mapping[str, Callable[[Sequence[dict]], AnyRecord]],
        images: int,
        batch_size: int,
        save_every_minutes: float = 0,
    ):
        """results: pattern of the names of the result files; identity: plain data that must be equal when the analysis
        is resumed; passes: {name: makes a pass's record from the states of several processes}; images: of every pass;
        batch_size: images per process; save_every_minutes: 0 for no checkpoints within a pass."""
        self.program, self.folder, self.pattern, self.identity = program, folder, results, identity
        self.names, self.makers, self.images = list(passes), list(passes.values()), images
        self.batch_size, self.save_every_minutes = batch_size, save_every_minutes
        self.results: list[dict] = []  # of the passes behind it
        self.saved = (0, 0)  # where the newest checkpoint stands; at the start, none is needed
        self.saved_at = time.monotonic()
        self._begin([])

    def _begin(self, states: Sequence[dict], seen: int = 0, seconds: float = 0.0) -> None:
        self.record = None if self.complete else self.makers[len(self.results)](states)
        self.seen, self.first = seen, seen
        self.start = time.perf_counter() - seconds

    @property
    def complete(self) -> bool:
        """Nothing is left but to write the results."""
        return len(self.results) == len(self.makers)

    @property
    def seconds(self) -> float:
        """That the pass has taken, in all its starts."""
        return time.perf_counter() - self.start

    @property
    def place(self) -> tuple[int, int]:
        return len(self.results), self.seen

    def reach(self, batches: int) -> None:
        """So many batches of every process are behind this start; a checkpoint where it is time for one."""
        self.seen = min(self.first + batches * self.batch_size * world_size(), self.images)
        minutes = self.save_every_minutes
        late = bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes
        if agree(late)[0] and self.saved != self.place:
            self.save()

    def end_pass(self, result: dict) -> None:
        """Keep what a pass has given, tensors and plain data, and go to the next."""
        self.results.append(result)
        self._begin([])
        self.save()

    def save(self) -> None:
        """Write a checkpoint of where the analysis stands: all processes together."""
        ended = self.seen == 0
        states = [] if ended else gather_objects(self.record.state())
        state = {
            "results": [list(pair) for pair in zip(self.names, self.results, strict=False)], "recorders": states,
            "seconds": self.seconds, "identity": self.identity,
        }  # fmt: skip
        keep = 1 if self.complete else 2
        self.folder.save_checkpoint(len(self.results) - ended, state, keep, None if ended else self.seen)
        self.saved, self.saved_at = self.place, time.monotonic()

    def stoppable(self) -> contextlib.AbstractContextManager[None]:
        """Requests to stop wait for the end of a batch in this block; then the analysis is saved."""
        return signals.saving(self._save_for_later)

    def _save_for_later(self) -> str:
        if self.folder.read_path is None:
            return "nothing saved, because --output_dir is empty"
        if self.place == (0, 0):
            return "before its first batch, so that there was nothing to save"
        if self.saved != self.place:
            self.save()
        barrier()  # the first process to end takes the others along
        leave()
        return (
            f"saved after {self.seen} of {self.images} images ({self.names[len(self.results)]}) in "
            f"{self.folder.read_path}; the same command with --resume auto goes on"
        )

    def resume(self, resume: str) -> None:
        """Continue from the checkpoint that `resume` names, see RunFolder.find_checkpoint. ValueError where there is
        none to continue from and the folder holds results."""
        require_same_run(self.identity)
        if self.folder.find_checkpoint(resume, restore=self._restore) is None:
            self.folder.refuse_results(self.pattern)
        elif self.folder.kept:
            self.saved = self.place
        if self.complete:
            log.info("the analysis is complete: its results are written again")

    def _restore(self, state: dict) -> None:
        """Take over a checkpoint. ValueError where it does not fit, AnotherRun where that is meant by the arguments."""
        if missing := {"step", "results", "recorders", "seconds", "identity"} - state.keys():
            raise ValueError(f"not a checkpoint of {self.program} (no {', '.join(sorted(missing))})")
        try:
            check_identity(self.identity, state["identity"])
            results, states, seen = state["results"], state["recorders"], state["step"] or 0
            if len(results) != state["epoch"] + (seen == 0) or not 0 <= seen <= self.images:
                raise ValueError(f"it stands at image {seen} of pass {state['epoch']}, with {len(results)} results")
            if [name for name, _ in results] != self.names[: len(results)]:
                raise ValueError(f"its results are of other passes than {', '.join(self.names)}")
            if seen and not states:
                raise ValueError("it is of no process")
            if not seen:
                states = []
            elif len(states) == world_size():
                states = [states[rank()]]
            elif rank() != 0:
                states = []  # the first process takes what all of them had
            self.results = [result for _, result in results]
            self._begin(states, seen, float(state["seconds"]))
        except AnotherRun:
            raise
        except MISFITS as error:
            raise ValueError(f"the checkpoint does not fit this run: {error}") from error
