"""What a frozen encoder makes of a data set, kept: epochs of probing then cost no forward pass of the encoder.

An image's row is what a bank of probes reads of it: the tokens of its blocks, or, where no probe learns to pool, only
the vectors that they pool to. Training images have V rows: their augmented views of the epochs 0 to V - 1, which later
epochs repeat. So V = the number of epochs is training without a cache, to the encoder's rounding, and V = 1 is where
nothing is augmented.

Letters: B images, V views, n images of a part.
"""

import contextlib
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

from data_sets.loader import EvaluationBatches, GlobalBatches, KeyedDataset, Sample, Watched, build_loader
from encoders.load import load_plain_or_safetensors, save_encoder
from engine_linprobe import FrozenTokens, Read
from probing.bank import ProbeBank
from util.distributed import barrier, processes_here, rank, sum_on_cpu, world_size
from util.files import digest
from util.progress import log

VALUE = 4  # bytes of a float32


class Part(NamedTuple):
    """Images to keep, in V views of the epochs 0 to V - 1."""

    dataset: KeyedDataset
    indices: Sequence[int]
    views: int = 1


class CachedTokens:
    """Rows of the cache -> what they were made of; stands for the FrozenTokens whose `backbone` it has."""

    def __init__(self, tokens: FrozenTokens, bank: ProbeBank, size: int, device: torch.device):
        self.backbone = tokens.backbone
        self.tokens, self.pool = tokens, None if any(bank.learned) else bank.pool
        leaves, self.tree = pytree.tree_flatten(self.read(torch.zeros(1, 3, size, size, device=device)))
        self.shapes = [None if leaf is None else leaf.shape[1:] for leaf in leaves]

    @torch.no_grad()
    def read(self, images: Tensor) -> Read:
        """Images (B,3,h,w) -> what the bank reads of them."""
        features = self.tokens(images)
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
        """Rows (B,width) -> what the bank reads."""
        widths = [0 if shape is None else shape.numel() for shape in self.shapes]
        leaves = [
            None if shape is None else part.reshape(len(rows), *shape)
            for shape, part in zip(self.shapes, rows.split(widths, dim=1), strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.tree)


class CachedLoader:
    """Sample batches in the order of `batches`, whose `image` is a row of the cache."""

    def __init__(self, cache: "FeatureCache", part: Part, rows: slice, batches: Any):
        """rows: those of the part, V n; they need not be there yet."""
        self.cache, self.rows, self.batch_sampler = cache, rows, batches
        self.n, self.views = len(part.indices), part.views
        self.position = torch.full((len(part.dataset),), -1)
        self.position[torch.as_tensor(part.indices)] = torch.arange(self.n)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Sample | None]:
        rows, labels, valid = (kept[self.rows] for kept in (self.cache.rows, self.cache.labels, self.cache.valid))
        for keys in self.batch_sampler:
            epochs, indices = torch.tensor(keys).unbind(1)
            places = (epochs % self.views) * self.n + self.position[indices]
            kept = valid[places]
            places, indices = places[kept], indices[kept]
            found = len(places) > 0
            yield Sample(rows[places], labels[places], indices, torch.empty(0)) if found else None


class FeatureCache:
    """The rows of several parts of a data set, in memory or in a file, complete on every process."""

    def __init__(self, tokens: CachedTokens, parts: dict[str, Part], folder: Path | None, facts: dict[str, Any]):
        """folder: where the rows go, into a file of a name of its own for `facts`, which say what rows depend on
        beside the parts' images; None for memory. ValueError where they do not fit there."""
        self.tokens, self.parts = tokens, parts
        counts = {name: len(part.indices) * part.views for name, part in parts.items()}
        ends = list(itertools.accumulate(counts.values()))
        self.places = {name: slice(end - counts[name], end) for name, end in zip(parts, ends, strict=True)}
        shape = ends[-1], tokens.width
        words = " + ".join(
            f"{len(part.indices):,} {name} images" + f" x {part.views} views" * (part.views > 1)
            for name, part in parts.items()
        )
        name = digest({**facts, "rows": counts, "width": tokens.width})[:16]
        self.file = None if folder is None else Path(folder) / f"features-{name}.f32"
        here = processes_here()
        if self.file is not None and world_size() > here:
            raise ValueError("--cache_dir: processes on several machines cannot share a file; keep the cache in memory")
        self.found = self.file is not None and self._marker.exists() and self._is_whole(shape)
        need = shape[0] * shape[1] * VALUE * (here if folder is None else 1)
        copies = f" x {here} processes" if folder is None and here > 1 else ""
        sum_of = f"({words}) x {shape[1]:,} values x {VALUE} bytes{copies} = {need / 2**30:,.2f} GiB"
        where = "memory" if folder is None else f"{folder}"
        room = free_memory() if folder is None else None if self.found else free_disk(Path(folder))
        if room is not None and need > room:
            raise ValueError(
                f"--cache_views: the cache takes {sum_of}, and {where} has {room / 2**30:,.2f} GiB left: lower "
                "--cache_views, name a roomier --cache_dir, or leave the cache out"
            )
        log.info("feature cache: %s in %s", sum_of, f"{self.file}, made before" if self.found else where)
        self.shape = shape

    @property
    def _marker(self) -> Path:
        """Labels of the rows; written when all rows are."""
        return self.file.with_suffix(".safetensors")

    def _is_whole(self, shape: tuple[int, int]) -> bool:
        return self.file.exists() and self.file.stat().st_size == shape[0] * shape[1] * VALUE

    def fill(self, batch_size: int, **loading: Any) -> None:
        """Compute the rows, each once over all processes, or take those of the file. loading: of build_loader."""
        if self.found:
            self.rows = self._map("r")
            kept = load_plain_or_safetensors(self._marker)
            self.labels, self.valid = kept["labels"], kept["valid"]
            return
        in_file = self.file is not None
        self.rows = self._map("w+") if in_file else torch.zeros(self.shape)
        first = torch.as_tensor(np.asarray(next(iter(self.parts.values())).dataset.dataset.targets[:1]))
        self.labels = first.new_zeros(self.shape[0], *first.shape[1:])
        self.valid = torch.zeros(self.shape[0], dtype=torch.bool)
        for name, part in self.parts.items():
            for view in range(part.views):
                start = self.places[name].start + view * len(part.indices)
                self._fill_view(part, view, start, batch_size, **loading)
        if world_size() > 1:
            everywhere = self.valid.to(torch.uint8)
            for tensor in (everywhere, self.labels, *([] if in_file else [self.rows])):
                sum_on_cpu(tensor)
            self.valid = everywhere.bool()
        if in_file:
            self._finish_file()

    def _fill_view(self, part: Part, view: int, start: int, batch_size: int, **loading: Any) -> None:
        position = {index: start + place for place, index in enumerate(part.indices)}
        batches = EvaluationBatches(len(part.dataset), batch_size, list(part.indices), epoch=view)
        for sample in Watched(build_loader(part.dataset, batches, **loading), "feature cache", agree=True):
            places = torch.tensor([position[index] for index in sample.index.tolist()])
            self.rows[places] = self.tokens.pack(sample.image).cpu()
            self.labels[places] = sample.label.to(self.labels.dtype)
            self.valid[places] = True

    def _map(self, mode: str) -> Tensor:
        """The file as a tensor. All processes open the same one."""
        if mode == "w+":
            if rank() == 0:
                try:
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    self._marker.unlink(missing_ok=True)
                    with open(self.file, "ab") as file:  # not "wb": another run may be writing the same rows to it
                        # the blocks are taken now: a full disk behind a map would end the program without a word
                        take = getattr(os, "posix_fallocate", lambda handle, start, size: os.truncate(handle, size))
                        take(file.fileno(), 0, self.shape[0] * self.shape[1] * VALUE)
                except OSError as error:
                    raise ValueError(f"--cache_dir {self.file.parent} cannot be written: {error}") from error
            barrier()
            mode = "r+"
        self.map = np.memmap(self.file, np.float32, mode if mode == "r+" else "c", shape=self.shape)
        return torch.from_numpy(self.map)

    def _finish_file(self) -> None:
        self.map.flush()
        barrier()
        if rank() == 0:
            save_encoder(self._marker, {"labels": self.labels, "valid": self.valid}, {"kind": "features"})

    def loader(self, name: str, batches: GlobalBatches | EvaluationBatches) -> CachedLoader:
        """The samples of a part in the order of `batches`."""
        return CachedLoader(self, self.parts[name], self.places[name], batches)


def free_memory() -> int | None:
    """Bytes that processes may still take, of the machine or of their control group; None where nothing tells."""
    rooms = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        rooms.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(rooms, default=None)


def free_disk(folder: Path) -> int:
    """Bytes left on the disk of a folder that may not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
