"""What a micro-step of a bank of probes on a frozen backbone computes, and the exact evaluation of the bank.

Letters: B images, S probes, K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from data_sets.loader import Sample, Watched
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank
from probing.pooling import Needs
from probing.predictions import PredictionKeeper
from runtime.training import all_finite
from util.scores import MultiLabelScores, MultiLabelTally, Scores, Tally

# what a bank takes: the tokens of its blocks, or the vectors that they pool to
Read = dict[int, Features] | list[Tensor]


class FrozenTokens(NamedTuple):
    """A frozen backbone with the way its tokens are read; calling it gives float32 tokens, outside of autograd.

    final_norm: normalise the tokens with the backbone's last norm (MAE's probe does, the paper's does not).
    needs: what is read beside the tokens; oracle: images -> (B,M), called where `needs` names it.
    """

    backbone: VisionTransformer
    blocks: tuple[int, ...]
    amp: torch.dtype
    final_norm: bool = False
    needs: Needs = Needs()
    oracle: Callable[[Tensor], Tensor] | None = None

    # no_grad, not inference_mode: the probes keep the tokens for their backward pass
    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[int, Features]:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            features = self.backbone(images, self.blocks, self.needs.cls_attention, self.needs.cells)
        attention = self.oracle(images) if self.needs.oracle else None

        def prepare(tokens: Tensor | None) -> Tensor | None:
            if tokens is None:
                return None
            return self.backbone.norm(tokens.float()) if self.final_norm else tokens.float()

        return {
            block: f._replace(
                cls=prepare(f.cls), registers=prepare(f.registers), patches=prepare(f.patches), oracle=attention
            )
            for block, f in features.items()
        }


class Probing:
    """A bank of probes and its optimizer (a group per probe), as a runtime.training.Method.

    Losses are summed over probes, so no probe's gradient depends on its neighbours. A probe whose loss, gradient or
    new weights are not finite keeps the weights, statistics and momentum that it had before that step, for good.
    """

    program, state_name = "main_linprobe.py", "probes"

    def __init__(
        self, bank: ProbeBank, tokens: FrozenTokens, optimizer: torch.optim.Optimizer, device: torch.device,
        multi_label: bool = False, bn_group: int | None = None,
    ):  # fmt: skip
        """multi_label: labels are (B,K) zeros and ones, and the loss is binary cross-entropy, mean over all B x K.
        bn_group: images that are normalised together, part of a micro-batch or several (default: a micro-batch)."""
        self.bank, self.tokens, self.optimizer, self.device = bank, tokens, optimizer, device
        self.loss = binary_cross_entropy if multi_label else F.cross_entropy
        self.bn_group = bn_group
        self.waiting: list[tuple[Read, Tensor]] = []  # tokens and labels of a group that is not complete
        self.names = tuple(spec.name for spec in bank.specs)
        self.groups = [list(probe.parameters()) for probe in bank.probes]

    def train(self) -> None:
        self.bank.train()
        self.tokens.backbone.eval()

    def losses(self, sample: Sample, words: tuple) -> Tensor | None:
        labels = sample.label.to(self.device, non_blocking=True)
        read = self.tokens(sample.image.to(self.device, non_blocking=True))
        bn_group = self.bn_group or len(labels)
        if bn_group > len(labels):
            self.waiting.append((read, labels))
            if len(labels) * len(self.waiting) < bn_group:
                return None
            reads, all_labels = zip(*self.waiting, strict=True)
            self.waiting, read, labels = [], together(reads), torch.cat(all_labels)
        logits = self.bank(read, len(labels) // bn_group)
        return torch.stack([self.loss(one, labels) for one in logits])

    @torch.no_grad()
    def step(self, alive: Tensor) -> Tensor:
        # undone rather than left out: whether a probe is alive is known on the GPU alone, and not waited for
        before = [{key: tensor.clone() for key, tensor in self._tensors(i).items()} for i in range(len(self.groups))]
        self.bank.commit_statistics()
        self.optimizer.step()
        alive = alive & torch.stack([all_finite(group) for group in self.groups])
        for i, kept in enumerate(before):
            for key, tensor in self._tensors(i).items():
                # momentum that the first step makes was nothing before
                tensor.copy_(torch.where(alive[i], tensor, kept.get(key, torch.zeros_like(tensor))))
        return alive

    def _tensors(self, index: int) -> dict[Any, Tensor]:
        """All that a probe's step changes: parameters, buffers, state of the optimizer."""
        probe = self.bank.probes[index]
        found: dict[Any, Tensor] = {**dict(probe.named_parameters()), **dict(probe.named_buffers())}
        for name, parameter in probe.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[name, key] = value
        return found

    def state(self) -> dict[str, Any]:
        return self.bank.probe_states()

    def load(self, state: dict[str, Any]) -> None:
        self.bank.load_probe_states(state)


def together(parts: Sequence[Read]) -> Read:
    """What was read of several micro-batches, as one."""
    return pytree.tree_map(lambda *same: None if same[0] is None else torch.cat(same), *parts)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


@torch.no_grad()
def evaluate(
    bank: ProbeBank, tokens: FrozenTokens, loader: Iterable, device: torch.device, tally: Tally | MultiLabelTally,
    keeper: PredictionKeeper | None = None, name: str = "test",
) -> list[Scores] | list[MultiLabelScores]:  # fmt: skip
    """Scores of every probe, in the order of `bank.specs`, by a new `tally`; each sample counts once, over all ranks.

    keeper: takes up what every probe says of every image. name: of the images, for the progress bar.
    """
    bank.eval()
    tokens.backbone.eval()
    for sample in Watched(loader, name, agree=True):
        labels = sample.label.to(device, non_blocking=True)
        logits = bank(tokens(sample.image.to(device, non_blocking=True)))
        tally.update(logits, labels)
        if keeper is not None:
            keeper.update(logits, labels, sample.index)
    return tally.compute()


@torch.no_grad()
def pooled(
    bank: ProbeBank, tokens: FrozenTokens, loader: Iterable, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """The vectors (b,D') of `bank.distinct` and the labels (b,), of the b images of this rank, on `device`."""
    bank.eval()
    tokens.backbone.eval()
    vectors = [[torch.empty(0, width, device=device)] for width in bank.widths]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for sample in Watched(loader, "features", agree=True):
        read = tokens(sample.image.to(device, non_blocking=True))
        for kept, vector in zip(vectors, read if isinstance(read, list) else bank.pool(read), strict=True):
            kept.append(vector)
        labels.append(sample.label.to(device))
    return [torch.cat(kept) for kept in vectors], torch.cat(labels)
