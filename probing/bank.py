"""Linear probes on frozen tokens, and banks of probes that train at once, each as if it were alone.

A probe is aggregation -> BatchNorm1d without affine -> Linear. Letters: B images, D' width of the aggregated vector,
K classes, S probes.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encoders.architectures import check_blocks
from models_vit import Features, VisionTransformer
from probing.folding import pool_together
from probing.heads import blocks_of, build_head, parts_of
from probing.norm import ProbeNorm, normalise
from probing.pooling import Needs, Pooling, Tokens, read_blocks, select
from util.distributed import gather_tensors
from util.seeding import seeded


@dataclass(frozen=True)
class ProbeSpec:
    """One probe of a bank. `name` identifies it everywhere: in logs, results and checkpoints."""

    head: str  # from heads.canonical_head, such as cls, abmilp:depth=2,act=tanh, ap12 or cls@8-11+pos@11
    block: int  # 0-based; of the parts of the head that name none, else the last that the head names
    blr: float  # base learning rate; the rate is blr x effective batch / 256
    seed: int  # of the initial weights, and of its data if seeds vary it
    optimizer: str = "lars"  # or "sgd", or "logreg"
    lr: float | None = None  # the rate itself, if given instead of blr

    @property
    def aggregation(self) -> str:
        """The head without options and blocks."""
        return "+".join(part.aggregation for part in parts_of(self.head, {}))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that the probe reads."""
        return blocks_of(self.head, self.block)

    @property
    def name(self) -> str:
        if self.optimizer == "logreg":  # has no rate
            return f"{self.head}/block{self.block}/logreg/seed{self.seed}"
        rate = f"blr{self.blr!r}" if self.lr is None else f"lr{self.lr!r}"
        # LARS is the recipe's and omitted, like an option at its default
        optimizer = "" if self.optimizer == "lars" else f"{self.optimizer}/"
        return f"{self.head}/block{self.block}/{optimizer}{rate}/seed{self.seed}"


class Probe(nn.Module):
    """aggregation -> norm -> classifier. Initial weights depend on nothing but the spec.

    init: of the classifier, "default" (PyTorch's, as in the paper's code) or "trunc_normal" (std 0.01, MAE's probe).
    """

    def __init__(self, spec: ProbeSpec, tokens: Tokens, num_classes: int, init: str = "default"):
        super().__init__()
        # the learning rate is not part of the key: rates are compared from equal initial weights
        with seeded("probe", spec.head, spec.block, spec.seed):
            self.aggregation = build_head(spec.head, spec.block, tokens)
            self.norm = ProbeNorm(self.aggregation.width)
            self.classifier = nn.Linear(self.aggregation.width, num_classes)
            if init == "trunc_normal":
                nn.init.trunc_normal_(self.classifier.weight, std=0.01)
                nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Features) -> Tensor:
        """Tokens of the probe's block, or several from read_blocks -> logits (B,K)."""
        return self.classifier(self.norm(self.aggregation(features).vector))


class ProbeBank(nn.Module):
    """Probes on one frozen backbone. They share nothing but the tokens."""

    def __init__(
        self, specs: Sequence[ProbeSpec], backbone: VisionTransformer, grid: tuple[int, int], num_classes: int,
        init: str = "default",
    ):  # fmt: skip
        super().__init__()
        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the same probe is requested twice: {', '.join(twice)}")
        self.specs = tuple(specs)
        check_blocks(self.blocks, backbone.depth)
        tokens = Tokens.of(backbone, grid)
        self.probes = nn.ModuleList(Probe(spec, tokens, num_classes, init) for spec in specs)
        self._plan()

    def _plan(self) -> None:
        """Decide which probes share a vector (_distinct: the first probe of each; _row: the vector of each probe), and
        which vectors are pooled in one product (_folded)."""
        rows: dict[tuple, int] = {}
        self._distinct, self._row, self._folded = [], [], {}
        for index, (spec, probe) in enumerate(zip(self.specs, self.probes, strict=True)):
            key = (index,) if probe.aggregation.learned else (spec.head, spec.block)
            if key not in rows:
                rows[key] = len(self._distinct)
                self._distinct.append(index)
                pool = getattr(probe.aggregation, "pool", None)
                if pool is not None and pool.folds:
                    inputs = spec.blocks, probe.aggregation.content, pool.norm_eps
                    self._folded.setdefault(inputs, []).append(rows[key])
            self._row.append(rows[key])

    def subset(self, indices: Sequence[int]) -> "ProbeBank":
        """A bank of some of these probes, which are shared, not copied."""
        part = copy.copy(self)
        part._modules = {"probes": nn.ModuleList(self.probes[i] for i in indices)}
        part.specs = tuple(self.specs[i] for i in indices)
        part._plan()
        return part

    def probe(self, index: int) -> Probe:
        """A copy of a probe."""
        return copy.deepcopy(self.probes[index])

    def row(self, index: int) -> int:
        """The position of a probe's vector among those that `pool` returns."""
        return self._row[index]

    @property
    def distinct(self) -> tuple[ProbeSpec, ...]:
        """The first probe of each of the vectors that `pool` returns."""
        return tuple(self.specs[index] for index in self._distinct)

    @property
    def widths(self) -> tuple[int, ...]:
        """D' of each of the vectors that `pool` returns."""
        return tuple(self._aggregation(row).width for row in range(len(self._distinct)))

    @property
    def learned(self) -> tuple[bool, ...]:
        """Whether the head of each of the vectors that `pool` returns has parameters."""
        return tuple(self._aggregation(row).learned for row in range(len(self._distinct)))

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted({block for spec in self.specs for block in spec.blocks}))

    @property
    def needs(self) -> Needs:
        """Inputs of the probes beside the tokens."""
        return functools.reduce(Needs.union, (probe.aggregation.needs for probe in self.probes))

    def forward(self, features: dict[int, Features] | list[Tensor], groups: int = 1) -> list[Tensor]:
        """{block: Features}, or the vectors of `pool` -> logits (B,K) of every probe, in the order of `specs`.

        Equal to Probe.forward within rounding. No operation mixes probes: NaN or infinity in one changes no other.
        groups: of images, each normalised by itself in training.
        """
        for norm in self.modules() if self.training else ():
            if isinstance(norm, ProbeNorm):
                norm.groups = groups
        vectors = features if isinstance(features, list) else self.pool(features)
        if not self.training:
            return [
                probe.classifier(probe.norm(vectors[row])) for row, probe in zip(self._row, self.probes, strict=True)
            ]
        normalised, statistics = normalise(vectors, groups)
        logits = []
        for row, probe in zip(self._row, self.probes, strict=True):
            probe.norm.pending.append(statistics[row])
            logits.append(probe.classifier(normalised[row]))
        return logits

    def pool(self, features: dict[int, Features]) -> list[Tensor]:
        """Vectors (B,D') of the distinct poolings; one without parameters is computed once for all probes."""
        vectors = [None] * len(self._distinct)
        tokens = {spec.blocks: read_blocks(features, spec.blocks) for spec in self.distinct}
        for (blocks, content, _), rows in self._folded.items():
            pools = [self._aggregation(row).pool for row in rows]
            for row, vector in zip(rows, pool_together(pools, select(tokens[blocks], content)), strict=True):
                vectors[row] = vector
        return [
            self._aggregation(row)(tokens[spec.blocks]).vector if vector is None else vector
            for row, (vector, spec) in enumerate(zip(vectors, self.distinct, strict=True))
        ]

    def _aggregation(self, row: int) -> Pooling:
        return self.probes[self._distinct[row]].aggregation

    def commit_statistics(self) -> None:
        """Update every probe's running statistics, equally on all ranks; call once per optimizer step."""
        norms = [module for module in self.probes.modules() if isinstance(module, ProbeNorm)]
        local = torch.cat([torch.stack(norm.pending).flatten(2) for norm in norms], dim=2)  # (A, G, sum of 2 D')
        everywhere = torch.stack(gather_tensors(local), dim=1).flatten(0, 2)  # micro-step, rank, group: data order
        widths = [2 * norm.num_features for norm in norms]
        for norm, statistics in zip(norms, everywhere.split(widths, dim=1), strict=True):
            norm.commit(statistics.unflatten(1, (2, -1)))
            norm.pending.clear()

    def parameter_groups(self, peak_lrs: Sequence[float]) -> list[dict]:
        """One optimizer group per probe; the schedule scales `peak_lr`."""
        return [
            {"params": list(probe.parameters()), "lr": lr, "peak_lr": lr}
            for probe, lr in zip(self.probes, peak_lrs, strict=True)
        ]

    def probe_states(self) -> dict[str, dict[str, Tensor]]:
        """{probe name: its parameters and buffers}."""
        return {spec.name: probe.state_dict() for spec, probe in zip(self.specs, self.probes, strict=True)}

    def load_probe_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of probe_states. ValueError if the probes differ."""
        expected = {spec.name for spec in self.specs}
        if expected != set(states):
            raise ValueError(f"the checkpoint holds the probes {sorted(states)}, this run has {sorted(expected)}")
        for spec, probe in zip(self.specs, self.probes, strict=True):
            try:
                probe.load_state_dict(states[spec.name], strict=True)
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's probe {spec.name} does not fit: {error}") from error
