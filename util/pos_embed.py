"""Position embeddings: the fixed sine-cosine table of MAE, and resampling of any table to another grid."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(width: int, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Fixed 2-D sine-cosine table, (1, num_prefix + M, width) in float32; the prefix rows are zero.

    Half of the channels encode the column, half the row (in this order, as in MAE's weights); each half holds the sines
    of all frequencies, then the cosines, with frequencies 10000^(-2i/(width/2)).
    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022; Vaswani et al., 2017, section 3.5.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine position embedding needs a width divisible by 4, not {width}")
    rows, columns = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(position: Tensor) -> Tensor:  # (M,) -> (M, width / 2)
        angle = position.flatten()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    patches = torch.cat([encode(column), encode(row)], dim=1)
    return torch.cat([patches.new_zeros(num_prefix, width), patches])[None].float()


def resample_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix: int) -> Tensor:
    """The table (1, num_prefix + M_old, D) for another grid: (1, num_prefix + M_new, D), same dtype.

    Patch rows are resampled bicubically with antialiasing in float32 (timm's rule, to the bit); prefix rows stay.
    """
    if old == new:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    patches = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
