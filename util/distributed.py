"""One process or many: the process group, the few collectives that are needed, and what happens when a rank is lost.

A wait for other ranks is bounded and can be interrupted by signals. About once a second, each rank notes in the shared
store how many exchanges it has joined and where in the program it is.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from util import signals
from util.lazy import lazy
from util.rendezvous import GRACE, NotJoined, address, interruptible, meet, slurm_environment

if TYPE_CHECKING:
    from torch import Tensor

torch, dist = lazy("torch"), lazy("torch.distributed")
LOOK = 0.2  # seconds between two looks at what else there is to do while waiting
LAST_WORDS = 3  # seconds that ranks have to report that they still run
BEAT = 5  # seconds between two signs of life of a rank that works alone
PATIENCE = 3  # seconds that other ranks have to join an exchange after this one was asked to stop


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


class Timeouts(NamedTuple):
    """Seconds to wait for other ranks."""

    join: float = 300
    training: float = 120  # between two optimizer steps
    other: float = 1800  # while one of them reads data, evaluates or writes


class PeerLost(RuntimeError):
    """Another rank has ended, or does not answer. answered: it was there until now, and so may have an error of its
    own; reported_here: False where a lower rank reports the same."""

    def __init__(self, message: str, answered: bool, reported_here: bool = True):
        super().__init__(message)
        self.answered, self.reported_here = answered, reported_here


class Contact:
    """What this process knows of the others."""

    def __init__(self, store: dist.Store, control: dist.ProcessGroup | None, timeouts: Timeouts):
        self.store, self.control, self.timeouts, self.limit = store, control, timeouts, timeouts.other
        self.exchanges, self.where = 0, "the start"
        self.noted = self.ended = time.monotonic()  # the last note, the end of the last exchange
        self.beats = ""  # of rank 0, when they were last looked at

    def note(self) -> None:
        self.noted = time.monotonic()
        with contextlib.suppress(RuntimeError, TimeoutError):
            interruptible(1, self.store.set, f"note {rank()}", f"{self.exchanges} {self.where}")

    def wait(self, work: dist.Work, writing: bool = False) -> None:
        """Wait for an exchange. PeerLost where a rank is gone or does not join it in time; Stopped where this process
        was asked to stop and the others take longer than this one took since the last exchange.

        writing: another rank may be writing a file, which may take longer than a training step."""
        self.exchanges += 1
        start, asked = time.monotonic(), None
        until = start + (self.timeouts.other if writing else self.limit)
        patience = max(PATIENCE, start - self.ended)
        if start - self.noted > 1:
            self.note()
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):  # it is not completed, or has failed: see below
                work.wait(timedelta(seconds=LOOK))
            now = time.monotonic()
            if self.noted < start:
                self.note()
            asked = asked or (now if signals.requested() else None)
            if asked and now - asked > patience and not signals.saving_now():
                raise signals.Stopped(signals.requested(), "another rank does not answer; --resume auto continues")
            if now > until:
                if not self._works_alone():
                    raise self.lost(False)
                until = now + 3 * BEAT
        try:
            work.wait()
        except RuntimeError as error:
            raise self.lost(True) from error
        self.ended = time.monotonic()

    def _works_alone(self) -> bool:
        """Whether rank 0 has given a sign of life in `alone` since the last look."""
        before = self.beats
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.beats = interruptible(LAST_WORDS, lambda: self.store.check(["alone"]) and self.store.get("alone"))
        return self.beats != before and bool(self.beats)

    def lost(self, answered: bool) -> PeerLost | signals.Stopped:
        """The error that names the ranks which have not joined the last exchange, and where they were last heard."""
        if signals.requested():
            return signals.Stopped(signals.requested(), "another rank has ended; --resume auto continues")
        here = f", while rank {rank()} waits at {self.where}; continue with the same command and --resume auto"
        try:
            notes = interruptible(2 * LAST_WORDS, self._notes)
        except (RuntimeError, TimeoutError):
            return PeerLost(f"rank 0, or the torchrun that serves its port, is gone or hangs{here}", answered)
        behind = {other: where for other, (exchanges, where) in notes.items() if exchanges < self.exchanges}
        heard = ", ".join(f"rank {other} (last heard at {where})" for other, where in behind.items())
        what = "has ended" if answered else f"has not answered for {self.limit:g} s (--dist_timeout)"
        first = min(notes.keys() - behind.keys())
        return PeerLost(f"{heard or 'another rank'} {what}{here}", answered, rank() == first)

    def _notes(self) -> dict[int, tuple[int, str]]:
        """{rank: its exchanges, where it was}, once those that still run had the time to write theirs."""
        self.store.set(f"note {rank()}", f"{self.exchanges} {self.where}")
        end = time.monotonic() + LAST_WORDS
        while True:
            keys = [f"note {other}" for other in range(world_size())]
            texts = [self.store.get(key).decode() if self.store.check([key]) else "0 the start" for key in keys]
            notes = {other: (int(text.split()[0]), text.partition(" ")[2]) for other, text in enumerate(texts)}
            if time.monotonic() > end or min(notes.values())[0] >= self.exchanges:
                return notes
            time.sleep(0.05)


_contact: Contact | None = None


@contextlib.contextmanager
def distributed(device: str, dist_url: str = "env://", timeouts: Timeouts = Timeouts()) -> Iterator[World]:  # noqa: B008
    """Join the process group that torchrun or SLURM describes (NCCL on GPUs, gloo on CPUs); leave it at the end.

    device: "cuda", "cpu", or "auto" for CUDA where there is one. Where neither has started several, one process.
    Raises ValueError for another device, where CUDA is asked for and there is none, and for an incomplete environment;
    NotJoined where other processes do not come in time, PeerLost where they are lost later.
    """
    if device.partition(":")[0] not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device {device}: write cuda, cpu or auto")
    use_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if use_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine shows no CUDA device to PyTorch; use --device cpu")
    os.environ.update({} if "RANK" in os.environ else slurm_environment(os.environ))
    if "RANK" not in os.environ:
        yield World(0, 1, torch.device((device if ":" in device else "cuda") if use_cuda else "cpu"))
        return
    here = address(dist_url, os.environ)
    # imported before there is a group: its functions keep the group of that moment as their default, and with it
    # threads that may abort the process when Python ends; torch.compile and torchvision import it at any time
    importlib.import_module("torch.distributed.nn")
    target = torch.device("cpu")
    if use_cuda:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(target)
    global _contact
    try:
        store = interruptible(timeouts.join + 2 * GRACE, meet, here, timeouts.join)
        # the bound of an exchange on the CPU is Contact's; NCCL's own ends the process, so it comes later
        limit = timedelta(seconds=60 + max(timeouts))
        group = {"store": store, "rank": here.rank, "world_size": here.size, "timeout": limit}
        interruptible(timeouts.join, dist.init_process_group, "nccl" if use_cuda else "gloo", **group)
        # messages between the processes go from CPU to CPU: reading them from a GPU would make it wait
        control = interruptible(timeouts.join, dist.new_group, backend="gloo", timeout=limit) if use_cuda else None
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise NotJoined(f"rank {here.rank} has lost contact at the start: {error}") from error
    _contact = Contact(store, control, timeouts)
    yield World(here.rank, here.size, target)
    leave()  # not after an error: the others may be gone, and it would wait for them


def leave() -> None:
    """End the process group, if there is one still; no process may need another one any more.

    Threads of a group that is there when Python ends may abort the process (PyTorch's issue 190489).
    """
    global _contact
    if joined():
        dist.destroy_process_group()
    _contact = None


def joined() -> bool:
    return _contact is not None


def rank() -> int:
    return dist.get_rank() if joined() else 0


def world_size() -> int:
    return dist.get_world_size() if joined() else 1


@contextlib.contextmanager
def training_limit() -> Iterator[None]:
    """In this block, other ranks have the time of a training step to join an exchange."""
    if joined():
        _contact.limit = _contact.timeouts.training
    yield
    if joined():
        _contact.limit = _contact.timeouts.other


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In this block, others wait for rank 0 as long as it lives: it draws, or does what only it does."""
    end, contact = threading.Event(), _contact

    def beat() -> None:
        with contextlib.suppress(RuntimeError):
            contact.store.set("alone", str(time.monotonic()))
            while not end.wait(BEAT):
                contact.store.set("alone", str(time.monotonic()))

    thread = threading.Thread(target=beat, daemon=True)
    if joined() and rank() == 0:
        thread.start()
    try:
        yield
    finally:
        end.set()
        if thread.ident:
            thread.join()


def processes_here() -> int:
    """Processes of this run on this machine; each must call it."""
    return gather_objects(platform.node()).count(platform.node())


def sum_over_ranks(value: Tensor) -> None:
    """Replace a tensor, of any size, by its sum over ranks."""
    if world_size() == 1:
        return
    if value.is_cuda:
        barrier()  # NCCL waits without end for a rank that is gone
        dist.all_reduce(value)
        return
    for part in value.view(-1).split(2**26):
        _contact.wait(dist.all_reduce(part, group=_contact.control, async_op=True))


def barrier(writing: bool = False) -> None:
    """writing: another rank may be writing a file, which may take longer than a training step."""
    if joined():
        _contact.wait(dist.barrier(group=_contact.control, async_op=True), writing)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do, which then find what it has downloaded."""
    if rank() != 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def agree(*values: int, where: str = "") -> list[int]:
    """The greatest of every rank's values, on every rank. One exchange between CPUs: no GPU waits for it.

    where: the point of the program, for the message that other ranks print if this one is lost.
    """
    if world_size() == 1:
        return list(values)
    _contact.where = where or _contact.where
    shared = torch.tensor(values)
    _contact.wait(dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_contact.control, async_op=True))
    return shared.tolist()


def from_main(value: Any) -> Any:
    """Rank 0's `value`, of plain data, on every rank."""
    return gather_objects(value if rank() == 0 else None)[0]


SAME_COPIES = "give every process the same copies of data, weights and checkpoints"


def require_equal(values: dict[str, Any], remedy: str = SAME_COPIES) -> None:
    """Compare plain data of all ranks. Where a value is not the same everywhere, all ranks leave the process group and
    raise the same ValueError, which names each such value, the ranks that have it, and the remedy."""
    everywhere, differences = gather_objects(values), []
    for name in dict.fromkeys(name for of_rank in everywhere for name in of_rank):
        ranks: dict[str, list[str]] = {}
        for number, of_rank in enumerate(everywhere):
            ranks.setdefault(str(of_rank.get(name)), []).append(str(number))
        if len(ranks) > 1:  # of a long value, such as a digest, the beginning is shown
            shown = [
                f"{text if len(text) <= 60 else text[:8] + '...'} on rank {' '.join(r)}" for text, r in ranks.items()
            ]
            differences.append(f"{name} ({', '.join(shown)})")
    if differences:
        error = everywhere_raised(f"the processes of this run differ in {', '.join(differences)}: {remedy}")
        barrier()
        leave()
        raise error


def everywhere_raised(message: str) -> ValueError:
    """An error that all ranks raise and rank 0 reports."""
    error = ValueError(message)
    error.reported_here = rank() == 0
    return error


def gather_tensors(value: Tensor) -> list[Tensor]:
    """The tensor of every rank, in rank order, on every rank. Shapes must agree."""
    if world_size() == 1:
        return [value]
    parts = [torch.empty_like(value) for _ in range(world_size())]
    if value.is_cuda:
        barrier()
        dist.all_gather(parts, value.contiguous())
    else:
        _contact.wait(dist.all_gather(parts, value.contiguous(), group=_contact.control, async_op=True))
    return parts


def gather_rows(value: Tensor) -> Tensor:
    """Concatenate over ranks, in rank order, tensors whose first dimension may differ by rank."""
    return torch.cat(gather_parts(value)) if world_size() > 1 else value


def gather_parts(value: Tensor) -> list[Tensor]:
    """The tensor of every rank, whose first dimension may differ by rank."""
    lengths = [int(length) for length in gather_tensors(torch.tensor([len(value)]))]
    padded = value.new_zeros(max(lengths), *value.shape[1:])
    padded[: len(value)] = value
    return [part[:length] for part, length in zip(gather_tensors(padded), lengths, strict=True)]


def gather_objects(value: object) -> list:
    """The value of every rank, in rank order, on every rank: plain data and tensors on the CPU, of any size."""
    if world_size() == 1:
        return [value]
    torch.save(value, content := io.BytesIO())
    parts = gather_parts(torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8))
    return [torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True) for part in parts]


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
            sum_over_ranks(self.total)
            self.total /= self.micro_steps * world_size()
        self.is_empty = True
        losses, *gradients = self.parts
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return losses.clone()
