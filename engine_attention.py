"""One pass of a frozen encoder over images: every metric in every block, as moments over the images.

A pass can be stopped between two batches and goes on from there, to the same bits.
"""

import argparse
import contextlib
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from attention_stats import METRICS, Metric, Sizes, reduce_attention
from models_vit import BlockTrace, VisionTransformer
from token_stats import log_spectrum
from util import signals
from util.arguments import check_resumed, plain
from util.datasets import Watched
from util.distributed import agree, barrier, gather_objects, leave, rank, world_size
from util.moments import Covariance, Moments
from util.progress import log
from util.run_folder import MISFITS, AnotherRun, RunFolder

Place = tuple[str, int]  # a metric, and the block (of tokens: the number of blocks before them)


def applicable(names: Collection[str], backbone: VisionTransformer) -> dict[str, Metric]:
    """The metrics among the names whose tokens the encoder has. ValueError where there is none."""
    absent = {"cls"} if not backbone.has_cls else set()
    absent |= {"registers"} if not backbone.num_registers else set()
    found = {name: METRICS[name] for name in METRICS if name in names and not absent & set(METRICS[name].needs)}
    if not found:
        missing = " and ".join(f"no {'[cls]' if token == 'cls' else 'register'} token" for token in sorted(absent))
        raise ValueError(f"--metrics {' '.join(names)}: this encoder has {missing}")
    return found


def observe(
    step: BlockTrace, metrics: dict[str, Metric], num_prefix: int, has_cls: bool, sizes: Sizes, reduction: str
) -> Iterator[tuple[Place, Tensor]]:
    """What the metrics say of one block, (B,..) each; those of tokens, also of what enters the first block."""
    of_attention = {name: metric for name, metric in metrics.items() if not metric.of_tokens}
    if of_attention:
        wanted = {need for metric in of_attention.values() for need in metric.needs}
        reduced = reduce_attention(step, num_prefix, has_cls, reduction, wanted, sizes)
        for name, metric in of_attention.items():
            yield (name, step.index), metric.record(reduced)
    for depth, tokens in ((0, step.x), (step.index + 1, step.out)):
        if depth == 0 and step.index > 0:
            continue
        patches = tokens[:, num_prefix:].unflatten(1, sizes.grid)
        for name, metric in metrics.items():
            if metric.of_tokens:
                yield (name, depth), metric.compute(patches) if metric.over_images else metric.record(patches)


class Recorder:
    """What was observed so far, by place."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.moments = Moments()  # of all records of an image as one vector: one update per batch
        self.widths: dict[Place, int] = {}
        self.covariances: dict[Place, Covariance] = {}
        if state is not None:
            self.moments = Moments(**state["moments"])
            self.widths = {(name, block): width for name, block, width in state["widths"]}
            self.covariances = {(name, block): Covariance(**kept) for name, block, kept in state["covariances"]}
            numbers = (sum(self.widths.values()),)
            if self.widths and not self.moments.mean.shape == self.moments.squares.shape == numbers:
                raise ValueError(f"its moments are not of {numbers[0]} numbers")

    def state(self) -> dict[str, Any]:
        """What another is made of that goes on from here: tensors and plain data."""
        return {
            "moments": vars(self.moments),
            "widths": [[*place, width] for place, width in self.widths.items()],
            "covariances": [[*place, vars(covariance)] for place, covariance in self.covariances.items()],
        }

    def add(self, observed: dict[Place, Tensor]) -> None:
        """One batch of at least one image."""
        records = {place: record for place, record in observed.items() if not METRICS[place[0]].over_images}
        for place, vectors in observed.items():
            if place not in records:
                self.covariances.setdefault(place, Covariance()).update(vectors.cpu())
        if records:
            widths = {place: record.shape[1] for place, record in records.items()}
            if self.widths not in ({}, widths):
                raise ValueError("--resume: what was observed before is of other numbers: the code has changed since")
            self.widths = widths
            self.moments.update(torch.cat(list(records.values()), dim=1).cpu())

    @classmethod
    def merged(cls, recorders: Iterable["Recorder"]) -> "Recorder":
        """Of all their images; ranks are merged in their order: the same bits everywhere and in every run."""
        total = cls()
        for one in recorders:
            total.widths = total.widths or one.widths
            total.moments.merge(one.moments)
            for place, covariance in one.covariances.items():
                total.covariances.setdefault(place, Covariance()).merge(covariance)
        return total

    def results(self) -> dict[Place, dict]:
        """count, mean and std over the images of the summary, and of each number per axis, as JSON has them."""
        found = {}
        if self.widths:
            widths = list(self.widths.values())
            parts = (self.moments.mean.split(widths), self.moments.std().split(widths))
            for place, mean, std in zip(self.widths, *parts, strict=True):
                axis = METRICS[place[0]].axis
                entry = {"count": self.moments.count, "mean": float(mean[0]), "std": float(std[0])}
                if axis is not None:
                    entry |= {f"mean_per_{axis}": mean[1:].tolist(), f"std_per_{axis}": std[1:].tolist()}
                found[place] = entry
        for place, covariance in self.covariances.items():
            rank = min(covariance.count - 1, len(covariance.mean))  # more cannot differ from zero
            spectrum = log_spectrum(covariance.matrix(), rank)
            mean = float(spectrum.mean()) if rank else None
            found[place] = {
                "count": covariance.count, "mean": mean, "std": None,
                f"mean_per_{METRICS[place[0]].axis}": spectrum.tolist(),
            }  # fmt: skip
        return found


@torch.no_grad()
def measure(
    backbone: VisionTransformer,
    loader: Iterable,
    metrics: dict[str, Metric],
    sizes: Sizes,
    amp: torch.dtype,
    reduction: str,
    device: torch.device,
    description: str = "attention",
    progress: "Progress | None" = None,
) -> dict[Place, dict]:
    """{(metric, block): count, mean, std, ...} over the images of all processes, each counted once.

    Metrics of tokens have a block more: 0 is what enters the first block. FloatingPointError at the first batch whose
    activations overflow. progress: what was seen before, to be gone on with; the loader has the images that are left.
    """
    recorder, between = (progress.recorder, progress.reach) if progress else (Recorder(), lambda done: None)
    seen, start = 0, time.perf_counter()
    for sample in (watched := Watched(loader, description, agree=True, between=between)):
        images = sample.image.to(device, non_blocking=True)
        observed = {}
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            for step in backbone.trace(images):
                observed |= observe(step, metrics, backbone.num_prefix_tokens, backbone.has_cls, sizes, reduction)
                last = step.out
        if not last.isfinite().all():  # what overflows in any block reaches the last
            raise FloatingPointError(f"{description}: activations are not finite in {amp}; use another --amp")
        recorder.add(observed)
        seen += len(images)
        watched.bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.0f} images/s")
    if not (found := Recorder.merged(gather_objects(recorder)).results()):
        raise ValueError(f"{description}: none of the images can be read")
    return found


class Progress:
    """How far an analysis of several encoders has come, and its checkpoints.

    checkpoint-<encoder>-<images>.pth stands within the pass of an encoder, counted from 0; checkpoint-<encoder>.pth
    behind it. The images that were seen are always the first ones, so another number of processes can go on with the
    others; it gives the same numbers, to rounding.
    """

    program = "main_analyze_attention.py"

    def __init__(self, args: argparse.Namespace, folder: RunFolder, facts: dict[str, Any], encoders: int, images: int):
        """facts: what must be alike when the analysis is resumed, beside the arguments; images: in every pass."""
        self.args, self.folder, self.facts = args, folder, facts
        self.encoders, self.images = encoders, images
        self.results: list[dict] = []  # of the encoders behind it
        self.saved = (0, 0)  # where the newest checkpoint stands; at the start, none is needed
        self.saved_at = time.monotonic()
        self._begin(Recorder())

    def _begin(self, recorder: Recorder, seen: int = 0, seconds: float = 0.0) -> None:
        self.recorder, self.seen, self.first = recorder, seen, seen
        self.start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """That the pass has taken, in all its starts."""
        return time.perf_counter() - self.start

    @property
    def place(self) -> tuple[int, int]:
        return len(self.results), self.seen

    def reach(self, batches: int) -> None:
        """So many batches of every process are behind this start; a checkpoint where it is time for one."""
        self.seen = min(self.first + batches * self.args.batch_size * world_size(), self.images)
        minutes = self.args.save_every_minutes
        late = bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes
        if agree(late)[0] and self.saved != self.place:
            self.save()

    def end_pass(self, result: dict) -> None:
        """Keep what an encoder has given, and go to the next."""
        self.results.append(result)
        self._begin(Recorder())
        self.save()

    def save(self) -> None:
        """Write a checkpoint of where the analysis stands: all processes together."""
        ended = self.seen == 0
        state = {
            "results": self.results, "recorders": gather_objects(self.recorder.state()), "seconds": self.seconds,
            "args": plain(self.args), "facts": self.facts,
        }  # fmt: skip
        last = len(self.results) == self.encoders  # nothing is behind it but to write the results
        self.folder.save_checkpoint(len(self.results) - ended, state, 1 if last else 2, None if ended else self.seen)
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
            f"saved after {self.seen} of {self.images} images of encoder {len(self.results)} in "
            f"{self.folder.read_path}; the same command with --resume auto goes on"
        )

    def resume(self, resume: str) -> bool:
        """Continue from the checkpoint that --resume asks for; see RunFolder.find_checkpoint. Whether there is one."""
        found = self.folder.find_checkpoint(resume, restore=self._restore) is not None
        if found and self.folder.kept:
            self.saved = self.place
        if len(self.results) == self.encoders:
            log.info("the analysis is complete: its results are written again")
        return found

    def _restore(self, state: dict) -> None:
        """Take over a checkpoint. ValueError where it does not fit, AnotherRun where that is meant by the arguments."""
        if missing := {"step", "results", "recorders", "seconds"} - state.keys():
            raise ValueError(f"not a checkpoint of {self.program} (no {', '.join(sorted(missing))})")
        try:
            check_resumed(self.args, self.facts, state)
            results, seen = state["results"], state["step"] or 0
            if len(results) != state["epoch"] + (seen == 0) or not 0 <= seen <= self.images:
                raise ValueError(f"it stands at image {seen} of encoder {state['epoch']}, with {len(results)} results")
            recorders = [Recorder(kept) for kept in state["recorders"]]
            if not recorders:
                raise ValueError("it is of no process")
            if [result["label"] for result in results] != self.facts["encoders"][: len(results)]:
                raise ValueError("its results are of other encoders")
            if len(recorders) != world_size():
                recorders = [Recorder.merged(recorders), *(Recorder() for _ in range(world_size() - 1))]
            self.results = results
            self._begin(recorders[rank()], seen, float(state["seconds"]))
        except AnotherRun:
            raise
        except MISFITS as error:
            raise ValueError(f"the checkpoint does not fit this run: {error}") from error
