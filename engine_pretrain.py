"""One epoch of masked-autoencoder pretraining."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from util.distributed import mean_over_ranks, world_size
from util.progress import progress


def train_one_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_of: Callable[[float], float],
    epoch: int,
    accum_iter: int,
    mask_ratio: float,
    device: torch.device,
    amp: torch.dtype,
    on_step: Callable[[int, torch.Tensor, float], None] = lambda step, loss, lr: None,
) -> dict[str, float]:
    """Train on one epoch of Sample batches (with noise, which decides the masks).

    lr_of: fractional epoch -> learning rate, set before every optimizer step. on_step: called after every optimizer
    step with its number over the run, this process's loss (a tensor, not read yet) and its rate. Returns the epoch's
    mean loss, last rate and images per second, over all processes. Raises FloatingPointError, on all of them, when the
    loss is not finite.
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
                group["lr"] = lr
        images = sample.image.to(device, non_blocking=True)
        noise = sample.noise.to(device, non_blocking=True)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = update  # exchange gradients once per optimizer step
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            loss = model(images, noise, mask_ratio).loss / accum_iter
        loss.backward()
        pending = pending + loss.detach()
        images_seen += len(images)
        if update:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(pending)
            on_step((epoch * micro_steps + micro_step) // accum_iter, pending, lr)
            pending = 0.0
    mean = mean_over_ranks(torch.stack(losses).double().mean()).item()
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} in epoch {epoch}: training stopped")
    return {"loss": mean, "lr": lr, "images_per_second": world_size() * images_seen / (time.perf_counter() - start)}
