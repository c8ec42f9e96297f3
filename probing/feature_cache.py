"""Features of a data set, computed once: epochs of probing then cost no forward pass of the encoder.

An image's row is the input of a bank of probes: the tokens of its blocks, or, if no head has parameters, only the
pooled vectors. A training image has a row for each seed of augmentation and each of its V views, those of the epochs 0
to V - 1, which later epochs repeat. So V = number of epochs is training without a cache, to the encoder's rounding, and
V = 1 suffices without augmentation.

Letters: B images, V views, n images of a part.
"""

import contextlib
import copy
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from data_sets.loader import KeyedDataset, Sample, Watched, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from encoders.load import load_plain_or_safetensors, safetensors_metadata, save_encoder
from probing.bank import ProbeBank
from probing.frozen import FiniteCheck, FrozenTokens, Read
from util.distributed import agree, barrier, from_main, processes_here, rank, sum_over_ranks, world_size
from util.files import digest, no_link, sha256
from util.progress import log

VALUE = 4  # bytes of a float32


class Part(NamedTuple):
    """Images to cache, in V views for each seed of augmentation (none: the data set's own)."""

    dataset: KeyedDataset
    indices: Sequence[int]
    views: int = 1
    seeds: Sequence[int] = ()

    @property
    def passes(self) -> list[tuple[int, ...]]:
        """(epoch,) or (epoch, seed) of each pass over the images, in the order of their rows."""
        return (
            list(itertools.product(range(self.views), self.seeds)) if self.seeds else [(v,) for v in range(self.views)]
        )


class CachedTokens:
    """Turns cached rows into the input of a bank; replaces the FrozenTokens that it was made of."""

    def __init__(self, tokens: FrozenTokens, bank: ProbeBank, size: int, device: torch.device):
        self.backbone, self.amp, self.oracle = tokens.backbone, tokens.amp, tokens.oracle
        self.tokens = tokens
        self.pool = None if any(pooling.learned for _, pooling in bank.distinct) else bank.pool
        self.finite = FiniteCheck(tokens, device)
        leaves, self.tree = pytree.tree_flatten(self.read(torch.zeros(1, 3, size, size, device=device)))
        self.shapes = [None if leaf is None else leaf.shape[1:] for leaf in leaves]

    @torch.no_grad()
    def read(self, images: Tensor) -> Read:
        """Images (B,3,h,w) -> input of the bank."""
        features = self.finite.see(self.tokens(images))
        return features if self.pool is None else self.pool(features)

    @property
    def width(self) -> int:
        """Values in a row."""
        return sum(shape.numel() for shape in self.shapes if shape is not None)

    def pack(self, images: Tensor) -> Tensor:
        """Images (B,3,h,w) -> rows (B,width) in float32."""
        leaves = pytree.tree_leaves(self.read(images))
        return torch.cat([leaf.float().flatten(1) for leaf in leaves if leaf is not None], dim=1)

    def __call__(self, rows: Tensor) -> Read:
        """Rows (B,width) -> input of the bank."""
        widths = [0 if shape is None else shape.numel() for shape in self.shapes]
        leaves = [
            None if shape is None else part.reshape(len(rows), *shape)
            for shape, part in zip(self.shapes, rows.split(widths, dim=1), strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.tree)


class CachedLoader:
    """Sample batches in the order of `batches`, whose `image` is a cached row."""

    def __init__(self, cache: "FeatureCache", part: Part, rows: slice, batches: Any):
        """rows: of the part; they may be computed later."""
        self.cache, self.rows, self.batch_sampler = cache, rows, batches
        self.n, self.views = len(part.indices), part.views
        self.start = {key: number * self.n for number, key in enumerate(part.passes)}
        self.position = torch.full((len(part.dataset),), -1)
        self.position[torch.as_tensor(part.indices)] = torch.arange(self.n)
        self.seeded = bool(part.seeds)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Sample | None]:
        rows, labels, valid = (kept[self.rows] for kept in (self.cache.rows, self.cache.labels, self.cache.valid))
        for keys in self.batch_sampler:
            indices = torch.tensor([key[1] for key in keys])
            # a batch has one epoch and one seed
            first = (keys[0][0] % self.views, *(keys[0][2:] if self.seeded else ()))
            places = self.start[first] + self.position[indices]
            readable = valid[places]
            places, indices = places[readable], indices[readable]
            yield Sample(rows[places], labels[places], indices, torch.empty(0)) if len(places) else None


class FeatureCache:
    """Rows of several parts of a data set, in memory or in a file, complete on every process."""

    def __init__(self, tokens: CachedTokens, parts: dict[str, Part], folder: Path | None, facts: dict[str, Any]):
        """folder: of the file (None: memory). facts: everything that rows depend on, but for the parts' shape; the file
        is named after them. ValueError if the rows do not fit there."""
        self.tokens, self.parts = tokens, parts
        counts = {name: len(part.indices) * len(part.passes) for name, part in parts.items()}
        ends = list(itertools.accumulate(counts.values()))
        self.places = {name: slice(end - counts[name], end) for name, end in zip(parts, ends, strict=True)}
        self.shape = ends[-1], tokens.width
        key = {**facts, "rows": {name: [len(p.indices), p.passes] for name, p in parts.items()}, "width": tokens.width}
        self.file = None if folder is None else Path(folder) / f"features-{digest(key)[:16]}.f32"
        if self.file is not None and world_size() > processes_here():
            raise ValueError("--cache_dir: processes on several machines cannot share a file; keep the cache in memory")
        self.bytes = self.shape[0] * self.shape[1] * VALUE
        self.made_before = from_main(self._is_whole())
        self._check_room(folder)

    @property
    def _marker(self) -> Path:
        """Labels of the rows, and a digest; written when all rows are."""
        return self.file.with_suffix(".safetensors")

    def _is_whole(self) -> bool:
        file = self.file
        return file is not None and self._marker.exists() and file.exists() and file.stat().st_size == self.bytes

    def _check_room(self, folder: Path | None) -> None:
        images = " + ".join(
            f"{len(part.indices):,} {name} images"
            + f" x {part.views} views" * (part.views > 1)
            + f" x {len(part.seeds)} seeds" * (len(part.seeds) > 1)
            for name, part in self.parts.items()
        )
        copies = processes_here() if folder is None else 1
        shared = f" x {copies} processes" * (copies > 1)
        need = self.bytes * copies
        arithmetic = f"({images}) x {self.shape[1]:,} values x {VALUE} bytes{shared} = {need / 2**30:,.2f} GiB"
        where, room = f"{folder}", None
        if folder is None:
            where, room = "memory", free_memory()
        elif not self.made_before:
            room = free_disk(Path(folder))
        if room is not None and need > room:
            raise ValueError(
                f"--cache_views: the cache takes {arithmetic}, and {where} has {room / 2**30:,.2f} GiB left: lower "
                "--cache_views, name a --cache_dir with more room, or leave out the cache"
            )
        log.info("feature cache: %s in %s", arithmetic, f"{self.file}, made before" if self.made_before else where)

    def fill(self, batch_size: int, **loading: Any) -> None:
        """Compute the rows, each once over all processes, or read the file. loading: options of build_loader.

        ValueError for a damaged file, or if the encoder's tokens are not finite.
        """
        if self.made_before:
            self._read_file()
            return
        in_file = self.file is not None
        self.rows = self._create() if in_file else torch.zeros(self.shape)
        first = torch.as_tensor(np.asarray(next(iter(self.parts.values())).dataset.dataset.targets[:1]))
        self.labels = first.new_zeros(self.shape[0], *first.shape[1:])
        self.valid = torch.zeros(self.shape[0], dtype=torch.bool)
        for name, part in self.parts.items():
            for number, key in enumerate(part.passes):
                self._fill_pass(part, key, self.places[name].start + number * len(part.indices), batch_size, **loading)
        self.tokens.finite.check()
        if world_size() > 1:
            valid = self.valid.to(torch.uint8)
            for tensor in (valid, self.labels, *([] if in_file else [self.rows])):
                sum_over_ranks(tensor)
            self.valid = valid.bool()
        if in_file:
            self._finish_file()

    def _fill_pass(self, part: Part, key: tuple[int, ...], start: int, batch_size: int, **loading: Any) -> None:
        epoch, *seed = key
        dataset = copy.copy(part.dataset)
        dataset.seed = seed[0] if seed else dataset.seed
        position = {index: start + row for row, index in enumerate(part.indices)}
        batches = EvaluationBatches(len(dataset), batch_size, list(part.indices), epoch)
        for sample in Watched(build_loader(dataset, batches, **loading), "feature cache", agree=True):
            places = torch.tensor([position[index] for index in sample.index.tolist()])
            self.rows[places] = self.tokens.pack(sample.image).cpu()
            self.labels[places] = sample.label.to(self.labels.dtype)
            self.valid[places] = True

    def _create(self) -> Tensor:
        """The new file as a tensor, shared by all processes."""
        if rank() == 0:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._marker.unlink(missing_ok=True)
                # not "wb": another run may be writing the same rows to it
                with open(self.file, "ab", opener=no_link) as file:
                    os.truncate(file.fileno(), self.bytes)
                    # allocate the blocks now: a full disk behind a memory map ends the program without a message
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self.bytes)
            except OSError as error:
                raise ValueError(f"--cache_dir {self.file.parent} cannot be written: {error}") from error
        barrier()
        self.map = np.memmap(self.file, np.float32, "r+", shape=self.shape)
        return torch.from_numpy(self.map)

    def _finish_file(self) -> None:
        self.map.flush()
        barrier()
        if rank() == 0:
            tensors = {"labels": self.labels, "valid": self.valid}
            save_encoder(self._marker, tensors, {"kind": "features", "sha256": self._digest(tensors)})

    def _digest(self, tensors: dict[str, Tensor]) -> str:
        """Of the rows in the file, their labels, and which of them are valid."""
        return digest([sha256(self.file), tensors["labels"], tensors["valid"]])

    def _read_file(self) -> None:
        try:
            tensors = load_plain_or_safetensors(self._marker)
            stored = safetensors_metadata(self._marker).get("sha256")
            damaged = rank() == 0 and stored != self._digest(tensors)  # one reading of the rows is enough
        except (ValueError, KeyError, OSError):
            damaged = True
        if agree(damaged)[0]:
            raise ValueError(
                f"cached features are damaged: delete {self.file} and {self._marker.name}, and they are computed again"
            )
        self.labels, self.valid = tensors["labels"], tensors["valid"]
        self.rows = torch.from_numpy(np.memmap(self.file, np.float32, "c", shape=self.shape))

    def loader(self, name: str, batches: GlobalBatches | EvaluationBatches) -> CachedLoader:
        """The samples of a part in the order of `batches`."""
        return CachedLoader(self, self.parts[name], self.places[name], batches)


def free_memory() -> int | None:
    """Bytes that this machine or its control group has left for processes; None if unknown."""
    rooms = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        rooms.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(rooms, default=None)


def free_disk(folder: Path) -> int:
    """Bytes left on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
