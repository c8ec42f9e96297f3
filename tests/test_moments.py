"""Streaming moments against numpy over the whole set, and the record of an analysis over two processes."""

import numpy as np
import pytest
import torch

from attention.measure import Recorder
from util.moments import Covariance, Moments


def numbers(images: int) -> np.ndarray:
    """Values as hard as they come: a standard deviation of 1e-3 around a mean of 5."""
    return np.random.default_rng(0).normal(5.0, 1e-3, (images, 5))


def assert_moments(moments: Moments, values: np.ndarray):
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std().numpy(), values.std(0), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_those_of_the_whole_set_for_any_split(seed):
    values = numbers(1000)
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, 1000), size=30, replace=False))
    moments, covariance = Moments(), Covariance()
    for batch in np.split(values, cuts):
        moments.update(torch.from_numpy(batch))
        covariance.update(torch.from_numpy(batch))
    assert_moments(moments, values)
    np.testing.assert_allclose(covariance.matrix().numpy(), np.cov(values.T, bias=True), rtol=1e-9)


def test_moments_merge_with_those_of_no_images():
    values, moments = numbers(10), Moments()
    moments.merge(Moments())
    moments.update(torch.from_numpy(values))
    moments.merge(Moments())
    assert_moments(moments, values)


def recorded(values: np.ndarray) -> Recorder:
    """What an analysis keeps of images whose numbers are these: two metrics, and one whose result is a covariance."""
    recorder = Recorder()
    if len(values):
        parts = torch.from_numpy(values)
        vectors = {("image_log_singular_values", 0): parts[:, :3], ("cls_patch_entropy", 0): parts[:, :2]}
        recorder.add({**vectors, ("patch_update_ratio", 0): parts[:, 3:]})
    return recorder


def assert_record(recorder: Recorder, values: np.ndarray):
    found = recorder.results()
    entropy = found["cls_patch_entropy", 0]
    assert (entropy["count"], len(found)) == (len(values), 3)
    np.testing.assert_allclose([entropy["mean"], *entropy["mean_per_head"]], values[:, :2].mean(0), rtol=1e-12)
    np.testing.assert_allclose([entropy["std"], *entropy["std_per_head"]], values[:, :2].std(0), rtol=1e-9)
    assert found["patch_update_ratio", 0]["mean"] == pytest.approx(values[:, 3].mean(), rel=1e-12)
    spectrum = np.linalg.svd(np.cov(values[:, :3].T, bias=True), compute_uv=False)
    rank = min(3, len(values) - 1)
    np.testing.assert_allclose(
        found["image_log_singular_values", 0]["mean_per_rank"], np.log(spectrum[:rank]), rtol=1e-9
    )


def test_a_record_holds_mean_and_deviation_of_the_summary_and_of_each_number():
    assert_record(recorded(numbers(101)), numbers(101))
    assert_record(recorded(numbers(3)), numbers(3))  # fewer images than numbers: their covariance has rank 2


PROGRAM = """
import sys
from tests.test_moments import *
from util.distributed import distributed, gather_objects
with distributed("cpu") as world:
    merged = Recorder.of(gather_objects(recorded(numbers(101)[world.rank::2]).state()))
    assert_record(merged, numbers(101))
    unseen = Recorder.of(gather_objects(recorded(numbers(5) if world.rank == 1 else numbers(0)).state()))
    assert_record(unseen, numbers(5))
    torch.save([merged.moments.mean, merged.moments.squares], f"{sys.argv[1]}/rank{world.rank}.pth")
"""


def test_two_processes_agree_on_the_record_of_all_images(run_ranks, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_ranks(tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
