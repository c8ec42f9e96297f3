"""AbMILP by its formula, in float64, and by the parameter counts of the paper."""

import pytest
import torch
from torch import nn

from abmilp import AbMILP
from aggregation import AGGREGATIONS, Tokens
from models_vit import Features
from util.pos_embed import sincos_pos_embed


def tokens(B=3, M=9, D=16):
    return torch.randn(B, M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax(scores):
    exponentials = (scores - scores.max(1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_scores_and_weighted_sum_are_the_formulas(depth, activation):
    pool, x = AbMILP(16, depth=depth, activation=activation).double(), tokens()
    function = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[activation]
    hidden = x
    linears = [layer for layer in pool.score if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        hidden = function(hidden @ layer.weight.T + layer.bias)
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


@pytest.mark.parametrize("mode", ["map", "both"])
def test_self_attention_has_one_head_and_no_residual(mode):
    pool, x = AbMILP(16, self_attention=mode).double(), tokens()
    q, k, v = (x @ pool.self_attention.qkv.weight.T).split(16, dim=-1)
    mixed = (q @ k.transpose(1, 2) / 16**0.5).softmax(-1) @ v
    mixed = mixed @ pool.self_attention.proj.weight.T + pool.self_attention.proj.bias
    weights = softmax((mixed @ pool.score[0].weight.T)[..., 0])
    vector, found = pool(x)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(vector, (weights[..., None] * (mixed if mode == "both" else x)).sum(1))


def test_positions_enter_the_scores_only_and_are_never_trained():
    pool, x = AbMILP(16, condition="pe", grid=(3, 3)).double(), tokens()
    weights = softmax(((x + sincos_pos_embed(16, (3, 3), 0)) @ pool.score[0].weight.T)[..., 0])
    vector, found = pool(x)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(vector, (weights[..., None] * x).sum(1))
    assert len(list(pool.parameters())) == 2 and set(pool.state_dict()) == {"score.0.weight", "score.0.bias"}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 769),
        ({"depth": 2}, 591_361),
        ({"depth": 3}, 1_181_953),
        ({"depth": 4}, 1_772_545),
        ({"self_attention": "both"}, 2_360_833),
    ],
)
def test_parameter_counts_are_the_papers(options, parameters):
    assert sum(p.numel() for p in AbMILP(768, **options).parameters()) == parameters


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth of at least 1"):
        AbMILP(16, depth=0)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_every_aggregation_gives_its_width_and_weights_that_sum_to_one(name):
    entry, x = AGGREGATIONS[name], tokens().float()
    features = Features(cls=x[:, 0], registers=x[:, 1:1], patches=x, cls_attention=None)
    vector, weights = entry.build(Tokens(16, (3, 3), 1))(features)
    assert vector.shape == (3, 16 * entry.width)
    if weights is not None:
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
    if entry.needs_cls:
        assert not torch.equal(vector, entry.build(Tokens(16, (3, 3), 1))(features._replace(cls=x[:, 1])).vector)


def test_content_all_pools_every_token_in_order():
    x = tokens().float()
    features = Features(cls=x[:, 0], registers=x[:, 1:3], patches=x[:, 3:], cls_attention=None)
    pool = AGGREGATIONS["abmilp"].build(Tokens(16, (2, 3), 3), content="all")
    torch.testing.assert_close(pool(features).vector, pool.pool(x).vector)
