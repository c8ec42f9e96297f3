"""The encoder of models_vit with a linear classifier on top, for end-to-end fine-tuning. Letters as in models_vit."""

import torch.nn as nn
from torch import Tensor

from models_vit import NORMS, VisionTransformer


class Classifier(nn.Module):
    """Classification on the normalised [cls] token (the paper's MAE-FT), or on the normalised mean patch token.

    global_pool: the mean patch. The encoder's final norm, which is one of single tokens, is then replaced by a new
    one behind the mean, `fc_norm`, as in MAE's published fine-tuned models. ValueError where there is no [cls] token
    to classify on.
    """

    def __init__(self, backbone: VisionTransformer, num_classes: int, global_pool: bool = False):
        super().__init__()
        if not (backbone.has_cls or global_pool):
            raise ValueError(
                "fine-tuning on [cls] needs an encoder with a [cls] token: drop --no_cls_token, or add --global_pool"
            )
        self.backbone = backbone
        self.fc_norm = NORMS["layernorm"](backbone.embed_dim) if global_pool else None
        if global_pool:
            backbone.norm = nn.Identity()
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's fine-tuning: start from nearly uniform predictions
        nn.init.zeros_(self.head.bias)

    @property
    def family(self) -> str:
        """Of its published_state_dict, in encoders.families."""
        return "mae_ft" if self.fc_norm is None else "mae_ft_mean"

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,h,w) -> logits (B,K)."""
        (features,) = self.backbone(images).values()
        if self.fc_norm is None:
            return self.head(self.backbone.norm(features.cls))
        return self.head(self.fc_norm(features.patches.mean(1)))

    def published_state_dict(self) -> dict[str, Tensor]:
        """Weights in the published layout: encoder keys as timm's, then `fc_norm.*` with global_pool, and `head.*`."""
        return {key.removeprefix("backbone."): value for key, value in self.state_dict().items()}

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of published_state_dict; strict."""
        names = {key.removeprefix("backbone."): key for key in self.state_dict()}
        self.load_state_dict({names.get(key, key): value for key, value in state.items()}, strict=True)
