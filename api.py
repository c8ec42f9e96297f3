"""Encoders and trained probes as modules, for hubconf.py and the installed package `beyond_cls`; see docs/api.md."""

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
from encoders.load import Encoder, input_size, load_encoder
from models_vit import Features
from probing.bank import Probe
from probing.finished_run import Trained, read_trained
from probing.frozen import FrozenTokens
from probing.pooling import Tokens, read_blocks
from util.files import digest


class FrozenEncoder(nn.Module):
    """A frozen encoder of images (B,3,h,w), normalised as by `transform`; h and w are multiples of the patch size.

    pixels: mean, std, interpolation and crop. record: the weights and their source.
    """

    def __init__(self, encoder: Encoder, size: int):
        super().__init__()
        self.backbone, self.pixels, self.record, self.size = encoder.backbone, encoder.pixels, encoder.record, size

    @property
    def transform(self) -> View:
        """PIL image -> (3,size,size): resize, central crop and normalisation, as in the programs' evaluation."""
        return eval_transform(self.size, **self.pixels)

    @torch.no_grad()
    def features(
        self, images: Tensor, blocks: Sequence[int] = (-1,), cls_attention: bool = False, pooled: bool = False
    ) -> dict[int, Features]:
        """{block: its tokens before the final norm}; blocks count from 0, negative ones from the end.

        cls_attention: also the attention of [cls] to the patches, (B,H,M). pooled: also the outputs of the model's own
        pooling of its last block, {name: (B,E)}.
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
        self, images: Tensor, metrics: Sequence[str] = ("flow",), reduction: str = "auto"
    ) -> dict[str, Tensor]:
        """{metric: (L,B,K)}: K values for each block and image, one per head or a single one; NaN pads blocks that have
        fewer heads than others.

        metrics: names or groups of METRICS; those of tokens that the encoder lacks are skipped. ValueError for unknown
        names and for metrics that are not of attention (patch_log_amplitude, ...).
        """
        names = metric_names(metrics)
        if of_tokens := [name for name in names if METRICS[name].of_tokens]:
            raise ValueError(f"{of_tokens[0]} is a metric of tokens, not of attention: see main_analyze_attention.py")
        backbone = self.backbone
        chosen, grid = applicable(names, backbone), backbone.grid_of(*images.shape[-2:])
        prefix, patches = backbone.num_prefix_tokens, grid[0] * grid[1]
        sizes = Sizes(prefix + patches, patches, backbone.num_registers, grid, backbone.patch_size)
        blocks: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for step in backbone.trace(images):
            for (name, _), values in observe(step, chosen, prefix, backbone.has_cls, sizes, reduction):
                blocks[name].append(values[:, 1:])  # the first is their summary over heads
        heads = {name: max(value.shape[1] for value in values) for name, values in blocks.items()}
        return {
            name: torch.stack([F.pad(v, (0, heads[name] - v.shape[1]), value=torch.nan) for v in values])
            for name, values in blocks.items()
        }


class Prediction(NamedTuple):
    logits: Tensor  # (B,K)
    weights: Tensor | None  # (B,M) of the patches, sum 1, mean over heads or queries; None: the head has no weights


class TrainedProbe(nn.Module):
    """A trained probe and its encoder. facts: training and scores.

    ValueError if the probe was trained on other weights, or needs the attention of a third network.
    """

    def __init__(self, trained: Trained, encoder: FrozenEncoder):
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
        """Images (B,3,size,size), as from `transform` -> Prediction."""
        features = read_blocks(self.tokens(images), self.spec.blocks)
        pooled = self.probe.aggregation(features)
        logits = self.probe.classifier(self.probe.norm(pooled.vector))
        if not self.probe.aggregation.weighs:
            return Prediction(logits, None)
        weights = pooled.weights.mean(1) if pooled.weights.dim() == 3 else pooled.weights
        weights = weights[:, -features.patches.shape[1] :]  # of all tokens, those of patches
        return Prediction(logits, weights / weights.sum(1, keepdim=True))


def encoder(weights: str, model: str = FROM_FILE, family: str | None = None, **options) -> FrozenEncoder:
    """The encoder that `weights` names, as for --finetune; "" for random weights. ValueError if a file does not fit.

    model: a name of ARCHITECTURES (default: by the sizes of the tensors). family, options: of load_encoder.
    """
    loaded = load_encoder(weights, model, family, **options)
    return FrozenEncoder(loaded, input_size(loaded, None)).eval()


def probe(
    folder: str, head: str | None = None, block: int | None = None, seed: int | None = None, weights: str | None = None
) -> TrainedProbe:
    """A probe from the --output_dir of main_linprobe.py or the folder of scripts/export_probe.py.

    head, block and seed choose among several. weights: of the encoder, if they are no longer where the run read them.
    ValueError if no probe or several probes match, or if the encoder is another.
    """
    trained = read_trained(Path(folder), head, block, seed)
    settings = {**trained.facts["encoder"], "offline": False} | ({"finetune": weights} if weights else {})
    return TrainedProbe(trained, FrozenEncoder(*frozen_encoder(argparse.Namespace(**settings))).eval())
