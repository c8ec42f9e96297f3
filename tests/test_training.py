"""What the training loop decides by."""

import math

import pytest
import torch

from runtime.training import all_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_single_value_that_is_not_finite_is_found(value, place):
    tensors = [torch.randn(300, 70), torch.randn(5)]
    assert all_finite(tensors)
    tensors[place][-1] = value
    assert not all_finite(tensors)


def test_infinities_of_both_signs_do_not_cancel():
    assert not all_finite([torch.tensor([math.inf, 1.0, -math.inf])])


def test_large_and_tiny_gradients_are_finite():
    assert all_finite([torch.full((1000, 1000), 1e30), torch.full((3,), 1e-44), torch.zeros(0)])
