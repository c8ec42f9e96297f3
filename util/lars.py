"""LARS as in the linear probes of MoCo v3 and MAE, and SGD with momentum by the same rule."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum.

    For a parameter w with gradient g and momentum buffer u (zero at start):
      if w has more than one dimension:  g <- g + weight_decay w,  g <- g trust ||w|| / ||g||  (if no norm is 0)
      always:                            u <- momentum u + g,  w <- w - lr u
    So biases and other vectors get plain momentum steps, and matrices are scaled even without weight decay. (Libraries
    differ: some skip the scaling without weight decay, or scale vectors too.) A group with trust_coefficient None is
    trained by torch.optim.SGD's rule with momentum: nothing is scaled, and vectors decay like matrices.
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
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trust, momentum, decay = group["trust_coefficient"], group["momentum"], group["weight_decay"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                g, ratio = w.grad, None
                if decay and (w.ndim > 1 or trust is None):
                    g = g.add(w, alpha=decay)
                if w.ndim > 1 and trust is not None:
                    w_norm, g_norm = w.norm(), g.norm()
                    # torch.where: reading the norms would synchronise with the GPU once per tensor
                    ratio = torch.where((w_norm > 0) & (g_norm > 0), trust * w_norm / g_norm, torch.ones_like(w_norm))
                if momentum:
                    state = self.state[w]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(w)
                    u = state["momentum_buffer"].mul_(momentum)
                    u = u.add_(g) if ratio is None else u.addcmul_(g, ratio)
                else:
                    u = g if ratio is None else g * ratio
                w.add_(u, alpha=-group["lr"])  # the same bits as sub_, in half the time on a CPU
        return loss
