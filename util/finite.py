"""Whether tensors are finite, and why a network's activations are not."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all values are finite, as a tensor () of bool: the device is not waited for.

    The sum of a tensor is not finite where one of its values is not, nor where values of 1e38 and more add up, which
    have diverged as well. On a CPU it takes a tenth of the time of isfinite or of the largest value: 8 % of a step of
    ViT-B, 6 % of an analysis.
    """
    if tensors[0].device.type == "cpu":
        sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
        return torch.stack(sums).isfinite().all()
    return torch.stack(torch._foreach_norm(list(tensors), ord=float("inf"))).isfinite().all()


def overflow_cause(models: Mapping[str, object], amp: torch.dtype) -> str:
    """models: {owner of the weights, such as "the encoder's": network; anything else is passed over}."""
    for owner, model in models.items():
        for name, weight in model.state_dict().items() if isinstance(model, nn.Module) else ():
            if weight.is_floating_point() and not weight.isfinite().all():
                return f"{owner} weight {name} holds NaN or infinity; use another checkpoint"
    if amp == torch.float16:
        return "its weights are, but activations exceed float16's largest number, 65,504; use --amp bfloat16"
    precision = str(amp).removeprefix("torch.")
    return f"its weights are, but activations overflow in {precision}; check the checkpoint, its family and --model"
