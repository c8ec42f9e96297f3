"""One process or many: set-up from torchrun's or SLURM's environment, and the few collectives that are needed."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch, dist = lazy("torch"), lazy("torch.distributed")
_control: dist.ProcessGroup | None = None  # of the CPUs, where the default group is of GPUs


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set for a process that srun has started with others; {} for any other process.

    SLURM_PROCID and SLURM_NTASKS are there in a batch script and in the shell of salloc, too, where one process runs;
    only a step has a number of tasks. A terminal (srun --pty) belongs to a user, who starts programs one by one.
    """
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "SLURM_PTY_PORT" in environment:
        return {}
    # the first of "gpu[03-05,7]-a,login1" is gpu03-a; on a single node, its name need not be known to any resolver
    first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
    return {
        "MASTER_ADDR": "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else first,
        "MASTER_PORT": str(rendezvous_port(job, step)),
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
    }


def rendezvous_port(job: int, step: int = 0) -> int:
    """A port that all processes of a job know, and jobs that share a node do not share: below those that the system
    gives away (32768 on Linux)."""
    return 10000 + (job + 997 * step) % 20000


@contextlib.contextmanager
def distributed(device: str, dist_url: str = "env://") -> Iterator[World]:
    """Join the process group that torchrun or SLURM describes (NCCL on GPUs, gloo on CPUs); leave it at the end.

    device: "cuda", "cpu", or "auto" for CUDA where there is one. Where neither has started several, one process.
    Raises ValueError for another device, and where CUDA is asked for and there is none.
    """
    if device.partition(":")[0] not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device {device}: write cuda, cpu or auto")
    use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if use_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine shows no CUDA device to PyTorch; use --device cpu")
    if "RANK" not in os.environ:
        os.environ.update(slurm_rendezvous(os.environ))
    if "RANK" not in os.environ:
        yield World(0, 1, torch.device((device if ":" in device else "cuda") if use_cuda else "cpu"))
        return
    # imported before there is a group: its functions keep the group of that moment as their default, and with it
    # threads that may abort the process when Python ends; torch.compile and torchvision import it at any time
    importlib.import_module("torch.distributed.nn")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    target = torch.device("cpu")
    if use_cuda:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(target)
    global _control
    try:
        store, rank, size = next(dist.rendezvous(dist_url, rank, size, timeout=timedelta(minutes=30)))
        # torchrun may keep its store when it restarts a run, with the addresses of processes that are gone
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend, timeout = "nccl" if use_cuda else "gloo", timedelta(minutes=30)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        # words between the processes go from CPU to CPU: reading them from a GPU would stop it
        _control = dist.new_group(backend="gloo") if use_cuda else None
        yield World(rank, size, target)
    except RuntimeError as error:
        if not _peer_is_gone(error):
            raise
        raise PeerLost(f"rank {rank} stops because another process is gone: see the first error") from error
    leave()  # not after an error: the others may be gone, and it would wait for them


def leave() -> None:
    """End the process group, if there is one still; no process may need another one any more.

    Threads of a group that is there when Python ends may abort the process (PyTorch's issue 190489).
    """
    if _joined():
        dist.destroy_process_group()


class PeerLost(RuntimeError):
    """Another process of the run has ended; its own error tells why."""


def _peer_is_gone(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, dist.DistNetworkError) or any(word in str(error) for word in words)


def said_first(line: str) -> bool:
    """Whether no other process of this run has said the same before: all of them see a user's mistake.

    Asks torchrun's store, which is there before the process group and after it; without one, everybody may speak: in
    jobs, to a log of its own.
    """
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {line}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _joined() -> bool:
    return "torch.distributed" in sys.modules and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def processes_here() -> int:
    """Processes of this run on this machine; each must call it."""
    return gather_objects(platform.node()).count(platform.node())


def sum_on_cpu(value: Tensor) -> None:
    """Replace a tensor on the CPU, of any size, by its sum over ranks."""
    if world_size() > 1:
        for part in value.view(-1).split(2**26):
            dist.all_reduce(part, group=_control)


def barrier() -> None:
    if _joined():
        dist.barrier(group=_control)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do: what it downloads, they find."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def agree(*values: int) -> list[int]:
    """The greatest of every rank's values, on every rank. One exchange between CPUs: no GPU waits for it."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_control)
    return shared.tolist()


def from_main(value: Any) -> Any:
    """Rank 0's `value`, of plain data, on every rank."""
    if world_size() == 1:
        return value
    parts = [value]
    dist.broadcast_object_list(parts, src=0, group=_control)
    return parts[0]


def require_equal(values: dict[str, Any], remedy: str) -> None:
    """Compare plain data of all ranks. Where a value is not the same everywhere, all ranks leave the process group and
    raise the same ValueError, which names each such value, the ranks that have it, and the remedy."""
    if world_size() == 1:
        return
    everywhere = gather_objects(values)
    differences = []
    for name in dict.fromkeys(name for of_rank in everywhere for name in of_rank):
        ranks: dict[str, list[int]] = {}
        for number, of_rank in enumerate(everywhere):
            ranks.setdefault(str(of_rank.get(name)), []).append(number)
        if len(ranks) > 1:
            differences.append(
                f"{name} ({', '.join(f'{_short(value)} on {_listed(r)}' for value, r in ranks.items())})"
            )
    if differences:
        barrier()
        leave()
        raise ValueError(f"the processes of this run differ in {', '.join(differences)}: {remedy}")


def _short(value: str) -> str:
    """Of a long text, such as a digest, the beginning."""
    return value if len(value) <= 60 else f"{value[:8]}..."


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


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


class GradientMean:
    """The mean gradient of an effective batch, over micro-steps and ranks: summed in double precision, rounded once.

    The rounded mean does not depend on how the batch is split into micro-steps and ranks (but for one value in about
    10^8, on the edge between two float32 numbers), where sums in float32 do, and Adam makes steps of full length out
    of that difference wherever a gradient is zero but for rounding. One exchange per optimizer step, 8 bytes a
    parameter; a batch of one chunk costs nothing. Letters: S losses.
    """

    def __init__(self, parameters: list[Tensor], micro_steps: int):
        self.parameters, self.micro_steps = parameters, micro_steps
        self.averages = micro_steps * world_size() > 1
        self.trained: list[Tensor] = []  # the parameters that have a gradient
        self.total: Tensor | None = None  # (S + number of values,) losses, then gradients
        self.is_empty = True

    def add(self, losses: Tensor) -> None:
        """Take up the gradients of a micro-step, which the parameters lose, and its losses (S,)."""
        if self.total is None:
            self.trained = [p for p in self.parameters if p.grad is not None] if self.averages else []
            sizes = [len(losses), *(p.numel() for p in self.trained)]
            self.total = torch.empty(sum(sizes), dtype=torch.float64, device=losses.device)
            self.parts = self.total.split(sizes)
        values = [losses.detach(), *(p.grad.flatten() for p in self.trained)]
        for part, value in zip(self.parts, values, strict=True):
            if self.is_empty:
                part.copy_(value)
            else:
                part.add_(value)
        self.is_empty = False
        for parameter in self.trained:
            parameter.grad = None

    def take(self) -> Tensor:
        """Give the parameters their mean gradients. Returns the mean losses (S,) in double, alike on all ranks."""
        if self.averages:
            if world_size() > 1:
                dist.all_reduce(self.total)
            self.total /= self.micro_steps * world_size()
        self.is_empty = True
        losses, *gradients = self.parts
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return losses.clone()
