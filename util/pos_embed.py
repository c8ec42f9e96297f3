"""Positions: MAE's sine-cosine table, BEiT's relative table, CAPI's coordinates; and their resampling."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(width: int, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Fixed 2-D sine-cosine table, (1, num_prefix + M, width) in float32; the prefix rows are zero.

    The first half of the channels encodes the column, the second the row, as in MAE; each half holds the sines
    of all frequencies 10000^(-2i/(width/2)), then the cosines.
    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022; Vaswani et al., 2017, section 3.5.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine position embedding needs a width divisible by 4, not {width}")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    sides = [torch.arange(size, dtype=torch.float64) for size in grid]
    row, column = torch.meshgrid(*sides, indexing="ij")
    angles = [position.flatten()[:, None] * omega for position in (column, row)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([patches.new_zeros(num_prefix, width), patches])[None].float()


def resample_pos_embed(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix: int, rule: str = "antialias"
) -> Tensor:
    """The table (1, num_prefix + M_old, D) for another grid: (1, num_prefix + M_new, D), same dtype.

    Patch rows are resampled bicubically in float32, by the rule of the authors' code; prefix rows stay.
    "antialias": timm's, to the bit (and DINOv2's with registers). "plain": without antialiasing (MAE, I-JEPA, MSN).
    "offset": plain, with 0.1 added to the new sizes in the scale factor (DINO, iBOT, DINOv2).
    "unknown": ValueError, because the weights may be of several families with different rules.
    """
    if old == new:
        return table
    if rule == "unknown":
        raise ValueError(
            f"the weights have positions for {old[0]} x {old[1]} patches, the images {new[0]} x {new[1]}: the possible "
            "families resample them differently; name one with --family (scripts/inspect_checkpoint.py lists them)"
        )
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    patches = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if rule == "offset":
        scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        patches = F.interpolate(patches, size=new, mode="bicubic", antialias=rule == "antialias")
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


# ---- relative positions


@functools.lru_cache(maxsize=8)
def relative_index(grid: tuple[int, int]) -> Tensor:
    """Row of a relative-position table for each pair of tokens, (N,N), query first; [cls] precedes the patches.

    The table has (2 rows - 1)(2 columns - 1) rows, one per offset query - key, then three: [cls] to patch, patch to
    [cls], [cls] to itself. Source: Bao et al., "BEiT", 2022, after Liu et al., "Swin Transformer", 2021.
    """
    rows, columns = grid
    sides = [torch.arange(size, device="cpu") for size in grid]
    row, column = (axis.flatten() for axis in torch.meshgrid(*sides, indexing="ij"))
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(down * (2 * columns - 1) + right, (1, 0, 1, 0))
    index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def resample_relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative-position table (offsets + 3, H) for another grid; the rows of [cls] stay.

    As in BEiT's and SimMIM's fine-tuning: a bicubic spline through the old values, placed at distances that grow
    geometrically from the centre, which keeps near offsets and stretches far ones.
    """
    if old == new:
        return table
    spans = [(2 * o - 1, 2 * n - 1) for o, n in zip(old, new, strict=True)]
    down, right = (relative_spline(*span).to(table.device) for span in spans)
    values = table[:-3].double().reshape(spans[0][0], spans[1][0], -1)
    values = torch.einsum("ai,bj,ijh->abh", down, right, values).flatten(0, 1)
    return torch.cat([values.to(table.dtype), table[-3:]])


@functools.lru_cache(maxsize=8)
def relative_spline(old: int, new: int) -> Tensor:
    """Matrix (new, old) in float64 that resamples values at `old` offsets of one axis to `new` ones.

    The spline is cubic and "not-a-knot".
    """
    from scipy.interpolate import CubicSpline

    low, high = 1.01, 1.5  # ratio of neighbouring distances, found by bisection as in BEiT
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    far = [(1 - ratio**k) / (1 - ratio) for k in range(1, old // 2 + 1)]
    knots, points = [-x for x in reversed(far)] + [0.0] + far, [float(i - new // 2) for i in range(new)]
    spline = CubicSpline(knots, torch.eye(old, dtype=torch.float64).numpy(), bc_type="not-a-knot")
    return torch.from_numpy(spline([min(max(point, knots[0]), knots[-1]) for point in points]))


# ---- rotary positions


def rotary_frequencies(width: int) -> Tensor:
    """Angular frequencies (2, width) of CAPI's axial rotary embedding: of the token's row, then of its column.

    Each axis has width / 4 frequencies, from 7 down to 7e-4 turns per image side, each for a pair of channels.
    """
    turns = 7.0 * 1e4 ** -torch.linspace(0, 1, width // 4)
    frequencies = torch.zeros(2, width)
    frequencies[0, : width // 2] = frequencies[1, width // 2 :] = 2 * math.pi * torch.cat([turns, turns])
    return frequencies


@functools.lru_cache(maxsize=8)
def rotary_coordinates(grid: tuple[int, int], num_registers: int) -> Tensor:
    """(row, column) of registers and patches in the unit square, (R + M, 2).

    Patches span it from 0 to 1 in any grid; registers lie on its edge, a quarter of them along each side.
    Source: Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling" (CAPI), 2025.
    """
    if num_registers % 4:
        raise ValueError(f"{num_registers} registers cannot be shared among the four edges: take a multiple of 4")
    patches = torch.cartesian_prod(*(torch.linspace(0, 1, size, device="cpu") for size in grid))
    c = torch.arange(num_registers // 4, device="cpu") / max(num_registers // 4, 1)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    edge = torch.cat([torch.stack(side, dim=1) for side in ((c, zero), (one, c), (1 - c, one), (zero, 1 - c))])
    return torch.cat([edge * patches.amax(0), patches])
