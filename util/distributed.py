"""One process or many: set-up from torchrun's environment, and the few collectives that this project needs."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def distributed(device: str, dist_url: str = "env://") -> Iterator[World]:
    """Join the process group that torchrun or SLURM describes (NCCL on GPUs, gloo on CPUs); leave it at the end.

    device: "cuda", "cpu", or "auto" for CUDA where there is one. Without RANK in the environment: one process.
    Raises ValueError for another device, and where CUDA is asked for and there is none.
    """
    if device.partition(":")[0] not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device {device}: write cuda, cpu or auto")
    use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if use_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine shows no CUDA device to PyTorch; use --device cpu")
    if "RANK" not in os.environ:
        yield World(0, 1, torch.device((device if ":" in device else "cuda") if use_cuda else "cpu"))
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    target = torch.device("cpu")
    if use_cuda:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(target)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo", init_method=dist_url, rank=rank, world_size=size, timeout=timedelta(minutes=30)
    )
    try:
        yield World(rank, size, target)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do: what it downloads, they find."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's `value`, on every rank."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def gather_tensors(value: Tensor) -> list[Tensor]:
    """The tensor of every rank, in rank order, on every rank. Shapes must agree."""
    if world_size() == 1:
        return [value]
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return parts


def gather_rows(value: Tensor) -> Tensor:
    """Concatenate over ranks, in rank order, tensors whose first dimension may differ by rank."""
    if world_size() == 1:
        return value
    lengths = [int(n) for n in gather_tensors(torch.tensor([len(value)], device=value.device))]
    padded = value.new_zeros(max(lengths), *value.shape[1:])
    padded[: len(value)] = value
    return torch.cat([part[:n] for part, n in zip(gather_tensors(padded), lengths, strict=True)])


def gather_objects(value: object) -> list:
    """The value of every rank, in rank order, on every rank: plain data and tensors on the CPU, of any size."""
    if world_size() == 1:
        return [value]
    parts = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in one exchange."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
