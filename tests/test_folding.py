"""A bank computed together is its probes one by one: numbers, gradients, training, neighbours that diverge."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models_vit import Features, VisionTransformer
from probing.bank import ProbeBank, ProbeSpec
from probing.heads import build_head, canonical_head
from probing.pooling import Columns, Tokens, fold, read_blocks, select
from util.lars import LARS

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 1}
FOLDING = [
    *("abmilp", "ap1", "ap4", "ap3", "ep8", "abmilp:branches=3", "abmilp:cond=pe", "ep2:shrink=2"),
    *("vjepa4", "siglip4", "capi:width=4"),
]
WORDS = [*FOLDING, *(f"{word}{',' if ':' in word else ':'}content=all" for word in FOLDING)]
MIXED = [
    "cls", "pos", "both", "attn-mn", "attn-lcte", "ca2", "cp1", "dino", "abmilp", "ap1", "ap4", "ep8",
    "abmilp:content=all", "ap4:content=all", "abmilp:depth=2,act=tanh", "abmilp:sa=both", "aim4", "vjepa4:depth=2",
    "siglip4", "simpool", "alf", "cls@0-1+pos", "abmilp@0-1", "ap4:depth=2", "ep8:depth=2", "fused", "earlier",
    "earlier@0-1:by=received",
]  # fmt: skip


def build(word, dtype=torch.float64):
    torch.manual_seed(len(word))
    head = build_head(canonical_head(word, {}, 2), 1, Tokens(16, (3, 3), 2)).to(dtype)
    for parameter in head.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return head


def both_blocks(generator, dtype=torch.float32):
    return {block: make_features(generator, dtype=dtype) for block in (0, 1)}


def make_features(generator, B=32, dtype=torch.float32):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = {i: normal(B, 2, 9).softmax(-1) for i in range(-1, 9)}
    return Features(normal(B, 16), normal(B, 1, 16), 3 * normal(B, 9, 16) + 1, rows[-1], rows, rows[0].mean(1))


def together(heads, features, coefficients):
    """Vectors and gradients of heads that fold, of those with the same tokens at once, as in a bank."""
    vectors = {}
    for content in ("patch", "all"):
        for eps in (None, 1e-6, 1e-5):
            group = [w for w, head in heads.items() if (head.content, head.pool.norm_eps) == (content, eps)]
            if group:
                tokens = heads[group[0]].pool.prepare(select(features, content))
                columns = [[t if t is None else t[None] for t in heads[word].pool.columns()] for word in group]
                means = fold(tokens, [Columns(*each) for each in columns])
                vectors |= {word: heads[word].pool.project(mean[:, 0]) for word, mean in zip(group, means, strict=True)}
    return {word: gradients(heads[word], vectors[word], coefficients[word]) for word in heads}


def gradients(head, vector, coefficient):
    """The vector, then each parameter's gradient; zero where the vector does not depend on it."""
    total, parameters = (vector * coefficient.to(vector.dtype)).sum(), list(head.parameters())
    found = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
    return [vector.detach(), *found]


def test_folded_poolings_and_their_gradients_are_those_of_the_definitions():
    """In float64 to a few units in the last place; in float32 as near to float64 as the definition, within 1e-6."""
    heads = {word: build(word) for word in WORDS}
    f = make_features(torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(head.pool.folds for head in heads.values())
    coefficients = {word: torch.randn(32, head.width, dtype=torch.float64) for word, head in heads.items()}
    exact = {word: gradients(head, head(f).vector, coefficients[word]) for word, head in heads.items()}
    # of a head, as gradients that cancel to zero keep the rounding of their terms
    scale = {word: max(t.abs().max() for t in tensors) for word, tensors in exact.items()}
    for word, found in together(heads, f, coefficients).items():
        for ours, definition in zip(found, exact[word], strict=True):
            assert (ours - definition).abs().max() < 5e-15 * scale[word], word
    single = Features(*(None if t is None else t.float() for t in f[:4]))
    floats = {word: copy.deepcopy(head).float() for word, head in heads.items()}
    folded = together(floats, single, coefficients)
    for word, head in floats.items():
        plain = gradients(head, head(single).vector, coefficients[word])
        for ours, naive, truth in zip(folded[word], plain, exact[word], strict=True):
            error, usual = ((t.double() - truth).abs().max() for t in (ours, naive))
            assert error <= 2 * usual + 1e-6 * scale[word], word


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(**TINY).eval().requires_grad_(False)


def specs_of(words, seed=0, optimizer="lars"):
    return [ProbeSpec(canonical_head(word, {}, 2), 1, 0.1, seed, optimizer) for word in words]


@functools.cache
def batches(dtype):
    """Features and labels of 100 steps."""
    generator = torch.Generator().manual_seed(1)
    return [(both_blocks(generator, dtype), torch.randint(5, (32,), generator=generator)) for _ in range(100)]


def train(specs, backbone, rates, dtype=torch.float32, steps=100, spoil=None, folded=True):
    """The bank after `steps` optimizer steps; spoil: (spec, step) whose probe gets NaN for weights at that step.

    folded: computed together, else each probe by its own definition.
    """
    bank = ProbeBank(specs, backbone, (3, 3), 5).to(dtype)
    groups = bank.parameter_groups(rates)
    if not folded:
        groups = [{"params": list(probe.parameters()), "lr": lr} for probe, lr in zip(bank.probes, rates, strict=True)]
    for position, group in enumerate(groups):
        optimizer = specs[group.get("rows", [position])[0]].optimizer
        group["trust_coefficient"] = 1e-3 if optimizer == "lars" else None
    optimizer = LARS(groups)
    for step, (features, labels) in enumerate(batches(dtype)[:steps]):
        logits = [each.T for part in bank.logits(features) for each in part] if folded else alone(bank, features)
        torch.stack([F.cross_entropy(each, labels) for each in logits]).sum().backward()
        if folded:
            bank.commit_statistics([torch.ones(len(stack.rows), dtype=torch.bool) for stack in bank.stacks])
        optimizer.step()
        optimizer.zero_grad()
        if spoil is not None and step == spoil[1]:
            for parameter in bank.probes[specs.index(spoil[0])].parameters():
                parameter.data.fill_(float("nan"))
    return bank


def alone(bank, features):
    """Logits of each probe by its own definition."""
    pairs = zip(bank.specs, bank.probes, strict=True)
    return [probe(read_blocks(features, spec.blocks)) for spec, probe in pairs]


def distance(state, truth):
    return max(((state[key].double() - truth[key]).abs().max() / (1 + truth[key].abs().max())).item() for key in truth)


def test_each_probe_of_a_mixed_bank_ends_where_it_ends_alone(backbone):
    """By its own definition: in float64 after 100 steps, in float32 after 20 within what float32 costs it alone."""
    specs = [*specs_of(MIXED), *specs_of(["cls", "ap4"], seed=1), *specs_of(["cls", "abmilp", "ap1"], optimizer="sgd")]
    rates = [2.0 if spec.optimizer == "lars" else 0.02 for spec in specs]
    bank, exact = (train(specs, backbone, rates, torch.float64, folded=f).probe_states() for f in (True, False))
    for name, state in bank.items():
        assert distance(state, exact[name]) < 1e-10, name
    exact = train(specs, backbone, rates, torch.float64, 20, folded=False).probe_states()
    bank, single = (train(specs, backbone, rates, steps=20, folded=f).probe_states() for f in (True, False))
    for name, truth in exact.items():
        assert distance(bank[name], truth) <= 3 * distance(single[name], truth) + 1e-6, name


def test_modules_alone_and_the_bank_score_alike(backbone):
    bank = train(specs_of(MIXED), backbone, [2.0] * len(MIXED), steps=3).eval()
    features = both_blocks(torch.Generator().manual_seed(5))
    torch.testing.assert_close(bank(features), torch.stack(alone(bank, features)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lost", ["abmilp", "ap4:content=all", "cls", "abmilp:sa=both", "aim4", "abmilp@0-1"])
def test_a_neighbour_that_turns_to_nan_changes_no_bit_of_the_others(backbone, lost):
    specs = specs_of(MIXED)
    spoiled = specs[MIXED.index(lost)]
    healthy = train(specs, backbone, [2.0] * len(specs), steps=8).probe_states()
    beside = train(specs, backbone, [2.0] * len(specs), steps=8, spoil=(spoiled, 3)).probe_states()
    assert beside[spoiled.name]["classifier.weight"].isnan().any()
    for name in healthy.keys() - {spoiled.name}:
        assert all(torch.equal(healthy[name][key], beside[name][key]) for key in healthy[name]), name


def test_poolings_without_parameters_are_computed_once_for_all_seeds_and_rates(backbone):
    specs = [ProbeSpec(name, 1, rate, seed) for name in ("cls", "pos") for rate in (0.1, 0.2) for seed in (0, 1)]
    bank = ProbeBank([*specs, *specs_of(["abmilp"])], backbone, (3, 3), 5)
    assert len(bank.pool({1: make_features(torch.Generator().manual_seed(0))})) == 3


@pytest.mark.parametrize("word", ["ap4", "vjepa4", "simpool", "alf"])
def test_tokens_are_normalised_as_the_layer_norms_of_the_definition_do(word):
    pool = build(word).pool
    assert {norm.eps for norm in pool.modules() if isinstance(norm, torch.nn.LayerNorm)} == {pool.norm_eps}


def test_heads_in_bfloat16_are_those_of_float32_to_its_digits_and_folded_ones_to_the_bit(backbone):
    words, features = ["abmilp:depth=2", "abmilp:sa=both", "aim4", "abmilp", "cls"], batches(torch.float32)[0][0]
    full, half = (ProbeBank(specs_of(words), backbone, (3, 3), 5, amp=amp) for amp in (torch.float32, torch.bfloat16))
    for word, ours, theirs in zip(words, half.pool(features), full.pool(features), strict=True):
        assert ours.dtype == torch.float32
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert (error == 0) if word in ("abmilp", "cls") else (0 < error < 0.02), word


def test_the_number_of_operations_does_not_grow_with_the_bank(backbone):
    class Count(TorchDispatchMode):
        launched = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.launched += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for seeds in (2, 16):
        words = ["cls", "abmilp", "ap4", "abmilp:depth=2,act=tanh", "abmilp:sa=both", "aim4"]
        specs = [spec for word in words for seed in range(seeds) for spec in specs_of([word], seed)]
        bank = ProbeBank(specs, backbone, (3, 3), 5)
        optimizer, features = LARS(bank.parameter_groups([2.0] * len(specs))), batches(torch.float32)[0][0]
        with Count() as count:
            torch.cat([logits.sum((1, 2)) for logits in bank.logits(features)]).sum().backward()
            alive = [torch.ones(seeds, dtype=torch.bool) for _ in bank.stacks]
            bank.commit_statistics(optimizer.guarded_step(alive))
        counts.append(count.launched)
    assert counts[0] == counts[1]
