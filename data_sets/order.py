"""The order in which images are loaded: a function of (seed, epoch), however batches are split among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from util import distributed
from util.lazy import lazy
from util.seeding import seeded, stable_seed

torch = lazy("torch")


class GlobalBatches:
    """The training order: batches of (epoch, index) keys for one rank.

    An epoch is one permutation of `indices` (default: all), a function of (seed, epoch). It is cut into effective
    batches of batch_size x accum_iter x world images; micro-step a of rank r takes chunk a x world + r. So however an
    effective batch is split into ranks and micro-steps, the chunks are the same. An incomplete last batch is dropped.

    group: number of images that are normalised together, on one rank in consecutive micro-steps. seeds: independent
    orders, which take turns group by group; keys are then (epoch, index, seed), and `accum_iter` and `joined` count the
    micro-steps of all seeds. ValueError if an effective batch does not consist of groups, or exceeds the images.
    """

    epoch = 0
    first_step = 0  # optimizer steps of the epoch that a resumed run has behind it

    def __init__(
        self,
        length: int,
        batch_size: int,
        accum_iter: int,
        seed: int,
        shuffle: bool = True,
        indices: Sequence[int] | None = None,
        group: int | None = None,
        seeds: Sequence[int] = (),
    ):
        self.indices = torch.arange(length) if indices is None else torch.as_tensor(indices)
        self.length, self.batch_size = len(self.indices), batch_size
        self.seeds, self.keyed, self.shuffle = tuple(seeds) or (seed,), bool(seeds), shuffle
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.effective = batch_size * accum_iter * self.world  # images per optimizer step, of each seed
        self.accum_iter = accum_iter * len(self.seeds)
        self.joined = micro_steps_of_a_group(group or batch_size, batch_size, accum_iter) * len(self.seeds)
        self.steps = self.length // self.effective  # optimizer steps in an epoch
        if self.steps == 0:
            sizes = f"batch_size {batch_size} x accum_iter {accum_iter} x {self.world} processes"
            problem = f"an effective batch of {self.effective} ({sizes})"
            remedy = "lower --batch_size, or fit probes with --preset small"
            raise ValueError(f"{problem} is larger than the {self.length} training images: {remedy}")

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        joined, orders = self.joined // len(self.seeds), []
        for seed in self.seeds:
            order = self.indices
            if self.shuffle:
                generator = torch.Generator().manual_seed(stable_seed("order", seed, self.epoch))
                order = order[torch.randperm(self.length, generator=generator)]
            order = order[: self.steps * self.effective]
            orders.append(order.view(-1, self.world, joined, self.batch_size)[:, self.rank])
        chunks = torch.stack(orders, dim=1).flatten(0, 2)
        first = self.first_step * self.accum_iter
        for number, chunk in enumerate(chunks[first:].tolist(), start=first):
            seed = self.seeds[number // joined % len(self.seeds)]
            yield [(self.epoch, index, seed)[: 3 if self.keyed else 2] for index in chunk]


def micro_steps_of_a_group(group: int, batch_size: int, accum_iter: int) -> int:
    """The number of micro-steps of batch_size that a group of images spans. ValueError if they do not fit."""
    if min(batch_size, accum_iter) < 1:
        raise ValueError(f"batches of {batch_size} images, {accum_iter} accumulated: both must be positive")
    if group < 1 or (group % batch_size and batch_size % group):
        raise ValueError(f"--bn_group {group} and --batch_size {batch_size}: one must be a multiple of the other")
    joined = max(1, group // batch_size)
    if accum_iter % joined:
        needed = f"--bn_group {group} takes {joined} micro-steps of --batch_size {batch_size}"
        raise ValueError(f"{needed}: --accum_iter {accum_iter} must be a multiple of {joined}")
    return joined


class EvaluationBatches:
    """Every sample exactly once over all ranks: rank r takes number r, r + world, ... of `indices` (default: all).

    epoch: of the samples' augmentation, if their data set has one.
    """

    def __init__(self, length: int, batch_size: int, indices: Sequence[int] | None = None, epoch: int = 0):
        chosen = list(range(length) if indices is None else indices)
        self.rounds = -(-len(chosen) // (batch_size * distributed.world_size()))  # batches of the busiest rank
        self.mine = chosen[distributed.rank() :: distributed.world_size()]
        self.batch_size, self.epoch = batch_size, epoch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(self.epoch, index) for index in self.mine[start : start + self.batch_size]]


def hold_out(targets: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices (kept, held out) of a training set, a function of the seed: that fraction of every class is held out.

    At least one image of a class that has two; with several labels per image, the fraction of all images. A fraction of
    0 holds out nothing. ValueError if another fraction leaves either part empty.
    """
    if not fraction:
        return range(len(targets)), []
    targets = np.asarray(targets)
    held = np.zeros(len(targets), dtype=bool)
    with seeded("held out", seed):
        order = np.random.permutation(len(targets))
    for group in [order] if targets.ndim > 1 else [order[targets[order] == label] for label in np.unique(targets)]:
        held[group[: max(round(fraction * len(group)), min(1, len(group) - 1))]] = True
    if held.all() or not held.any():
        raise ValueError(f"a share of {fraction:g} of {len(targets)} images leaves a part without images")
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
