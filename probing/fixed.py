"""Poolings without parameters: [cls], means, and the fixed weightings of the paper's Table 6.

Letters: B images, H attention heads, M patches, D width.
"""

import torch
from torch import Tensor

from models_vit import Features
from probing.pooling import Needs, Pooled, Pooling, Tokens


class Vector(Pooling):
    """[cls], [cls] and mean patch concatenated (both), or an own output of the model; no weights."""

    weighs = False

    def __init__(self, tokens: Tokens, output: str):
        widths = {"cls": tokens.width, "both": 2 * tokens.width, **tokens.pooled}
        if output not in widths:
            own = ", ".join(tokens.pooled) or "no pooling of its own"
            raise ValueError(f"head {output}: this encoder has {own}; choose another head")
        super().__init__(widths[output])
        self.output, self.needs = output, Needs(pooled=output in tokens.pooled)

    def forward(self, features: Features) -> Pooled:
        if self.needs.pooled:
            return Pooled(features.pooled[self.output], None)
        means = [features.patches.mean(1)] * (self.output == "both")
        return Pooled(torch.cat([features.cls, *means], dim=1), None)


class MeanPatch(Pooling):
    """The mean of the patch tokens; weights (B,M), all 1/M."""

    def __init__(self, tokens: Tokens):
        super().__init__(tokens.width)

    def forward(self, features: Features) -> Pooled:
        M = features.patches.shape[1]
        return Pooled(features.patches.mean(1), features.patches.new_full((len(features.patches), M), 1 / M))


class FixedWeights(Pooling):
    """sum_j w_j x_j over the patches; weights (B,M).

    w is what a subclass's `raw(features)` returns, (B,M) of any positive sum, divided by its sum (decision D21 of the
    reproduction). scale "release": the vector is the published code's; see `released`. The weights returned have a sum
    of 1 in either case.
    """

    def __init__(self, tokens: Tokens, scale: str = "sum"):
        super().__init__(tokens.width)
        self.scale = scale

    def released(self, weights: Tensor, raw: Tensor) -> Tensor:
        """(B,M) factors of the tokens in the published code's sum."""
        return weights

    def forward(self, features: Features) -> Pooled:
        raw = self.raw(features)
        weights = raw / raw.sum(1, keepdim=True)
        factors = self.released(weights, raw) if self.scale == "release" else weights
        return Pooled(torch.einsum("bm,bmd->bd", factors.to(features.patches.dtype), features.patches), weights)


class ClsAttention(FixedWeights):
    """Weights: the [cls] attention of one head of the block, of their "mean", or of the "sharpest" in each image, whose
    attention over patches has the lowest entropy."""

    needs = Needs(cls_attention=True)

    def __init__(self, tokens: Tokens, head: int | str):
        super().__init__(tokens)
        self.head = head

    def raw(self, features: Features) -> Tensor:
        attention = features.cls_attention
        if self.head == "mean":
            return attention.mean(1)
        if self.head != "sharpest":
            return attention[:, self.head]
        entropy = torch.special.entr(attention / attention.sum(-1, keepdim=True)).sum(-1)
        chosen = entropy.nan_to_num(nan=torch.inf).argmin(1)  # (B,); NaN: a head that attends to no patch
        return attention[torch.arange(len(attention), device=attention.device), chosen]


def central_cells(grid: tuple[int, int], size: int) -> list[int]:
    """Indices (row-major) of the size x size patches in the middle of a grid.

    They start at row g/2 - ceil(size/2), likewise columns: in a 14 x 14 grid, size 1 is cell (6, 6) and size 2 the
    centre. With an odd side, size 1 is the middle row. ValueError if they do not fit.
    """
    if not 1 <= size <= min(grid):
        raise ValueError(f"{size} x {size} central patches do not fit in a grid of {grid[0]} x {grid[1]}")
    rows, columns = ([(side + 1) // 2 - (size + 1) // 2 + i for i in range(size)] for side in grid)
    return [row * grid[1] + column for row in rows for column in columns]


class PatchAttention(FixedWeights):
    """Weights: the attention of the size x size central patches, or of all (0), to all patches, averaged over them and
    heads.

    The release averages the weighted tokens instead of summing them: a factor 1/M.
    """

    def __init__(self, tokens: Tokens, size: int = 1, scale: str = "sum"):
        super().__init__(tokens, scale)
        rows, columns = tokens.grid
        self.cells = central_cells(tokens.grid, size) if size else list(range(rows * columns))
        self.needs = Needs(cells=frozenset(self.cells))

    def raw(self, features: Features) -> Tensor:
        return torch.stack([features.patch_attention[cell].mean(1) for cell in self.cells]).mean(0)

    def released(self, weights: Tensor, raw: Tensor) -> Tensor:
        return weights / weights.shape[1]


class CentralPatches(FixedWeights):
    """The mean of the size x size central patch tokens."""

    def __init__(self, tokens: Tokens, size: int = 1):
        super().__init__(tokens)
        weights = torch.zeros(tokens.grid[0] * tokens.grid[1])
        weights[central_cells(tokens.grid, size)] = 1.0
        self.register_buffer("cells", weights, persistent=False)

    def raw(self, features: Features) -> Tensor:
        return self.cells.expand(len(features.patches), -1)


class OracleAttention(FixedWeights):
    """Weights: the mean [cls] attention of another encoder's last block (in the paper, DINO's).

    The release does not normalise it, and averages the weighted tokens instead of summing them: a factor 1/M.
    """

    needs = Needs(oracle=True)

    def raw(self, features: Features) -> Tensor:
        return features.oracle

    def released(self, weights: Tensor, raw: Tensor) -> Tensor:
        return raw / raw.shape[1]
