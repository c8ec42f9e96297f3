"""Statistics of tokens against straightforward numpy."""

import numpy as np
import pytest
import torch

from attention.metrics import norm_ratio
from attention.tokens import embed_tokens, log_amplitude, log_singular_values


@pytest.mark.parametrize("side", [1, 2, 7, 8, 14])
def test_log_amplitude_is_the_half_diagonal_of_the_shifted_transform_less_its_centre(side):
    tokens = torch.randn(3, side, side, 5, generator=torch.Generator().manual_seed(0))
    amplitude = np.abs(np.fft.fft2(tokens.double().numpy(), axes=(1, 2)))
    shifted = np.roll(np.log(amplitude + 1e-6), (side // 2, side // 2), axis=(1, 2)).mean(-1)
    half = np.stack([np.diag(image)[side // 2 :] for image in shifted])
    np.testing.assert_allclose(log_amplitude(tokens).numpy(), half - half[:, :1], atol=1e-12)


def test_constant_tokens_have_no_high_frequencies_and_a_checkerboard_has_the_highest():
    flat = log_amplitude(torch.ones(1, 8, 8, 2))
    assert flat[0, 1:].max() < -15  # only the floor of the amplitude is left
    rows = torch.arange(9.0)
    wave = torch.cos(2 * torch.pi * 4 / 9 * (rows[:, None] + rows))[None, :, :, None]
    assert log_amplitude(wave)[0].argmax() == 4


def test_oblong_grids_are_refused():
    with pytest.raises(ValueError, match="2 x 3 patches has no diagonal"):
        log_amplitude(torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize(("patches", "width"), [(9, 30), (30, 9), (9, 9)])
def test_singular_values_are_those_of_the_covariance_over_tokens(patches, width):
    tokens = torch.randn(4, patches, width, generator=torch.Generator().manual_seed(0))
    expected = [
        np.log(np.linalg.svd(np.cov(image.T, bias=True), compute_uv=False)[: min(patches - 1, width)])
        for image in tokens.double().numpy()
    ]
    np.testing.assert_allclose(log_singular_values(tokens).numpy(), expected, atol=1e-9)


def test_singular_values_that_are_rounding_are_floored():
    assert log_singular_values(torch.ones(1, 5, 3)).isfinite().all()
    line = torch.arange(5.0)[:, None] * torch.ones(3)  # tokens on a line: one singular value
    first, *others = log_singular_values(line[None])[0].tolist()
    assert first == pytest.approx(np.log(2 * 3))
    assert others == pytest.approx([first + 2 * np.log(2**-23)] * 2)


def test_embedding_separates_clusters_and_is_a_function_of_the_seed():
    generator = np.random.default_rng(0)
    tokens = np.concatenate([generator.normal(20 * c, 1, (40, 8)) for c in range(2)]).astype(np.float32)
    points = embed_tokens(tokens, seed=0)
    assert points.shape == (80, 2)
    np.testing.assert_array_equal(points, embed_tokens(tokens, seed=0))
    centres = points[:40].mean(0), points[40:].mean(0)
    distance = np.linalg.norm(points[:, None] - np.stack(centres), axis=-1)
    assert (distance.argmin(1) == np.repeat([0, 1], 40)).all()


def test_norm_ratio_is_the_largest_norm_over_the_median():
    tokens = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    norms = np.linalg.norm(tokens.double().numpy(), axis=-1)
    np.testing.assert_allclose(norm_ratio(tokens)[:, 0], norms.max(1) / np.median(norms, axis=1))
