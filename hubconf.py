"""Encoders in Python: torch.hub.load(FOLDER, "encoder", WEIGHTS, source="local") gives tokens and attention statistics.

encoder = torch.hub.load(".", "encoder", "demo/mae.safetensors", source="local")
features = encoder.features(images, blocks=[-1])   # {block: Features}: tokens by name
flow = encoder.attention(images)                   # {metric: (L,B,K)}: each block, image and head
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from attention.measure import applicable, observe
from attention.metrics import METRICS, Sizes, metric_names
from data_sets.views import View, eval_transform
from encoders.architectures import FROM_FILE
from encoders.catalogue import CATALOGUE
from encoders.load import Encoder, input_size, load_encoder
from models_vit import Features
from util.tensor_files import safetensors_metadata

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]


class FrozenEncoder(nn.Module):
    """A frozen encoder. Images (B,3,h,w) are normalised with `mean` and `std`, as `transform` does; h and w are
    multiples of the patch size. `record` says which weights these are."""

    def __init__(self, encoder: Encoder, size: int):
        super().__init__()
        self.backbone, self.mean, self.std = encoder.backbone, encoder.mean, encoder.std
        self.pixels = encoder.pixels
        self.record, self.size = encoder.record, size

    @property
    def transform(self) -> View:
        """From a PIL image to (3,size,size): resize, central crop, normalisation, as the programs evaluate."""
        return eval_transform(self.size, **self.pixels)

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int] = (-1,)) -> dict[int, Features]:
        """{block: tokens leaving it}, before the final norm; blocks count from 0, negative ones from the end."""
        depth = self.backbone.depth
        if outside := [block for block in blocks if not -depth <= block < depth]:
            raise ValueError(f"block {outside[0]}: this encoder has the blocks 0 to {depth - 1}")
        features = self.backbone(images, sorted({block % depth for block in blocks}))
        return {block: features[block % depth] for block in blocks}

    forward = features

    @torch.no_grad()
    def attention(
        self, images: Tensor, metrics: Sequence[str] = ("flow",), reduction: str = "fused"
    ) -> dict[str, Tensor]:
        """{metric: (L,B,K)}: K numbers, one per head or one, of each block and image.

        metrics: names or groups of METRICS; those of tokens that the encoder lacks are left out. Raises ValueError for
        unknown names and for metrics of tokens (patch_log_amplitude, ...), which are not attention.
        """
        names = metric_names(metrics)
        if of_tokens := [name for name in names if METRICS[name].of_tokens]:
            raise ValueError(
                f"{of_tokens[0]} is a metric of tokens, not of attention: main_analyze_attention.py has it"
            )
        backbone = self.backbone
        chosen, grid = applicable(names, backbone), backbone.grid_of(*images.shape[-2:])
        patches = grid[0] * grid[1]
        sizes = Sizes(backbone.num_prefix_tokens + patches, patches, backbone.num_registers, grid, backbone.patch_size)
        blocks: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for step in backbone.trace(images):
            for (name, _), values in observe(
                step, chosen, backbone.num_prefix_tokens, backbone.has_cls, sizes, reduction
            ):
                blocks[name].append(values[:, 1:])  # the first is their summary over heads
        return {name: torch.stack(values) for name, values in blocks.items()}


def encoder(weights: str, model: str | None = None, family: str | None = None, **options) -> FrozenEncoder:
    """The encoder that `weights` names: a name of the catalogue, a file, a URL or a timm model; "" for random weights.

    model: a name of ARCHITECTURES (default: the catalogue's, that of the file's metadata, or its tensors' sizes).
    family and options are those of encoders.load.load_encoder. Raises ValueError where the file does not fit.
    """
    if model is None:
        model = FROM_FILE
        if weights in CATALOGUE:
            model = CATALOGUE[weights].model
        elif Path(weights).suffix == ".safetensors" and Path(weights).is_file():
            model = safetensors_metadata(Path(weights)).get("model", FROM_FILE)
    loaded = load_encoder(weights, model, family, **options)
    return FrozenEncoder(loaded, input_size(loaded, None)).eval()
