"""One pass of a frozen encoder over images: the vectors with which rules weigh its patches, and what is made of them.

Letters: B images, R rules, M patches, H heads.
"""

import functools
import time
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aggregation.boxes import ImageBoxes
from aggregation.divergence import VectorStats, normalised
from aggregation.localization import Localizer, Tally
from data_sets.loader import Sample, Watched
from engine_linprobe import FrozenTokens
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank
from probing.fixed import FixedWeights
from probing.heads import AGGREGATIONS, check_aggregation, parse_head
from probing.pooling import Needs, Pooling, Tokens
from runtime.analysis import Progress

# what the default rules are, in the order of the paper's Table 6; beside them, uniform weights as the reference
DEFAULT_RULES = ("attn-mn", "attn-lcte", "ca1", "dino", "pos")


class Rule(NamedTuple):
    """One way to weigh the patches. `name` tells it from all others of an analysis."""

    name: str
    head: str  # as --cls_features spells it
    block: int
    pooling: Pooling
    probe: str | None = None  # the name of the probe that has learned it
    seed: int | None = None  # of that probe
    notes: tuple[str, ...] = ()


class ClsAttentionOfHead(FixedWeights):
    """Weights: the [cls] attention of one head of the block."""

    needs = Needs(cls_attention=True)

    def __init__(self, tokens: Tokens, head: int):
        super().__init__(tokens)
        self.head = head

    def raw(self, features: Features) -> Tensor:
        return features.cls_attention[:, self.head]


# ---------------------------------------------------------------------------------------------------------------------
# rules
# ---------------------------------------------------------------------------------------------------------------------


def fixed_rules(words: Sequence[str], backbone: VisionTransformer, tokens: Tokens, has_oracle: bool) -> list[Rule]:
    """Rules without parameters, of the last block. ValueError for what learns, weighs nothing or lacks its source."""
    rules = []
    for word in words:
        aggregation, options = parse_head(word, {})
        check_aggregation(aggregation, backbone.has_cls)
        pooling = AGGREGATIONS[aggregation].build(tokens, **dict(options))
        if not pooling.weighs:
            raise ValueError(f"--rules {word}: {AGGREGATIONS[aggregation].description}; it weighs no patches")
        if pooling.learned:
            raise ValueError(f"--rules {word} has to be learned: name the run of a trained one with --probes")
        if pooling.needs.oracle and not has_oracle:
            raise ValueError(f"--rules {word} takes another encoder's attention: name it with --oracle")
        rules.append(Rule(word, word, backbone.depth - 1, pooling))
    if len({rule.name for rule in rules}) < len(rules):
        raise ValueError(f"--rules {' '.join(words)} names a rule twice")
    return rules


def default_rules(backbone: VisionTransformer, has_oracle: bool) -> tuple[list[str], list[str]]:
    """The words of DEFAULT_RULES that this encoder can follow, and those that it cannot."""
    usable, missing = [], []
    for word in DEFAULT_RULES:
        aggregation, _ = parse_head(word, {})
        lacking = AGGREGATIONS[aggregation].needs_cls and not backbone.has_cls
        (missing if lacking or (aggregation == "dino" and not has_oracle) else usable).append(word)
    return usable, missing


def probe_rules(bank: ProbeBank, last: int, names: Container[str]) -> list[Rule]:
    """A rule for each probe of these names that weighs patches; those without parameters of a head and block share one.

    Its name is the probe's, without rate and optimizer where all have the same, and without block where that is the
    last one of all.
    """
    weighing = [(spec, probe) for spec, probe in zip(bank.specs, bank.probes, strict=True)
                if probe.aggregation.weighs and spec.name in names]  # fmt: skip
    blocks, rates = ({getattr(spec, field) for spec, _ in weighing} for field in ("block", "blr"))
    optimizers = {spec.optimizer for spec, _ in weighing}
    rules: dict[str, Rule] = {}
    for spec, probe in weighing:
        learned = probe.aggregation.learned
        parts = [f"block{spec.block}"] if blocks != {last} else []
        if learned:
            parts += [spec.optimizer] if len(optimizers) > 1 else []
            parts += [f"blr{spec.blr!r}"] if len(rates) > 1 else []
            parts.append(f"seed{spec.seed}")
        name = "/".join([spec.head, *parts])
        own = (spec.name, spec.seed) if learned else (None, None)
        if name not in rules:
            rules[name] = Rule(name, spec.head, spec.block, probe.aggregation, *own, notes_on(probe.aggregation))
    return list(rules.values())


def notes_on(pooling: Pooling) -> tuple[str, ...]:
    """What has to be said of a vector that is not the head's own."""
    pool = getattr(pooling, "pool", None)
    if pool is None:
        return ()
    queries = getattr(pool, "heads", getattr(pool, "queries", None)) or pool.score[-1].out_features
    notes = [f"the mean of {queries} heads, queries or branches"] if queries > 1 else []
    if pooling.content == "all":
        notes.append("it weighs [cls] and registers, too: here, its weights on the patches alone, of sum 1")
    return tuple(notes)


def head_rules(backbone: VisionTransformer, tokens: Tokens) -> list[Rule]:
    """The [cls] attention of each head of the last block; heads are counted from 0."""
    return [
        Rule(f"attn-head{head}", f"attn-head{head}", backbone.depth - 1, ClsAttentionOfHead(tokens, head))
        for head in range(backbone.num_heads)
    ]


def needs_of(rules: Iterable[Rule]) -> Needs:
    return functools.reduce(Needs.union, (rule.pooling.needs for rule in rules), Needs())


def vectors_of(rules: Sequence[Rule], features: dict[int, Features]) -> Tensor:
    """Tokens by block -> (B,R,M) weights of sum 1, in float64; NaN where a rule has none for an image."""
    patches = next(iter(features.values())).patches.shape[1]
    return torch.stack(
        [normalised(rule.pooling(features[rule.block]).weights, patches) for rule in rules], dim=1
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the pass
# ---------------------------------------------------------------------------------------------------------------------


class Localization:
    """Boxes of all rules of a pass. `left_out`: images whose boxes all lie outside of the crop; `boxes_out`: boxes that
    do."""

    def __init__(self, localizer: Localizer, boxes: ImageBoxes, crop: bool, grid: tuple[int, int]):
        self.localizer, self.boxes, self.crop, self.grid = localizer, boxes, crop, grid
        self.tally = localizer.nothing()
        self.left_out = self.boxes_out = 0

    def truth(self, index: int) -> np.ndarray:
        size = self.localizer.size[0]
        return self.boxes.cropped(index, size) if self.crop else self.boxes.resized(index, size)

    def update(self, vectors: Tensor, indices: list[int]) -> None:
        """One batch (B,R,M) on the CPU, of the images with these indices."""
        truths = [self.truth(index) for index in indices]
        if self.crop:
            originally = sum(len(self.boxes.annotations[index].boxes) for index in indices)
            self.boxes_out += originally - sum(map(len, truths))
        kept = [number for number, truth in enumerate(truths) if len(truth)]
        self.left_out += len(truths) - len(kept)
        maps = vectors.unflatten(2, self.grid).numpy()
        self.localizer.add(maps[kept], [truths[number] for number in kept])

    def state(self) -> dict[str, Any]:
        """Tensors and plain data, for `take`; waits for what is being evaluated."""
        self.tally += self.localizer.result()
        counts = {name: torch.from_numpy(found) for name, found in self.tally._asdict().items() if name != "images"}
        return {"images": self.tally.images, **counts, "left_out": self.left_out, "boxes_out": self.boxes_out}

    def take(self, state: dict[str, Any]) -> None:
        """Add what another has found. ValueError where that is of other maps or levels."""
        other = Tally(**{name: state[name] if name == "images" else state[name].numpy() for name in Tally._fields})
        for name, mine, theirs in zip(Tally._fields, self.tally, other, strict=True):
            if np.shape(mine) != np.shape(theirs):
                raise ValueError(f"{name} has the shape {np.shape(theirs)} instead of {np.shape(mine)}")
        self.tally += other
        self.left_out += state["left_out"]
        self.boxes_out += state["boxes_out"]


class Findings:
    """What a pass finds in the vectors of rules: entropies and divergences (`vectors`, of the first rules) and boxes
    (`boxes`, of all); None for what it does not look for."""

    def __init__(self, vectors: VectorStats | None, boxes: Localization | None, states: Sequence[dict] = ()):
        """states: of others, whose images are these findings' first ones."""
        self.vectors, self.boxes = vectors, boxes
        for state in states:
            for name, part in self._parts():
                part.take(state[name])

    def _parts(self) -> list[tuple[str, VectorStats | Localization]]:
        parts = {"vectors": self.vectors, "boxes": self.boxes}
        return [(name, part) for name, part in parts.items() if part is not None]

    def update(self, vectors: Tensor, indices: list[int]) -> None:
        """One batch (B,R,M) on the CPU, of the images with these indices."""
        if self.vectors is not None:
            self.vectors.update(vectors[:, : self.vectors.rules])
        if self.boxes is not None:
            self.boxes.update(vectors, indices)

    def state(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self._parts()}


@torch.no_grad()
def run_pass(
    rules: Sequence[Rule], tokens: FrozenTokens, loader: Iterable[Sample], progress: Progress[Findings],
    device: torch.device, description: str,
) -> None:  # fmt: skip
    """Add the vectors of every image that is left of the pass and this process's. FloatingPointError at the first batch
    whose activations overflow."""
    seen, start = 0, time.perf_counter()
    for sample in (watched := Watched(loader, description, agree=True, between=progress.reach)):
        features = tokens(sample.image.to(device, non_blocking=True))
        if not all(found.patches.isfinite().all() for found in features.values()):
            raise FloatingPointError(f"{description}: activations are not finite in {tokens.amp}; use another --amp")
        vectors = vectors_of(rules, features).cpu()
        progress.record.update(vectors, sample.index.tolist())
        seen += len(vectors)
        watched.bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.0f} images/s")
