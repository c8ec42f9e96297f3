"""Encoders and trained probes as modules: what hubconf.py and the installed package `beyond_cls` offer; docs/api.md."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.measure import applicable, observe
from attention.metrics import METRICS, Sizes, metric_names
from cli.encoder_arguments import frozen_encoder
from data_sets.views import View, eval_transform
from encoders.architectures import FROM_FILE
from encoders.catalogue import CATALOGUE
from encoders.load import Encoder, input_size, load_encoder
from models_vit import Features
from probing.bank import Probe
from probing.finished_run import Trained, read_trained
from probing.frozen import FrozenTokens
from probing.pooling import Tokens, read_blocks
from util.files import digest
from util.tensor_files import safetensors_metadata


class FrozenEncoder(nn.Module):
    """A frozen encoder. Images (B,3,h,w) are normalised as `transform` does (`pixels`: mean, std, interpolation, crop);
    h and w are multiples of the patch size. `record` says which weights these are."""

    def __init__(self, encoder: Encoder, size: int):
        super().__init__()
        self.backbone, self.pixels, self.record, self.size = encoder.backbone, encoder.pixels, encoder.record, size

    @property
    def transform(self) -> View:
        """From a PIL image to (3,size,size): resize, central crop, normalisation, as the programs evaluate."""
        return eval_transform(self.size, **self.pixels)

    @torch.no_grad()
    def features(
        self, images: Tensor, blocks: Sequence[int] = (-1,), cls_attention: bool = False, pooled: bool = False
    ) -> dict[int, Features]:
        """{block: tokens leaving it}, before the final norm; blocks count from 0, negative ones from the end.

        cls_attention: with the attention of [cls] to the patches, (B,H,M). pooled: with what the model's own pooling
        makes of its last block, {name: (B,E)}.
        """
        depth = self.backbone.depth
        if outside := [block for block in blocks if not -depth <= block < depth]:
            raise ValueError(f"block {outside[0]}: this encoder has the blocks 0 to {depth - 1}")
        wanted = sorted({block % depth for block in blocks})
        features = self.backbone(images, wanted, cls_attention, pooled=pooled)
        return {block: features[block % depth] for block in blocks}

    forward = features

    @torch.no_grad()
    def attention(
        self, images: Tensor, metrics: Sequence[str] = ("flow",), reduction: str = "fused"
    ) -> dict[str, Tensor]:
        """{metric: (L,B,K)}: K numbers, one per head or one, of each block and image; NaN behind those of a block that
        has fewer heads than another.

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
        heads = {name: max(value.shape[1] for value in values) for name, values in blocks.items()}
        return {
            name: torch.stack([F.pad(v, (0, heads[name] - v.shape[1]), value=torch.nan) for v in values])
            for name, values in blocks.items()
        }


class Prediction(NamedTuple):
    logits: Tensor  # (B,K)
    weights: Tensor | None  # (B,M) of each patch, sum 1, mean over heads or queries; None: the head weighs no patches


class TrainedProbe(nn.Module):
    """A trained probe and its encoder: images -> Prediction. `facts` say how it was trained and what it scored."""

    def __init__(self, trained: Trained, encoder: FrozenEncoder):
        """ValueError if the probe was trained on other weights, or needs the attention of a third network."""
        super().__init__()
        self.encoder, self.facts, self.transform = encoder, trained.facts, encoder.transform
        backbone, self.spec = encoder.backbone, trained.spec
        if digest(backbone.state_dict()) != self.facts["encoder_weights"]:
            raise ValueError(f"this probe was trained on another encoder: {self.facts['encoder_record']}")
        tokens = Tokens.of(backbone, backbone.grid_of(encoder.size, encoder.size))
        self.probe = Probe(self.spec, tokens, self.facts["classes"])
        if self.probe.aggregation.needs.oracle:
            raise ValueError(f"head {self.spec.head} needs the attention of another encoder: choose another head")
        self.probe.load_state_dict(trained.state)
        self.eval().requires_grad_(False)
        needs = self.probe.aggregation.needs
        self.tokens = FrozenTokens(backbone, self.spec.blocks, torch.float32, self.facts["final_norm"], needs)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Prediction:
        """images: (B,3,size,size), as `transform` makes them."""
        features = read_blocks(self.tokens(images), self.spec.blocks)
        pooled = self.probe.aggregation(features)
        logits = self.probe.classifier(self.probe.norm(pooled.vector))
        if not self.probe.aggregation.weighs:
            return Prediction(logits, None)
        weights = pooled.weights.mean(1) if pooled.weights.dim() == 3 else pooled.weights
        weights = weights[:, -features.patches.shape[1] :]  # of all tokens, those of patches
        return Prediction(logits, weights / weights.sum(1, keepdim=True))


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


def probe(
    folder: str, head: str | None = None, block: int | None = None, seed: int | None = None, weights: str | None = None
) -> TrainedProbe:
    """A probe that main_linprobe.py trained (folder: its --output_dir) or scripts/export_probe.py wrote.

    head, block and seed choose among several; weights: of the encoder, if the run's are no longer there. ValueError
    where no or several probes fit, or the encoder is another.
    """
    trained = read_trained(Path(folder), head, block, seed)
    settings = {**trained.facts["encoder"], "offline": False} | ({"finetune": weights} if weights else {})
    return TrainedProbe(trained, FrozenEncoder(*frozen_encoder(argparse.Namespace(**settings))).eval())
