"""One training epoch and one exact evaluation of a bank of probes on a frozen backbone.

Letters: B images, S probes, K classes.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models_vit import Features, VisionTransformer
from pooling import Needs
from probes import ProbeBank
from util.distributed import average_gradients, world_size
from util.progress import progress
from util.scores import Scores, count, total


class FrozenTokens(NamedTuple):
    """A frozen backbone with the way its tokens are read; calling it gives float32 tokens, outside of autograd.

    final_norm: normalise the tokens with the backbone's last norm (MAE's probe does, the paper's does not).
    needs: what is read beside the tokens; oracle: images -> (B,M), called where `needs` names it.
    """

    backbone: VisionTransformer
    blocks: tuple[int, ...]
    amp: torch.dtype
    final_norm: bool = False
    needs: Needs = Needs()
    oracle: Callable[[Tensor], Tensor] | None = None

    # no_grad, not inference_mode: the probes keep the tokens for their backward pass
    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[int, Features]:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            features = self.backbone(images, self.blocks, self.needs.cls_attention, self.needs.cells)
        attention = self.oracle(images) if self.needs.oracle else None

        def prepare(tokens: Tensor | None) -> Tensor | None:
            if tokens is None:
                return None
            return self.backbone.norm(tokens.float()) if self.final_norm else tokens.float()

        return {
            block: f._replace(
                cls=prepare(f.cls), registers=prepare(f.registers), patches=prepare(f.patches), oracle=attention
            )
            for block, f in features.items()
        }


def train_one_epoch(
    bank: ProbeBank,
    tokens: FrozenTokens,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[float, float], float],
    epoch: int,
    accum_iter: int,
    device: torch.device,
    on_step: Callable[[int, Tensor], None] = lambda step, losses: None,
) -> dict:
    """Train every probe of the bank on one epoch of Sample batches.

    schedule: (fractional epoch, peak rate of a probe) -> rate, set before every optimizer step. on_step: called after
    every optimizer step with its number over the run and the (S,) losses. Losses are summed over probes, so no probe's
    gradient depends on its neighbours. Returns mean loss per probe (list of S), images per second over all processes,
    and the share of time spent waiting for data.
    """
    bank.train()
    tokens.backbone.eval()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    micro_steps = len(loader)
    epoch_loss = pending = torch.zeros(len(bank.specs), device=device, dtype=torch.float64)
    start = asked = time.perf_counter()
    images_seen, waited = 0, 0.0
    for micro_step, sample in enumerate(progress(loader, f"epoch {epoch}", micro_steps)):
        waited += time.perf_counter() - asked
        if micro_step % accum_iter == 0:
            for group in optimizer.param_groups:
                group["lr"] = schedule(epoch + micro_step / micro_steps, group["peak_lr"])
        images = sample.image.to(device, non_blocking=True)
        labels = sample.label.to(device, non_blocking=True)
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in bank(tokens(images))])
        (losses.sum() / accum_iter).backward()
        pending = pending + losses.detach().double() / accum_iter
        images_seen += len(images)
        if (micro_step + 1) % accum_iter == 0:
            average_gradients(parameters)
            bank.commit_statistics()
            optimizer.step()
            optimizer.zero_grad()
            on_step((epoch * micro_steps + micro_step) // accum_iter, pending)
            epoch_loss = epoch_loss + pending
            pending = torch.zeros_like(pending)
        asked = time.perf_counter()
    if world_size() > 1:
        dist.all_reduce(epoch_loss)
    seconds = time.perf_counter() - start
    return {
        "train_loss": (epoch_loss / (micro_steps // accum_iter) / world_size()).tolist(),
        "images_per_second": images_seen * world_size() / seconds,
        "data_wait": waited / seconds,
    }


@torch.no_grad()
def evaluate(bank: ProbeBank, tokens: FrozenTokens, loader: Iterable, device: torch.device) -> list[Scores]:
    """Scores of every probe, in the order of `bank.specs`; each sample counts once, over all processes."""
    bank.eval()
    tokens.backbone.eval()
    counts = torch.zeros(len(bank.specs), 4, device=device, dtype=torch.float64)
    for sample in progress(loader, "test", len(loader)):
        labels = sample.label.to(device, non_blocking=True)
        logits = bank(tokens(sample.image.to(device, non_blocking=True)))
        counts += torch.stack([count(probe_logits, labels) for probe_logits in logits])
    return total(counts)
