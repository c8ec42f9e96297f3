"""Encoders of timm: pretrained ones by name, and timm's configuration for a weight file (--timm_name)."""

import torch
from torch import nn

from encoders.catalogue import hugging_face_offline
from encoders.contents import State
from models_vit import VisionTransformer
from util.choices import nearest

HEADS = ("head.", "fc_norm.", "attn_pool.")  # what follows the blocks
EPS = {1e-6: "layernorm", 1e-5: "layernorm_eps1e-5"}  # names of models_vit.NORMS


def create(name: str, pretrained: bool = False, offline: bool = False, **options) -> nn.Module:
    """timm's model, without classifier. ValueError where timm does not know it or cannot provide its weights."""
    import timm  # takes a second

    if not timm.is_model(name.split(".")[0]):
        near = nearest(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}: {near}timm.list_models() lists them")
    try:
        with hugging_face_offline(offline):
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options).eval()
    except (RuntimeError, OSError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{'--offline: ' * offline}timm cannot provide {name!r}: {reason}") from error


def obstacles(model: nn.Module) -> list[str]:
    """Computations of a timm model that models_vit does not have."""
    import timm

    vit = timm.models.vision_transformer
    norms = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    problems = [] if type(model) is vit.VisionTransformer else [f"it is a {type(model).__name__}"]
    if len(norms) > 1 or norms - EPS.keys():
        problems.append(f"its norms have eps {', '.join(map(str, sorted(norms)))}")
    for block in getattr(model, "blocks", []):
        if type(block) not in (vit.Block, vit.ResPostBlock):
            problems.append(f"its blocks are {type(block).__name__}")
        elif type(block.attn) is not timm.layers.Attention:
            problems.append(f"its attention is {type(block.attn).__name__}")
        elif type(block.mlp) is not timm.layers.Mlp or activation(block.mlp.act) is None:
            problems.append("its MLPs are not two layers with GELU between")
    return sorted(set(problems))


def activation(module: nn.Module) -> str | None:
    """The name in models_vit.ACTIVATIONS."""
    import timm

    if isinstance(module, timm.layers.GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_tanh"
    if isinstance(module, timm.layers.QuickGELU):
        return "quick_gelu"
    return "gelu" if isinstance(module, nn.GELU | timm.layers.GELU) else None


def options_of(model: nn.Module, name: str) -> dict:
    """What the keys of a timm model do not show, as options of models_vit.VisionTransformer.

    Raises ValueError with the reasons where models_vit cannot compute it.
    """
    import timm

    if problems := obstacles(model):
        raise ValueError(f"timm's {name} is no plain ViT: {'; '.join(problems)}")
    block = model.blocks[0]
    residual = type(block) is timm.models.vision_transformer.ResPostBlock
    return {
        "num_heads": block.attn.num_heads,
        "norm_layer": EPS[block.norm1.eps],
        "norm_order": "residual" if residual else "pre",
        "activation": activation(block.mlp.act),
        "no_embed_class": model.no_embed_class,
    }


def preprocessing(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of timm's configuration."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def fill(model: nn.Module, ours: State, name: str) -> None:
    """Give a timm model the weights of a file. ValueError where some are missing or of no use."""
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(HEADS)}
    shapes = [
        f"{key} is {tuple(ours[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in sorted(ours.keys() & wanted.keys())
        if ours[key].shape != wanted[key].shape
    ]
    differences = [
        f"{label} {', '.join(sorted(keys)[:4])}{', ...' * (len(keys) > 4)}"
        for label, keys in (("missing", wanted.keys() - ours.keys()), ("not used", ours.keys() - wanted.keys()))
        if keys
    ]
    if differences or shapes:
        raise ValueError(f"the file is not timm's {name}: {'; '.join([*differences, *shapes[:3]])}")
    model.load_state_dict(ours, strict=False)


@torch.no_grad()
def check_tokens(model: nn.Module, backbone: VisionTransformer, name: str, tolerance: float = 1e-4) -> None:
    """ValueError where a block's tokens differ from timm's by more than `tolerance` of its largest token.

    Both have the same weights and see the same small drawn input, at the size of the file's own grid.
    """
    rows, columns = backbone.grid_size
    images = torch.randn(2, 3, rows * backbone.patch_size, columns * backbone.patch_size,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    tokens: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, out: tokens.append(out)) for block in model.blocks]
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    for step, expected in zip(backbone.trace(images), tokens, strict=True):
        difference = ((step.out - expected).abs().max() / expected.abs().max()).item()
        if not difference < tolerance:
            raise ValueError(
                f"models_vit cannot compute timm's {name}: the tokens of block {step.index} differ by {difference:.1e} "
                "of the largest"
            )
