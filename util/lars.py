"""LARS as in the linear probes of MoCo v3 and MAE."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

    For a parameter w with gradient g and momentum buffer u (zero at start):
      if w has more than one dimension:  g <- g + weight_decay w,  g <- g trust ||w|| / ||g||  (if no norm is 0)
      always:                            u <- momentum u + g,  w <- w - lr u
    So biases and other vectors get plain momentum steps, and matrices are scaled at weight decay 0 too. (Libraries
    differ: several skip the scaling without weight decay, or scale vectors as well.)
    Source: You et al., "Large batch training of convolutional networks", 2017; paper, B.2.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,  # You et al.; MoCo v3 and MAE use the same
    ):
        super().__init__(params, {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient,
        })  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = g.add(w, alpha=group["weight_decay"])
                    w_norm, g_norm = w.norm(), g.norm()
                    ratio = group["trust_coefficient"] * w_norm / g_norm
                    # chosen on the device: reading the norms would stop the GPU once per tensor
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                u = state["momentum_buffer"]
                u.mul_(group["momentum"]).add_(g)
                w.sub_(u, alpha=group["lr"])
        return loss
