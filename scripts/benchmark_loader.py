"""What scripts/benchmark.py races for loading: batches decoded, cropped, flipped and normalised by one core."""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file
from torchvision.transforms import v2

from util.crop import RandomResizedCrop
from util.datasets import EvaluationBatches, GlobalBatches, KeyedDataset, Sample, build_dataset, build_loader
from util.views import IMAGENET_MEAN, IMAGENET_STD, LOADERS, View, eval_transform, train_transform

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
        contestants["torchvision, PIL images"] = forever(ImageFolder(folder, plain), args)
        contestants["torchvision, v2 on tensors"] = forever(ImageFolder(folder, second, loader=decode), args)
        files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if files and device.type == "cuda":  # which decodes JPEG alone
            contestants["torchvision, v2, decoded by the GPU"] = decoded_on(device, files, second, args)
    for loader in LOADERS:
        contestants[f"--loader {loader}"] = endless(args, 0, train_transform(size, loader=loader))
    for loader in LOADERS:
        contestants[f"--loader {loader}, test"] = endless(args, 0, eval_transform(size, loader=loader), test=True)
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


def forever(images: ImageFolder, args: argparse.Namespace) -> Callable[[], object]:
    """Batch after batch of PyTorch's own loader, in random order."""
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    state = {"batches": iter(loader)}

    def batch() -> object:
        found = next(state["batches"], None)
        if found is None:
            state["batches"] = iter(loader)
            found = next(state["batches"])
        return found

    return batch


def endless(args: argparse.Namespace, workers: int, view: View, test: bool = False) -> Callable[[], Sample]:
    """Batch after batch of views of images, epoch after epoch. test: in the order of an evaluation."""
    images = build_dataset(args.dataset, args.data_path, split_of(args), allow_subset=True)
    batches = GlobalBatches(len(images), args.batch_size, 1, seed=0)
    if test:
        whole = range(batches.steps * args.batch_size)
        batches = EvaluationBatches(len(images), args.batch_size, whole)
    loader = build_loader(KeyedDataset(images, view, 0, noise=196), batches, num_workers=workers)
    state = {"batches": iter(loader)}

    def batch() -> Sample:
        found = next(state["batches"], None)
        if found is None:
            batches.epoch += 1
            state["batches"] = iter(loader)
            found = next(state["batches"])
        return found

    return batch
