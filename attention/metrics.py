"""Attention-flow metrics: one block's trace in, one number per image and head out, without an attention matrix.

Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then R registers), M patches, H heads, D width.
Query i attends to key j with probability A_ij, softmax over all N keys; i = 0 is [cls].

Every probability is the exponential of a difference of log-sum-exps. The one over the patch keys is computed first and
the logits of the prefix are merged into it, so that patch probabilities stay exact where [cls] takes nearly all of the
attention and 1 - A_i0 would cancel. No epsilon is added anywhere.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from attention.explicit import Grid, Operands
from attention.reductions import attention_sums
from attention.tokens import log_amplitude, log_singular_values
from util.choices import nearest
from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

    from models_vit import BlockTrace, VisionTransformer
torch = lazy("torch")


class Sizes(NamedTuple):
    """How an encoder divides an image into tokens; bounds of metrics depend on it."""

    tokens: int  # N
    patches: int  # M
    registers: int  # R
    grid: Grid
    patch_size: int  # pixels

    @classmethod
    def of(cls, backbone: VisionTransformer, input_size: int) -> Sizes:
        grid = backbone.grid_of(input_size, input_size)
        patches = grid[0] * grid[1]
        return cls(backbone.num_prefix_tokens + patches, patches, backbone.num_registers, grid, backbone.patch_size)


class Rows(NamedTuple):
    """Summary of the attention rows of some queries: (B,H,M) for the patches, (B,H) for [cls]."""

    to_self: Tensor  # A_ii
    to_self_log_ratio: Tensor  # ln(A_ii / sum of A_ij over the patches j)
    to_cls: Tensor | None  # A_i0; None without [cls]
    to_registers: Tensor  # sum of A_ij over the registers j
    to_patch: Tensor  # mean of A_ij over the patches j
    patch_entropy: Tensor  # nats; entropy of the row renormalised over the patches (Eq. 6)


class Reduced(NamedTuple):
    """One block's attention, by kind of query, in float64, without the rows of registers. None where not requested."""

    cls: Rows | None  # None without [cls]
    patches: Rows
    cls_update_ratio: Tensor | None  # (B,) |update_0| / |x_0|, 2-norms
    patch_update_ratio: Tensor  # (B,M)
    cls_attention: Tensor | None  # (B,H,M) A_0j
    distance: Tensor | None  # (B,H,M) sum_j a'_ij |r_i - r_j|, in pixels
    received: Tensor | None  # (B,H,M) sum_i a'_ij, what patch j gets from all patches
    patch_update: Tensor | None  # (B,M,D) update_i
    patch_values: Tensor | None  # (B,H,M,d) v_i


def reduce_attention(
    trace: BlockTrace,
    num_prefix: int,
    has_cls: bool,
    reduction: str = "auto",
    wanted: Collection[str] = (),
    sizes: Sizes | None = None,
) -> Reduced:
    """Summarise the attention rows of one block's trace, whatever the caller's autocast.

    On float32 inputs all reductions agree with the definitions in float64 within 1e-5 (nats, or relative for
    probabilities), however large the logits; "auto" takes the fastest of the device. wanted: optional fields to
    compute; "distance" needs the sizes. ValueError for a reduction that does not run on the device.
    """
    grid = sizes.grid if sizes else (1, trace.q.shape[2] - num_prefix)
    optional = {"distance": "distance" in wanted, "received": "received" in wanted}
    operands = Operands(trace.q, trace.k, trace.scale, trace.logit_bias, num_prefix, grid, **optional)
    sums = attention_sums(operands, reduction)
    lse = torch.cat([sums.patches[..., None], sums.prefix], dim=-1).logsumexp(-1)
    prefix = (sums.prefix - lse[..., None]).exp()
    rows = Rows(
        to_self=(sums.own - lse).exp(),
        to_self_log_ratio=sums.own - sums.patches,
        to_cls=prefix[..., 0] if has_cls else None,
        to_registers=prefix[..., int(has_cls) :].sum(-1),
        to_patch=(sums.patches - lse).exp() / (trace.q.shape[2] - num_prefix),
        patch_entropy=sums.patch_entropy,
    )
    wide = torch.promote_types(trace.x.dtype, torch.float32)
    update, x = (torch.linalg.vector_norm(tokens, dim=-1, dtype=wide) for tokens in (trace.update, trace.x))
    ratio = update.double() / x.double()

    def of(queries: int | slice) -> Rows:
        return Rows(*(None if values is None else values[:, :, queries] for values in rows))

    return Reduced(
        cls=of(0) if has_cls else None,
        patches=of(slice(num_prefix, None)),
        cls_update_ratio=ratio[:, 0] if has_cls else None,
        patch_update_ratio=ratio[:, num_prefix:],
        cls_attention=cls_attention(trace, num_prefix) if "cls_attention" in wanted else None,
        distance=sums.distance * sizes.patch_size if sums.distance is not None else None,
        received=sums.received,
        patch_update=trace.update[:, num_prefix:] if "patch_update" in wanted else None,
        patch_values=trace.v[:, :, num_prefix:] if "patch_values" in wanted else None,
    )


def cls_attention(trace: BlockTrace, num_prefix: int) -> Tensor:
    """(B,H,M) A_0j in float64, in which it is computed where float32 loses digits: large logits, tiny probabilities."""
    from models_vit import attention_row  # needs torch

    if trace.q.dtype != torch.float32:  # products of half-precision numbers are exact
        row = attention_row(trace, 0, num_prefix).double()
        if row.sum(-1).amin() > 1e-30:  # float32 ends at 1e-38
            return row
    exact = trace._replace(q=trace.q[:, :, :1].double(), k=trace.k.double())
    return attention_row(exact, 0, num_prefix)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of non-negative weights (...,M), normalised first: Eq. 6."""
    return torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1)


def mutual_information(received: Tensor, patch_entropy: Tensor) -> Tensor:
    """Normalised mutual information of query and key patches; (B,H,M) twice -> (B,H) from 0 to 1.

    With uniform queries, p(k) = mean_i a'_ik and I = H(k) - mean_i H(a'_i): no sum over pairs is needed. It is divided
    by sqrt(H(q) H(k)), H(q) = ln M (Park et al. 2023). Where all queries attend to one and the same patch it is 0.
    """
    key_entropy = entropy(received)
    information = (key_entropy - patch_entropy.mean(2)).clamp(min=0)
    normaliser = (math.log(received.shape[2]) * key_entropy).sqrt()
    return torch.where(information > 0, information / normaliser, 0.0)


def largest_share(weights: Tensor) -> Tensor:
    """Share of non-negative weights (...,M) that the SINKS largest of them hold."""
    return weights.topk(min(SINKS, weights.shape[-1])).values.sum(-1) / weights.sum(-1)


def effective_rank(vectors: Tensor) -> Tensor:
    """(B,M,D) -> (B,1): exp of the entropy of the normalised singular values, in float64."""
    wide = vectors.double()
    gram = wide @ wide.mT if wide.shape[1] <= wide.shape[2] else wide.mT @ wide  # faster than their own decomposition
    return entropy(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()).exp()[:, None]


def norm_ratio(vectors: Tensor) -> Tensor:
    """(B,M,D) -> (B,1): the largest 2-norm divided by the median one."""
    norms = torch.linalg.vector_norm(vectors.double(), dim=-1)
    return (norms.amax(1) / norms.quantile(0.5, dim=1))[:, None]


def weighted_value_norm(received: Tensor, values: Tensor) -> Tensor:
    """(B,H,M), (B,H,M,d) -> (B,H): mean norm of values, weighted by the attention they receive, over the plain mean."""
    norms = torch.linalg.vector_norm(values.double(), dim=-1)
    return (received * norms).sum(2) / received.sum(2) / norms.mean(2)


def mean_distance(sizes: Sizes) -> float:
    """Of all ordered pairs of patches, a patch and itself included."""
    rows, columns = sizes.grid
    total = sum(
        (rows - abs(down)) * (columns - abs(across)) * math.hypot(down, across)
        for down in range(1 - rows, rows)
        for across in range(1 - columns, columns)
    )
    return total / sizes.patches**2 * sizes.patch_size


REFERENCES: dict[str, Callable[[Sizes], float]] = {  # by the name that figures print
    "0": lambda s: 0.0,
    "1": lambda s: 1.0,
    "1/N": lambda s: 1 / s.tokens,
    "1/M": lambda s: 1 / s.patches,
    "R/N": lambda s: s.registers / s.tokens,
    "4/M": lambda s: min(1.0, SINKS / s.patches),
    "ranks": lambda s: float(s.patches),
    "ln M": lambda s: math.log(s.patches),
    "-ln M": lambda s: -math.log(s.patches),
    "mean distance": mean_distance,
    "largest distance": lambda s: math.hypot(s.grid[0] - 1, s.grid[1] - 1) * s.patch_size,
}


class Metric(NamedTuple):
    """K numbers per image and block; metrics.toml explains the fields."""

    unit: str
    definition: str
    source: str
    compute: Callable[[Reduced | Tensor], Tensor]  # -> (B,K)
    needs: Sequence[str] = ()
    lower: str | None = "0"
    upper: str | None = None
    uniform: str | None = None
    of_tokens: bool = False
    axis: str | None = "head"
    summary: str = "mean"
    title: str = ""
    over_images: bool = False

    def record(self, measured: Reduced | Tensor) -> Tensor:
        """(B,1 + K): the summary, then the numbers."""
        values = self.compute(measured)
        summary = values[:, -1] if self.summary == "last" else values.mean(1)
        return torch.cat([summary[:, None], values], dim=1)


LEGEND = (
    "i, j, k run over the patches, r over the registers, 0 is [cls]; A_ij is the attention of query i to key j, "
    "softmax over all N tokens; a'_ij = A_ij / Σ_k A_ik; H(a) = -Σ_j a_j ln a_j; p_i is the position of patch i, v_i "
    "its value; x_i enters the block, update_i is what attention adds to it (before LayerScale), z_i leaves the block"
)
SINKS = 4  # patches that count as attention sinks
PARK = "Park et al. 2023"
COMPUTE: dict[str, Callable[[Reduced | Tensor], Tensor]] = {  # of Reduced, or of tokens (B,rows,columns,D)
    "cls_self_attention": lambda r: r.cls.to_self,
    "patch_self_attention": lambda r: r.patches.to_self.mean(2),
    "cls_self_attention_relative": lambda r: r.cls.to_self_log_ratio.exp(),
    "cls_self_attention_log_ratio": lambda r: r.cls.to_self_log_ratio,
    "patch_self_attention_relative": lambda r: r.patches.to_self_log_ratio.exp().mean(2),
    "cls_patch_attention": lambda r: r.cls.to_patch,
    "patch_cls_attention": lambda r: r.patches.to_cls.mean(2),
    "cls_register_attention": lambda r: r.cls.to_registers,
    "patch_register_attention": lambda r: r.patches.to_registers.mean(2),
    "cls_patch_entropy": lambda r: r.cls.patch_entropy,
    "cls_patch_entropy_of_mean": lambda r: entropy(r.cls_attention.mean(1))[:, None],
    "patch_patch_entropy": lambda r: r.patches.patch_entropy.mean(2),
    "cls_update_ratio": lambda r: r.cls_update_ratio[:, None],
    "patch_update_ratio": lambda r: r.patch_update_ratio.mean(1, keepdim=True),
    "patch_patch_distance": lambda r: r.distance.mean(2),
    "patch_patch_mutual_information": lambda r: mutual_information(r.received, r.patches.patch_entropy),
    "patch_sink_attention": lambda r: largest_share(r.received),
    "cls_sink_attention": lambda r: largest_share(r.cls_attention),
    "patch_sink_value_ratio": lambda r: weighted_value_norm(r.received, r.patch_values),
    "patch_update_rank": lambda r: effective_rank(r.patch_update),
    "patch_log_amplitude": log_amplitude,
    "patch_log_singular_values": lambda tokens: log_singular_values(tokens.flatten(1, 2)),
    "patch_norm_ratio": lambda tokens: norm_ratio(tokens.flatten(1, 2)),
    "image_log_singular_values": lambda tokens: tokens.double().mean((1, 2)),
}
METRICS = {
    name: Metric(compute=COMPUTE[name], **{key: None if value == "" else value for key, value in facts.items()})
    for name, facts in tomllib.loads(Path(__file__).with_name("metrics.toml").read_text("utf-8")).items()
}
# Figs. 3 to 6 and 10 to 13, in this order
PAPER_METRICS = ("cls_self_attention", "cls_patch_entropy", "patch_self_attention_relative", "patch_patch_entropy")
PARK_METRICS = tuple(name for name, metric in METRICS.items() if metric.source == PARK)
SINK_METRICS = (
    *("patch_norm_ratio", "patch_sink_attention", "cls_sink_attention", "patch_sink_value_ratio", "patch_update_rank"),
)
GROUPS = {
    "paper": PAPER_METRICS,
    "flow": tuple(name for name in METRICS if name not in (*PARK_METRICS, *SINK_METRICS)),  # nearly free
    "park": PARK_METRICS,
    "sinks": SINK_METRICS,
    "all": tuple(METRICS),
}


def metric_names(names: Sequence[str]) -> list[str]:
    """Expand groups and keep the order; ValueError for an unknown name."""
    if unknown := [name for name in names if name not in GROUPS and name not in METRICS]:
        near = nearest(unknown[0], [*GROUPS, *METRICS])
        choices = f"the groups {', '.join(GROUPS)}, or {', '.join(METRICS)}"
        raise ValueError(f"unknown metrics {' '.join(unknown)}: {near}choose from {choices}")
    return list(dict.fromkeys(metric for name in names for metric in GROUPS.get(name, (name,))))
