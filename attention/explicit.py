"""Sums over attention rows and columns, as they are defined.

Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), M patches on a grid, H heads,
d head width. Query i meets key j with the logit s_ij = scale q_i . k_j + bias_ij; p_ij is the softmax of s_ij over the
patch keys j alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from util.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor
torch = lazy("torch")

Grid = tuple[int, int]  # rows and columns of patches
QUERY_CHUNK = 64  # queries per step


class Operands(NamedTuple):
    """What the logits are made of, and which optional sums are wanted."""

    q: Tensor  # (B,H,N,d)
    k: Tensor  # (B,H,N,d)
    scale: float
    bias: Tensor | None  # (H,N,N), added to the logits
    num_prefix: int
    grid: Grid
    distance: bool = False
    received: bool = False


class Sums(NamedTuple):
    """Sums for every query or key; one shift per query may be common to all its logits."""

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


def explicit_sums(operands: Operands) -> Sums:
    """The definitions, on the logits of some queries at a time, in the type of the queries."""
    q, k, scale, bias, P, grid, distance, received = operands
    chunks, columns = [], None
    for start in range(0, q.shape[2], QUERY_CHUNK):
        queries = slice(start, start + QUERY_CHUNK)
        logits = q[:, :, queries] @ k.transpose(-2, -1) * scale
        if bias is not None:
            logits = logits + bias[:, queries].to(logits.dtype)
        own = logits.diagonal(offset=start, dim1=-2, dim2=-1)
        prefix, patches = logits.split([P, logits.shape[-1] - P], dim=-1)
        lse = patches.logsumexp(-1)
        attention = (patches - lse[..., None]).exp()
        entropy = torch.special.entr(attention).sum(-1)
        of_patches = attention[:, :, max(P - start, 0) :]
        reach = None
        if distance:
            first = max(start - P, 0)
            distances = patch_distances(grid, slice(first, first + of_patches.shape[2]), q.device)
            reach = (of_patches * distances.to(q.dtype)).sum(-1)
        if received:
            columns = of_patches.sum(2) if columns is None else columns + of_patches.sum(2)
        # a view would keep the chunk's logits alive
        chunks.append(Sums(own.clone(), prefix.clone(), lse, entropy, reach))
    parts = zip(*chunks, strict=True)
    return Sums(*(None if part[0] is None else torch.cat(part, dim=2) for part in parts))._replace(received=columns)
