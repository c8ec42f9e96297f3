"""Sums over attention rows (and columns) without an attention matrix: one definition, three ways to compute it.

Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), M patches on a grid, H heads,
d head width. Query i meets key j with the logit s_ij; p_ij is the softmax of s_ij over the patch keys j alone.

"explicit" states the definitions, some queries at a time. On the CPU, "tiled" makes the same sums in few passes over
the logits of heads that fit its cache, and "fused" makes them for longer sequences out of calls of fused attention. On
CUDA, "triton" is one kernel (attention/kernel.py). No epsilon is added anywhere.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches
QUERY_CHUNK = 64  # queries per explicit step
# Measured on 2 cores with 1 MiB of second-level cache each, ViT-B at 224 pixels: 15.2, 8.2, 6.8, 7.6 ms for 8 images
# with tiles of 1/4, 1, 2 and 4 MiB, where one call of fused attention takes 9.8 ms.
# Beyond one head per tile, fused attention is faster: 350 ms instead of 700 for one image of 4,096 patches.
TILE_BYTES = 2 * 2**20

# The rounding of the logits limits float32: errors (nats, or relative for probabilities) measured at d = 64 grow with
# the largest logit, by up to 6e-7 times it where q is parallel to k. Heads beyond this value are reduced in float64.
FLOAT32_LOGITS = 12.0


class Sums(NamedTuple):
    """What is summed up for every query or key, up to one shift per query that is common to all its logits."""

    own: Tensor  # (B,H,N) s_ii
    prefix: Tensor  # (B,H,N,P) s_ij of the prefix keys
    patches: Tensor  # (B,H,N) log-sum-exp of s_ij over the patch keys
    patch_entropy: Tensor  # (B,H,N) nats; - sum_j p_ij ln p_ij
    distance: Tensor | None = None  # (B,H,M) of the patch queries, in patches; sum_j p_ij |r_i - r_j|
    received: Tensor | None = None  # (B,H,M) of the patch keys; sum of p_ij over the patch queries i


def patch_distances(grid: Grid, rows: slice = slice(None), device: torch.device | str = "cpu") -> Tensor:
    """(m,M) Euclidean distances from the patches `rows` of a row-major grid to all, in patches; float64."""
    axes = (torch.arange(side, dtype=torch.float64, device=device) for side in grid)
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cdist(centres[rows], centres, compute_mode="donot_use_mm_for_euclid_dist")


def explicit_sums(
    q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int, grid: Grid,
    distance: bool = False, received: bool = False,
) -> Sums:  # fmt: skip
    """The definitions, on the logits of some queries at a time."""
    chunks, columns = [], None
    for start in range(0, q.shape[2], QUERY_CHUNK):
        queries = slice(start, start + QUERY_CHUNK)
        logits = q[:, :, queries] @ k.transpose(-2, -1) * scale
        if logit_bias is not None:
            logits = logits + logit_bias[:, queries].to(logits.dtype)
        own = logits.diagonal(offset=start, dim1=-2, dim2=-1)
        prefix, patches = logits.split([num_prefix, logits.shape[-1] - num_prefix], dim=-1)
        lse = patches.logsumexp(-1)
        attention = (patches - lse[..., None]).exp()
        entropy = torch.special.entr(attention).sum(-1)
        of_patches = attention[:, :, max(num_prefix - start, 0) :]
        reach = None
        if distance:
            first = max(start - num_prefix, 0)
            rows = slice(first, first + of_patches.shape[2])
            reach = (of_patches * patch_distances(grid, rows, q.device).to(q.dtype)).sum(-1)
        if received:
            columns = of_patches.sum(2) if columns is None else columns + of_patches.sum(2)
        # a view would keep the chunk's logits alive
        chunks.append(Sums(own.clone(), prefix.clone(), lse, entropy, reach))
    parts = zip(*chunks, strict=True)
    joined = [None if part[0] is None else torch.cat(part, dim=2) for part in parts]
    return Sums(*joined)._replace(received=columns)


def tiled_sums(
    q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int, grid: Grid,
    distance: bool = False, received: bool = False,
) -> Sums:  # fmt: skip
    """The same, a few heads at a time, whose logits stay in the cache from the product to the last sum over them.

    With p the softmax of a row,  lse = s_ij - ln p_ij  for any j, best for the largest, and entropy = lse - sum p s.
    """
    (B, H, N), P = q.shape[:3], num_prefix
    distances = patch_distances(grid, device=q.device).to(q.dtype) if distance else None
    q, keys = q * scale, k.transpose(-2, -1)
    own, patches, patch_entropy = (q.new_empty(B, H, N) for _ in range(3))
    prefix = q.new_empty(B, H, N, P)
    reach, columns = (q.new_empty(B, H, N - P) if wanted else None for wanted in (distance, received))
    for tile in tiles(B, H, N * N * q.element_size()):
        # two products, so that the one the softmax reads is contiguous
        to_prefix, to_patches = q[tile] @ keys[tile][..., :P], q[tile] @ keys[tile][..., P:]
        if logit_bias is not None:
            to_prefix += logit_bias[tile[1], :, :P]
            to_patches += logit_bias[tile[1], :, P:]
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
    together = max(TILE_BYTES // head_bytes, 1)
    images, heads = max(together // H, 1), min(together, H)
    for image, head in itertools.product(range(0, B, images), range(0, H, heads)):
        yield slice(image, image + images), slice(head, head + heads)


def fused_sums(
    q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int, grid: Grid,
    distance: bool = False, received: bool = False,
) -> Sums:  # fmt: skip
    """The same in O(N d) memory, from fused attention over the patch keys: it returns lse_i and sum_j p_ij v_j.

    With the keys as values,  entropy_i = lse_i - sum_j p_ij s_ij = lse_i - scale q_i . sum_j p_ij k_j - sum_j p_ij b_ij
    (b the logit bias). With the roles exchanged and -lse_i added to the logits of query i, now a key, the log-sum-exp
    that is returned for key j is the logarithm of sum_i p_ij.
    """
    patches = k[:, :, num_prefix:]
    own, prefix = (q * k).sum(-1) * scale, q @ k[:, :, :num_prefix].transpose(-2, -1) * scale
    bias = None
    if logit_bias is not None:
        bias = logit_bias.to(q.dtype)
        own, prefix = own + bias.diagonal(dim1=-2, dim2=-1), prefix + bias[:, :, :num_prefix]
        bias = bias_to_patches = bias[:, :, num_prefix:]
    mean_key, lse = fused_attention(q, patches, patches, scale, bias)
    entropy = lse - (q * mean_key).sum(-1) * scale
    if bias is not None:
        entropy = entropy - expectation(q, patches, scale, bias, lambda rows: bias_to_patches[:, rows])

    reach = columns = None
    queries, bias = q[:, :, num_prefix:], None if bias is None else bias[:, num_prefix:]
    if distance:
        reach = expectation(queries, patches, scale, bias, lambda rows: patch_distances(grid, rows)[None])
    if received:
        # the shift of query i is one more channel of it, and a 1 of every key: as a mask it would be of size N x N
        shifted = torch.cat([queries, -lse[:, :, num_prefix:, None] / scale], dim=-1)
        keys = F.pad(patches, (0, 1), value=1.0)
        columns = fused_attention(keys, shifted, shifted, scale, None if bias is None else bias.mT)[1].exp()
    # rounding can leave the entropy of a one-hot row at -1e-7
    return Sums(own, prefix, lse, entropy.clamp(min=0), reach, columns)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B,H,Q,d), (B,H,K,d), (B,H,K,d), addition to the logits -> mean value (B,H,Q,d), log-sum-exp (B,H,Q)."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def expectation(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, values: Callable[[slice], Tensor]) -> Tensor:
    """sum_j p_ij v_ij for values that differ by query, `values(queries)` (1 or H,q,K): (B,H,Q).

    The values of d queries are the columns of the d-wide value vectors of one fused call, whose output has what is
    wanted on its diagonal: in all, the arithmetic of one attention, and nothing of the size of its matrix.
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


def triton_sums(*operands) -> Sums:
    """The same from one pass of a Triton kernel over the keys."""
    from attention.kernel import attention_sums  # needs triton, which comes with PyTorch for CUDA only

    return attention_sums(*operands)


REDUCTIONS: dict[str, Callable[..., Sums]] = {
    "explicit": explicit_sums,
    "tiled": tiled_sums,
    "fused": fused_sums,
    "triton": triton_sums,
}


def choose_reduction(reduction: str, device: torch.device, tokens: int = 0) -> str:
    """The reduction for a device and a number of tokens: "auto" is the fastest. ValueError for one that cannot run."""
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
        raise ValueError(f"--reduction {reduction} does not run on {device.type}{reason}: use auto or explicit")
    return reduction


def attention_sums(
    q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int, grid: Grid,
    distance: bool = False, received: bool = False, reduction: str = "auto",
) -> Sums:  # fmt: skip
    """Queries and keys (B,H,N,d) -> Sums in float64, as exact as their type deserves.

    All reductions accumulate in float32 or better. Of float32 (and wider) inputs, heads of an image whose logits are so
    large that float32 would err by more than 1e-5 (nats, or relative for probabilities) are reduced in float64; float16
    and bfloat16 inputs have lost more than that already. Autocast around the caller is ignored.
    Raises ValueError for a reduction that does not run on the device of the inputs.
    """
    reduction = choose_reduction(reduction, q.device, q.shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    if reduction == "triton" and dtype == torch.float64:
        reduction = "explicit"  # the kernel has no float64
    with torch.autocast(q.device.type, enabled=False):
        wide_q, wide_k = q, k
        if reduction != "triton" or q.dtype == torch.float32:  # the kernel converts half precision as it loads
            wide_q, wide_k = q.to(dtype), k.to(dtype)
            # One vector taken from all keys shifts a row's logits by one number, which softmax does not see. Without
            # the mean patch key, logits are small where they differ little, however large their common part is.
            wide_k = wide_k - wide_k[:, :, num_prefix:].mean(2, keepdim=True)
        operands = (wide_q, wide_k, scale, logit_bias, num_prefix, grid, distance, received)
        sums = REDUCTIONS[reduction](*operands)
        sums = Sums(*(None if part is None else part.double() for part in sums))
        if q.dtype == torch.float32:
            refine(sums, q, k, scale, logit_bias, num_prefix, grid, distance, received, reduction)
    return sums


def refine(sums: Sums, q, k, scale, logit_bias, num_prefix, grid, distance, received, reduction) -> None:
    """Replace in place what float32 cannot say exactly, heads of an image with large logits, by the same in float64."""
    largest = sums.patches.abs().amax(-1)  # a log-sum-exp is no smaller than the largest logit
    for logits in (sums.own, sums.prefix.flatten(2)):
        if logits.shape[-1]:
            largest = torch.maximum(largest, logits.abs().amax(-1))
    inexact = ~(largest <= FLOAT32_LOGITS)  # NaN is not exact either
    if not inexact.any():
        return
    in_float64 = REDUCTIONS["explicit" if reduction == "triton" else reduction]
    for head in inexact.any(0).nonzero().flatten().tolist():
        images = inexact[:, head].nonzero().flatten()
        pair = (tokens[images, head : head + 1].double() for tokens in (q, k))
        bias = None if logit_bias is None else logit_bias[head : head + 1].double()
        exact = in_float64(*pair, scale, bias, num_prefix, grid, distance, received)
        for part, replacement in zip(sums, exact, strict=True):
            if part is not None:
                part[images, head] = replacement[:, 0]
