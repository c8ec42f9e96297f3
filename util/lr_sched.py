"""Learning rate as a function of the epoch."""

import math

from util.progress import log


def lr_at(epoch: float, lr: float, epochs: int, warmup_epochs: int, min_lr: float = 0.0) -> float:
    """The rate at a fractional epoch: linear warm-up from 0, then half a cosine from lr to min_lr.

    The epoch is counted at the start of an optimizer step (as in MAE's code), so the first step has rate 0.
    Source: MAE, appendix A; Loshchilov and Hutter, "SGDR", 2017.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_lr(blr: float, effective_batch: int) -> float:
    """Linear scaling rule: base rate x effective batch / 256 (Goyal et al., 2017)."""
    return blr * effective_batch / 256


def fitting_warmup(warmup_epochs: int, epochs: int) -> int:
    """The warm-up, shortened to a tenth of the epochs if it is longer than all of them, which the log states."""
    if warmup_epochs <= epochs:
        return warmup_epochs
    shorter = epochs // 10
    log.info("a warm-up of %d epochs does not fit into %d: shortened to %d", warmup_epochs, epochs, shorter)
    return shorter
