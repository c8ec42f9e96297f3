"""Statistics of patch tokens: Fourier amplitudes, spectra of singular values, t-SNE (Park et al. 2023).

Letters: B images, M patches on a grid of rows and columns, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from util.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
torch = lazy("torch")

# added to amplitudes before the logarithm (Park et al.'s code): absent frequencies have no logarithm
AMPLITUDE_FLOOR = 1e-6


def log_amplitude(tokens: Tensor) -> Tensor:
    """Relative log amplitude of the tokens' Fourier transform over the grid, along its diagonal.

    Tokens (B,g,g,D) -> (B,g - g // 2): ln(|F| + 1e-6), mean over channels, at the frequencies (f, f), f = 0, 1, ..,
    less its value at 0. Negative values: coarse structure prevails. ValueError for an oblong grid.
    """
    rows, columns = tokens.shape[1:3]
    if rows != columns:
        raise ValueError(f"a grid of {rows} x {columns} patches has no diagonal: Fourier statistics need square images")
    # on the diagonal, the transform at (f, f) depends on row + column alone
    frequency = torch.arange(rows - rows // 2, dtype=torch.float64, device=tokens.device)
    steps = torch.arange(rows, dtype=torch.float64, device=tokens.device)
    angle = frequency[:, None] * (steps[:, None] + steps).flatten() * (2 * torch.pi / rows)
    flat = tokens.double().flatten(1, 2)
    amplitude = torch.hypot(angle.cos() @ flat, angle.sin() @ flat)
    logs = (amplitude + AMPLITUDE_FLOOR).log().mean(2)
    return logs - logs[:, :1]


def log_spectrum(covariance: Tensor, rank: int) -> Tensor:
    """Logarithms of the `rank` largest singular values of covariances (...,K,K), largest first; float64.

    Singular values below the rounding of float32 tokens, 1.4e-14 of the largest, are raised to it: a constant
    image has only noise there, whose logarithm would dominate a mean over images.
    """
    values = torch.linalg.eigvalsh(covariance.double()).flip(-1)
    floor = values[..., :1] * torch.finfo(torch.float32).eps ** 2
    return values[..., :rank].maximum(floor).clamp(min=torch.finfo(torch.float64).tiny).log()


def log_singular_values(tokens: Tensor) -> Tensor:
    """Tokens (B,M,D) -> logarithms of the singular values of each image's covariance over tokens, largest first.

    (B,K), K = min(M - 1, D): more cannot differ from zero. Float64.
    """
    centred = tokens.double() - tokens.double().mean(1, keepdim=True)
    M, D = tokens.shape[1:]
    # both products share their non-zero eigenvalues: take the smaller
    gram = centred @ centred.mT if M <= D else centred.mT @ centred
    return log_spectrum(gram / M, rank=min(M - 1, D))


def embed_tokens(tokens: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of tokens (n,D) -> (n,2), with the settings of Park et al.: perplexity 20, random start, 1000 steps.

    Fewer than 61 tokens lower the perplexity to a third of their number, as scikit-learn advises.
    """
    from sklearn.manifold import TSNE  # takes seconds to import

    perplexity = min(20.0, (len(tokens) - 1) / 3)
    reducer = TSNE(perplexity=perplexity, learning_rate="auto", init="random", max_iter=1000, random_state=seed)
    return reducer.fit_transform(tokens)
