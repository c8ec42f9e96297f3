"""The images that an analysis takes, and resumable passes over them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runtime.folder import RunFolder
from runtime.resumable import Resumable, check_identity
from util.distributed import agree, gather_objects, rank, require_equal, world_size
from util.progress import log
from util.seeding import stable_seed


def subset(length: int, num_images: int | None, seed: int) -> list[int]:
    """Indices to analyse, in order: all, or a random subset that is a function of the seed."""
    if num_images is None:
        return list(range(length))
    if not 1 <= num_images <= length:
        raise ValueError(f"--num_images {num_images}, but there are {length} images: choose from 1 to {length}")
    generator = torch.Generator().manual_seed(stable_seed("subset", seed))
    return torch.randperm(length, generator=generator)[:num_images].sort().values.tolist()


class Progress(Resumable):
    """Passes of an analysis over its images, with checkpoints: checkpoint-<pass>-<images>.pth within a pass, counted
    from 0, and checkpoint-<pass>.pth after it.

    The images seen are always the first ones, so another number of processes can continue with the others, with the
    same numbers to rounding.
    """

    def __init__(
        self,
        program: str,
        folder: RunFolder,
        results: str,
        identity: dict[str, Any],
        passes: Mapping[str, Callable[[Sequence[dict]], Any]],
        images: int,
        batch_size: int,
        save_every_minutes: float = 0,
    ):
        """results: pattern of the names of the result files; identity: plain data that must be equal when the analysis
        is resumed; passes: {name: makes a pass's record from the `state()`, tensors and plain data, of those of several
        processes}; images: of every pass; batch_size: per process; save_every_minutes: 0: not within a pass."""
        super().__init__(program, folder, identity, save_every_minutes)
        self.pattern, self.images, self.batch_size = results, images, batch_size
        self.names, self.makers = list(passes), list(passes.values())
        self.results: list[dict] = []  # of the passes behind it
        self._begin([])

    def _begin(self, states: Sequence[dict], seen: int = 0, seconds: float = 0.0) -> None:
        self.record = None if self.complete else self.makers[len(self.results)](states)
        self.seen, self.first = seen, seen
        self.start = time.perf_counter() - seconds

    @property
    def complete(self) -> bool:
        """Whether all passes are done."""
        return len(self.results) == len(self.makers)

    @property
    def seconds(self) -> float:
        """Duration of the pass, over all starts of the program."""
        return time.perf_counter() - self.start

    @property
    def position(self) -> tuple[int, int]:
        return len(self.results), self.seen

    def done_so_far(self) -> str:
        return f"{self.seen} of {self.images} images ({self.names[len(self.results)]})"

    def reach(self, batches: int) -> None:
        """Every process has done this many batches since this start; a checkpoint if one is due."""
        self.seen = min(self.first + batches * self.batch_size * world_size(), self.images)
        new = self.position not in (self.first_position, self.saved_position)
        if agree(self.overdue)[0] and new:
            self.save()

    def end_pass(self, result: dict) -> None:
        """Keep the result of a pass, tensors and plain data, and begin the next pass."""
        self.results.append(result)
        self._begin([])
        self.save()

    def save(self) -> None:
        ended = self.seen == 0
        state = {
            "results": [list(pair) for pair in zip(self.names, self.results, strict=False)],
            "recorders": [] if ended else gather_objects(self.record.state()),
            "seconds": self.seconds,
        }
        self._write(len(self.results) - ended, state, None if ended else self.seen, keep=1 if self.complete else 2)

    def resume(self, resume: str) -> None:
        """Continue from the checkpoint that `resume` names, see RunFolder.find_checkpoint. ValueError where there is
        none to continue from and the folder holds results."""
        require_equal(self.identity)
        if self.folder.find_checkpoint(resume, restore=self._restore) is None:
            self.folder.refuse_results(self.pattern)
        elif self.folder.kept:
            self.saved_position = self.position
        if self.complete:
            log.info("the analysis is complete: only its results are written again")

    def _restore(self, state: dict) -> None:
        """Take over a checkpoint. ValueError where it does not fit, AnotherRun where the arguments differ."""
        with self._checking(state, {"results", "recorders", "seconds"}):
            check_identity(self.identity, state["identity"])
            results, states, seen = state["results"], state["recorders"], state["step"] or 0
            if len(results) != state["epoch"] + (seen == 0) or not 0 <= seen <= self.images:
                raise ValueError(f"it stands at image {seen} of pass {state['epoch']}, with {len(results)} results")
            if [name for name, _ in results] != self.names[: len(results)]:
                raise ValueError(f"its results are of other passes than {', '.join(self.names)}")
            if seen and not states:
                raise ValueError("it has the state of no process")
            if len(states) == world_size():
                states = [states[rank()]]
            elif rank() != 0:
                states = []  # the first process takes over the states of all
            states = states if seen else []
            self.results = [result for _, result in results]
            self._begin(states, seen, float(state["seconds"]))
