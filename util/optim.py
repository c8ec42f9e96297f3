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


def layer_of(name: str, depth: int) -> int:
    """Layer of a ViT parameter: 0 for the embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed.")) else depth + 1


def layer_decay_groups(model: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups by layer, each with `lr_scale` = layer_decay^(depth + 1 - layer), decayed weights apart.

    Tokens and position tables are not decayed. Source: BEiT (Bao et al., 2022); MAE's fine-tuning uses the same.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("backbone.")
        layer = layer_of(name, depth)
        decayed = parameter.ndim > 1 and name not in ("cls_token", "reg_token", "pos_embed")
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
