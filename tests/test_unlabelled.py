"""Rules without labels are their definitions, written with NumPy and SciPy, image by image."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from models_vit import VisionTransformer
from probing.heads import build_head
from probing.pooling import Tokens

GRID, D = (4, 6), 8


def far(x):
    return ((x - x.mean(0)) ** 2).sum(1)


def blob(x):
    summed, count = (
        scipy.ndimage.uniform_filter(part.reshape(GRID), 3, mode="constant") for part in (far(x), x[:, 0] * 0 + 1)
    )
    return (summed / count).ravel()


def lowfreq(x):
    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    total = np.zeros_like(x)
    for u, v in {(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1)} - {(0, 0)}:
        wave = np.exp(2j * np.pi * (u * rows / GRID[0] + v * columns / GRID[1])).ravel()
        total = total + np.real(np.outer(wave, wave.conj() @ x)) / len(x)
    return (total**2).sum(1)


def fiedler(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    W = np.where(unit @ unit.T > 0.2, 1.0, 1e-5)
    degrees = np.diag(W.sum(1))
    y = scipy.linalg.eigh(degrees - W, degrees)[1][:, 1]  # TokenCut's generalised problem
    y = y * np.sign(y[np.abs(y).argmax()])
    return np.maximum(y - y.mean(), 0)


DEFINITIONS = {
    "far": far,
    "blob": blob,
    "norm": lambda x: np.linalg.norm(x, axis=1),
    "lowfreq": lowfreq,
    "fiedler": fiedler,
}


def encoded():
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=D, depth=2, num_heads=2).double().eval()
    encoder.blocks[1].attn.qkv.weight.data *= 4
    images = torch.randn(5, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        *_, last = encoder.trace(images)
        return encoder(images, patch_attention=range(24))[1], last, Tokens.of(encoder, GRID)


@pytest.mark.parametrize("name", [*DEFINITIONS, "received"])
def test_weights_and_vectors_are_their_definitions(name):
    features, last, tokens = encoded()
    vector, weights = build_head(name, 1, tokens)(features)
    attention = (last.q @ last.k.transpose(-2, -1) * last.scale).softmax(-1)[:, :, 1:, 1:].mean((1, 2)).numpy()
    for number, x in enumerate(features.patches.numpy()):
        raw = attention[number] if name == "received" else DEFINITIONS[name](x)
        np.testing.assert_allclose(weights[number], raw / raw.sum(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(vector[number], raw @ x / raw.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["far", "blob", "norm", "lowfreq"])
def test_equal_tokens_are_weighted_uniformly(name):
    features, _, tokens = encoded()
    equal = features._replace(patches=torch.ones(2, 24, D, dtype=torch.bfloat16))
    torch.testing.assert_close(build_head(name, 1, tokens)(equal).weights, torch.full((2, 24), 1 / 24))
