"""Sums over attention rows and columns without an attention matrix: the definitions, computed in three faster ways.

"explicit" states the definitions (attention/explicit.py, which explains the letters). On the CPU, "tiled" makes few
passes over the logits of as many heads as fit the cache; "fused" makes the same sums of longer sequences out of calls
of fused attention. On CUDA, "triton" is one kernel (attention/kernel.py). No epsilon is added anywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from attention.explicit import Operands, Sums, explicit_sums, patch_distances
from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor
torch = lazy("torch")
F = lazy("torch.nn.functional")

# Measured on 2 cores with 1 MiB of second-level cache each, ViT-B at 224 pixels: 15.2, 8.2, 6.8, 7.6 ms for 8 images
# with tiles of 1/4, 1, 2 and 4 MiB, where one call of fused attention takes 9.8 ms.
# Beyond one head per tile, fused attention is faster: 350 ms instead of 700 for one image of 4,096 patches.
TILE_BYTES = 2 * 2**20

# The rounding of the logits limits float32: errors (nats, or relative for probabilities) measured at d = 64 grow with
# the largest logit, by up to 6e-7 times it where q is parallel to k. Heads beyond this value are reduced in float64.
FLOAT32_LOGITS = 12.0


def tiled_sums(operands: Operands) -> Sums:
    """The sums, a few heads at a time, whose logits stay in the cache from the product to the last sum over them.

    With p the softmax of a row,  lse = s_ij - ln p_ij  for any j, best for the largest, and entropy = lse - sum p s.
    """
    q, k, scale, bias, P, grid, distance, received = operands
    B, H, N = q.shape[:3]
    distances = patch_distances(grid, device=q.device).to(q.dtype) if distance else None
    q, keys = q * scale, k.transpose(-2, -1)
    own, patches, patch_entropy = (q.new_empty(B, H, N) for _ in range(3))
    prefix = q.new_empty(B, H, N, P)
    reach, columns = (q.new_empty(B, H, N - P) if wanted else None for wanted in (distance, received))
    for tile in tiles(B, H, N * N * q.element_size()):
        # two products, so that the one the softmax reads is contiguous
        to_prefix, to_patches = q[tile] @ keys[tile][..., :P], q[tile] @ keys[tile][..., P:]
        if bias is not None:
            to_prefix += bias[tile[1], :, :P]
            to_patches += bias[tile[1], :, P:]
        prefix[tile] = to_prefix
        own[tile][..., :P] = to_prefix.diagonal(dim1=-2, dim2=-1)
        own[tile][..., P:] = to_patches[:, :, P:].diagonal(dim1=-2, dim2=-1)
        p = to_patches.softmax(-1)
        patches[tile] = to_patches.amax(-1) - p.amax(-1).log_()
        if distance:
            reach[tile] = torch.linalg.vecdot(p[:, :, P:], distances)
        if received:
            columns[tile] = p[:, :, P:].sum(2)
        patch_entropy[tile] = patches[tile] - p.mul_(to_patches).sum(-1)
    # rounding can leave the entropy of a one-hot row at -1e-7
    return Sums(own, prefix, patches, patch_entropy.clamp_(min=0), reach, columns)


def tiles(B: int, H: int, head_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut B images of H heads into (images, heads) of at most TILE_BYTES, or of one head if that is larger."""
    capacity = max(TILE_BYTES // head_bytes, 1)
    images, heads = max(capacity // H, 1), min(capacity, H)
    for image, head in itertools.product(range(0, B, images), range(0, H, heads)):
        yield slice(image, image + images), slice(head, head + heads)


def fused_sums(operands: Operands) -> Sums:
    """The sums in O(N d) memory, from fused attention over the patch keys: it returns lse_i and sum_j p_ij v_j.

    With the keys as values,  entropy_i = lse_i - sum_j p_ij s_ij = lse_i - scale q_i . sum_j p_ij k_j - sum_j p_ij b_ij
    (b the logit bias). With the roles exchanged and -lse_i added to the logits of query i, now a key, the log-sum-exp
    that is returned for key j is the logarithm of sum_i p_ij.
    """
    q, k, scale, bias, P, grid, distance, received = operands
    patches = k[:, :, P:]
    own, prefix = (q * k).sum(-1) * scale, q @ k[:, :, :P].transpose(-2, -1) * scale
    if bias is not None:
        bias = bias.to(q.dtype)
        own, prefix = own + bias.diagonal(dim1=-2, dim2=-1), prefix + bias[:, :, :P]
        bias = bias[:, :, P:]
    mean_key, lse = fused_attention(q, patches, patches, scale, bias)
    entropy = lse - (q * mean_key).sum(-1) * scale
    if bias is not None:
        entropy = entropy - expectation(q, patches, scale, bias, lambda rows: bias[:, rows])

    reach = columns = None
    queries, patch_bias = q[:, :, P:], None if bias is None else bias[:, P:]
    if distance:
        reach = expectation(queries, patches, scale, patch_bias, lambda rows: patch_distances(grid, rows)[None])
    if received:
        # the shift of query i is one more channel of it, and a 1 of every key: as a mask it would be of size N x N
        shifted = torch.cat([queries, -lse[:, :, P:, None] / scale], dim=-1)
        keys = F.pad(patches, (0, 1), value=1.0)
        mask = None if patch_bias is None else patch_bias.mT
        columns = fused_attention(keys, shifted, shifted, scale, mask)[1].exp()
    # rounding can leave the entropy of a one-hot row at -1e-7
    return Sums(own, prefix, lse, entropy.clamp(min=0), reach, columns)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B,H,Q,d), (B,H,K,d), (B,H,K,d), addition to the logits -> mean value (B,H,Q,d), log-sum-exp (B,H,Q)."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def expectation(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, values: Callable[[slice], Tensor]) -> Tensor:
    """sum_j p_ij v_ij for values that differ by query, `values(queries)` (1 or H,q,K): (B,H,Q).

    The values of d queries are the columns of the d-wide value vectors of one fused call, and the diagonal of its
    output is the result: in all, the arithmetic of one attention, and nothing of the size of its matrix.
    """
    length, width = q.shape[2:]
    parts = []
    for start in range(0, length, width):
        rows = slice(start, start + width)
        columns = values(rows).transpose(-2, -1).to(q.dtype)
        columns = F.pad(columns, (0, width - columns.shape[-1])).expand(*k.shape[:2], -1, -1)  # the kernel wants d
        mask = None if bias is None else bias[:, rows]
        parts.append(fused_attention(q[:, :, rows], k, columns, scale, mask)[0].diagonal(dim1=-2, dim2=-1))
    return torch.cat(parts, dim=-1)


def triton_sums(operands: Operands) -> Sums:
    """The sums from one pass of a Triton kernel over the keys."""
    from attention.kernel import kernel_sums  # needs triton, which PyTorch brings for CUDA only

    return kernel_sums(operands)


REDUCTIONS: dict[str, Callable[[Operands], Sums]] = {
    "explicit": explicit_sums,
    "tiled": tiled_sums,
    "fused": fused_sums,
    "triton": triton_sums,
}


def choose_reduction(reduction: str, device: torch.device, tokens: int = 0) -> str:
    """The reduction for a device and a number of tokens; "auto" is the fastest. ValueError if it cannot run there."""
    has_triton = importlib.util.find_spec("triton") is not None
    fastest = "explicit"
    if device.type == "cpu":
        fastest = "tiled" if tokens**2 * 4 <= TILE_BYTES else "fused"
    elif device.type == "cuda" and has_triton:
        fastest = "triton"
    possible = {"explicit", fastest} | ({"tiled", "fused"} if device.type == "cpu" else set())
    if reduction == "auto":
        return fastest
    if reduction not in possible:
        reason = " without triton" if reduction == "triton" and device.type == "cuda" else ""
        raise ValueError(f"reduction {reduction} does not run on {device.type}{reason}: use auto or explicit")
    return reduction


def attention_sums(operands: Operands, reduction: str = "auto") -> Sums:
    """The sums in float64, as exact as the type of queries and keys allows.

    All reductions accumulate in float32 or better. Of float32 (and wider) inputs, heads of an image whose logits are so
    large that float32 would err by more than 1e-5 (nats, or relative for probabilities) are reduced in float64; float16
    and bfloat16 inputs have lost more than that already. Autocast around the caller is ignored.
    Raises ValueError for a reduction that does not run on the device of the inputs.
    """
    q, k, P = operands.q, operands.k, operands.num_prefix
    reduction = choose_reduction(reduction, q.device, q.shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    if reduction == "triton" and dtype == torch.float64:
        reduction = "explicit"  # the kernel has no float64
    with torch.autocast(q.device.type, enabled=False):
        wide = operands
        if reduction != "triton" or q.dtype == torch.float32:  # the kernel converts half precision as it loads
            wide_k = k.to(dtype)
            # One vector taken from all keys shifts a row's logits by one number, which softmax does not see. Without
            # the mean patch key, logits are small where they differ little, however large their common part is.
            wide = operands._replace(q=q.to(dtype), k=wide_k - wide_k[:, :, P:].mean(2, keepdim=True))
        sums = REDUCTIONS[reduction](wide)
        sums = Sums(*(None if part is None else part.double() for part in sums))
        if q.dtype == torch.float32:
            refine(sums, operands, REDUCTIONS["explicit" if reduction == "triton" else reduction])
    return sums


def refine(sums: Sums, operands: Operands, reduce: Callable[[Operands], Sums]) -> None:
    """Reduce heads of an image with large logits, of which float32 loses digits, again in float64, in place."""
    largest = sums.patches.abs().amax(-1)  # a log-sum-exp is no smaller than the largest logit
    for logits in (sums.own, sums.prefix.flatten(2)):
        if logits.shape[-1]:
            largest = torch.maximum(largest, logits.abs().amax(-1))
    inexact = ~(largest <= FLOAT32_LOGITS)  # NaN is not exact either
    for head in inexact.any(0).nonzero().flatten().tolist():
        images = inexact[:, head].nonzero().flatten()
        q, k = (tokens[images, head : head + 1].double() for tokens in (operands.q, operands.k))
        bias = None if operands.bias is None else operands.bias[head : head + 1].double()
        exact = reduce(operands._replace(q=q, k=k, bias=bias))
        for part, replacement in zip(sums, exact, strict=True):
            if part is not None:
                part[images, head] = replacement[:, 0]
