"""Parameter groups: weight decay on matrices only, and layer-wise rate decay."""

from torch import nn


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, tokens' tables of one dimension."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups of the trainable parameters: decayed and not (timm's rule, which MAE's pretraining uses)."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if is_decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not is_decayed(name, p)], "weight_decay": 0.0},
    ]
