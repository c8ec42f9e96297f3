"""One epoch of end-to-end fine-tuning, and its exact evaluation."""

import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.distributed import mean_over_ranks, rank, world_size
from util.progress import progress
from util.scores import Scores, count, total
from util.seeding import seeded, stable_seed


def train_one_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_of: Callable[[float], float],
    epoch: int,
    accum_iter: int,
    device: torch.device,
    amp: torch.dtype,
    seed: int,
    smoothing: float = 0.0,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    clip_grad: float | None = None,
    on_step: Callable[[int, Tensor, float], None] = lambda step, loss, lr: None,
) -> dict[str, float]:
    """Train on one epoch of Sample batches.

    lr_of: fractional epoch -> rate, multiplied by each group's `lr_scale`. mixup: timm's Mixup, which returns soft
    labels (label smoothing is then its business). on_step: called after every optimizer step with its number over the
    run, this process's loss (a tensor, not read yet) and its rate. Mixing and stochastic depth draw from (seed, epoch,
    chunk), the chunks counted as by util.datasets.GlobalBatches: a resumed run repeats them, and so does another split
    into processes and micro-steps. Returns the epoch's mean loss, last rate and images per second, over all processes.
    Raises FloatingPointError, on all of them, when the loss is not finite.
    """
    model.train()
    micro_steps = len(loader)
    losses = []  # stay on the device: reading them here would stop a GPU at every step
    start, images_seen = time.perf_counter(), 0
    pending = 0.0
    for micro_step, sample in enumerate(progress(loader, f"epoch {epoch}", micro_steps)):
        update = (micro_step + 1) % accum_iter == 0
        if micro_step % accum_iter == 0:
            lr = lr_of(epoch + micro_step / micro_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        images = sample.image.to(device, non_blocking=True)
        labels = sample.label.to(device, non_blocking=True)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = update  # exchange gradients once per optimizer step
        words = ("finetune", seed, epoch, micro_step * world_size() + rank())
        with seeded(*words):
            if device.type == "cuda":
                torch.cuda.manual_seed(stable_seed(*words))
            if mixup is not None:
                images, labels = mixup(images, labels)
            with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
                logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.0 if mixup else smoothing) / accum_iter
        loss.backward()
        pending = pending + loss.detach()
        images_seen += len(images)
        if update:
            if clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(pending)
            on_step((epoch * micro_steps + micro_step) // accum_iter, pending, lr)
            pending = 0.0
    mean = mean_over_ranks(torch.stack(losses).double().mean()).item()
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} in epoch {epoch}: training stopped")
    return {"loss": mean, "lr": lr, "images_per_second": world_size() * images_seen / (time.perf_counter() - start)}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device, amp: torch.dtype) -> Scores:
    """Scores of a classifier; each sample counts once, over all processes."""
    model.eval()
    counts = torch.zeros(1, 4, device=device, dtype=torch.float64)
    for sample in progress(loader, "test", len(loader)):
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            logits = model(sample.image.to(device, non_blocking=True))
        counts += count(logits, sample.label.to(device, non_blocking=True))
    return total(counts)[0]
