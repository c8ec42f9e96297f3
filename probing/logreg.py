"""The optimizer "logreg": fit probes to convergence on cached features, and again to draws of few images.

A probe minimises loss + strength / 2 x (squared weights of the classifier + squared change of the head's parameters),
by L-BFGS in float64 on all images at once. loss: mean cross-entropy, or mean binary cross-entropy with several labels
per image. The classifier reads vectors standardised over these images; its biases are not penalised. Without parameters
in the head this is convex: scikit-learn's LogisticRegression(C=1 / (strength n)) on the features of its StandardScaler,
with the same optimum. The change of the head counts, not its size: standardisation undoes the size of values, which
would shrink without end.

Letters: n images, D' width of a vector, K classes.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from probing.bank import Probe, ProbeSpec
from probing.feature_cache import FeatureCache
from probing.pooling import read_blocks
from probing.predictions import score
from probing.results import metric_label
from runtime.training import EpochStats, Training
from util import signals
from util.distributed import from_main, world_size
from util.intervals import student
from util.progress import log, peak_memory, progress
from util.seeding import seeded

# bound on the excess over the optimum as a share of the objective, by whether the head has parameters; see `fit`
TOLERANCE = {False: 1e-6, True: 1e-4}
MOST_STEPS = 5000
CHUNK = 2**24  # values of cached features that are read at a time
KEPT = 8  # such chunks that stay on the device


class Shots(NamedTuple):
    """Draws of few training images: `episodes` draws for each of `numbers`, the images per class."""

    numbers: Sequence[int]
    episodes: int
    seed: int


class Fits(NamedTuple):
    """Takes the place of the batches of an epoch whose steps are fits."""

    effective: int  # images of a fit
    steps: int
    seeds: tuple[int, ...] = (0,)  # one order


def tasks(specs: Sequence[ProbeSpec], shots: Shots) -> list[tuple[int, int, int]]:
    """(probe, shots, episode) of every fit; shots 0: all training images."""
    draws = [(number, episode) for number in shots.numbers for episode in range(shots.episodes)]
    return [(probe, *draw) for draw in [(0, 0), *draws] for probe in range(len(specs))]


class Images:
    """Cached images: their labels, and the vectors that a probe makes of them."""

    def __init__(self, cache: FeatureCache, rows: Tensor, device: torch.device):
        self.cache, self.device = cache, device
        rows = rows[cache.valid[rows]]
        self.labels = cache.labels[rows].to(device)
        self.chunks = rows.split(max(1, CHUNK // cache.shape[1]))
        self.read = functools.lru_cache(KEPT)(self._read)

    def _read(self, chunk: int) -> Any:
        read = self.cache.tokens(self.cache.rows[self.chunks[chunk]].to(self.device))
        return pytree.tree_map(lambda leaf: None if leaf is None else leaf.double(), read)

    def vectors(self, probe: Probe, blocks: Sequence[int], row: int) -> Tensor:
        """(n,D') in float64, differentiable in the parameters of the head. row: of the probe's vector if the cache
        holds pooled vectors. The backward pass recomputes the activations of several chunks, to save memory."""

        def pool(chunk: int) -> Tensor:
            read = self.read(chunk)
            return read[row] if isinstance(read, list) else probe.aggregation(read_blocks(read, blocks)).vector

        if len(self.chunks) > 1 and torch.is_grad_enabled() and probe.aggregation.learned:
            pool = functools.partial(checkpoint, pool, use_reentrant=False)
        return torch.cat([pool(chunk) for chunk in range(len(self.chunks))])


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with labels (n,), binary cross-entropy with labels (n,K)."""
    if labels.ndim > 1:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def standardise(vectors: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (n,D') of mean 0 and variance 1; their mean and variance (D',) before."""
    variance, mean = torch.var_mean(vectors, dim=0, correction=0)
    return (vectors - mean) / (variance + eps).sqrt(), mean, variance


def fit(probe: Probe, vectors: Callable[[], Tensor], labels: Tensor, strength: float) -> dict[str, float]:
    """Move a probe in float64 from its weights to a minimum.

    Steps end when |gradient|^2 / (2 strength), as a share of the objective, is below TOLERANCE. Without parameters in
    the head this bounds the excess over the optimum, as the penalty makes the objective strongly convex but for the
    biases; a head with parameters may have other minima. Returns the training loss without the penalty, that share
    ("gap"), and the number of steps.
    """
    learned, parameters = probe.aggregation.learned, list(probe.parameters())
    initial = [parameter.detach().clone() for parameter in probe.aggregation.parameters()]
    fixed = None if learned else standardise(vectors(), probe.norm.eps)
    state: dict[str, float] = {}

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        torch.nn.utils.vector_to_parameters(torch.tensor(point, device=labels.device), parameters)
        normalised, mean, variance = fixed or standardise(vectors(), probe.norm.eps)
        probe.norm.running_mean.copy_(mean.detach())
        probe.norm.running_var.copy_(variance.detach())
        value = mean_loss(probe.classifier(normalised), labels)
        changes = (p - before for p, before in zip(probe.aggregation.parameters(), initial, strict=True))
        squares = sum((change.square().sum() for change in changes), probe.classifier.weight.square().sum())
        objective = value + strength / 2 * squares
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([gradient.flatten() for gradient in gradients]).cpu().numpy()
        state.update(loss=value.item(), gap=float(gradient @ gradient) / (2 * strength * objective.item()))
        return objective.item(), gradient

    def is_done(point: np.ndarray) -> None:
        if world_size() == 1:  # several processes stop after the fit, at the same one
            signals.check()
        if state["gap"] <= TOLERANCE[learned]:
            raise StopIteration

    start = torch.nn.utils.parameters_to_vector(parameters).detach().cpu().numpy()
    options = {"gtol": 0, "ftol": 0, "maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "maxcor": 20}
    end = optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=is_done, options=options)
    evaluate(end.x)
    return {**state, "steps": int(end.nit)}


class Fitting(Training):
    """A run of one epoch, each step of which fits a probe: to all training images, then to each draw of few.

    With several strengths, held-out images choose: from the strongest on, until two in a row have a higher loss. The
    probe is then fitted to the training and the held-out images; of a draw, to the draw alone. All processes compute
    the same fits.
    """

    def __init__(self, cache: FeatureCache, strengths: Sequence[float], shots: Shots, headline: str, *training: Any):
        super().__init__(*training)
        self.cache, self.headline, self.shots = cache, headline, shots
        self.strengths = sorted(set(strengths), reverse=True)
        self.bank = self.method.bank
        self.tasks = tasks(self.bank.specs, shots)
        self.initial = [self.bank.probe(index) for index in range(len(self.bank.specs))]
        self.facts: dict[str, dict[str, Any]] = {spec.name: {} for spec in self.bank.specs}

    def train_one_epoch(self) -> EpochStats:
        """Do the fits that are left."""
        start, earlier = time.perf_counter(), self.seconds
        for task in progress(self.tasks[self.done :], "fits", unit="fit"):
            self._fit(*task)
            self.done += 1
            self.seconds = earlier + time.perf_counter() - start
            self._save_or_stop()
        for name, facts in self.facts.items():
            for shots, few in describe(facts).get("few_shots", {}).items():
                text = f"{few['mean']:.2f}, 95 % interval {few['interval']} over {len(few['each'])} draws"
                log.info("%s, %s images per class: %s %s", name, shots, metric_label(self.headline), text)
        speed = self.batches.effective * self.batches.steps / self.seconds
        return EpochStats(self.loss_sum.tolist(), 0.0, speed, 0.0, peak_memory(self.method.device))

    @functools.cache  # noqa: B019 - one run per process
    def images(self, part: str, shots: int = 0, episode: int = 0) -> Images:
        """The images of "train", "val", "test" or "all" but the test images; of a draw with `shots`."""
        parts = [name for name in ("train", "val") if name in self.cache.parts] if part == "all" else [part]
        rows = torch.cat([torch.arange(self.cache.places[name].start, self.cache.places[name].stop) for name in parts])
        if shots:
            n = len(self.cache.parts[part].indices)  # of its rows, n for each view
            chosen = draw(self.cache.labels[rows[:n]], shots, self.shots.seed, episode)
            rows = rows[torch.isin(torch.arange(len(rows)) % n, chosen)]
        return Images(self.cache, rows, self.method.device)

    def _fit(self, index: int, shots: int, episode: int) -> None:
        name, draw = self.bank.specs[index].name, (shots, episode)
        strength, path, probe, end = self._choose(index, draw)
        if shots:
            facts = {"l2": strength, "score": self._evaluate(probe, index, self.images("test"))["score"]}
            self.facts[name].setdefault("few_shots", {}).setdefault(str(shots), []).append(from_main(facts))
            return
        if path:
            probe, end = self._probe(index, strength, self.images("all"))
        state = {key: value.cpu() for key, value in probe.state_dict().items()}
        state, self.facts[name] = from_main((state, {"l2": strength, "path": path, "converged": end}))
        self.loss_sum[index] = self.facts[name]["converged"]["loss"]
        self.bank.load_probe_states({**self.bank.probe_states(), name: state})
        log.info("%s: strength %g, training loss %.4f, gap %.0e after %d steps", name, strength, *end.values())

    def _choose(self, index: int, draw: tuple[int, int]) -> tuple[float, dict, Probe, dict]:
        """The strength with the lowest loss on the held-out images, {strength: loss and score on them}, the probe with
        that strength fitted to the training images or a draw of them, and the record of that fit. A single strength is
        not evaluated."""
        path: dict[str, dict[str, float]] = {}
        best, lowest, tried_since = None, np.inf, 0
        for strength in self.strengths:
            candidate = strength, path, *self._probe(index, strength, self.images("train", *draw))
            if len(self.strengths) == 1:
                return candidate
            path[f"{strength:g}"] = scores = self._evaluate(candidate[2], index, self.images("val"))
            tried_since += 1
            if best is None or scores["loss"] < lowest:
                best, lowest, tried_since = candidate, scores["loss"], 0
            if tried_since == 2:
                break
        return best

    def _probe(self, index: int, strength: float, images: Images) -> tuple[Probe, dict[str, float]]:
        """A copy of a probe of the bank, fitted to images from its initial head and a classifier of zeros."""
        probe = copy.deepcopy(self.initial[index]).double().eval()
        torch.nn.init.zeros_(probe.classifier.weight)
        torch.nn.init.zeros_(probe.classifier.bias)
        vectors = functools.partial(images.vectors, probe, self.bank.specs[index].blocks, self.bank.vector_of[index])
        return probe, fit(probe, vectors, images.labels, strength)

    @torch.no_grad()
    def _evaluate(self, probe: Probe, index: int, images: Images) -> dict[str, float]:
        """Loss and score in percent of a probe."""
        vectors = images.vectors(probe, self.bank.specs[index].blocks, self.bank.vector_of[index])
        logits, labels = probe.classifier(probe.norm(vectors)), images.labels
        outputs = logits if labels.ndim > 1 else logits.topk(1).indices
        return {"loss": mean_loss(logits, labels).item(), "score": score(outputs, labels, self.headline)}

    def _write(self, index: int, state: dict[str, Any], step: int | None, keep: int = 2) -> None:
        super()._write(index, {**state, "fits": self.facts}, step, keep)

    def _restore_progress(self, state: dict) -> None:
        super()._restore_progress(state)
        self.facts = {spec.name: state["fits"][spec.name] for spec in self.bank.specs}


def draw(labels: Tensor, shots: int, seed: int, episode: int) -> Tensor:
    """Positions of `shots` images of each class, a function of (seed, episode); fewer shots are the first of more.

    ValueError if a class has fewer.
    """
    with seeded("shots", seed, episode):
        order = torch.randperm(len(labels))
    positions = [order[labels[order] == label] for label in labels.unique()]
    if (fewest := min(map(len, positions))) < shots:
        raise ValueError(f"{shots} images per class: a class has only {fewest} training images that are not held out")
    return torch.cat([of_class[:shots] for of_class in positions])


def describe(facts: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of a fit, with the mean score over the episodes of few shots and its interval."""
    few = {}
    for shots, episodes in facts.get("few_shots", {}).items():
        scores = np.array([episode["score"] for episode in episodes])
        few[shots] = {"each": scores.tolist(), "l2": [episode["l2"] for episode in episodes]}
        few[shots] |= {"mean": float(scores.mean()), "interval": student(scores)}
    return {**facts, "few_shots": few} if few else facts
