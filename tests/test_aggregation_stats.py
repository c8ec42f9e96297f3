"""Entropies and divergences of aggregation vectors: closed forms, scipy's values, and the same for any split."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from aggregation.divergence import VectorStats, divergences, entropies, normalised
from util.moments import FiniteMoments

M, KL_FLOOR = 49, 1e-8


def random_vectors(images: int, rules: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(images, rules, M, generator=generator, dtype=torch.float64)).softmax(-1)


def one_hot(patch: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(patch), M).double()


UNIFORM = torch.full((M,), 1 / M, dtype=torch.float64)


def test_uniform_weights_have_the_logarithm_of_their_number_and_no_distance_from_themselves():
    vectors = torch.stack([UNIFORM, UNIFORM])[None]
    assert entropies(vectors).tolist() == [[pytest.approx(math.log(M), abs=1e-12)] * 2]
    assert divergences(vectors).abs().max() == 0 == divergences(vectors, KL_FLOOR).abs().max()


def test_one_hot_is_log_m_from_uniform_and_infinitely_far_the_other_way():
    found = divergences(torch.stack([one_hot(3), UNIFORM])[None])[0]
    assert found[0, 1] == pytest.approx(math.log(M), abs=1e-12) and found[1, 0] == math.inf
    assert found.diagonal().tolist() == [0, 0] and entropies(one_hot(3)[None, None]).item() == 0


def test_floor_makes_every_divergence_finite_and_is_the_closed_form():
    found = divergences(torch.stack([one_hot(3), UNIFORM])[None], KL_FLOOR)[0]
    total = 1 + (M - 1) * KL_FLOOR
    p, q = np.full(M, KL_FLOOR / total), np.full(M, 1 / M)
    p[3] = 1 / total
    assert found[1, 0].item() == pytest.approx(float((q * np.log(q / p)).sum()), rel=1e-12)
    assert found[0, 1].item() == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)


def test_values_are_scipys():
    vectors = random_vectors(3, 4)
    vectors[0, 0, :5] = 0
    vectors[0, 0] /= vectors[0, 0].sum()
    found, p = divergences(vectors), vectors.numpy()
    expected = scipy.special.rel_entr(p[:, :, None], p[:, None]).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(entropies(vectors), scipy.stats.entropy(p, axis=-1), rtol=1e-12)


def test_infinite_divergences_are_counted_and_not_averaged():
    vectors = random_vectors(5, 2)
    vectors[1, 1], vectors[3, 1] = one_hot(0), one_hot(7)
    stats = VectorStats(2, "row_col", KL_FLOOR)
    stats.update(vectors)
    _, matrices = stats.results()
    exact, finite = matrices["kl_exact"], [0, 2, 4]
    assert exact["infinite"] == [[0, 2], [0, 0]] and exact["images"] == [[5, 3], [5, 5]]
    assert exact["mean"][0][1] == pytest.approx(divergences(vectors[finite])[:, 0, 1].mean().item(), rel=1e-12)
    floored = matrices["kl"]
    assert floored["infinite"] == [[0, 0], [0, 0]] and floored["images"] == [[5, 5], [5, 5]]
    assert floored["mean"][0][1] == pytest.approx(divergences(vectors, KL_FLOOR)[:, 0, 1].mean().item(), rel=1e-12)


def test_direction_is_the_transpose():
    found = []
    for direction in ("row_col", "col_row"):
        stats = VectorStats(3, direction, KL_FLOOR)
        stats.update(random_vectors(4, 3))
        found.append(stats.results()[1])
    assert np.array_equal(np.array(found[0]["kl"]["mean"]).T, found[1]["kl"]["mean"])
    assert found[0]["kl"]["definition"] != found[1]["kl"]["definition"]


def test_prefix_is_left_out_after_the_mean_over_heads():
    weights = torch.rand(2, 3, 1 + M).softmax(-1)
    mean = weights.double().mean(1)[:, 1:]
    torch.testing.assert_close(normalised(weights, M), mean / mean.sum(1, keepdim=True), rtol=1e-12, atol=0)
    assert normalised(weights[:, 0], M).sum(1).tolist() == pytest.approx([1, 1], abs=1e-14)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_images_without_a_vector_are_left_out_of_all_that_is_said_of_the_rule(value):
    weights = torch.rand(4, 1 + M)
    weights[2, 1:] = value
    vectors = torch.stack([normalised(weights, M), random_vectors(4, 1)[:, 0]], dim=1)
    stats = VectorStats(2, "row_col", KL_FLOOR)
    stats.update(vectors)
    entropy, matrices = stats.results()
    assert [row["images"] for row in entropy] == [3, 4]
    assert entropy[0]["mean"] == pytest.approx(entropies(vectors)[[0, 1, 3], 0].mean().item())
    for name in ("kl", "kl_exact"):
        assert matrices[name]["images"] == [[3, 3], [3, 4]] and np.isfinite(matrices[name]["mean"]).all()


@pytest.mark.parametrize("sizes", [[1] * 23, [22, 1], [7, 16]], ids=str)
def test_any_split_of_the_images_gives_the_same(sizes):
    vectors = random_vectors(23, 3)
    vectors[4, 1] = one_hot(1)
    vectors[9, 2] = math.nan
    whole, parts = VectorStats(3, "row_col", KL_FLOOR), []
    whole.update(vectors)
    for chunk in vectors.split(sizes):
        parts.append(VectorStats(3, "row_col", KL_FLOOR))
        parts[-1].update(chunk)
    merged = VectorStats(3, "row_col", KL_FLOOR)
    merged.add_state(VectorStats(3, "row_col", KL_FLOOR).state())  # of a process without images
    for part in parts:
        merged.add_state(part.state())
    for (one, found), (other, expected) in zip(merged.results()[1].items(), whole.results()[1].items(), strict=True):
        assert one == other and found["images"] == expected["images"] and found["infinite"] == expected["infinite"]
        for key in ("mean", "std"):
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-10, atol=1e-12, err_msg=f"{one} {key}")


def test_number_that_no_image_has_is_nan_and_harms_no_other():
    moments = FiniteMoments()
    for row in ([math.nan, 1.0, math.inf], [math.nan, 3.0, 2.0], [math.inf, math.nan, -math.inf]):
        moments.update(torch.tensor([row]))
    np.testing.assert_array_equal(moments.averages(), [math.nan, 2.0, 2.0])
    np.testing.assert_array_equal(moments.std(), [math.nan, 1.0, 0.0])
    assert moments.count.tolist() == [0, 2, 1] and moments.infinite.tolist() == [1, 0, 2]
