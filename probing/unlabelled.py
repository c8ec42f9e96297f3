"""Rules that find relevant patches without labels, parameters or [cls]: appendix D of the paper calls for such.

Each gives non-negative weights from the tokens of one block alone.
Letters: B images, M patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models_vit import Features
from probing.fixed import FixedWeights
from probing.pooling import Tokens

Grid = tuple[int, int]
SIMILAR = 0.2  # cosine above which TokenCut joins two patches
UNLIKE = 1e-5  # its affinity of two others


def deviations(patches: Tensor, grid: Grid) -> Tensor:
    """(B,M) squared distance from the image's mean token."""
    return (patches - patches.mean(1, keepdim=True)).square().sum(-1)


def blobs(patches: Tensor, grid: Grid) -> Tensor:
    """(B,M) the squared distances, averaged over 3 x 3 patches: objects differ from the rest and hold together."""
    squares = deviations(patches, grid).unflatten(1, grid)[:, None]
    return F.avg_pool2d(squares, 3, stride=1, padding=1, count_include_pad=False).flatten(1)


def norms(patches: Tensor, grid: Grid) -> Tensor:
    """(B,M) norm of the token."""
    return patches.norm(dim=-1)


def low_frequencies(patches: Tensor, grid: Grid) -> Tensor:
    """(B,M) energy at each patch of the tokens' lowest frequencies: at most one cycle per axis, not the mean."""
    spectrum = torch.fft.fft2(patches.unflatten(1, grid), dim=(1, 2))
    low = [torch.fft.fftfreq(side, 1 / side, device=patches.device).abs() <= 1 for side in grid]
    kept = low[0][:, None] & low[1]
    kept[0, 0] = False
    return torch.fft.ifft2(spectrum * kept[..., None], dim=(1, 2)).real.square().sum(-1).flatten(1)


def fiedler(patches: Tensor, grid: Grid) -> Tensor:
    """(B,M) the smallest non-trivial eigenvector of TokenCut's graph of similar tokens, above its mean.

    The sign is that of its largest entry, the side that TokenCut takes for the object.
    Source: Wang et al., "Self-supervised transformers for unsupervised object discovery using normalized cut", 2022.
    """
    tokens = F.normalize(patches.double(), dim=-1)
    affinity = torch.where(tokens @ tokens.transpose(1, 2) > SIMILAR, 1.0, UNLIKE).double()
    scale = affinity.sum(-1).rsqrt()
    # eigenvectors of D^-1/2 W D^-1/2, ascending: the last is trivial, the one before the solution of (D - W) y = l D y
    vectors = torch.linalg.eigh(scale[:, :, None] * affinity * scale[:, None]).eigenvectors
    solution = vectors[..., -2] * scale
    largest = solution.gather(1, solution.abs().argmax(1, keepdim=True))
    solution = solution * largest.sign()
    return (solution - solution.mean(1, keepdim=True)).clamp(min=0).to(patches.dtype)


RULES = {rule.__name__: rule for rule in (deviations, blobs, norms, low_frequencies, fiedler)}


class UnlabelledWeights(FixedWeights):
    """Weights: a function of RULES of the patch tokens. Uniform where it is zero for all patches."""

    def __init__(self, tokens: Tokens, rule: str):
        super().__init__(tokens)
        self.rule, self.grid = RULES[rule], tokens.grid

    def raw(self, features: Features) -> Tensor:
        patches = features.patches.to(torch.promote_types(features.patches.dtype, torch.float32))
        weights = self.rule(patches, self.grid)
        return torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
