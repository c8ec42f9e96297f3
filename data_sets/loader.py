"""Samples and loaders. Order and augmentation are functions of (seed, epoch, sample index) alone."""

import contextlib
import copy
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_sets.images import ON_BAD_IMAGE, DamagedImage, UnreadableImage, path_of

# the data sets themselves, and what becomes of their images, for whoever also makes samples of them
from data_sets.table import DATASETS, build_dataset, build_splits, check_dataset  # noqa: F401
from data_sets.views import (  # noqa: F401
    IMAGENET_MEAN,
    IMAGENET_STD,
    LOADERS,
    View,
    eval_transform,
    stretch_transform,
    train_transform,
)
from util import distributed, signals
from util.progress import log, progress
from util.seeding import seeded, stable_seed

# ---------------------------------------------------------------------------------------------------------------------
# samples
# ---------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    image: Tensor  # (3,h,w) normalised; between a loader's worker and the loader, pixels in uint8
    # the class; or (K,) zeros and ones in uint8, which no loss takes for anything else: convert them with .float()
    label: int | np.ndarray
    index: int  # position in the data set
    noise: Tensor  # (M,) uniform, drawn after the augmentation; empty unless asked for
    # False where the image is damaged: another one stands in for it in training, and evaluation must not count it
    valid: bool = True

    def readable(self) -> "Sample":
        """Of a batch: the samples whose image could be read, perhaps none."""
        if self.valid is True or self.valid.all():
            return self
        return Sample(*(field[self.valid] for field in self))


MAX_BAD_IN_A_ROW = 1000  # then it is the disk or the folder, not an image


class KeyedDataset(Dataset):
    """A data set whose item (epoch, index) is augmented with randomness from (seed, epoch, index) and nothing else.

    So a sample looks the same whichever worker or rank makes it. An item (epoch, index, seed) has a seed of its own.
    noise: uniform numbers to draw beside the image.

    on_bad_image: what becomes of an image that cannot be decoded. "error": DamagedImage names it. "skip": its sample
    has valid = False and keeps its index; with train = True, image and label are those of the next index of `indices`
    (default: the whole data set) that can be read, else the image is zeros and the label is its own. Either way every
    batch has its size, so that ranks stay in step. Files that are not there or not accessible are errors always.
    """

    as_pixels = False  # leave out the normalisation of a View

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable,
        seed: int,
        noise: int = 0,
        on_bad_image: str = "error",
        train: bool = False,
        indices: Sequence[int] | None = None,
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"--on_bad_image {on_bad_image}: choose from {', '.join(ON_BAD_IMAGE)}")
        self.dataset, self.transform, self.seed, self.noise = dataset, transform, seed, noise
        self.on_bad_image, self.train = on_bad_image, train
        self.indices = None if indices is None else np.sort(np.asarray(indices))

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
                image, label = self.stand_in(index)
        make = self.transform.pixels if self.as_pixels else self.transform
        with seeded("sample", seed, epoch, index):
            view = make(Image.new("RGB", (8, 8)) if image is None else image)
            view = torch.zeros_like(view) if image is None else view
            return Sample(view, label, index, torch.rand(self.noise), valid)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int | np.ndarray]:
        """An image in RGB and its label. DamagedImage where it cannot be decoded; UnreadableImage where the system says
        why it cannot be read: there is no such file, no permission, a broken disk."""
        reads = self.transform.read if isinstance(self.transform, View) else operator.getitem
        try:
            return reads(self.dataset, index)
        except (MemoryError, UnreadableImage):
            raise
        except Exception as error:  # decoders raise anything: OSError without a number, SyntaxError, struct.error
            kind = DamagedImage if getattr(error, "errno", None) is None else UnreadableImage
            raise kind(f"cannot read image {path_of(self.dataset, index)}: {error}") from error

    def stand_in(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        """The next image after `index` that can be read, from the end of the data set back to its beginning."""
        candidates = range(len(self)) if self.indices is None else self.indices
        start = int(np.searchsorted(candidates, index)) if self.indices is not None else index
        for step in range(1, min(len(candidates), MAX_BAD_IN_A_ROW + 1)):
            with contextlib.suppress(DamagedImage):
                return self.read(int(candidates[(start + step) % len(candidates)]))
        raise UnreadableImage(f"cannot read image {path_of(self.dataset, index)}, nor any that could stand in for it")


# ---------------------------------------------------------------------------------------------------------------------
# order and loaders
# ---------------------------------------------------------------------------------------------------------------------


class GlobalBatches:
    """The training order: batches of (epoch, index) keys for one rank.

    An epoch is one permutation, a function of (seed, epoch). It is cut into effective batches of
    batch_size x accum_iter x world; the chunk that rank r takes in micro-step a is number a x world + r. So any split
    of the same effective batch into ranks and micro-steps sees the same chunks. An incomplete last batch is dropped.

    indices: the samples to take, where that is not the whole data set. group: images that have to be on one rank, in
    micro-steps that follow each other; ValueError where an effective batch does not consist of such groups.

    seeds: independent orders, which take turns group by group; keys are then (epoch, index, seed), and `accum_iter` and
    `joined` count the micro-steps of all seeds.
    """

    def __init__(
        self, length: int, batch_size: int, accum_iter: int, seed: int, shuffle: bool = True,
        indices: Sequence[int] | None = None, group: int | None = None, seeds: Sequence[int] = (),
    ):  # fmt: skip
        self.indices = torch.arange(length) if indices is None else torch.as_tensor(indices)
        self.length, self.batch_size = len(self.indices), batch_size
        self.seeds, self.keyed, self.shuffle = tuple(seeds) or (seed,), bool(seeds), shuffle
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.effective = batch_size * accum_iter * self.world  # images per optimizer step, of each seed
        self.epoch = 0
        self.first_step = 0  # optimizer steps of the epoch that are done already, and not loaded again
        self.accum_iter = accum_iter * len(self.seeds)
        self.joined = micro_steps_of_a_group(group or batch_size, batch_size, accum_iter) * len(self.seeds)
        if self.steps == 0:
            raise ValueError(
                f"an effective batch of {self.effective} (batch_size {batch_size} x accum_iter {accum_iter} x "
                f"{self.world} processes) is larger than the {self.length} training images: lower --batch_size"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return self.length // self.effective

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        joined = self.joined // len(self.seeds)
        chunks = torch.stack([self._groups(seed, joined) for seed in self.seeds], dim=1).flatten(0, 2)
        first = self.first_step * self.accum_iter
        for number, chunk in enumerate(chunks[first:].tolist(), start=first):
            seed = self.seeds[number // joined % len(self.seeds)]
            yield [(self.epoch, index, seed)[: 3 if self.keyed else 2] for index in chunk]

    def _groups(self, seed: int, joined: int) -> Tensor:
        """(groups, joined, batch_size) indices of this rank in this epoch, in the order of one seed."""
        order = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_seed("order", seed, self.epoch))
            order = order[torch.randperm(self.length, generator=generator)]
        order = order[: self.steps * self.effective]
        return order.view(-1, self.world, joined, self.batch_size)[:, self.rank]


def micro_steps_of_a_group(group: int, batch_size: int, accum_iter: int) -> int:
    """How many micro-steps of batch_size make a group of images: one, or several. ValueError where they make none."""
    if min(batch_size, accum_iter) < 1:
        raise ValueError(f"--batch_size {batch_size} and --accum_iter {accum_iter} must be positive")
    if group < 1 or (group % batch_size and batch_size % group):
        raise ValueError(f"--bn_group {group} and --batch_size {batch_size}: one must be a multiple of the other")
    joined = max(1, group // batch_size)
    if accum_iter % joined:
        raise ValueError(
            f"--bn_group {group} takes {joined} micro-steps of --batch_size {batch_size}: --accum_iter {accum_iter} "
            f"must be a multiple of {joined}"
        )
    return joined


class EvaluationBatches:
    """Every sample exactly once over all ranks: rank r takes number r, r + world, ... of `indices`.

    epoch: whose augmentation samples get, where their data set has one.
    """

    def __init__(self, length: int, batch_size: int, indices: Sequence[int] | None = None, epoch: int = 0):
        everything = range(length) if indices is None else indices
        self.rounds = -(-len(everything) // (batch_size * distributed.world_size()))  # batches of the busiest rank
        self.mine = list(everything)[distributed.rank() :: distributed.world_size()]
        self.batch_size, self.epoch = batch_size, epoch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(self.epoch, index) for index in self.mine[start : start + self.batch_size]]


def hold_out(targets: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices (kept, held out) of a training set, a function of the seed; in every class that fraction is held out.

    At least one image of a class that has two; where images have several labels, the fraction of all images. Nothing
    is held out for a fraction of 0. ValueError where a part would be empty otherwise.
    """
    if not fraction:
        return range(len(targets)), []
    targets = np.asarray(targets)
    held = np.zeros(len(targets), dtype=bool)
    with seeded("held out", seed):
        order = np.random.permutation(len(targets))
        groups = [order] if targets.ndim > 1 else [order[targets[order] == label] for label in np.unique(targets)]
    for group in groups:
        count = max(round(fraction * len(group)), min(1, len(group) - 1))
        held[group[:count]] = True
    if held.all() or not held.any():
        raise ValueError(f"--val_fraction {fraction} of {len(targets)} training images leaves a part without images")
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def _use_all_cores(worker_id: int) -> None:
    """Undo an affinity mask that some OpenMP builds set in the parent (pytorch issue 101850)."""
    os.sched_setaffinity(0, range(os.cpu_count()))


class Loader(DataLoader):
    """A loader of Sample batches, whose workers never see the signals that ask its program to stop.

    Where damaged images are skipped, it counts them, and batches of a data set that is not for training come without
    them; a batch of nothing else is None.

    When a pass ends, all ranks exchange what they found: each must go through its batches to the end. `damaged` is then
    the indices of the damaged images of all ranks, and new ones are logged.
    """

    damaged: tuple[int, ...] = ()
    known_workers: Sequence | None = None
    device = torch.device("cpu")  # where its images go, and are normalised

    def ready(self, batch: Sample) -> Sample:
        """The batch, its images normalised on the loader's device."""
        images = batch.image.to(self.device, non_blocking=True)
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
        found: set[int] = set()
        for batch in batches:
            found.update(batch.index[~batch.valid].tolist())
            kept = batch if self.dataset.train else batch.readable()
            yield self.ready(kept) if len(kept.index) else None
        everywhere = sorted(set().union(*distributed.gather_objects(found)))
        if distributed.rank() == 0 and not set(everywhere) <= set(self.damaged):
            fate = "replaced by the next" if self.dataset.train else "left out"
            paths = ", ".join(path_of(self.dataset.dataset, index) for index in everywhere[:5])
            more = ", ..." if len(everywhere) > 5 else ""
            log.warning("%d images could not be read and were %s: %s%s", len(everywhere), fate, paths, more)
        self.damaged = tuple(everywhere)


def build_loader(
    dataset: KeyedDataset, batches: Any, num_workers: int, pin_memory: bool = False, affinity_hack: bool = False,
    device: torch.device | None = None,
) -> Loader:  # fmt: skip
    """Loader of Sample batches in the order of `batches` (GlobalBatches or EvaluationBatches).

    device: where the images go, as bytes where their transform is a View (a quarter of what float32 takes between
    processes and to a GPU), and are normalised; None: they stay on the CPU.
    """
    if isinstance(dataset.transform, View):
        dataset = copy.copy(dataset)
        dataset.as_pixels = True
    loader = Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_use_all_cores if affinity_hack else None,
    )
    loader.device = device or loader.device
    return loader


class Watched:
    """The batches of a loader, behind a progress bar, ending at once where the program is asked to stop.

    A single process ends while it waits for data, too; several look at each other before every batch of an
    evaluation (agree = True), and otherwise leave it to the caller to agree on when to stop. `waited` is the time in
    seconds that was spent waiting for data. signals.DeadWorker where a worker of the loader was killed.

    between: called with the number of batches behind the pass, those without a readable image too, before every batch
    and at the end; with agree, by all processes together.
    """

    def __init__(
        self, loader: Any, description: str, agree: bool = False, between: Callable[[int], None] = lambda done: None
    ):
        self.loader, self.description, self.agree, self.between = loader, description, agree, between
        self.waited = 0.0

    def __iter__(self) -> Iterator[Sample]:
        alone = distributed.world_size() == 1
        batches = getattr(self.loader, "batch_sampler", None)
        rounds = batches.rounds if self.agree and not alone else len(self.loader)
        iterator = iter(self.loader)
        self.bar = progress(range(rounds), self.description, rounds)
        for done in self.bar:
            self.between(done)
            start = time.perf_counter()
            if self.agree and (number := distributed.agree(signals.requested())[0]):
                raise signals.Stopped(number)
            try:
                with signals.deferred(not alone):
                    sample = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise signals.DeadWorker(" ".join(str(error).split())) from error
            self.waited += time.perf_counter() - start
            if sample is not None:
                yield sample
        self.between(rounds)
        next(iterator, None)  # the loader has something to do when a pass ends
