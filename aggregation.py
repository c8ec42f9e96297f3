"""AGGREGATIONS: ways from the tokens of a block to one vector per image, with the weights used."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from abmilp import AbMILP, Pooled
from models_vit import Features


class Tokens(NamedTuple):
    """What an aggregation has to know of the tokens before it sees any."""

    width: int
    grid: tuple[int, int]
    num_prefix: int


class ClsToken(nn.Module):
    """The [cls] token."""

    def forward(self, features: Features) -> Pooled:
        return Pooled(features.cls, None)


class MeanPatch(nn.Module):
    """The mean of the patch tokens."""

    def forward(self, features: Features) -> Pooled:
        M = features.patches.shape[1]
        return Pooled(features.patches.mean(1), features.patches.new_full((len(features.patches), M), 1 / M))


class ClsAndMeanPatch(nn.Module):
    """[cls] and the mean of the patch tokens, concatenated (B,2D)."""

    def forward(self, features: Features) -> Pooled:
        return Pooled(torch.cat([features.cls, features.patches.mean(1)], dim=1), None)


class AbMILPTokens(nn.Module):
    """AbMILP over the patch tokens (content "patch", the paper's) or over all tokens (content "all")."""

    def __init__(self, tokens: Tokens, content: str = "patch", **options):
        super().__init__()
        self.all_tokens = content == "all"
        self.pool = AbMILP(
            tokens.width, grid=tokens.grid, num_prefix=tokens.num_prefix if self.all_tokens else 0, **options
        )

    def forward(self, features: Features) -> Pooled:
        if not self.all_tokens:
            return self.pool(features.patches)
        prefix = [] if features.cls is None else [features.cls[:, None]]
        return self.pool(torch.cat([*prefix, features.registers, features.patches], dim=1))


class Aggregation(NamedTuple):
    build: Callable[..., nn.Module]  # (tokens, **options) -> module: Features -> Pooled
    needs_cls: bool
    width: int  # of the vector, in multiples of D
    options: tuple[str, ...]  # names it takes; each has a flag --<aggregation>_<name>
    description: str


AGGREGATIONS = {
    "cls": Aggregation(lambda tokens: ClsToken(), True, 1, (), "the [cls] token"),
    "pos": Aggregation(lambda tokens: MeanPatch(), False, 1, (), "the mean of the patch tokens"),
    "both": Aggregation(lambda tokens: ClsAndMeanPatch(), True, 2, (), "[cls] and mean patch, concatenated"),
    "abmilp": Aggregation(
        AbMILPTokens, False, 1, ("depth", "activation", "self_attention", "condition", "content"),
        "attention-based multiple-instance pooling of the patch tokens (the paper's head)",
    ),
}  # fmt: skip


def check_aggregation(name: str, has_cls: bool) -> Aggregation:
    """The entry of AGGREGATIONS; ValueError where there is none or the encoder lacks the [cls] token it needs."""
    if name not in AGGREGATIONS:
        raise ValueError(f"unknown --cls_features {name!r}: choose among {', '.join(AGGREGATIONS)}")
    if AGGREGATIONS[name].needs_cls and not has_cls:
        possible = [other for other, entry in AGGREGATIONS.items() if not entry.needs_cls]
        raise ValueError(
            f"--cls_features {name}: this encoder has no [cls] token; probe {' or '.join(possible)} instead"
        )
    return AGGREGATIONS[name]
