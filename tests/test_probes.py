"""A bank of probes: each is the probe alone. test_fidelity.py has the published recipe's values."""

import copy
from argparse import Namespace

import pytest
import torch
from torch import nn

from data_sets.loader import Sample
from engine_linprobe import Probing
from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import AGGREGATIONS
from runtime.folder import RunFolder
from runtime.training import Training
from util.lars import LARS
from util.lr_sched import lr_at

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SPECS = [ProbeSpec(head, 1, 0.1, seed) for head in ("cls", "pos", "abmilp") for seed in (0, 1)]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(**TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches(backbone):
    """Tokens and labels of 24 micro-batches."""
    torch.manual_seed(1)
    return [(backbone(torch.randn(32, 3, 16, 16), blocks=[0, 1]), torch.randint(5, (32,))) for _ in range(24)]


def train(specs, backbone, batches, lrs, accum_iter=1, epochs=2, trust=1e-3, after_step=lambda training: None):
    """The engine on tokens made beforehand."""
    bank = ProbeBank(specs, backbone, (2, 2), 5)
    optimizer = LARS(bank.parameter_groups(lrs), trust_coefficient=trust)
    loader = [Sample(torch.full((32, 1), float(i)), labels, None, None) for i, (_, labels) in enumerate(batches)]

    class Tokens:
        backbone = nn.Identity()

        def __call__(self, images):
            return batches[int(images[0, 0])][0]

    args = Namespace(epochs=epochs, seed=0, lr=None, save_every_minutes=0, save_every_steps=0)
    order = Namespace(accum_iter=accum_iter, joined=1, steps=len(batches) // accum_iter, effective=32 * accum_iter)
    probing = Probing(bank, Tokens(), optimizer, torch.device("cpu"))
    training = Training(
        args, probing, optimizer, lambda t, lr: lr_at(t, lr, epochs, 1), loader, order, RunFolder("")
    )  # fmt: skip
    update = training._update
    training._update = lambda losses: (update(losses), after_step(training))
    for _ in training.epochs():
        training.train_one_epoch()
        training.end_epoch()
    return bank


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_probe_in_a_bank_is_the_probe_alone(backbone, batches, accum_iter):
    lrs = [3.0, 5.0] * 3
    together = train(SPECS, backbone, batches, lrs, accum_iter).probe_states()
    for spec, lr in zip(SPECS, lrs, strict=True):
        alone = train([spec], backbone, batches, [lr], accum_iter).probe_states()[spec.name]
        # 48 steps in float32, whose products in a bank and alone are rounded differently, by the CPU
        torch.testing.assert_close(together[spec.name], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trust", [1e-3, None], ids=["lars", "sgd"])
@pytest.mark.parametrize("what", ["rate", "loss", "gradient"])
def test_a_probe_that_diverges_stays_as_it_was_and_its_neighbours_do_not_notice(
    backbone, batches, trust, what, monkeypatch
):
    """A rate that overflows the weights, a loss and a gradient that are not finite, in one probe of a stack."""
    states, moments, steps = [], [], []
    logits_of, calls = ProbeBank.logits, []
    # the gradient is that of a head which has one behind its norm
    specs = [ProbeSpec(head, 1, 0.1, seed) for head, seed in (("cls", 0), ("abmilp", 0), ("abmilp", 1))]
    lost = specs[1]

    def poisoned(bank, features, groups=1):
        """Finite in the forward pass of the 8th step; not finite behind it."""
        logits = logits_of(bank, features, groups)
        calls.append(bank)
        if what != "rate" and len(calls) == 8:
            factor = torch.tensor([torch.nan if what == "loss" else torch.inf, 1.0])[:, None, None]
            if what == "loss":
                logits[1] = logits[1] * factor
            else:
                logits[1].register_hook(lambda gradient: gradient * factor)
        return logits

    def snapshot(training):
        probing = training.method
        states.append(copy.deepcopy(probing.state()[lost.name]))
        moments.append([
            probing.optimizer.state[parameter]["momentum_buffer"][0].clone()
            for parameter in probing.bank.stacks[1].parameters
            if parameter in probing.optimizer.state
        ])  # fmt: skip
        steps.append(training.diverged()[lost.name])

    monkeypatch.setattr(ProbeBank, "logits", poisoned)
    rates = [0.5, 1e38 if what == "rate" else 0.5, 0.5]
    together = train(specs, backbone, batches, rates, trust=trust, after_step=snapshot).probe_states()
    monkeypatch.undo()
    step = next(i for i, place in enumerate(steps) if place)
    assert steps[-1] == {"epoch": 0, "step": step} and (what == "rate" or step == 7)
    for state, moment in zip(states[step:], moments[step:], strict=True):  # weights, statistics and momentum
        assert all(value.isfinite().all() and value.equal(states[step - 1][key]) for key, value in state.items())
        assert all(value.equal(before) for value, before in zip(moment, moments[step - 1], strict=True))
    beside_a_healthy_one = train(specs, backbone, batches, [0.5, 0.5, 0.5], trust=trust).probe_states()
    for spec in (specs[0], specs[2]):
        assert all(value.equal(together[spec.name][key]) for key, value in beside_a_healthy_one[spec.name].items())


def test_a_bank_that_diverged_altogether_ends(backbone, batches):
    with pytest.raises(FloatingPointError, match=r"every one of the probes diverged: .* in epoch 0, step \d+; lower"):
        train(SPECS[:2], backbone, batches, [1e38, 1e38])


def test_initial_weights_depend_on_the_spec_alone(backbone):
    first = ProbeBank(SPECS, backbone, (2, 2), 5).probe_states()
    torch.manual_seed(123)
    again = ProbeBank(SPECS[::-1], backbone, (2, 2), 5).probe_states()
    assert all(torch.equal(first[name][key], again[name][key]) for name in first for key in first[name])
    a, b = (first[SPECS[i].name]["classifier.weight"] for i in (0, 1))
    assert not torch.equal(a, b)  # seeds differ
    other_rate = ProbeSpec("cls", 1, 10.0, 0)
    assert torch.equal(ProbeBank([other_rate], backbone, (2, 2), 5).probes[0].classifier.weight, a)


def test_probes_read_their_own_block(backbone, batches):
    bank = ProbeBank([ProbeSpec("cls", block, 0.1, 0) for block in (0, 1)], backbone, (2, 2), 5).eval()
    features = batches[0][0]
    changed = {0: features[0], 1: Features(*[None if t is None else t + 1 for t in features[1]])}
    before, after = bank(features), bank(changed)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([ProbeSpec("cls", 2, 0.1, 0)], "block 2 does not exist: this encoder has blocks 0 to 1"),
        ([ProbeSpec("mean", 1, 0.1, 0)], "unknown head 'mean': choose one of " + ", ".join(AGGREGATIONS)),
        ([ProbeSpec("cls", 1, 0.1, 0)] * 2, "requested twice"),
    ],
)
def test_impossible_banks_are_refused(backbone, specs, message):
    with pytest.raises(ValueError, match=message):
        ProbeBank(specs, backbone, (2, 2), 5)


def test_cls_probe_needs_a_cls_token():
    backbone = VisionTransformer(**TINY, class_token=False)
    without = [name for name, entry in AGGREGATIONS.items() if not entry.needs_cls]
    with pytest.raises(ValueError, match=rf"has no \[cls\] token; use {', '.join(without)} instead"):
        ProbeBank([ProbeSpec("cls", 1, 0.1, 0)], backbone, (2, 2), 5)


def test_close_rates_are_different_probes():
    assert ProbeSpec("cls", 1, 0.1, 0).name != ProbeSpec("cls", 1, 0.1000001, 0).name
