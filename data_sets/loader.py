"""Samples and loaders: an image as a function of (seed, epoch, index) alone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from data_sets.images import DamagedImage, Images, Label, UnreadableImage
from data_sets.views import View, Windows
from util import distributed, signals
from util.progress import log, progress
from util.seeding import seeded
from util.workers import WAIT, check_workers, worker_failure


class Sample(NamedTuple):
    image: Tensor  # (3,h,w) normalised; between a loader's worker and the loader, pixels in uint8 or Windows
    label: Label  # zeros and ones are to be converted with .float()
    index: int  # position in the data set
    noise: Tensor  # (M,) uniform, drawn after the augmentation; empty unless asked for
    valid: bool = True  # False if damaged: training shows another image instead, evaluation must not count it


MAX_BAD_IN_A_ROW = 1000  # beyond, the disk or the folder is damaged, not single images


@dataclass(eq=False)
class KeyedDataset:
    """A data set whose item (epoch, index) is augmented with randomness from (seed, epoch, index) and nothing else,
    whichever worker or rank makes it. An item (epoch, index, seed) has a seed of its own.

    on_bad_image: for an image that cannot be decoded, "error" raises DamagedImage; with "skip", its sample has
    valid = False and keeps its index, so that every batch has its full size: with train = True, image and label are
    those of the next index of `indices` (default: all) that can be read, else the image is zeros. Missing and
    inaccessible files are always errors.
    """

    dataset: Images
    transform: Callable
    seed: int
    noise: int = 0  # how many uniform numbers to draw with each image
    on_bad_image: str = "error"
    train: bool = False
    indices: Sequence[int] | None = None
    as_pixels: bool = False  # items are uint8: the loader normalises them

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, seed = (*key, self.seed)[:3]
        image, valid = None, True
        try:
            image, label = self.read(index)
        except DamagedImage:
            if self.on_bad_image == "error":
                raise
            valid, label = False, self.dataset.targets[index]
            if self.train:
                image, label = self.replacement(index)
        make = self.transform.pixels if self.as_pixels else self.transform
        with seeded("sample", seed, epoch, index):
            view = make(Image.new("RGB", (8, 8)) if image is None else image)  # draws as for any image
            view = torch.zeros_like(view) if image is None else view
            return Sample(view, label, index, torch.rand(self.noise), valid)

    def read(self, index: int) -> tuple[Image.Image | Tensor, Label]:
        """An image in RGB and its label. DamagedImage if it cannot be decoded; UnreadableImage if the system reports
        another reason: no such file, no permission, a broken disk."""
        try:
            is_view = isinstance(self.transform, View)
            return self.transform.read(self.dataset, index) if is_view else self.dataset[index]
        except (MemoryError, UnreadableImage):
            raise
        except Exception as error:  # decoders raise anything: OSError without errno, SyntaxError, struct.error
            kind = DamagedImage if getattr(error, "errno", None) is None else UnreadableImage
            raise kind(f"cannot read image {self.dataset.names[index]}: {error}") from error

    def replacement(self, index: int) -> tuple[Image.Image | Tensor, Label]:
        """The next image after `index` that can be read; after the last one follows the first."""
        indices = np.arange(len(self)) if self.indices is None else np.sort(np.asarray(self.indices))
        following = np.roll(indices, -np.searchsorted(indices, index) - 1)
        for other in following[: min(len(indices) - 1, MAX_BAD_IN_A_ROW)].tolist():
            with contextlib.suppress(DamagedImage):
                return self.read(other)
        raise UnreadableImage(f"cannot read image {self.dataset.names[index]}, nor any that could replace it")


def _use_all_cores(worker_id: int) -> None:
    """Undo an affinity mask that some OpenMP builds set in the parent (pytorch issue 101850)."""
    os.sched_setaffinity(0, range(os.cpu_count()))


def _collate_windows(samples: Sequence[Sample]) -> Sample:
    """A batch of images of different sizes."""
    batch = default_collate([sample._replace(image=sample.index) for sample in samples])
    images = [sample.image for sample in samples]
    sizes = torch.tensor([image.shape[1:] for image in images])
    return batch._replace(image=Windows(torch.cat([image.flatten() for image in images]), sizes))


class Loader(DataLoader):
    """A loader of Sample batches, whose workers ignore the signals that ask the program to stop.

    If damaged images are skipped, batches for evaluation come without them; a batch of nothing else is None. At the end
    of a pass, which every rank must reach, `damaged` holds their indices on all ranks, and new ones are logged.
    """

    damaged: tuple[int, ...] = ()
    known_workers: Sequence | None = None
    device = torch.device("cpu")  # where images are normalised

    def ready(self, batch: Sample) -> Sample:
        """The batch with its images on the loader's device, normalised."""
        images = batch.image
        if isinstance(images, Windows):
            images = images._replace(pixels=images.pixels.to(self.device, non_blocking=True))
        else:
            images = images.to(self.device, non_blocking=True)
        return batch._replace(image=self.dataset.transform.normalise(images) if self.dataset.as_pixels else images)

    def __iter__(self) -> Iterator[Sample | None]:
        with signals.blocked():
            batches = super().__iter__()
        workers = getattr(batches, "_workers", ())
        if workers and workers is not self.known_workers:
            self.known_workers = workers
            signals.kill_at_exit(workers)
        if self.dataset.on_bad_image == "error":
            yield from map(self.ready, batches)
            return
        damaged: set[int] = set()
        for batch in batches:
            damaged.update(batch.index[~batch.valid].tolist())
            batch = self.ready(batch)
            if not self.dataset.train and not batch.valid.all():
                batch = Sample(*(field[batch.valid] for field in batch))
            yield batch if len(batch.index) else None
        everywhere = sorted(set().union(*distributed.gather_objects(damaged)))
        if distributed.rank() == 0 and not set(everywhere) <= set(self.damaged):
            outcome = "replaced by the next" if self.dataset.train else "left out"
            paths = ", ".join(self.dataset.dataset.names[index] for index in everywhere[:5])
            more = ", ..." if len(everywhere) > 5 else ""
            log.warning("%d images could not be read and were %s: %s%s", len(everywhere), outcome, paths, more)
        self.damaged = tuple(everywhere)


def build_loader(
    dataset: KeyedDataset,
    batches: Any,
    num_workers: int,
    pin_memory: bool = False,
    affinity_hack: bool = False,
    device: torch.device | None = None,
) -> Loader:
    """Loader of Sample batches in the order of `batches` (GlobalBatches or EvaluationBatches).

    device: where images are normalised (None: CPU). If their transform is a View, they travel there as bytes.
    """
    if num_workers:
        check_workers(num_workers)
    if isinstance(dataset.transform, View):
        dataset = replace(dataset, as_pixels=True)
    windows = dataset.as_pixels and dataset.transform.loader == "gpu"
    loader = Loader(
        dataset,
        collate_fn=_collate_windows if windows else None,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        timeout=WAIT if num_workers else 0,
        worker_init_fn=_use_all_cores if affinity_hack else None,
    )
    loader.device = device or loader.device
    return loader


@dataclass(eq=False)
class Watched:
    """The batches of a loader with a progress bar, which ends at once when the program is asked to stop.

    A single process stops even while it waits for data. Several agree before every batch of an evaluation
    (agree = True); otherwise the caller makes them agree. DeadWorker if a worker of the loader was killed, or delivers
    nothing. between: called with the number of batches done before every batch and at the end, by all processes at the
    same point if they agree.
    """

    loader: Any
    description: str
    agree: bool = False
    between: Callable[[int], None] = lambda done: None
    waited: float = 0.0  # seconds spent waiting for data

    def __iter__(self) -> Iterator[Sample]:
        alone = distributed.world_size() == 1
        batches = getattr(self.loader, "batch_sampler", None)
        rounds = batches.rounds if self.agree and not alone else len(self.loader)
        iterator = iter(self.loader)
        self.bar = progress(range(rounds), self.description, rounds)
        for done in self.bar:
            self.between(done)
            start = time.perf_counter()
            if self.agree:
                asked, *_ = distributed.agree(signals.requested(), where=f"{self.description}, batch {done}")
                if asked:
                    raise signals.Stopped(asked)
            try:
                with signals.deferred(not alone):
                    sample = next(iterator, None)
            except (RuntimeError, OSError) as error:
                raise worker_failure(error) or error from error
            self.waited += time.perf_counter() - start
            if sample is not None:
                yield sample
        self.between(rounds)
        next(iterator, None)  # lets the loader exchange its counts
