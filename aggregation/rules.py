"""Rules that weigh the patches of a frozen encoder, and one pass over images that measures their vectors.

Letters: B images, R rules, M patches, H heads.
"""

import functools
import time
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aggregation import DEFAULT_RULES
from aggregation.boxes import ImageBoxes
from aggregation.divergence import VectorStats, normalised
from aggregation.localization import Localizer, Tally
from data_sets.loader import Sample, Watched
from engine_linprobe import FrozenTokens
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank
from probing.fixed import FixedWeights
from probing.heads import AGGREGATIONS, blocks_of, build_head, canonical_head, parse_head
from probing.pooling import Needs, Pooling, Tokens, read_blocks
from runtime.analysis import Progress
from util.finite import overflow_cause


class Rule(NamedTuple):
    """One way to weigh the patches; `name` is unique within an analysis."""

    name: str
    head: str  # as in --cls_features
    block: int
    blocks: tuple[int, ...]  # all that the head reads; `block` is the last
    pooling: Pooling
    probe: str | None = None  # name of the probe that learned it
    seed: int | None = None  # of that probe
    notes: tuple[str, ...] = ()


class ClsAttentionOfHead(FixedWeights):
    """Weights: the [cls] attention of a single head of the block."""

    needs = Needs(cls_attention=True)

    def __init__(self, tokens: Tokens, head: int):
        super().__init__(tokens)
        self.head = head

    def raw(self, features: Features) -> Tensor:
        return features.cls_attention[:, self.head]


# ---------------------------------------------------------------------------------------------------------------------
# rules
# ---------------------------------------------------------------------------------------------------------------------


def fixed_rules(heads: Sequence[str], backbone: VisionTransformer, tokens: Tokens, has_oracle: bool) -> list[Rule]:
    """Rules of the last block without parameters. ValueError for heads that are learned, weigh no patches or need an
    oracle that is missing."""
    rules = []
    for head in heads:
        last, name = backbone.depth - 1, canonical_head(head, {}, backbone.depth)
        pooling = build_head(name, last, tokens)
        if not pooling.weighs:
            raise ValueError(f"--rules {head} weighs no patches")
        if pooling.learned:
            raise ValueError(f"--rules {head} is learned: name the run that trained it with --probes")
        if pooling.needs.oracle and not has_oracle:
            raise ValueError(f"--rules {head} needs the attention of another encoder: name it with --oracle")
        rules.append(Rule(head, name, last, blocks_of(name, last), pooling))
    if len(set(heads)) < len(heads):
        raise ValueError(f"--rules {' '.join(heads)} names a rule twice")
    return rules


def default_rules(backbone: VisionTransformer, has_oracle: bool) -> tuple[list[str], list[str]]:
    """DEFAULT_RULES split into those that this encoder supports and those that it does not."""
    usable, missing = [], []
    for head in DEFAULT_RULES:
        aggregation, _ = parse_head(head, {})
        lacking = AGGREGATIONS[aggregation].needs_cls and not backbone.has_cls
        (missing if lacking or (aggregation == "dino" and not has_oracle) else usable).append(head)
    return usable, missing


def probe_rules(bank: ProbeBank, last: int, names: Container[str]) -> list[Rule]:
    """One rule per probe among `names` that weighs patches; probes without parameters share one per head and block.

    A rule is named after its probe, without rate and optimizer if all probes share them, and without the block if all
    probes read the last one.
    """
    weighing = [(spec, probe) for spec, probe in zip(bank.specs, bank.probes, strict=True)
                if probe.aggregation.weighs and spec.name in names]  # fmt: skip
    blocks, rates, optimizers = ({getattr(s, field) for s, _ in weighing} for field in ("block", "blr", "optimizer"))
    rules: dict[str, Rule] = {}
    for spec, probe in weighing:
        learned = probe.aggregation.learned
        parts = [f"block{spec.block}"] if blocks != {last} else []
        if learned:
            parts += [spec.optimizer] if len(optimizers) > 1 else []
            parts += [f"blr{spec.blr!r}"] if len(rates) > 1 else []
            parts.append(f"seed{spec.seed}")
        name = "/".join([spec.head, *parts])
        probe_and_seed = (spec.name, spec.seed) if learned else (None, None)
        read, pooling = (spec.head, spec.block, spec.blocks), probe.aggregation
        rule = Rule(name, *read, pooling, *probe_and_seed, notes_on(pooling))
        rules.setdefault(name, rule)
    return list(rules.values())


def notes_on(pooling: Pooling) -> tuple[str, ...]:
    """How the vector differs from the weights that the head itself uses."""
    pool = getattr(pooling, "pool", None)
    if pool is None:
        return ()
    queries = getattr(pool, "heads", getattr(pool, "queries", None)) or pool.score[-1].out_features
    notes = [f"the mean of {queries} heads, queries or branches"] if queries > 1 else []
    if pooling.content == "all":
        notes.append("weights on [cls] and registers are dropped, and the rest renormalised")
    return tuple(notes)


def head_rules(backbone: VisionTransformer, tokens: Tokens) -> list[Rule]:
    """The [cls] attention of each head of the last block; heads are counted from 0."""
    last, names = backbone.depth - 1, [f"attn-head{head}" for head in range(backbone.num_heads)]
    return [Rule(name, name, last, (last,), ClsAttentionOfHead(tokens, head)) for head, name in enumerate(names)]


def needs_of(rules: Iterable[Rule]) -> Needs:
    return functools.reduce(Needs.union, (rule.pooling.needs for rule in rules), Needs())


def vectors_of(rules: Sequence[Rule], features: dict[int, Features]) -> Tensor:
    """Features by block -> (B,R,M) weights that sum to 1, in float64; NaN where a rule has none for an image."""
    patches = next(iter(features.values())).patches.shape[1]
    vectors = [normalised(rule.pooling(read_blocks(features, rule.blocks)).weights, patches) for rule in rules]
    return torch.stack(vectors, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# the pass
# ---------------------------------------------------------------------------------------------------------------------


class Localization:
    """MaxBoxAcc of all rules in one pass.

    left_out: images whose boxes all lie outside the crop; boxes_out: boxes that do; without_map (R,): images for which
    a rule's vector is not finite, which count as not found.
    """

    def __init__(self, localizer: Localizer, boxes: ImageBoxes, crop: bool, grid: tuple[int, int]):
        self.localizer, self.boxes, self.crop, self.grid = localizer, boxes, crop, grid
        self.tally = localizer.empty()
        self.left_out = self.boxes_out = 0
        self.without_map = torch.zeros(localizer.maps, dtype=torch.int64)

    def truth(self, index: int) -> np.ndarray:
        size = self.localizer.size[0]
        return self.boxes.cropped(index, size) if self.crop else self.boxes.resized(index, size)

    def update(self, vectors: Tensor, indices: list[int]) -> None:
        """Add a batch (B,R,M) on the CPU; indices: of its images in the data set."""
        truths = [self.truth(index) for index in indices]
        if self.crop:
            total = sum(len(self.boxes.annotations[index].boxes) for index in indices)
            self.boxes_out += total - sum(map(len, truths))
        kept = [number for number, truth in enumerate(truths) if len(truth)]
        self.left_out += len(truths) - len(kept)
        self.without_map += (~vectors[kept].isfinite().all(2)).sum(0)
        maps = vectors.unflatten(2, self.grid).numpy()
        self.localizer.add(maps[kept], [truths[number] for number in kept])

    def state(self) -> dict[str, Any]:
        """Tensors and plain data, for `add_state`; waits for pending evaluations."""
        self.tally += self.localizer.result()
        counts = {name: torch.from_numpy(part) for name, part in self.tally._asdict().items() if name != "images"}
        counts |= {"without_map": self.without_map, "left_out": self.left_out, "boxes_out": self.boxes_out}
        return {"images": self.tally.images, **counts}

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the images of another Localization. ValueError for other numbers of maps or levels."""
        other = Tally(**{name: state[name] if name == "images" else state[name].numpy() for name in Tally._fields})
        for name, mine, theirs in zip(Tally._fields, self.tally, other, strict=True):
            if np.shape(mine) != np.shape(theirs):
                raise ValueError(f"{name} has the shape {np.shape(theirs)} instead of {np.shape(mine)}")
        self.tally += other
        self.without_map = self.without_map + state["without_map"]
        self.left_out += state["left_out"]
        self.boxes_out += state["boxes_out"]


class Findings:
    """What one pass measures: `vectors`, of the first rules, and `boxes`, of all; None for what it does not measure."""

    def __init__(self, vectors: VectorStats | None, boxes: Localization | None, states: Sequence[dict] = ()):
        """states: of earlier images or other processes, added first."""
        self.vectors, self.boxes = vectors, boxes
        for state in states:
            for name, part in self._parts().items():
                part.add_state(state[name])

    def _parts(self) -> dict[str, VectorStats | Localization]:
        parts = {"vectors": self.vectors, "boxes": self.boxes}
        return {name: part for name, part in parts.items() if part is not None}

    def update(self, vectors: Tensor, indices: list[int]) -> None:
        """Add a batch (B,R,M) on the CPU; indices: of its images in the data set."""
        if self.vectors is not None:
            self.vectors.update(vectors[:, : self.vectors.rules])
        if self.boxes is not None:
            self.boxes.update(vectors, indices)

    def state(self) -> dict[str, Any]:
        return {name: part.state() for name, part in self._parts().items()}


@torch.no_grad()
def run_pass(
    rules: Sequence[Rule], tokens: FrozenTokens, loader: Iterable[Sample], progress: Progress[Findings],
    device: torch.device, description: str,
) -> None:  # fmt: skip
    """Add the remaining images of this process to progress.record. FloatingPointError for overflowing activations."""
    seen, start = 0, time.perf_counter()
    for sample in (watched := Watched(loader, description, agree=True, between=progress.reach)):
        features = tokens(sample.image.to(device, non_blocking=True))
        if not all(block.patches.isfinite().all() for block in features.values()):
            cause = overflow_cause({"the encoder's": tokens.backbone}, tokens.amp)
            raise FloatingPointError(f"{description}: activations are not finite: {cause}")
        vectors = vectors_of(rules, features).cpu()
        progress.record.update(vectors, sample.index.tolist())
        seen += len(vectors)
        watched.bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.0f} images/s")
