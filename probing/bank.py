"""Linear probes on frozen tokens, and banks of probes that train at once, each as if it were alone.

A probe is aggregation -> BatchNorm1d without affine -> Linear. Letters: B images, G groups of images, D width of
tokens, D' width of the aggregated vector, C columns (queries), K classes, S probes of a stack or of a bank, V vectors.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from encoders.architectures import check_blocks
from models_vit import Features, VisionTransformer
from probing.heads import blocks_of, build_head, parts_of
from probing.norm import BN_EPS, ProbeNorm, commit, normalise
from probing.pooling import Columns, Needs, Pooling, Tokens, fold, read_blocks, select
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


class WeightFirst(TorchFunctionMode):
    """F.linear as weight @ x^T where the weight is the larger: so its gradient has its layout and needs no copy.

    Copies of transposed gradients of attentive heads took a fifth of a step."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and args[0].ndim > 1 and args[0].numel() < args[1].numel():
            x, weight, *bias = args
            product = (weight @ x.mT).mT
            return product + bias[0] if bias and bias[0] is not None else product
        return func(*args, **(kwargs or {}))


class Applied(nn.Module):
    """function(module, ...) in the form that functional_call takes: the forward pass of a module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.module, self.forward = module, functools.partial(function, module)


class Stack:
    """Probes of one head, block and optimizer, computed at once: each of their tensors is a row of a common one.

    The probes remain modules; their parameters and buffers are views of these rows. The number of operations does not
    depend on S, the number of probes.
    """

    def __init__(self, rows: Sequence[int], spec: ProbeSpec, probes: Sequence[Probe]):
        """rows: positions of the probes in their bank. spec: of the first of them."""
        self.rows, self.spec, self.pooling = tuple(rows), spec, probes[0].aggregation
        states = [probe.state_dict(keep_vars=True) for probe in probes]
        self.tensors = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        for row, state in enumerate(states):
            for name, tensor in state.items():
                tensor.data = self.tensors[name][row]
        self.parameters = [self.tensors[name].requires_grad_() for name, _ in probes[0].named_parameters()]
        self.index = torch.tensor(rows, device=self.parameters[0].device)
        inner = self.pooling.named_modules(prefix="aggregation")
        self.inner = {name: norm for name, norm in inner if isinstance(norm, ProbeNorm)}
        # by norm: statistics (G,2,S,D') of each training batch since the last commit
        self.pending: dict[str, list[Tensor]] = {name: [] for name in ("norm", *self.inner)}
        self.folds = getattr(getattr(self.pooling, "pool", None), "folds", False)

    def _map(self, function: Callable[..., Any], *inputs: Tensor, dim: int = 0, out_dims: Any = 0) -> Any:
        """function(pooling, *inputs) of every probe. dim, out_dims: of the probes in inputs and outputs."""
        module, prefix = Applied(self.pooling, function), "aggregation."
        values = {
            f"module.{name.removeprefix(prefix)}": tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        run = functools.partial(functional_call, module)
        with WeightFirst(), sdpa_kernel(SDPBackend.MATH):  # vmap computes the fused kernels one probe at a time
            return vmap(lambda values, *inputs: run(values, inputs), (0, *[dim] * len(inputs)), out_dims)(
                values, *inputs
            )

    def columns(self) -> Columns:
        """Of poolings that fold: weights (S,D,C), offsets (S,M,C) or None."""
        return Columns(*self._map(lambda pooling: tuple(t for t in pooling.pool.columns() if t is not None)))

    def project(self, means: Tensor) -> Tensor:
        """Weighted mean of each query (B,S,C,D) -> vectors (B,S,D')."""
        return self._map(lambda pooling, means: pooling.pool.project(means), means, dim=1, out_dims=1)

    def vectors(self, features: Features, groups: int, amp: torch.dtype) -> Tensor:
        """Vectors (B,S,D') of poolings that do not fold; (B,1,D') if they have no parameters.

        amp: precision of those with parameters."""
        if not self.pooling.learned:
            return self.pooling(features).vector[:, None]

        def pool(pooling: Pooling) -> tuple[Tensor, list[Tensor]]:
            for norm in self.inner.values():
                norm.pending, norm.groups = [], groups
            vector = pooling(features).vector
            statistics = [norm.pending for norm in self.inner.values()]
            for norm in self.inner.values():
                norm.pending = None
            return vector, statistics

        with torch.autocast(self.index.device.type, dtype=amp, enabled=amp != torch.float32):
            vectors, statistics = self._map(pool, out_dims=(1, 2))
        for name, batches in zip(self.inner, statistics, strict=True):
            self.pending[name] += batches
        return vectors.to(self.parameters[0].dtype)

    def logits(self, vectors: Tensor) -> Tensor:
        """Normalised vectors (B,S,D') or (B,1,D') -> (S,K,B). In this layout gradients have that of their weights."""
        weight, bias = self.tensors["classifier.weight"], self.tensors["classifier.bias"]
        return torch.baddbmm(bias[:, :, None], weight, vectors.permute(1, 2, 0).expand(len(weight), -1, -1))

    def evaluated(self, vectors: Tensor) -> Tensor:
        """Normalise (B,S,D') or (B,1,D') by the running statistics: (B,S,D')."""
        mean, variance = (self.tensors[f"norm.running_{name}"] for name in ("mean", "var"))
        return (vectors - mean) * (variance + BN_EPS).rsqrt()


class ProbeBank(nn.Module):
    """Probes on one frozen backbone. They share nothing but the tokens, and are computed in stacks."""

    def __init__(
        self,
        specs: Sequence[ProbeSpec],
        backbone: VisionTransformer,
        grid: tuple[int, int],
        num_classes: int,
        init: str = "default",
        seeds_apart: bool = False,
        amp: torch.dtype = torch.float32,
    ):
        """seeds_apart: probes of different seeds train on different batches, hence in different stacks. amp: precision
        of poolings that transform every token."""
        super().__init__()
        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the same probe is requested twice: {', '.join(twice)}")
        self.specs, self.seeds_apart, self.amp = tuple(specs), seeds_apart, amp
        check_blocks(self.blocks, backbone.depth)
        tokens = Tokens.of(backbone, grid)
        self.probes = nn.ModuleList(Probe(spec, tokens, num_classes, init) for spec in specs)
        self._stack()

    def _stack(self) -> None:
        """Arrange the probes in stacks, and number their vectors: a pooling without parameters is computed once."""
        kinds: dict[tuple, list[int]] = {}
        for i, spec in enumerate(self.specs):
            kind = spec.head, spec.block, spec.optimizer, spec.seed if self.seeds_apart else None
            kinds.setdefault(kind, []).append(i)
        self.stacks = [Stack(rows, self.specs[rows[0]], [self.probes[i] for i in rows]) for rows in kinds.values()]
        numbers: dict[tuple, int] = {}
        self.vector_of = [
            numbers.setdefault(i if probe.aggregation.learned else (spec.head, spec.block), len(numbers))
            for i, (spec, probe) in enumerate(zip(self.specs, self.probes, strict=True))
        ]
        order = torch.cat([stack.index for stack in self.stacks])
        self._order = order.argsort()  # of the stacks' probes, one stack after the other: the order of `specs`

    def _apply(self, fn: Callable, recurse: bool = True) -> "ProbeBank":
        super()._apply(fn, recurse)
        self._stack()  # the tensors may be new ones, on another device or of another type
        return self

    def of_seed(self, seed: int) -> "ProbeBank":
        """The part of a bank with seeds apart that has this seed; it shares the probes."""
        part = copy.copy(self)
        part.stacks = [stack for stack in self.stacks if stack.spec.seed == seed]
        return part

    def probe(self, index: int) -> Probe:
        """A copy of a probe."""
        return copy.deepcopy(self.probes[index])

    @property
    def distinct(self) -> list[tuple[ProbeSpec, Pooling]]:
        """The first probe and the pooling of each of the vectors that `pool` returns."""
        first = [self.vector_of.index(number) for number in range(max(self.vector_of) + 1)]
        return [(self.specs[i], self.probes[i].aggregation) for i in first]

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted({block for spec in self.specs for block in spec.blocks}))

    @property
    def needs(self) -> Needs:
        """Inputs of the probes beside the tokens."""
        return functools.reduce(Needs.union, (probe.aggregation.needs for probe in self.probes))

    def forward(self, features: dict[int, Features] | list[Tensor]) -> Tensor:
        """{block: Features}, or the vectors of `pool` -> logits (S,B,K), in the order of `specs`."""
        return torch.cat(self.logits(features)).transpose(1, 2)[self._order]

    def logits(self, features: dict[int, Features] | list[Tensor], groups: int = 1) -> list[Tensor]:
        """As forward, but (S,K,B) of each stack.

        Equal to Probe.forward within rounding. No operation mixes probes: NaN or infinity in one changes no other.
        groups: of images, each normalised by itself in training.
        """
        if isinstance(features, list):
            numbers = [list(dict.fromkeys(self.vector_of[i] for i in stack.rows)) for stack in self.stacks]
            vectors = [torch.stack([features[number] for number in each], dim=1) for each in numbers]
        else:
            vectors = self._pool(features, groups)
        if not self.training:
            normalised = [stack.evaluated(vector) for stack, vector in zip(self.stacks, vectors, strict=True)]
        else:
            shapes = [vector.shape[1:] for vector in vectors]
            flat, statistics = normalise([vector.flatten(1) for vector in vectors], groups)
            normalised = [vector.unflatten(1, shape) for vector, shape in zip(flat, shapes, strict=True)]
            for stack, value, shape in zip(self.stacks, statistics, shapes, strict=True):
                stack.pending["norm"].append(value.unflatten(2, shape))
        return [stack.logits(vector) for stack, vector in zip(self.stacks, normalised, strict=True)]

    def pool(self, features: dict[int, Features]) -> list[Tensor]:
        """Vectors (B,D') of the distinct poolings, in the order of `distinct`."""
        vectors = {}
        for stack, pooled in zip(self.stacks, self._pool(features), strict=True):
            numbers = dict.fromkeys(self.vector_of[i] for i in stack.rows)
            vectors |= zip(numbers, pooled.unbind(1), strict=True)
        return [vectors[number] for number in range(len(vectors))]

    def _pool(self, features: dict[int, Features], groups: int = 1) -> list[Tensor]:
        """Vectors (B,V,D') of each stack: V is 1 for poolings without parameters, else the number of its probes."""
        read = {stack.spec.blocks: read_blocks(features, stack.spec.blocks) for stack in self.stacks}
        vectors: dict[Stack, Tensor] = {}
        alike: dict[tuple, list[Stack]] = {}  # stacks that fold and read the same tokens
        shared: dict[tuple, Tensor] = {}
        for stack in self.stacks:
            key = stack.spec.head, stack.spec.block
            if stack.folds:
                pool = stack.pooling.pool
                alike.setdefault((stack.spec.blocks, stack.pooling.content, pool.norm_eps), []).append(stack)
            elif key in shared:
                vectors[stack] = shared[key]
            else:
                vectors[stack] = stack.vectors(read[stack.spec.blocks], groups, self.amp)
                if not stack.pooling.learned:
                    shared[key] = vectors[stack]
        for (blocks, content, _), stacks in alike.items():
            tokens = stacks[0].pooling.pool.prepare(select(read[blocks], content))
            means = fold(tokens, [stack.columns() for stack in stacks])
            vectors |= {stack: stack.project(mean) for stack, mean in zip(stacks, means, strict=True)}
        return [vectors[stack] for stack in self.stacks]

    def commit_statistics(self, alive: Sequence[Tensor]) -> None:
        """Update the running statistics, equally on all ranks; call once per optimizer step.

        alive: per stack, (S,) bool: the other probes keep theirs."""
        norms = [(stack, rows, name) for stack, rows in zip(self.stacks, alive, strict=True) for name in stack.pending]
        local = [torch.stack(stack.pending[name]) for stack, _, name in norms]  # (A,G,2,V,D') of A micro-steps
        joined = torch.cat([value.flatten(2) for value in local], dim=2)
        everywhere = torch.stack(gather_tensors(joined), dim=1).flatten(0, 2)  # micro-step, rank, group: data order
        parts = everywhere.split([value[0, 0].numel() for value in local], dim=1)
        for (stack, rows, name), value, part in zip(norms, local, parts, strict=True):
            buffers = (
                stack.tensors[f"{name}.{buffer}"] for buffer in ("running_mean", "running_var", "num_batches_tracked")
            )
            commit(*buffers, part.unflatten(1, value.shape[2:]), rows)
            stack.pending[name].clear()

    def parameter_groups(self, peak_lrs: Sequence[float]) -> list[dict]:
        """One optimizer group per stack, for util.lars.LARS; the schedule scales `peak_lr` (S,).

        peak_lrs: of the probes. "rows": their positions in the bank."""
        rates = [torch.tensor([peak_lrs[i] for i in stack.rows], dtype=torch.float64) for stack in self.stacks]
        return [
            {"params": stack.parameters, "lr": lr, "peak_lr": lr, "rows": stack.rows, "stacked": True}
            for stack, lr in zip(self.stacks, rates, strict=True)
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
