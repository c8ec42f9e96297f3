"""Train a bank of probes on a frozen encoder, evaluate it exactly, and collect its pooled vectors.

Letters: B images, S probes, K classes, D' width of a pooled vector.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_sets.loader import Sample, Watched
from probing.bank import ProbeBank
from probing.frozen import FiniteCheck, FrozenTokens, Read, concat_reads
from probing.knn import knn_scores
from probing.predictions import PredictionKeeper
from util.lars import LARS
from util.scores import MultiLabelScores, MultiLabelTally, Scores, Tally


class Probing:
    """A bank of probes and its optimizer (one group per stack), as a runtime.training.Method.

    Losses are summed over probes, so no probe's gradient depends on the others. A probe whose loss, gradient or update
    is not finite keeps, from then on, the weights, statistics and momentum from before that step.
    """

    program, state_name = "main_linprobe.py", "probes"

    def __init__(
        self,
        bank: ProbeBank,
        tokens: FrozenTokens,
        optimizer: LARS,
        device: torch.device,
        multi_label: bool = False,
        bn_group: int | None = None,
        seeds: Sequence[int] = (),
    ):
        """multi_label: labels are (B,K) zeros and ones; the loss is binary cross-entropy, averaged over B x K.
        bn_group: images normalised together, part of a micro-batch or several (default: one micro-batch).
        seeds: groups of images alternate between these seeds (GlobalBatches' `seeds`), and each trains the probes of
        its seed; empty: every group trains all probes."""
        self.bank, self.tokens, self.optimizer, self.device = bank, tokens, optimizer, device
        self.multi_label, self.bn_group = multi_label, bn_group
        self.names = tuple(spec.name for spec in bank.specs)
        self.parameters = [parameter for stack in bank.stacks for parameter in stack.parameters]
        self.turns = [bank.of_seed(seed) for seed in seeds] or [bank]
        self.finite = FiniteCheck(tokens, device)
        self.train()

    def train(self) -> None:
        self.bank.train()
        self.tokens.backbone.eval()
        self.waiting: list[tuple[Read, Tensor]] = []  # tokens and labels of an incomplete group
        self.turn = 0
        self.done = torch.zeros(len(self.names), device=self.device)  # losses of the seeds whose turn is over

    def losses(self, sample: Sample, rng_key: tuple) -> Tensor | None:
        labels = sample.label.to(self.device, non_blocking=True)
        read = self.finite.see(self.tokens(sample.image.to(self.device, non_blocking=True)))
        bn_group = self.bn_group or len(labels)
        if bn_group > len(labels):
            self.waiting.append((read, labels))
            if len(labels) * len(self.waiting) < bn_group:
                return None
            reads, all_labels = zip(*self.waiting, strict=True)
            self.waiting, read, labels = [], concat_reads(reads), torch.cat(all_labels)
        bank = self.turns[self.turn]
        by_stack = [self._loss(logits, labels) for logits in bank.logits(read, len(labels) // bn_group)]
        index = torch.cat([stack.index for stack in bank.stacks])
        losses = self.done.to(by_stack[0].dtype).index_copy(0, index, torch.cat(by_stack))
        self.turn += 1
        if self.turn < len(self.turns):
            losses.sum().backward()  # now, so that the tokens of one seed are in memory
            self.done = losses.detach()
            return None
        self.turn, self.done = 0, torch.zeros_like(self.done)
        return losses

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (S,K,B) -> losses (S,)."""
        if self.multi_label:
            targets = labels.T.to(logits.dtype).expand_as(logits)
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((1, 2))
        return F.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none").mean(1)

    @torch.no_grad()
    def step(self, alive: Tensor) -> Tensor:
        stacks = self.bank.stacks
        healthy = self.optimizer.guarded_step([alive[stack.index] for stack in stacks])
        self.bank.commit_statistics(healthy)
        return alive.index_copy(0, torch.cat([stack.index for stack in stacks]), torch.cat(healthy))

    def check(self) -> None:
        """ValueError if the encoder's tokens, not the probes, are what is not finite; each rank must call it."""
        self.finite.check()

    def state(self) -> dict[str, Any]:
        return self.bank.probe_states()

    def load(self, state: dict[str, Any]) -> None:
        self.bank.load_probe_states(state)


def reads(
    bank: ProbeBank, tokens: FrozenTokens, loader: Iterable, device: torch.device, name: str
) -> Iterator[tuple[Read, Sample]]:
    """What a bank in evaluation mode reads of each batch. ValueError at the end if the tokens are not finite."""
    bank.eval()
    tokens.backbone.eval()
    finite = FiniteCheck(tokens, device)
    for sample in Watched(loader, name, agree=True):
        yield finite.see(tokens(sample.image.to(device, non_blocking=True))), sample
    finite.check()


@torch.no_grad()
def evaluate(
    bank: ProbeBank,
    tokens: FrozenTokens,
    loader: Iterable,
    device: torch.device,
    tally: Tally | MultiLabelTally,
    keeper: PredictionKeeper | None = None,
    name: str = "test",
) -> list[Scores] | list[MultiLabelScores]:
    """Scores of every probe, in the order of `bank.specs`; each sample of all ranks counts once.

    tally: a new one. keeper: collects the predictions. name: label of the progress bar. ValueError if the encoder's
    tokens are not finite.
    """
    for read, sample in reads(bank, tokens, loader, device, name):
        labels, logits = sample.label.to(device, non_blocking=True), bank(read)
        tally.update(logits, labels)
        if keeper is not None:
            keeper.update(logits, labels, sample.index)
    return tally.compute()


@torch.no_grad()
def pooled(
    bank: ProbeBank, tokens: FrozenTokens, loader: Iterable, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """The vectors (b,D') of `bank.distinct` and the labels (b,) of this rank's b images, on `device`.

    ValueError if the encoder's tokens are not finite.
    """
    vectors = [[torch.empty(0, pooling.width, device=device)] for _, pooling in bank.distinct]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for read, sample in reads(bank, tokens, loader, device, "features"):
        for kept, vector in zip(vectors, read if isinstance(read, list) else bank.pool(read), strict=True):
            kept.append(vector)
        labels.append(sample.label.to(device))
    return [torch.cat(kept) for kept in vectors], torch.cat(labels)


def nearest_neighbours(
    bank: ProbeBank,
    tokens: FrozenTokens,
    train: Iterable,
    test: Iterable,
    device: torch.device,
    ks: Sequence[int],
    num_classes: int,
) -> dict[str, dict]:
    """{vector: {k: scores}} of k-NN classification on the vectors of the bank. train, test: loaders, not augmented."""
    (references, labels), (queries, answers) = (pooled(bank, tokens, loader, device) for loader in (train, test))
    results = {}
    for (spec, pooling), ours, theirs in zip(bank.distinct, references, queries, strict=True):
        name = spec.name if pooling.learned else f"{spec.head}/block{spec.block}"
        results[name] = knn_scores(ours, labels, theirs, answers, ks, num_classes)
    return results
