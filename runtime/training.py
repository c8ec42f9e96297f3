"""The loop that probing, pretraining and fine-tuning share: epochs of optimizer steps, and a run that survives.

An engine states what a micro-step computes (`Method`); everything else is here. A checkpoint can be written after any
optimizer step, and a run resumed from it is the uninterrupted one to the bit: order, augmentation and all that is drawn
are functions of (seed, epoch, sample or chunk), and the sums of the epoch that was cut are part of the checkpoint.

Letters: S losses, one per network that trains on its own: the probes of a bank, or the one network.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data_sets.loader import Loader, Sample, Watched
from data_sets.order import GlobalBatches
from runtime.folder import RunFolder
from runtime.resumable import Resumable, check_identity
from util import signals
from util.distributed import GradientMean, agree, rank, require_equal, training_limit, world_size
from util.finite import all_finite
from util.progress import log, peak_memory

LOADER_BOUND = 0.3  # share of the time that an epoch waits for data


class Method(Protocol):
    """What a program trains, stated by its engine."""

    program: str  # whose checkpoints these are
    names: tuple[str, ...]  # of the S losses, in logs; "" for the only one
    parameters: list[Tensor]  # that are trained
    device: torch.device
    state_name: str  # under which a checkpoint holds the weights

    def train(self) -> None:
        """Before an epoch: modes of the modules."""

    def losses(self, sample: Sample, key: tuple) -> Tensor | None:
        """Losses (S,) of a micro-batch, to be differentiated. It draws with util.seeding and `key`.

        None where it waits for the micro-batches that follow: the last of GlobalBatches' `joined` ones has the losses.
        """

    def step(self, alive: Tensor) -> Tensor:
        """The optimizer step with the mean gradients, for networks that are `alive` (S,): their losses are finite.

        Returns which of them still are: their gradients and updates are finite, too."""

    def check(self) -> None:
        """ValueError if losses are not finite for another reason than training; each rank must call it."""

    def state(self) -> dict[str, Any]:
        """Weights and buffers, of tensors by name."""

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, complete or an error of LOAD_ERRORS."""


class OneNetwork:
    """A Method that trains one network, of weights in a published layout, with one loss; its engine adds `losses`."""

    state_name, names = "model", ("",)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, amp: torch.dtype):
        self.model, self.optimizer, self.device, self.amp = model, optimizer, device, amp
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def train(self) -> None:
        self.model.train()

    def step(self, alive: Tensor) -> Tensor:
        alive = alive & all_finite([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.step()
        return alive

    def check(self) -> None:
        """Nothing but training can make its losses infinite or NaN."""

    def state(self) -> dict[str, Any]:
        return self.model.published_state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_published_state_dict(state)


class EpochStats(NamedTuple):
    """An epoch over all processes, resumed or not."""

    losses: list[float]  # (S,) mean over the epoch; NaN where it diverged
    lr: float  # of the last step
    images_per_second: float
    data_wait: float  # share of the time that this process waited for its loader
    memory_gib: float  # taken by this process so far, at most

    def speed(self) -> str:
        """For the log."""
        bound = " (loader-bound)" if self.data_wait > LOADER_BOUND else ""
        wait = f"{100 * self.data_wait:.0f} % of the time waiting for data{bound}"
        return f"{self.images_per_second:.0f} images/s, {wait}, {self.memory_gib:.1f} GiB at most"

    def costs(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("images_per_second", "data_wait", "memory_gib")}

    def record(self, epoch: int) -> dict[str, float]:
        """The line of log.txt of a run with one loss."""
        return {"epoch": epoch, "loss": self.losses[0], "lr": self.lr, **self.costs()}


@dataclass(frozen=True)
class Plan:
    """How long a run trains, from which seed, and how often it writes a checkpoint within an epoch (0: not by this).

    seed: of what a step draws. The order of the images is the loader's.
    """

    epochs: int
    seed: int
    save_every_minutes: float = 0
    save_every_steps: int = 0


class Training(Resumable):
    """One run of a Method. Its position is `epoch` and `done`, the number of optimizer steps done in that epoch."""

    def __init__(
        self,
        plan: Plan,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[float, float], float],
        loader: Loader,
        batches: GlobalBatches,
        folder: RunFolder,
        identity: dict[str, Any] | None = None,
        first_epoch: int = 0,
    ):
        """schedule: (fractional epoch, a group's `peak_lr`) -> rate, which the group's `lr_scale` multiplies.
        identity: plain data that must be equal when the run is resumed. first_epoch: of a run that is not resumed."""
        self.plan, self.method, self.optimizer, self.schedule = plan, method, optimizer, schedule
        self.loader, self.batches = loader, batches
        identity = {"effective batch": batches.effective, **(identity or {})}
        super().__init__(method.program, folder, identity, plan.save_every_minutes)
        self.epoch, self.done = self.first_position = first_epoch, 0
        self.history: list[dict] = []  # what the program keeps of earlier epochs
        self.diverged_at = torch.full((len(method.names),), -1, device=method.device)  # step of the run; -1: it did not
        self.reported: set[int] = set()  # losses whose divergence was reported
        self.last_scalars: dict[str, float] = {}  # of the epoch that has just ended
        self.began = time.monotonic()
        self.earlier = 0.0  # seconds that the run took in the starts before this one, until it was saved
        self._clear()

    def _clear(self) -> None:
        self.loss_sum = torch.zeros(len(self.method.names), device=self.method.device, dtype=torch.float64)
        self.seconds = self.waited = 0.0

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.done

    def done_so_far(self) -> str:
        return f"{self.done} of {self.batches.steps} steps of epoch {self.epoch}"

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the run."""
        return self.epoch * self.batches.steps + self.done

    @property
    def elapsed(self) -> float:
        """Seconds since the first epoch began, evaluations too, in all starts of the run."""
        return self.earlier + time.monotonic() - self.began

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each to be ended by `end_epoch`."""
        self.began = time.monotonic()
        while self.epoch < self.plan.epochs:
            yield self.epoch

    @training_limit()
    def train_one_epoch(self) -> EpochStats:
        """Train on what is left of the epoch. FloatingPointError, on all processes, when nothing is left to train."""
        accum_iter, steps = self.batches.accum_iter, self.batches.steps
        self.method.train()
        self.batches.epoch, self.batches.first_step = self.epoch, self.done
        watched = Watched(self.loader, f"epoch {self.epoch}")
        mean = GradientMean(self.method.parameters, accum_iter // self.batches.joined)
        start, earlier, waited = time.perf_counter(), self.seconds, self.waited
        for micro_step, sample in enumerate(watched, start=self.done * accum_iter):
            if micro_step % accum_iter == 0:
                for group in self.optimizer.param_groups:
                    rate = self.schedule(self.epoch + self.done / steps, group["peak_lr"])
                    group["lr"] = rate * group.get("lr_scale", 1.0)
            chunk = micro_step * world_size() + rank()  # counted as by GlobalBatches: alike for any split
            losses = self.method.losses(sample, (self.plan.seed, self.epoch, chunk))
            if losses is not None:
                losses.sum().backward()
                mean.add(losses)
            if (micro_step + 1) % accum_iter == 0:
                self._update(mean.take())
                self.seconds, self.waited = earlier + time.perf_counter() - start, waited + watched.waited
                self._save_or_stop()
        self._look_for_divergence()
        return EpochStats(
            (self.loss_sum / steps).tolist(),
            self.schedule(self.epoch + (steps - 1) / steps, first_of(self.optimizer.param_groups[0]["peak_lr"])),
            steps * self.batches.effective / self.seconds,
            self.waited / self.seconds,
            peak_memory(self.method.device),
        )

    def end_epoch(self, scalars: dict[str, float] | None = None) -> None:
        """The epoch is evaluated and logged: its figures go to TensorBoard, and the run to a checkpoint."""
        self.last_scalars = scalars or {}
        self.folder.scalars(self.last_scalars, (self.epoch + 1) * self.batches.steps)
        self.epoch, self.done = self.epoch + 1, 0
        self._clear()
        self.save()

    def _update(self, losses: Tensor) -> None:
        """One optimizer step with losses (S,); nothing here waits for a GPU, but for reports."""
        before = self.diverged_at < 0
        alive = self.method.step(before & losses.isfinite())
        self.optimizer.zero_grad()
        self.diverged_at = torch.where(before & ~alive, self.steps_done, self.diverged_at)
        self.loss_sum += torch.where(alive, losses, torch.nan)
        if self.done % max(1, self.batches.steps // 20) == 0:
            self._look_for_divergence()
            tags = [f"train_loss/{name}".removesuffix("/") for name in self.method.names]
            values = {tags[i]: loss for i, loss in enumerate(losses.tolist()) if i not in self.reported}
            self.folder.scalars({**values, "lr": first_of(self.optimizer.param_groups[0]["lr"])}, self.steps_done)
        self.done += 1

    def diverged(self) -> dict[str, dict[str, int] | None]:
        """{name of a loss: epoch and step, both from 0, whose loss or gradient was not finite, or None}."""
        return {
            name: {"epoch": step // self.batches.steps, "step": step % self.batches.steps} if step >= 0 else None
            for name, step in zip(self.method.names, self.diverged_at.tolist(), strict=True)
        }

    def _look_for_divergence(self) -> None:
        """Report losses that diverged since the last look; reading them waits for a GPU."""
        self.method.check()
        steps = self.diverged_at.tolist()
        where = [f"epoch {step // self.batches.steps}, step {step % self.batches.steps}" for step in steps]
        if min(steps) >= 0:
            what = "training" if len(steps) == 1 else "every one of the probes"
            cause = f"the loss or its gradient is not finite in {where[steps.index(max(steps))]}"
            error = FloatingPointError(f"{what} diverged: {cause}; lower the learning rate")
            error.reported_here = rank() == 0
            raise error
        for index, step in enumerate(steps):
            if step >= 0 and index not in self.reported:
                self.reported.add(index)
                log.warning("%s diverged in %s: it stays as it was", self.method.names[index], where[index])

    def _save_or_stop(self) -> None:
        where = f"epoch {self.epoch}, step {self.done}"
        number, overdue = agree(signals.requested(), self.overdue, where=where)
        if number:
            raise signals.Stopped(number)
        steps = self.plan.save_every_steps
        if overdue or (steps and self.steps_done % steps == 0):
            self.save()

    def save(self) -> None:
        """Write a checkpoint. FloatingPointError instead where nothing is left to train."""
        self._look_for_divergence()
        ended = self.done == 0
        state = {name: getattr(self, name) for name in ("loss_sum", "seconds", "waited", "elapsed", "history")}
        state |= {"scalars": self.last_scalars if ended else {}, "diverged_at": self.diverged_at.tolist()}
        state |= {self.method.state_name: self.method.state(), "optimizer": self.optimizer.state_dict()}
        self._write(self.epoch - ended, state, None if ended else self.done)

    def resume(self, resume: str, evaluate_only: bool = False, evaluated: Sequence[str] = ()) -> None:
        """Continue from the checkpoint that `resume` names, if there is one; see RunFolder.find_checkpoint.

        evaluated: names of `identity` that must be equal if the checkpoint is only evaluated."""
        self.evaluated = evaluated
        require_equal(self.identity)
        state = self.folder.find_checkpoint(resume, evaluate_only, lambda state: self._restore(state, evaluate_only))
        if state is not None and not evaluate_only:
            self.saved_position = self.position if self.folder.kept else None  # None: it is in another folder
            if self.epoch >= self.plan.epochs:
                log.info("all %d epochs are done: only the results are written again", self.plan.epochs)

    def _restore(self, state: dict, evaluate_only: bool) -> None:
        """Take over a checkpoint. ValueError where it does not fit, AnotherRun where the arguments differ."""
        name = self.method.state_name
        with self._checking(state, {name, "optimizer", "history", "loss_sum", "diverged_at", "scalars"}):
            if evaluate_only:
                kept = {name: self.identity[name] for name in self.evaluated}
                check_identity(kept, state["identity"], "give the flags of the run, as --args_from its args.json does")
            else:
                check_identity(self.identity, state["identity"])
            self.method.load(state[name])
            if not evaluate_only:
                self._restore_progress(state)

    def _restore_progress(self, state: dict) -> None:
        steps = self.batches.steps
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            for key, value in kept.items():  # torch does not look
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{key} of the optimizer is {tuple(value.shape)}, not {tuple(parameter.shape)}")
        loss_sum, diverged_at = state["loss_sum"], torch.tensor(state["diverged_at"])
        if loss_sum.shape != self.loss_sum.shape or diverged_at.shape != self.diverged_at.shape:
            raise ValueError(f"it counts {len(loss_sum)} losses, this run has {len(self.loss_sum)}")
        epoch, step, history = state["epoch"], state["step"], state["history"]
        if not (0 <= epoch < self.plan.epochs and (step is None or (type(step) is int and 0 < step <= steps))):
            raise ValueError(f"it stands at step {step} of epoch {epoch}")
        self.loss_sum, self.diverged_at = loss_sum.to(self.loss_sum), diverged_at.to(self.diverged_at)
        self.seconds, self.waited = float(state["seconds"]), float(state["waited"])
        self.earlier = float(state["elapsed"])
        evaluated = [entry["epoch"] for entry in history if isinstance(entry.get("test", entry.get("val")), dict)]
        if len(evaluated) < len(history) or (self.evaluated and state["scalars"] and evaluated[-1:] != [epoch]):
            raise ValueError(f"its history is of the epochs {evaluated}")
        self.history = list(history)
        self.last_scalars = {name: float(value) for name, value in state["scalars"].items()}
        self.epoch, self.done = (epoch + 1, 0) if step is None else (epoch, step)

    def start(self, record: dict[str, Any]) -> None:
        """Open the records of the run: its arguments, and TensorBoard from the present step on."""
        self.folder.start(record, purge_step=self.steps_done)  # from 0, too: a run killed before its first checkpoint
        if self.done == 0:
            self.folder.scalars(self.last_scalars, self.steps_done)  # they share their step with what is purged


def first_of(rate: float | Tensor) -> float:
    """A rate, or that of the first of several networks."""
    return torch.as_tensor(rate, dtype=torch.float64).flatten()[0].item()
