"""Data sets, transforms and loaders. Order and augmentation are functions of (seed, epoch, sample index) alone."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from util import distributed, signals
from util.crop import RandomResizedCrop
from util.progress import progress
from util.seeding import seeded, stable_seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = InterpolationMode.BICUBIC


# ---------------------------------------------------------------------------------------------------------------------
# data sets
# ---------------------------------------------------------------------------------------------------------------------


class DatasetEntry(NamedTuple):
    """Where a data set's images come from: build(root, split) -> data set of (PIL image, label) with `.classes`."""

    build: Callable[[Path, str], Dataset]
    description: str


def _image_folder(root: Path, split: str) -> datasets.ImageFolder:
    folder = root / split
    if not root.is_dir():
        raise ValueError(f"--data_path {root}: there is no such folder")
    if not folder.is_dir():
        raise ValueError(f"--data_path {root}: no {split!r} folder in it (expected train/<class>/ and val/<class>/)")
    try:
        return datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not an image folder: {error}") from error


IMAGENETTE_IMAGES = {"train": 9469, "val": 3925}


def _imagenette(root: Path, split: str) -> datasets.Imagenette:
    folder = root / "imagenette2-320"
    with distributed.main_process_first():
        try:
            images = datasets.Imagenette(root, split=split, size="320px", download=not folder.is_dir())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data_path {root}: Imagenette cannot be read or downloaded: {error}") from error
    if len(images) != IMAGENETTE_IMAGES[split]:
        raise ValueError(
            f"{folder}/{split} holds {len(images)} images instead of {IMAGENETTE_IMAGES[split]}: "
            "its extraction was interrupted; remove the folder and start again"
        )
    images.targets = [label for _, label in images._samples]  # as other data sets of torchvision have them
    return images


DATASETS = {
    "image_folder": DatasetEntry(_image_folder, "train/<class>/* and val/<class>/*, as ImageNet-1k is usually kept"),
    "imagenette": DatasetEntry(_imagenette, "ten ImageNet classes, 9,469 + 3,925 images, 320 px; downloaded if absent"),
}


def build_dataset(name: str, root: Path, split: str) -> Dataset:
    """Images without transform, by the name of an entry of DATASETS. ValueError says what is missing."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name].build(Path(root), split)


def build_splits(name: str, root: Path, nb_classes: int | None) -> tuple[Dataset, Dataset, int]:
    """Training set, test set and class count; ValueError where the splits or `nb_classes` disagree."""
    train, val = build_dataset(name, root, "train"), build_dataset(name, root, "val")
    if train.classes != val.classes:
        odd = sorted(set(map(str, train.classes)) ^ set(map(str, val.classes)))
        raise ValueError(
            f"{root}: train has {len(train.classes)} classes and val {len(val.classes)}; "
            f"in one only: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
        )
    if nb_classes is not None and nb_classes != len(train.classes):
        raise ValueError(
            f"--nb_classes {nb_classes}, but {root} has {len(train.classes)} classes: correct it or leave it out"
        )
    return train, val, len(train.classes)


# ---------------------------------------------------------------------------------------------------------------------
# transforms
# ---------------------------------------------------------------------------------------------------------------------


def train_transform(
    input_size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    scale: tuple[float, float] = (0.08, 1.0),
    crop: str = "mae",
    hflip: bool = True,
) -> transforms.Compose:
    """The recipe's augmentation: random crop to input_size, horizontal flip, normalisation (paper, B.2)."""
    cropper = {"mae": RandomResizedCrop, "torchvision": transforms.RandomResizedCrop}[crop]
    steps = [cropper(input_size, scale=scale, interpolation=BICUBIC)]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def eval_transform(
    input_size: int, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> transforms.Compose:
    """Resize the shorter side to input_size x 256 / 224 (bicubic), central crop, normalisation."""
    return transforms.Compose([
        transforms.Resize(int(input_size * 256 / 224), interpolation=BICUBIC),
        transforms.CenterCrop(input_size),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])  # fmt: skip


class Sample(NamedTuple):
    image: Tensor  # (3,h,w) normalised
    label: int
    index: int  # position in the data set
    noise: Tensor  # (M,) uniform, drawn after the augmentation; empty unless asked for


class UnreadableImage(ValueError):
    """An image that cannot be decoded. A loader's worker hands its exceptions on with the traceback in their text; this
    one keeps only its own words."""

    def __init__(self, text: str):
        super().__init__(text[max(text.rfind("cannot read image"), 0) :].strip())


class KeyedDataset(Dataset):
    """A data set whose item (epoch, index) is augmented with randomness from (seed, epoch, index) and nothing else.

    So a sample looks the same whichever worker or rank makes it. noise: uniform numbers to draw beside the image.
    """

    def __init__(self, dataset: Dataset, transform: Callable, seed: int, noise: int = 0):
        self.dataset, self.transform, self.seed, self.noise = dataset, transform, seed, noise

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        try:
            image, label = self.dataset[index]
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error
            path = self.dataset.samples[index][0] if hasattr(self.dataset, "samples") else f"number {index}"
            raise UnreadableImage(f"cannot read image {path}: {error}") from error
        with seeded("sample", self.seed, epoch, index):
            return Sample(self.transform(image), label, index, torch.rand(self.noise))


# ---------------------------------------------------------------------------------------------------------------------
# order and loaders
# ---------------------------------------------------------------------------------------------------------------------


class GlobalBatches:
    """The training order: batches of (epoch, index) keys for one rank.

    An epoch is one permutation, a function of (seed, epoch). It is cut into effective batches of
    batch_size x accum_iter x world; the chunk that rank r takes in micro-step a is number a x world + r. So any split
    of the same effective batch into ranks and micro-steps sees the same chunks. An incomplete last batch is dropped.
    """

    def __init__(self, length: int, batch_size: int, accum_iter: int, seed: int, shuffle: bool = True):
        self.length, self.batch_size, self.accum_iter = length, batch_size, accum_iter
        self.seed, self.shuffle = seed, shuffle
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.epoch = 0
        self.first_step = 0  # optimizer steps of the epoch that are done already, and not loaded again
        if min(batch_size, accum_iter) < 1:
            raise ValueError(f"--batch_size {batch_size} and --accum_iter {accum_iter} must be positive")
        if self.steps == 0:
            raise ValueError(
                f"an effective batch of {self.effective} (batch_size {batch_size} x accum_iter {accum_iter} x "
                f"{self.world} processes) is larger than the {length} training images: lower --batch_size"
            )

    @property
    def effective(self) -> int:
        return self.batch_size * self.accum_iter * self.world

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return self.length // self.effective

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_seed("order", self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        chunks = order[: self.steps * self.effective].view(-1, self.world, self.batch_size)[:, self.rank]
        for chunk in chunks[self.first_step * self.accum_iter :].tolist():
            yield [(self.epoch, index) for index in chunk]


class EvaluationBatches:
    """Every sample exactly once over all ranks: rank r takes number r, r + world, ... of `indices`."""

    def __init__(self, length: int, batch_size: int, indices: list[int] | None = None):
        everything = range(length) if indices is None else indices
        self.rounds = -(-len(everything) // (batch_size * distributed.world_size()))  # batches of the busiest rank
        self.mine = list(everything)[distributed.rank() :: distributed.world_size()]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(0, index) for index in self.mine[start : start + self.batch_size]]


def _use_all_cores(worker_id: int) -> None:
    """Undo an affinity mask that some OpenMP builds set in the parent (pytorch issue 101850)."""
    os.sched_setaffinity(0, range(os.cpu_count()))


class Loader(DataLoader):
    """A DataLoader whose workers never see the signals that ask its program to stop."""

    def __iter__(self) -> Iterator:
        with signals.blocked():
            return super().__iter__()


def build_loader(
    dataset: KeyedDataset, batches: Any, num_workers: int, pin_memory: bool = False, affinity_hack: bool = False
) -> Loader:
    """Loader of Sample batches in the order of `batches` (GlobalBatches or EvaluationBatches)."""
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_use_all_cores if affinity_hack else None,
    )


class DeadWorker(RuntimeError):
    """A loader's worker has ended without being asked to."""


class Watched:
    """The batches of a loader, behind a progress bar, ending at once where the program is asked to stop.

    A single process ends while it waits for data, too; several look at each other before every batch of an
    evaluation (agree = True), and otherwise leave it to the caller to agree on when to stop. `waited` is the time in
    seconds that was spent waiting for data. DeadWorker where a worker of the loader was killed.
    """

    def __init__(self, loader: Any, description: str, agree: bool = False):
        self.loader, self.description, self.agree = loader, description, agree
        self.waited = 0.0

    def __iter__(self) -> Iterator[Sample]:
        alone = distributed.world_size() == 1
        batches = getattr(self.loader, "batch_sampler", None)
        rounds = batches.rounds if self.agree and not alone else len(self.loader)
        iterator = iter(self.loader)
        for _ in progress(range(rounds), self.description, rounds):
            start = time.perf_counter()
            if self.agree and (number := distributed.agree(signals.requested())[0]):
                raise signals.Stopped(number)
            try:
                with signals.deferred(not alone):
                    sample = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DeadWorker(" ".join(str(error).split())) from error
            self.waited += time.perf_counter() - start
            if sample is not None:
                yield sample
