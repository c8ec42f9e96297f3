"""Sums over attention rows (and columns) without an attention matrix: one definition, three ways to compute it.

Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), M patches on a grid, H heads,
d head width. Query i meets key j with the logit s_ij; p_ij is the softmax of s_ij over the patch keys j alone.

"explicit" states the definitions, some queries at a time. "tiled" makes the same sums on the CPU with few passes over
tiles of logits that fit its cache. "triton" is one kernel on CUDA (attention_triton.py). No epsilon is added anywhere.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches
QUERY_CHUNK = 64  # queries per explicit step
# Measured on 2 cores with 1 MiB of second-level cache each, ViT-B at 224 pixels: 15.2, 8.2, 6.8, 7.6 ms for 8 images
# with tiles of 1/4, 1, 2 and 4 MiB, where one call of fused attention takes 9.8 ms.
TILE_BYTES = 2 * 2**20
MIN_TILE_ROWS = 64

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


def patch_distances(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """(M,M) Euclidean distances between the patches of a row-major grid, in patches; float64."""
    axes = (torch.arange(side, dtype=torch.float64, device=device) for side in grid)
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def explicit_sums(
    q: Tensor, k: Tensor, scale: float, logit_bias: Tensor | None, num_prefix: int, grid: Grid,
    distance: bool = False, received: bool = False,
) -> Sums:  # fmt: skip
    """The definitions, on the logits of some queries at a time."""
    distances = patch_distances(grid, q.device).to(q.dtype) if distance else None
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
            reach = (of_patches * distances[first : first + of_patches.shape[2]]).sum(-1)
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
    """The same, in tiles of logits that stay in a processor's cache from the product to the last sum over them.

    With p the softmax of a row,  lse = s_ij - ln p_ij  for any j, best for the largest, and entropy = lse - sum p s.
    """
    B, H, N = q.shape[:3]
    distances = patch_distances(grid, q.device).to(q.dtype) if distance else None
    q, keys = q * scale, k.transpose(-2, -1)
    own, patches, patch_entropy = (q.new_empty(B, H, N) for _ in range(3))
    prefix = q.new_empty(B, H, N, num_prefix)
    reach = q.new_empty(B, H, N - num_prefix) if distance else None
    columns = q.new_zeros(B, H, N - num_prefix) if received else None
    for images, heads, queries in tiles(B, H, N, q.element_size()):
        tile = (images, heads, queries)
        logits = q[tile] @ keys[images, heads]
        if logit_bias is not None:
            logits += logit_bias[heads, queries]
        own[tile] = logits.diagonal(offset=queries.start, dim1=-2, dim2=-1)
        prefix[tile], to_patches = logits[..., :num_prefix], logits[..., num_prefix:]
        p = to_patches.softmax(-1)
        patches[tile] = to_patches.amax(-1) - p.amax(-1).log_()
        of_patches = p[:, :, max(num_prefix - queries.start, 0) :]
        rows = slice(max(queries.start - num_prefix, 0), max(queries.stop - num_prefix, 0))
        if distance:
            reach[images, heads, rows] = torch.linalg.vecdot(of_patches, distances[rows])
        if received:
            columns[images, heads] += of_patches.sum(2)
        patch_entropy[tile] = patches[tile] - p.mul_(to_patches).sum(-1)
    # rounding can leave the entropy of a one-hot row at -1e-7
    return Sums(own, prefix, patches, patch_entropy.clamp_(min=0), reach, columns)


def tiles(B: int, H: int, N: int, element_size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut B x H matrices of N x N into (images, heads, queries) of at most TILE_BYTES: whole matrices if they fit."""
    rows = max(TILE_BYTES // (N * element_size), MIN_TILE_ROWS)
    heads, images = (rows // N, rows // (N * H)) if rows >= N else (1, 1)
    for image, head, query in itertools.product(
        range(0, B, max(images, 1)), range(0, H, max(heads, 1)), range(0, N, min(rows, N))
    ):
        yield (
            slice(image, min(image + max(images, 1), B)),
            slice(head, min(head + max(heads, 1), H)),
            slice(query, min(query + rows, N)),
        )


def triton_sums(*operands) -> Sums:
    """The same from one pass of a Triton kernel over the keys."""
    from attention_triton import attention_sums  # needs triton, which comes with PyTorch for CUDA only

    return attention_sums(*operands)


REDUCTIONS: dict[str, Callable[..., Sums]] = {"explicit": explicit_sums, "tiled": tiled_sums, "triton": triton_sums}


def choose_reduction(reduction: str, device: torch.device) -> str:
    """The reduction on a device: "auto" is the fastest there. ValueError for one that cannot run."""
    has_triton = importlib.util.find_spec("triton") is not None
    fastest = "tiled" if device.type == "cpu" else "triton" if device.type == "cuda" and has_triton else "explicit"
    if reduction not in ("auto", "explicit", fastest):
        raise ValueError(
            f"--reduction {reduction} does not run on {device.type}"
            f"{'' if has_triton or reduction != 'triton' else ' without triton'}: use auto or explicit"
        )
    return fastest if reduction == "auto" else reduction


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
    reduction = choose_reduction(reduction, q.device)
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
