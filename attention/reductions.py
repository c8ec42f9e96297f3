"""Sums over attention rows and columns without an attention matrix: the definitions, computed in two faster ways.

"explicit" states the definitions (attention/explicit.py, which explains the letters). On the CPU, "tiled" makes few
passes over as many logits as fit the cache. On CUDA, "triton" is one kernel (attention/kernel.py). No epsilon is added
anywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

from attention.explicit import Operands, Sums, explicit_sums, patch_distances
from util.lazy import lazy

torch = lazy("torch")
kernel = lazy("attention.kernel")  # needs triton, which PyTorch brings for CUDA only

# Measured on 2 cores with 1 MiB of second-level cache each, ViT-B at 224 pixels: 15.2, 8.2, 6.8, 7.6 ms for 8 images
# with tiles of 1/4, 1, 2 and 4 MiB, where one call of fused attention takes 9.8 ms.
TILE_BYTES = 2 * 2**20

# The rounding of the logits limits float32: errors (nats, or relative for probabilities) measured at d = 64 grow with
# the largest logit, by up to 6e-7 times it where q is parallel to k. Heads beyond this value are reduced in float64.
FLOAT32_LOGITS = 12.0


def tiled_sums(operands: Operands) -> Sums:
    """The sums, tile by tile: a few heads, or a part of the queries, whose logits stay in the cache until summed.

    With p the softmax of a row,  lse = s_ij - ln p_ij  for any j, best for the largest, and entropy = lse - sum p s.
    """
    q, k, scale, bias, P, grid, distance, received = operands
    B, H, N = q.shape[:3]
    q, keys = q * scale, k.transpose(-2, -1)
    own, patches, patch_entropy = (q.new_empty(B, H, N) for _ in range(3))
    prefix = q.new_empty(B, H, N, P)
    reach = q.new_empty(B, H, N - P) if distance else None
    columns = q.new_zeros(B, H, N - P) if received else None
    capacity = max(TILE_BYTES // (N * q.element_size()), 1)  # in queries
    for queries in parts(N, capacity):
        start, stop = queries.start, min(queries.stop, N)
        rows = slice(max(start - P, 0), max(stop - P, 0))  # of the queries, those that are patches
        distances = patch_distances(grid, rows, q.device).to(q.dtype) if distance else None
        for images, heads in itertools.product(parts(B, capacity // (N * H)), parts(H, capacity // N)):
            tile, of_tile = (images, heads, queries), keys[images, heads]
            # two products, so that the one the softmax reads is contiguous
            to_prefix, to_patches = q[tile] @ of_tile[..., :P], q[tile] @ of_tile[..., P:]
            if bias is not None:
                to_prefix += bias[heads, queries, :P]
                to_patches += bias[heads, queries, P:]
            prefix[tile] = to_prefix
            diagonals = to_prefix.diagonal(start, -2, -1), to_patches.diagonal(start - P, -2, -1)
            own[tile] = torch.cat(diagonals, dim=-1)
            p = to_patches.softmax(-1)
            patches[tile] = to_patches.amax(-1) - p.amax(-1).log_()
            of_patches = p[:, :, max(P - start, 0) :]
            if distance:
                reach[images, heads, rows] = torch.linalg.vecdot(of_patches, distances)
            if received:
                columns[images, heads] += of_patches.sum(2)
            patch_entropy[tile] = patches[tile] - p.mul_(to_patches).sum(-1)
    # rounding can leave the entropy of a one-hot row at -1e-7
    return Sums(own, prefix, patches, patch_entropy.clamp_(min=0), reach, columns)


def parts(length: int, size: int) -> list[slice]:
    """Slices of `size`, but at least 1, that cover a length."""
    return [slice(start, start + max(size, 1)) for start in range(0, length, max(size, 1))]


REDUCTIONS: dict[str, Callable[[Operands], Sums]] = {
    "explicit": explicit_sums,
    "tiled": tiled_sums,
    "triton": lambda operands: kernel.kernel_sums(operands),
}


def choose_reduction(reduction: str, device: torch.device) -> str:
    """The reduction for a device; "auto" is the fastest. ValueError if it cannot run there."""
    has_triton = importlib.util.find_spec("triton") is not None
    fastest = {"cpu": "tiled", "cuda": "triton" if has_triton else "explicit"}.get(device.type, "explicit")
    if reduction == "auto":
        return fastest
    if reduction not in ("explicit", fastest):
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
    reduction = choose_reduction(reduction, q.device)
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
