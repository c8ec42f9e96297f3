"""End-to-end fine-tuning: the classifier, a micro-step of its training, and its exact evaluation.

Letters as in models_vit; K classes.
"""

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sets.loader import Sample, Watched
from models_mae import Published
from models_vit import NORMS, VisionTransformer
from runtime.training import OneNetwork
from util.scores import Scores, Tally
from util.seeding import seeded, stable_seed


class Classifier(Published):
    """A linear classifier on the normalised [cls] token (the paper's MAE-FT), or on the normalised mean patch token.

    global_pool: the mean patch. The encoder's final norm, which acts on single tokens, is then replaced by a new norm
    of the mean, `fc_norm`, as in MAE's published fine-tuned models. ValueError if there is no [cls] token to classify.
    """

    prefix = r"backbone\."  # files have the keys of the encoder, `fc_norm.*` with global_pool, and `head.*`

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
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # as in MAE: nearly uniform predictions at first
        nn.init.zeros_(self.head.bias)

    @property
    def family(self) -> str:
        """The name in encoders.families of published_state_dict's layout."""
        return "mae_ft" if self.fc_norm is None else "mae_ft_mean"

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,h,w) -> logits (B,K)."""
        (features,) = self.backbone(images).values()
        if self.fc_norm is None:
            return self.head(self.backbone.norm(features.cls))
        return self.head(self.fc_norm(features.patches.mean(1)))


def layer_decay_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups by layer, each with `lr_scale` = layer_decay^(depth + 1 - layer), decayed weights apart.

    Layer 0 is the embedding, i + 1 block i, depth + 1 what follows. Tokens, position tables, biases and norms are not
    decayed. Source: BEiT (Bao et al., 2022); MAE's fine-tuning uses the same.
    """
    depth, tokens = model.backbone.depth, ("cls_token", "reg_token", "pos_embed")
    groups: dict[tuple[int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("backbone.")
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith((*tokens, "patch_embed.")) else depth + 1
        decay = weight_decay if parameter.ndim > 1 and name not in tokens else 0.0
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


class FineTuning(OneNetwork):
    """A classifier and its optimizer, as a runtime.training.Method.

    mixup: timm's Mixup, which returns soft labels and does the label smoothing. Mixing and stochastic depth draw from
    (seed, epoch, chunk), hence equally in a resumed run and in any split into processes and micro-steps.
    """

    program = "main_finetune.py"

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: torch.dtype,
        smoothing: float = 0.0,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        clip_grad: float | None = None,
    ):
        super().__init__(model, optimizer, device, amp)
        self.mixup, self.clip_grad = mixup, clip_grad
        self.smoothing = 0.0 if mixup else smoothing

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        labels = sample.label.to(self.device, non_blocking=True)
        with seeded("finetune", *words):
            if self.device.type == "cuda":
                torch.cuda.manual_seed(stable_seed("finetune", *words))
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
                logits = self.model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)[None]

    def step(self, alive: Tensor) -> Tensor:
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        return super().step(alive)


@torch.no_grad()
def evaluate(model: Classifier, loader: Iterable, device: torch.device, amp: torch.dtype) -> Scores:
    """Scores of a classifier over all processes; each sample counts once."""
    model.eval()
    tally = Tally(1, model.head.out_features, device)
    for sample in Watched(loader, "test", agree=True):
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            logits = model(sample.image.to(device, non_blocking=True))
        tally.update(logits[None], sample.label.to(device, non_blocking=True))
    return tally.compute()[0]
