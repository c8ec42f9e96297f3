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
from aggregation.divergence import normalised
from aggregation.localization import Localizer, Tally
from data_sets.loader import Sample, Watched
from engine_linprobe import FrozenTokens
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank
from probing.fixed import ClsAttention
from probing.heads import blocks_of, build_head, canonical_head
from probing.pooling import Needs, Pooling, Tokens, read_blocks
from runtime.analysis import Progress
from util.choices import nearest
from util.finite import overflow_cause
from util.progress import log


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


# ---- rules


def fixed_rules(heads: Sequence[str], backbone: VisionTransformer, tokens: Tokens, has_oracle: bool) -> list[Rule]:
    """Rules of the last block without parameters. ValueError for heads that are learned, weigh no patches, or need a
    [cls] token or an oracle that is missing."""
    rules, last = [], backbone.depth - 1
    for head in heads:
        name = canonical_head(head, {}, backbone.depth)
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


def probe_rules(bank: ProbeBank, last: int, names: Container[str]) -> list[Rule]:
    """One rule per probe among `names` that weighs patches; probes without parameters share one per head and block.

    A rule is named after its probe, without rate and optimizer if all probes share them, and without the block if all
    probes read the last one.
    """
    pairs = zip(bank.specs, bank.probes, strict=True)
    weighing = [(spec, probe.aggregation) for spec, probe in pairs if probe.aggregation.weighs and spec.name in names]
    several = {
        field: len({getattr(spec, field) for spec, _ in weighing}) > 1 for field in ("block", "optimizer", "blr")
    }
    several["block"] |= any(spec.block != last for spec, _ in weighing)
    rules: dict[str, Rule] = {}
    for spec, pooling in weighing:
        settings = {"block": f"block{spec.block}"}
        if pooling.learned:
            settings |= {"optimizer": spec.optimizer, "blr": f"blr{spec.blr!r}", "seed": f"seed{spec.seed}"}
        name = "/".join([spec.head, *(text for field, text in settings.items() if several.get(field, True))])
        trained = (spec.name, spec.seed, notes_on(pooling)) if pooling.learned else ()
        rules.setdefault(name, Rule(name, spec.head, spec.block, spec.blocks, pooling, *trained))
    return list(rules.values())


def rules_of(
    heads: Sequence[str] | None,
    trained: tuple[ProbeBank, Container[str], Sequence[str] | None] | None,
    backbone: VisionTransformer,
    tokens: Tokens,
    has_oracle: bool,
) -> list[Rule]:
    """The fixed rules `heads` (None: those of DEFAULT_RULES that the encoder supports), then those of trained probes.

    trained: a bank, the names of the probes to use, and their heads (None: all). ValueError for unknown heads.
    """
    rules, missing = [], []
    if heads is not None:
        rules = fixed_rules(heads, backbone, tokens, has_oracle)
    for head in DEFAULT_RULES if heads is None else ():
        try:
            rules += fixed_rules([head], backbone, tokens, has_oracle)
        except ValueError:
            missing.append(head)
    if missing:
        log.info("rules left out, for want of a [cls] token or an --oracle: %s", ", ".join(missing))
    if trained is None:
        return rules
    bank, names, wanted = trained
    learned = probe_rules(bank, backbone.depth - 1, names)
    known = dict.fromkeys(rule.head for rule in learned)
    if unknown := [head for head in wanted or [] if head not in known]:
        raise ValueError(f"--probe_heads {unknown[0]}: {nearest(unknown[0], known)}the run has {', '.join(known)}")
    if unweighted := sorted({spec.head for spec in bank.specs} - known.keys()):
        log.info("probes left out, which do not weigh patches: %s", ", ".join(unweighted))
    fixed = {(rule.head, rule.block) for rule in rules}
    learned = [rule for rule in learned if wanted is None or rule.head in wanted]
    return [*rules, *(rule for rule in learned if rule.probe is not None or (rule.head, rule.block) not in fixed)]


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
    return [Rule(name, name, last, (last,), ClsAttention(tokens, head)) for head, name in enumerate(names)]


def needs_of(rules: Iterable[Rule]) -> Needs:
    return functools.reduce(Needs.union, (rule.pooling.needs for rule in rules), Needs())


def vectors_of(rules: Sequence[Rule], features: dict[int, Features]) -> Tensor:
    """Features by block -> (B,R,M) weights that sum to 1, in float64; NaN where a rule has none for an image."""
    patches = next(iter(features.values())).patches.shape[1]
    vectors = [normalised(rule.pooling(read_blocks(features, rule.blocks)).weights, patches) for rule in rules]
    return torch.stack(vectors, dim=1)


# ---- the pass


class Localization:
    """MaxBoxAcc of all rules in one pass: the Tally of the images that it was given."""

    def __init__(self, localizer: Localizer, boxes: ImageBoxes, crop: bool, grid: tuple[int, int]):
        """crop: whether the images are central crops, to which boxes are clipped, else stretched."""
        self.localizer, self.boxes, self.grid = localizer, boxes, grid
        self.truth = boxes.cropped if crop else boxes.resized
        self.tally = localizer.result()

    def update(self, vectors: Tensor, indices: list[int]) -> None:
        """Add a batch (B,R,M) on the CPU; indices: of its images in the data set."""
        truths = [self.truth(index, self.localizer.size[0]) for index in indices]
        annotated = sum(len(self.boxes.annotations[index].boxes) for index in indices)
        self.tally = self.tally._replace(boxes_left_out=self.tally.boxes_left_out + annotated - sum(map(len, truths)))
        self.localizer.add(vectors.unflatten(2, self.grid).numpy(), truths)

    def state(self) -> dict[str, Any]:
        """Tensors and plain data, for `add_state`; waits for pending evaluations."""
        self.tally += self.localizer.result()
        return {
            name: torch.from_numpy(part) if isinstance(part, np.ndarray) else part
            for name, part in self.tally._asdict().items()
        }

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the images of another Localization. ValueError for other numbers of maps or levels."""
        other = Tally(**{name: part.numpy() if isinstance(part, Tensor) else part for name, part in state.items()})
        for name, mine, theirs in zip(Tally._fields, self.tally, other, strict=True):
            if np.shape(mine) != np.shape(theirs):
                raise ValueError(f"{name} has the shape {np.shape(theirs)} instead of {np.shape(mine)}")
        self.tally += other


@torch.no_grad()
def run_pass(
    rules: Sequence[Rule],
    tokens: FrozenTokens,
    loader: Iterable[Sample],
    progress: Progress,
    device: torch.device,
    description: str,
) -> None:
    """Add this process's remaining images to progress.record. FloatingPointError for overflowing activations."""
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
