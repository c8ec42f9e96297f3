"""Attention flow: one block's trace in, one number per image and head out, and no N x N attention matrix in between.

Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), M patches, H heads, d head width.
Query i attends to key j with logit s_ij and probability A_ij, softmax over all N keys; i = 0 is [cls].

Every probability is the exponential of a difference of log-sum-exps. The one over the patch keys is computed first and
the logits of the prefix are merged into it, so that patch probabilities stay exact where [cls] takes nearly all of the
attention and 1 - A_i0 would cancel. No epsilon is added anywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models_vit import BlockTrace

# The rounding of the logits limits float32. Measured at d = 64, errors (nats, or relative for probabilities) grow with
# the largest possible logit, by 1e-7 times it for random q and k and by 6e-7 times it where q is parallel to k. Beyond
# 8, hence 5e-6, the same code runs in float64, at half the speed and 1e-13.
FLOAT32_LOGITS = 8.0
QUERY_CHUNK = 64  # queries per explicit step: N x 64 logits of a head fit in a CPU's cache


class Rows(NamedTuple):
    """What the attention rows of some queries amount to: (B,H,M) for the patches, (B,H) for [cls]."""

    to_self: Tensor  # A_ii
    to_self_relative: Tensor  # A_ii / sum of A_ij over the patches j
    to_cls: Tensor | None  # A_i0; None without [cls]
    to_patch: Tensor  # mean of A_ij over the patches j
    patch_entropy: Tensor  # nats; entropy of the row renormalised over the patches (Eq. 6)
    update_ratio: Tensor  # |update_i| / |x_i|, 2-norms; one value for all heads, so H = 1 here


class Reduced(NamedTuple):
    """One block's attention, by kind of query; rows of registers are not kept."""

    cls: Rows | None
    patches: Rows


class Logs(NamedTuple):
    """What a reduction finds out about every query, up to one shift per query that is common to all logits."""

    own: Tensor  # (B,H,N) s_ii
    prefix: Tensor  # (B,H,N,P) s_ij of the prefix keys
    patches: Tensor  # (B,H,N) log-sum-exp of s_ij over the patch keys
    patch_entropy: Tensor  # (B,H,N) nats


def explicit_logs(q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int) -> Logs:
    """The definitions, on the logits of some queries at a time."""
    chunks = []
    for start in range(0, q.shape[2], QUERY_CHUNK):
        queries = slice(start, start + QUERY_CHUNK)
        logits = q[:, :, queries] @ k.transpose(-2, -1) * scale
        if logit_bias is not None:
            logits = logits + logit_bias[:, queries].to(logits.dtype)
        prefix, patches = logits.split([num_prefix, logits.shape[-1] - num_prefix], dim=-1)
        lse = patches.logsumexp(-1)
        entropy = torch.special.entr((patches - lse[..., None]).exp()).sum(-1)
        own = logits.diagonal(offset=start, dim1=-2, dim2=-1)
        chunks.append(Logs(own.clone(), prefix.clone(), lse, entropy))  # a view would keep the chunk's logits alive
    return Logs(*(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)))


def fused_logs(q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int) -> Logs:
    """The same from one call of fused attention over the patch keys with the keys as values, in O(N d) memory.

    With p_ij the attention renormalised over the patches, the call returns lse_i and sum_j p_ij k_j, and
        entropy_i = - sum_j p_ij ln p_ij = lse_i - sum_j p_ij s_ij = lse_i - scale * q_i . sum_j p_ij k_j.
    A logit bias would add sum_j p_ij b_ij, which the call does not return.
    """
    assert logit_bias is None
    patches = k[:, :, num_prefix:]
    expected_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, patches, patches, scale=scale)
    entropy = lse - (q * expected_key).sum(-1) * scale
    return Logs(
        own=(q * k).sum(-1) * scale,
        prefix=q @ k[:, :, :num_prefix].transpose(-2, -1) * scale,
        patches=lse,
        patch_entropy=entropy.clamp(min=0),  # rounding can leave the entropy of a one-hot row at -1e-7
    )


REDUCTIONS = {"explicit": explicit_logs, "fused": fused_logs}


def exact_operands(trace: BlockTrace, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (B,H,N,d) in the precision that their logits need: float32, or float64 where those are large.

    Subtracting one vector from all keys shifts a row's logits by one number, which softmax does not see. Without the
    mean patch key, the logits are small wherever they differ little, however large their common part is.
    """
    dtype = torch.promote_types(trace.q.dtype, torch.float32)
    q, k = trace.q.to(dtype), trace.k.to(dtype)
    k = k - k[:, :, num_prefix:].mean(2, keepdim=True)
    largest = trace.scale * (q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)).amax()  # Cauchy-Schwarz, per head
    if largest > FLOAT32_LOGITS:
        return trace.q.double(), trace.k.double()
    return q, k


def reduce_attention(trace: BlockTrace, num_prefix: int, has_cls: bool, reduction: str = "auto") -> Reduced:
    """One block's trace -> what each query's attention row amounts to, in float32 or better for any input type.

    Both reductions agree with the definitions in float64 within 1e-5 (nats, or relative for probabilities), whatever
    the logits. "fused" needs a CPU and no logit bias; "auto" takes it where it applies and "explicit" elsewhere.
    Autocast around the caller is ignored. Raises ValueError where the fused reduction is asked for and does not apply.
    """
    obstacle = "this encoder adds a bias to its attention logits" if trace.logit_bias is not None else None
    if trace.q.device.type != "cpu":
        obstacle = f"its kernel runs on the CPU, not on {trace.q.device.type}"
    if reduction == "auto":
        reduction = "explicit" if obstacle else "fused"
    elif reduction == "fused" and obstacle:
        raise ValueError(f"the fused reduction does not apply: {obstacle}; use auto or explicit")

    with torch.autocast(trace.q.device.type, enabled=False):
        q, k = exact_operands(trace, num_prefix)
        logs = REDUCTIONS[reduction](q, k, trace.scale, trace.logit_bias, num_prefix)
        lse = torch.cat([logs.patches[..., None], logs.prefix], dim=-1).logsumexp(-1)
        update, x = (torch.linalg.vector_norm(tokens, dim=-1, dtype=q.dtype) for tokens in (trace.update, trace.x))
        rows = Rows(
            to_self=(logs.own - lse).exp(),
            to_self_relative=(logs.own - logs.patches).exp(),
            to_cls=(logs.prefix[..., 0] - lse).exp() if has_cls else None,
            to_patch=(logs.patches - lse).exp() / (k.shape[2] - num_prefix),
            patch_entropy=logs.patch_entropy,
            update_ratio=(update / x)[:, None],
        )

    def of(queries: int | slice) -> Rows:
        return Rows(*(None if values is None else values[:, :, queries] for values in rows))

    return Reduced(cls=of(0) if has_cls else None, patches=of(slice(num_prefix, None)))


REFERENCES: dict[str, Callable[[int, int], float]] = {  # values for N tokens and M patches, by the name figures print
    "1": lambda n, m: 1.0,
    "1/N": lambda n, m: 1 / n,
    "1/M": lambda n, m: 1 / m,
    "ln M": lambda n, m: math.log(m),
}


class Metric(NamedTuple):
    """A number per image and head, never negative; `upper` and `uniform` name entries of REFERENCES."""

    unit: str
    definition: str  # in the letters of LEGEND
    source: str  # where the paper shows it
    needs_cls: bool
    upper: str | None  # largest possible value
    uniform: str | None  # value where every key gets the same attention
    compute: Callable[[Reduced], Tensor]  # (B,H), or (B,1) where it is not defined per head


LEGEND = (
    "i, j, k run over the patches, 0 is [cls]; A_ij is the attention of query i to key j, softmax over all N tokens; "
    "a'_ij = A_ij / Σ_k A_ik; H(a) = -Σ_j a_j ln a_j; x_i enters the block, update_i is what attention adds to it "
    "(before LayerScale)"
)
LOGGED = "logged by the paper's code"
METRICS = {
    "cls_self_attention": Metric("probability", "A_00", "Fig. 3, 10", True, "1", "1/N", lambda r: r.cls.to_self),
    "patch_self_attention": Metric(
        "probability", "mean_i A_ii", LOGGED, False, "1", "1/N", lambda r: r.patches.to_self.mean(2)
    ),
    "cls_self_attention_relative": Metric(
        "ratio", "A_00 / Σ_j A_0j", LOGGED, True, None, "1/M", lambda r: r.cls.to_self_relative
    ),
    "patch_self_attention_relative": Metric(
        "probability", "mean_i a'_ii", "Fig. 5, 12", False, "1", "1/M", lambda r: r.patches.to_self_relative.mean(2)
    ),
    "cls_patch_attention": Metric("probability", "mean_j A_0j", LOGGED, True, "1/M", "1/N", lambda r: r.cls.to_patch),
    "patch_cls_attention": Metric(
        "probability", "mean_i A_i0", LOGGED, True, "1", "1/N", lambda r: r.patches.to_cls.mean(2)
    ),
    "cls_patch_entropy": Metric(
        "nats", "H(a'_0)", "Fig. 4, 11; Table 3", True, "ln M", "ln M", lambda r: r.cls.patch_entropy
    ),
    "patch_patch_entropy": Metric(
        "nats", "mean_i H(a'_i)", "Fig. 6, 13", False, "ln M", "ln M", lambda r: r.patches.patch_entropy.mean(2)
    ),
    "cls_update_ratio": Metric("ratio", "|update_0| / |x_0|", LOGGED, True, None, None, lambda r: r.cls.update_ratio),
    "patch_update_ratio": Metric(
        "ratio", "mean_i |update_i| / |x_i|", LOGGED, False, None, None, lambda r: r.patches.update_ratio.mean(2)
    ),
}
# Figs. 3 to 6 and 10 to 13, in this order
PAPER_METRICS = ("cls_self_attention", "cls_patch_entropy", "patch_self_attention_relative", "patch_patch_entropy")


@dataclass
class Moments:
    """Mean and standard deviation over images, streaming in float64: of the average over heads, and of each head.

    The result does not depend on how the images are split into batches or ranks (to rounding, about 1e-15 relative).
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count: int = 0
    mean: Tensor | float = 0.0  # (1 + H,) the average over heads, then each head
    squares: Tensor | float = 0.0  # (1 + H,) sum of squared deviations from the mean

    def update(self, values: Tensor) -> None:
        """Add one batch of at least one image, (B,H)."""
        values = values.double()
        values = torch.cat([values.mean(1, keepdim=True), values], dim=1)
        mean = values.mean(0)
        self.merge(Moments(len(values), mean, (values - mean).square().sum(0)))

    def merge(self, other: "Moments") -> None:
        """Add the images that another has seen; either may have seen none."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        self.count = count

    def all_reduce(self) -> None:
        """Merge the images of all ranks, in the order of the ranks: the same bits everywhere, and in every run."""
        if not dist.is_initialized():
            return
        mine = (self.count, torch.as_tensor(self.mean).cpu(), torch.as_tensor(self.squares).cpu())
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        total = Moments()
        for rank in ranks:
            total.merge(Moments(*rank))
        self.count, self.mean, self.squares = total.count, total.mean, total.squares

    def to_json(self) -> dict:
        """Standard deviations are over the images (population), in the metric's unit."""
        mean, *mean_per_head = self.mean.tolist()
        std, *std_per_head = (self.squares / self.count).sqrt().tolist()
        return {
            "count": self.count,
            "mean": mean,
            "std": std,
            "mean_per_head": mean_per_head,
            "std_per_head": std_per_head,
        }
