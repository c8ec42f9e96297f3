"""Why a network's activations are not finite, and what to do about it."""

from collections.abc import Mapping

import torch
from torch import nn


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
