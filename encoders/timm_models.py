"""timm's configuration of plain ViTs, for weights that models_vit computes: what a file's tensors do not show."""

import torch
from torch import nn

from encoders.contents import State
from encoders.libraries import one_line
from models_vit import VisionTransformer
from util.choices import nearest

HEADS = ("head.", "fc_norm.", "attn_pool.")  # what follows the blocks
EPS = {1e-6: "layernorm", 1e-5: "layernorm_eps1e-5"}  # names of models_vit.NORMS


def create(name: str, **options) -> nn.Module:
    """timm's model with random weights, without classifier. ValueError where timm does not know it."""
    import timm  # takes a second

    if not timm.is_model(name.split(".")[0]):
        near = nearest(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}: {near}timm.list_models() lists them")
    try:
        return timm.create_model(name, num_classes=0, **options).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm cannot make {name!r}: {one_line(error)}") from error


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
        raise ValueError(f"timm's {name} is no plain ViT: {'; '.join(problems)}; timm runs it: --finetune timm:...")
    block = model.blocks[0]
    residual = type(block) is timm.models.vision_transformer.ResPostBlock
    return {
        "num_heads": block.attn.num_heads,
        "norm_layer": EPS[block.norm1.eps],
        "norm_order": "residual" if residual else "pre",
        "activation": activation(block.mlp.act),
        "no_embed_class": model.no_embed_class,
    }


def fill(model: nn.Module, ours: State, name: str) -> None:
    """Give a timm model the weights of a file. ValueError where some are missing, left over or misshapen."""
    try:
        missing, unused = model.load_state_dict(ours, strict=False)
    except RuntimeError as error:  # its second line has the first shape that differs
        raise ValueError(f"the file is not timm's {name}: {str(error).splitlines()[1].strip()}") from error
    kinds = {"missing": [key for key in missing if not key.startswith(HEADS)], "not used": unused}
    if differences := [f"{kind} {', '.join(sorted(keys)[:4])}" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"the file is not timm's {name}: {'; '.join(differences)}")


@torch.no_grad()
def check_tokens(model: nn.Module, backbone: VisionTransformer, name: str, tolerance: float = 1e-4) -> None:
    """ValueError where a block's patch tokens differ from timm's by more than `tolerance` of the largest.

    Both have the same weights and see the same small drawn input, at the size of the file's own grid.
    """
    height, width = (side * backbone.patch_size for side in backbone.grid_size)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for step, tokens in zip(backbone.trace(images), expected, strict=True):
        patches = step.out[:, backbone.num_prefix_tokens :]
        difference = ((patches - tokens).abs().max() / tokens.abs().max()).item()
        if not difference < tolerance:
            raise ValueError(
                f"models_vit cannot compute timm's {name}: the tokens of block {step.index} differ by {difference:.1e} "
                "of the largest"
            )
