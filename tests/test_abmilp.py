"""AbMILP: what the published code lacks, gradients, and the parameter counts of the paper.

test_fidelity.py has the published values.
"""

import pytest
import torch
from torch import nn

from abmilp import AbMILP
from models_vit import Features
from probing.heads import AGGREGATIONS
from probing.pooling import Tokens


def tokens(B=3, M=9, D=16):
    return torch.randn(B, M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax(scores):
    exponentials = (scores - scores.max(1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


@pytest.mark.parametrize("depth", [2, 4])
def test_gelu_which_the_published_code_lacks_is_the_exact_one(depth):
    pool, x = AbMILP(16, depth=depth, act="gelu").double(), tokens()
    hidden = x
    linears = [layer for layer in pool.score if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        hidden = nn.functional.gelu(hidden @ layer.weight.T + layer.bias)
    weights = softmax((hidden @ linears[-1].weight.T)[..., 0])  # the last bias drops out of the softmax
    vector, found = pool(x)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(vector, (weights[..., None] * x).sum(1))


def test_gradient_of_depth_1_is_the_derivative_of_the_softmax():
    pool, x = AbMILP(16).double(), tokens()
    coefficient = torch.randn(3, 16, dtype=torch.float64)
    vector, s = pool(x)
    (vector * coefficient).sum().backward()
    value = (x * coefficient[:, None]).sum(-1)  # (B,M)
    by_hand = (s * (value - (s * value).sum(1, keepdim=True)))[..., None] * x
    torch.testing.assert_close(pool.score[0].weight.grad[0], by_hand.sum((0, 1)))
    torch.testing.assert_close(pool.score[0].bias.grad, torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)


def test_positions_are_never_trained():
    pool = AbMILP(16, cond="pe", grid=(3, 3))
    assert len(list(pool.parameters())) == 2 and set(pool.state_dict()) == {"score.0.weight", "score.0.bias"}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 769),
        ({"depth": 2}, 591_361),
        ({"depth": 3}, 1_181_953),
        ({"depth": 4}, 1_772_545),
        ({"sa": "both"}, 2_360_833),
        ({"depth": 2, "act": "gated"}, 2 * 590_592 + 769),
        ({"depth": 2, "hidden": 128}, 768 * 128 + 128 + 129),
        ({"branches": 4}, 4 * 769),
    ],
)
def test_parameter_counts_are_the_papers(options, parameters):
    assert sum(p.numel() for p in AbMILP(768, **options).parameters()) == parameters


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        AbMILP(16, depth=0)


def test_branches_are_abmilps_side_by_side():
    pool, x = AbMILP(16, branches=3).double(), tokens()
    vector, weights = pool(x)
    assert weights.shape == (3, 3, 9)
    for i in range(3):
        one = AbMILP(16).double()
        one.score[0].load_state_dict({key: value[i : i + 1] for key, value in pool.score[0].state_dict().items()})
        torch.testing.assert_close(vector[:, 16 * i : 16 * i + 16], one(x).vector)
        torch.testing.assert_close(weights[:, i], one(x).weights)


def test_residual_self_attention_starts_as_nothing():
    pool, x = AbMILP(16, depth=2, act="tanh", sa="residual").double(), tokens()
    plain = AbMILP(16, depth=2, act="tanh").double()
    plain.score.load_state_dict(pool.score.state_dict())
    torch.testing.assert_close(pool(x), plain(x))


def test_content_all_pools_every_token_in_order():
    x = tokens().float()
    features = Features(cls=x[:, 0], registers=x[:, 1:3], patches=x[:, 3:], cls_attention=None)
    pool = AGGREGATIONS["abmilp"].build(Tokens(16, (2, 3), 3), content="all")
    torch.testing.assert_close(pool(features).vector, pool.pool(x).vector)
