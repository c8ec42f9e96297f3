"""Statistics of patch tokens: Fourier amplitudes, spectra of singular values, t-SNE (Park et al. 2023).

Letters: B images, M patches on a grid of rows and columns, D width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from util.lazy import lazy
from util.progress import log
from util.seeding import stable_seed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data_sets.loader import KeyedDataset
    from models_vit import VisionTransformer
torch = lazy("torch")

TSNE_CLASSES, TSNE_IMAGES = 3, 18  # Park et al. 2023
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


def token_map(
    backbone: VisionTransformer, dataset: KeyedDataset, blocks: Sequence[int], seed: int, device: torch.device
) -> dict:
    """t-SNE of the patch tokens of 18 images after each of the blocks, in float32 (Park et al. 2023).

    Damaged images are left out. ValueError if none can be read.
    """
    samples = [dataset[0, index] for index in images_of_few_classes(dataset.dataset.targets, seed)]
    samples = [sample for sample in samples if sample.valid]
    if not samples:
        raise ValueError("t-SNE: none of its images can be read")
    images = torch.stack([sample.image for sample in samples]).to(device)
    with torch.no_grad():
        features = backbone(images, blocks)
    maps = []
    for block in features:
        log.info("t-SNE of the tokens after block %d", block)
        tokens = features[block].patches.flatten(0, 1).float().cpu().numpy()
        points = embed_tokens(tokens, stable_seed("tsne", seed) % 2**32)
        maps.append({"block": block, "points": points.reshape(len(samples), -1, 2).tolist()})
    indices = [sample.index for sample in samples]
    classes = [dataset.dataset.classes[dataset.dataset.targets[index]] for index in indices]
    return {"images": indices, "classes": classes, "maps": maps}


def images_of_few_classes(targets: Sequence[int], seed: int) -> list[int]:
    """Eighteen images of three classes, six each; more classes where three do not have as many."""
    order = list(range(len(targets)))
    random.Random(stable_seed("tsne images", seed)).shuffle(order)
    per_class = TSNE_IMAGES // TSNE_CLASSES
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(targets[index], []).append(index)
    largest_first = sorted(by_class.values(), key=lambda images: -min(len(images), per_class))
    return [index for images in largest_first for index in images[:per_class]][:TSNE_IMAGES]
