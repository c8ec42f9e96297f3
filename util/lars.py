"""LARS as in the linear probes of MoCo v3 and MAE, and SGD with momentum by the same rule; for one network or many.

Letters: S networks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DIVERGED = 1e30  # norm of an update that counts as infinite: float32 ends at 3e38, and weights must stay below
LONG = 2**16  # numbers from which, on a CPU, a dot product takes a fifth of the time of vector_norm, and errs less


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

    For a parameter w with gradient g and momentum buffer u (zero at start):
      if w has more than one dimension:  g <- g + weight_decay w,  g <- g trust ||w|| / ||g||  (if no norm is 0)
      always:                            u <- momentum u + g,  w <- w - lr u
    So biases and other vectors get plain momentum steps, and matrices are scaled even without weight decay. (Libraries
    differ: some skip the scaling without weight decay, or scale vectors too.) A group with trust_coefficient None is
    trained by torch.optim.SGD's rule with momentum: nothing is scaled, and vectors decay like matrices.
    In a `stacked` group, the first dimension of every parameter counts S networks that are trained independently, and
    `lr` may be a tensor (S,). The number of operations does not depend on S.
    Source: You et al., "Large batch training of convolutional networks", 2017; paper, B.2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float | None = 1e-3,  # You et al.; MoCo v3 and MAE use the same
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "stacked": False}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    def step(self, closure: None = None) -> None:
        self.guarded_step([torch.tensor(True)] * len(self.param_groups))

    @torch.no_grad()
    def guarded_step(self, alive: Sequence[Tensor]) -> list[Tensor]:
        """Update the networks that are alive and whose gradients and updates are finite; returns which those are.

        alive: per group, (S,) bool. The others keep weights and momentum, without a copy and without waiting for a GPU:
        their update is multiplied by 0.
        """
        return [self._step(group, rows) for group, rows in zip(self.param_groups, alive, strict=True)]

    def _step(self, group: dict, alive: Tensor) -> Tensor:
        trust, momentum, decay = group["trust_coefficient"], group["momentum"], group["weight_decay"]
        updates = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if momentum and not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            w, g, u = parameter, parameter.grad, state.get("momentum_buffer")
            if not group["stacked"]:
                w, g, u = (None if tensor is None else tensor[None] for tensor in (w, g, u))
            scaled = trust is not None and w.ndim > 2
            if decay and (scaled or trust is None):
                g = g.add(w, alpha=decay)
            lr = torch.as_tensor(group["lr"], dtype=torch.float64).to(w.device, w.dtype)
            g_norm, ratio = norms(g), torch.ones_like(lr)
            if scaled:
                w_norm = norms(w)
                ratio = torch.where((w_norm > 0) & (g_norm > 0), trust * w_norm / g_norm, 1.0)
            # a geometric series bounds the momentum: the norm of u would take another pass over it. lr may still rise
            largest = lr.clamp(min=1) * ratio * g_norm / (1 - momentum)
            alive = alive.to(w.device) & (largest < DIVERGED)  # not so for NaN
            updates.append((w, g, u, ratio, lr))
        for w, g, u, ratio, lr in updates:
            shape = -1, *[1] * (w.ndim - 1)
            if g.is_cuda or not alive.all():  # reading `alive` is free on a CPU, and passing over g is not
                g = g.masked_fill_(~alive.view(shape), 0.0)
            keep = torch.where(alive, torch.full_like(lr, momentum), 1.0).view(shape)
            ratio, lr = (torch.where(alive, factor, 0.0).view(shape) for factor in (ratio, lr))
            if u is None:
                w.addcmul_(g, -lr * ratio)
            else:
                u.mul_(keep).addcmul_(g, ratio)
                w.addcmul_(u, -lr)
        return alive


def norms(tensor: Tensor) -> Tensor:
    """(S,...) -> (S,) Euclidean norms."""
    rows = tensor.reshape(len(tensor), -1)
    if rows.device.type == "cpu" and rows.shape[1] >= LONG:
        return torch.stack([row.dot(row) for row in rows]).sqrt()
    return torch.linalg.vector_norm(rows, dim=1)
