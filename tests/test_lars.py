"""LARS: its first step in closed form, SGD beside it, and its state. test_fidelity.py has the published values."""

import pytest
import torch

from util.lars import LARS, LONG, norms


def test_without_weight_decay_a_matrix_moves_by_trust_times_its_norm_and_a_vector_by_its_gradient():
    matrix, vector = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
    before = matrix.detach().clone(), vector.detach().clone()
    matrix.grad, vector.grad = 1e6 * torch.randn(4, 3), torch.randn(3)
    LARS([matrix, vector], lr=6.4).step()
    moved = (matrix - before[0]).norm().item()
    assert moved == pytest.approx(6.4 * 1e-3 * before[0].norm().item(), rel=1e-5)
    torch.testing.assert_close(vector.detach(), before[1] - 6.4 * vector.grad)


def test_a_restored_optimizer_continues_to_the_bit():
    def steps(optimizer, w, seeds):
        for seed in seeds:
            w.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole, first, second = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(3))
    steps(LARS([whole], lr=0.5), whole, range(6))
    optimizer = LARS([first], lr=0.5)
    steps(optimizer, first, range(3))
    second.data.copy_(first.data)
    restored = LARS([second], lr=0.0)
    restored.load_state_dict(optimizer.state_dict())
    steps(restored, second, range(3, 6))
    assert second.equal(whole)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_a_group_without_trust_coefficient_is_torchs_sgd_beside_one_of_lars(momentum, weight_decay):
    def train(make):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
        optimizer = make(parameters)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return parameters

    options = {"lr": 0.3, "momentum": momentum, "weight_decay": weight_decay}
    beside = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 6.4}
    ours = train(lambda parameters: LARS([beside, {"params": parameters, "trust_coefficient": None, **options}]))
    torch.testing.assert_close(ours, train(lambda parameters: torch.optim.SGD(parameters, **options)))


def test_a_parameter_without_gradient_stays():
    w = torch.nn.Parameter(torch.ones(2, 2))
    LARS([w], lr=1.0, weight_decay=0.1).step()
    assert (w == 1).all()


@pytest.mark.parametrize("length", [LONG - 1, LONG, 768_000])
def test_norms_of_long_and_short_rows_are_exact_to_float32(length):
    rows = torch.randn(3, length)
    rows[1] = 0
    torch.testing.assert_close(norms(rows).double(), rows.double().norm(dim=1), rtol=2e-5, atol=0)
