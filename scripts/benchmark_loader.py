"""What scripts/benchmark.py races for loading: batches decoded, cropped, flipped and normalised by one core."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file
from torchvision.transforms import v2

from data_sets.crop import RandomResizedCrop
from data_sets.loader import KeyedDataset, Loader, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from data_sets.table import build_dataset
from data_sets.views import IMAGENET_MEAN, IMAGENET_STD, LOADERS, View, eval_transform, train_transform

BICUBIC = transforms.InterpolationMode.BICUBIC


def loading(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same number of images by everybody: the recipe as it is usually written, torchvision's second version of its
    transforms on tensors, also with a GPU that decodes, and each --loader, of the training view; and each --loader of
    the test's."""
    if args.data_path is None:
        raise ValueError("loader: name a data set with --data_path, of --dataset's kind")
    torch.set_num_threads(1)  # as a loader's worker has it
    size = args.input_size
    folder = args.data_path / split_of(args)
    normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    plain = transforms.Compose([
        RandomResizedCrop(size, interpolation=BICUBIC), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), normalise,
    ])  # fmt: skip
    second = v2.Compose([
        v2.RandomResizedCrop(size, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip

    def decode(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    contestants = {}
    if args.dataset == "image_folder":
        usual = functools.partial(DataLoader, batch_size=args.batch_size, shuffle=True, drop_last=True)
        contestants["torchvision, PIL images"] = endless(usual(ImageFolder(folder, plain)))
        contestants["torchvision, v2 on tensors"] = endless(usual(ImageFolder(folder, second, loader=decode)))
        files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if files and device.type == "cuda":  # which decodes JPEG alone
            contestants["torchvision, v2, decoded by the GPU"] = decoded_on(device, files, second, args)
    for name in LOADERS:
        contestants[f"--loader {name}"] = endless(views(args, 0, train_transform(size, loader=name)))
    for name in LOADERS:
        test = views(args, 0, eval_transform(size, loader=name), test=True)
        contestants[f"--loader {name}, test"] = endless(test)
    return contestants


def decoded_on(
    device: torch.device, files: Sequence[str], transform: Callable, args: argparse.Namespace
) -> Callable[[], torch.Tensor]:
    """Batch after batch of JPEG files in random order, which a device decodes together and transforms one by one."""

    def batch() -> torch.Tensor:
        chosen = torch.randint(len(files), (args.batch_size,)).tolist()
        images = decode_jpeg([read_file(files[place]) for place in chosen], ImageReadMode.RGB, device=device)
        return torch.stack([transform(image) for image in images])

    return batch


def split_of(args: argparse.Namespace) -> str:
    return "train" if args.dataset != "image_folder" or (args.data_path / "train").is_dir() else "val"


def views(args: argparse.Namespace, workers: int, view: View, test: bool = False) -> Loader:
    """Batches of views of images as the programs load them. test: in the order of an evaluation."""
    images = build_dataset(args.dataset, args.data_path, split_of(args), allow_subset=True)
    batches = GlobalBatches(len(images), args.batch_size, 1, seed=0)
    if test:
        whole = range(batches.steps * args.batch_size)
        batches = EvaluationBatches(len(images), args.batch_size, whole)
    return build_loader(KeyedDataset(images, view, 0, noise=196), batches, num_workers=workers)


def endless(loader: DataLoader) -> Callable[[], object]:
    """Batch after batch, epoch after epoch."""

    def batches() -> Iterator[object]:
        for epoch in itertools.count():
            if isinstance(loader, Loader):
                loader.batch_sampler.epoch = epoch
            yield from loader

    return functools.partial(next, batches())
