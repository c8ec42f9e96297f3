"""The metrics against the paper's formulas in float64 and against closed forms; the moments against numpy."""

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attention_stats import METRICS, PAPER_METRICS, REDUCTIONS, REFERENCES, Moments, reduce_attention
from models_vit import BlockTrace, build_vit

B, H, D_HEAD, M = 2, 3, 64, 70  # M is no multiple of the query chunk


def make_trace(q, k, logit_bias=None) -> BlockTrace:
    batch, heads, tokens, width = q.shape
    generator = torch.Generator().manual_seed(1)
    x, update = (torch.randn(batch, tokens, heads * width, generator=generator) for _ in range(2))
    return BlockTrace(0, x, q, k, width**-0.5, logit_bias, update, x)


def random_qk(num_prefix: int, std: float = 0.4, seed: int = 0):
    """Queries and keys (B,H,N,d) whose logits have this standard deviation; those of 0.4 are reduced in float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, H, num_prefix + M, D_HEAD)
    return [std**0.5 * torch.randn(shape, generator=generator) for _ in range(2)]


def random_case(num_prefix: int, std: float = 0.4):
    return make_trace(*random_qk(num_prefix, std))


def large_logits():
    """Logits that reach -50 and 50 in every head."""
    q, k = random_qk(1)
    largest = (q @ k.mT).abs().amax((0, 2, 3)) / D_HEAD**0.5
    return make_trace(q * (50 / largest)[:, None, None], k)


def common_key():
    """Logits of several hundred, nearly all of it common to the keys of a row."""
    q, k = random_qk(1)
    return make_trace(q, k + 60 * random_qk(1, seed=1)[1][:, :, :1])


def one_hot():
    """Every query attends to itself, with a probability that float32 cannot tell from 1."""
    q, _ = random_qk(1)
    return make_trace(50 * q, q)


def peaked():
    """Rows as peaked, and errors as coherent, as they can be where the reduction still works in float32."""
    k = F.normalize(random_qk(1)[0], dim=-1)
    return make_trace(60 * k, k)  # s_ii = 7.5


def sink():
    """[cls] takes 99.999 % of the attention of every query, and the patches share the rest unevenly."""
    q, k = random_qk(1)
    q[..., 0], k[..., 0] = 1.0, 0.0
    logits = q @ k.mT / D_HEAD**0.5
    wanted = logits[..., 1:].logsumexp(-1) + math.log(0.99999 / 0.00001)
    k[:, :, 0], k[:, :, 0, 0] = 0.0, 1.0
    q[..., 0] = wanted * D_HEAD**0.5
    return make_trace(q, k)


def biased(num_prefix: int):
    generator = torch.Generator().manual_seed(2)
    tokens = num_prefix + M
    return make_trace(*random_qk(num_prefix), 5 * torch.randn(H, tokens, tokens, generator=generator))


CASES = {  # name -> (trace, number of prefix tokens, whether the first is [cls])
    "random": (random_case(1), 1, True),
    "soft": (random_case(1, std=0.01), 1, True),
    "selective": (random_case(1, std=4.0), 1, True),
    "uniform": (make_trace(torch.zeros(B, H, 1 + M, D_HEAD), random_qk(1)[1]), 1, True),
    "one-hot": (one_hot(), 1, True),
    "peaked": (peaked(), 1, True),
    "sink": (sink(), 1, True),
    "logits of 50": (large_logits(), 1, True),
    "common key": (common_key(), 1, True),
    "no prefix": (random_case(0), 0, False),
    "registers": (random_case(5), 5, True),
    "registers without cls": (random_case(4), 4, False),
    "bias": (biased(1), 1, True),
    "bias without cls": (biased(0), 0, False),
}


def applicable(case: str) -> list[str]:
    trace = CASES[case][0]
    return [name for name in REDUCTIONS if name == "explicit" or trace.logit_bias is None]


EVERY_REDUCTION = [(case, reduction) for case in CASES for reduction in applicable(case)]


def attention(trace: BlockTrace) -> torch.Tensor:
    """(B,H,N,N) float64."""
    logits = trace.q.double() @ trace.k.double().mT * trace.scale
    return (logits if trace.logit_bias is None else logits + trace.logit_bias.double()).softmax(-1)


def entropy(a):  # of rows over the patches (..., M), renormalised: Eq. 6
    a = a / a.sum(-1, keepdim=True)
    return -torch.xlogy(a, a).sum(-1)


def diagonal(a):  # A_ii of the last queries
    return a.diagonal(offset=a.shape[-1] - a.shape[-2], dim1=-2, dim2=-1)


def ratio(trace: BlockTrace) -> torch.Tensor:
    return (trace.update.double().norm(dim=-1) / trace.x.double().norm(dim=-1))[:, None]


DEFINITIONS = {  # a (B,H,N,N), p prefix tokens, trace -> (B,H)
    "cls_self_attention": lambda a, p, trace: a[:, :, 0, 0],
    "patch_self_attention": lambda a, p, trace: diagonal(a[:, :, p:]).mean(-1),
    "cls_self_attention_relative": lambda a, p, trace: a[:, :, 0, 0] / a[:, :, 0, p:].sum(-1),
    "patch_self_attention_relative": lambda a, p, trace: (diagonal(a[:, :, p:]) / a[:, :, p:, p:].sum(-1)).mean(-1),
    "cls_patch_attention": lambda a, p, trace: a[:, :, 0, p:].mean(-1),
    "patch_cls_attention": lambda a, p, trace: a[:, :, p:, 0].mean(-1),
    "cls_patch_entropy": lambda a, p, trace: entropy(a[:, :, 0, p:]),
    "patch_patch_entropy": lambda a, p, trace: entropy(a[:, :, p:, p:]).mean(-1),
    "cls_update_ratio": lambda a, p, trace: ratio(trace)[:, :, 0],
    "patch_update_ratio": lambda a, p, trace: ratio(trace)[:, :, p:].mean(-1),
}


def assert_metrics_match(reduced, trace, num_prefix, has_cls, tolerance):
    exact = attention(trace)
    for name, metric in METRICS.items():
        if metric.needs_cls and not has_cls:
            continue
        expected = DEFINITIONS[name](exact, num_prefix, trace)
        allowed = tolerance if metric.unit == "nats" else tolerance * expected.abs()
        error = (metric.compute(reduced).double() - expected).abs()
        assert (error <= allowed).all(), f"{name}: off by {error.max():.1e} at values up to {expected.max():.1e}"


def test_every_metric_has_a_definition():
    assert list(METRICS) == list(DEFINITIONS)
    assert set(PAPER_METRICS) <= set(METRICS)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_metrics_are_those_of_the_paper(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced = reduce_attention(trace, num_prefix, has_cls, reduction)
    assert_metrics_match(reduced, trace, num_prefix, has_cls, tolerance=1e-5)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_every_row_is_that_of_the_definition(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced, a = reduce_attention(trace, num_prefix, has_cls, reduction), attention(trace)
    queries = {"patches": slice(num_prefix, None), "cls": 0}
    for kind in ("patches", "cls") if has_cls else ("patches",):
        rows, of = getattr(reduced, kind), queries[kind]
        to_patches = a[..., num_prefix:]
        expected = {
            "to_self": diagonal(a),
            "to_self_relative": diagonal(a) / to_patches.sum(-1),
            "to_cls": a[..., 0],
            "to_patch": to_patches.mean(-1),
        }
        for field, value in expected.items():
            if field != "to_cls" or has_cls:
                torch.testing.assert_close(getattr(rows, field).double(), value[:, :, of], rtol=1e-5, atol=1e-37)
        error = (rows.patch_entropy - entropy(to_patches)[:, :, of]).abs()
        assert error.max() < 1e-5 and rows.patch_entropy.min() >= 0
    assert (reduced.cls is None) == (not has_cls) == (reduced.patches.to_cls is None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_is_exact(reduction):
    trace = make_trace(*(tensor.double() for tensor in random_qk(3)))
    reduced = reduce_attention(trace, 3, True, reduction)
    assert reduced.patches.patch_entropy.dtype == torch.float64
    assert_metrics_match(reduced, trace, 3, True, tolerance=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_precision_inputs_lose_nothing_in_the_reduction(reduction, dtype):
    trace = make_trace(*(tensor.to(dtype) for tensor in random_qk(1, std=4.0)))
    assert_metrics_match(reduce_attention(trace, 1, True, reduction), trace, 1, True, tolerance=1e-5)

    full = attention(make_trace(*random_qk(1, std=4.0)))
    naive = (trace.q @ trace.k.mT * trace.scale).softmax(-1)
    ours = METRICS["patch_patch_entropy"].compute(reduce_attention(trace, 1, True, reduction))
    exact, low = (DEFINITIONS["patch_patch_entropy"](a.double(), 1, None) for a in (full, naive))
    assert (ours - exact).abs().max() <= 2 * (low - exact).abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uniform_attention_has_known_values(reduction):
    trace, num_prefix, _ = CASES["uniform"]
    reduced = reduce_attention(trace, num_prefix, True, reduction)
    for metric in METRICS.values():
        if metric.uniform:
            value = REFERENCES[metric.uniform](num_prefix + M, M)
            torch.testing.assert_close(metric.compute(reduced), torch.full((B, H), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_metrics_stay_within_their_bounds(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced = reduce_attention(trace, num_prefix, has_cls, reduction)
    for metric in METRICS.values():
        if has_cls or not metric.needs_cls:
            values = metric.compute(reduced)
            assert values.shape in {(B, H), (B, 1)} and values.min() >= 0
            if metric.upper:
                assert values.max() <= REFERENCES[metric.upper](num_prefix + M, M) * (1 + 1e-6)


def test_one_hot_attention_has_no_entropy_and_a_sink_leaves_the_patches_their_own():
    trace, num_prefix, _ = CASES["one-hot"]
    reduced = reduce_attention(trace, num_prefix, True)
    assert reduced.patches.patch_entropy.max() < 1e-12
    assert reduced.patches.to_self.min() > 1 - 1e-12
    trace, num_prefix, _ = CASES["sink"]
    reduced = reduce_attention(trace, num_prefix, True)
    torch.testing.assert_close(reduced.patches.to_cls, torch.full((B, H, M), 0.99999).double(), rtol=1e-6, atol=0)
    assert 3.5 < reduced.patches.patch_entropy.min() < reduced.patches.patch_entropy.max() < math.log(M) - 0.02


def test_automatic_choice_is_fused_where_that_applies():
    plain, biased = CASES["random"][0], CASES["bias"][0]
    assert_same(reduce_attention(plain, 1, True), reduce_attention(plain, 1, True, "fused"))
    assert_same(reduce_attention(biased, 1, True), reduce_attention(biased, 1, True, "explicit"))
    with pytest.raises(ValueError, match="adds a bias to its attention logits; use auto or explicit"):
        reduce_attention(biased, 1, True, "fused")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_of_the_caller_changes_nothing(reduction):
    trace = CASES["random"][0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = reduce_attention(trace, 1, True, reduction)
    assert_same(inside, reduce_attention(trace, 1, True, reduction))


def assert_same(reduced, other):
    for rows, other_rows in zip(reduced, other, strict=True):
        assert all(torch.equal(value, other_value) for value, other_value in zip(rows, other_rows, strict=True))


class LargestStorage(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_attention_matrix_is_built_or_kept(reduction):
    q, k = torch.randn(2, 1, 1, 1025, 16) / 2
    with LargestStorage() as largest:
        reduced = reduce_attention(make_trace(q, k), 1, True, reduction)
    assert largest.bytes < 4 * 1025**2 / 10
    assert all(values.untyped_storage().nbytes() < 10_000 for values in reduced.patches)


def test_trace_of_a_model_gives_one_number_per_image_and_head():
    model = build_vit("vit_demo_patch8", img_size=32, depth=2, reg_tokens=2).eval()
    with torch.no_grad():
        for step in model.trace(torch.randn(3, 3, 32, 32)):
            reduced = reduce_attention(step, model.num_prefix_tokens, model.has_cls)
            for name, metric in METRICS.items():
                assert metric.compute(reduced).shape == ((3, 1) if "update" in name else (3, model.num_heads))


def assert_moments(moments: Moments, values: np.ndarray):
    """Against numpy over the whole set; values (images, H)."""
    values = np.concatenate([values.mean(1, keepdims=True), values], axis=1)
    found = moments.to_json()
    assert found["count"] == len(values)
    np.testing.assert_allclose([found["mean"], *found["mean_per_head"]], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose([found["std"], *found["std_per_head"]], values.std(0), rtol=1e-12)


def entropies(images: int) -> np.ndarray:
    """Values as hard as they come: a standard deviation of 1e-3 around a mean of 5."""
    return np.random.default_rng(0).normal(5.0, 1e-3, (images, 4))


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_those_of_the_whole_set_for_any_split(seed):
    values = entropies(1000)
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, 1000), size=30, replace=False))
    moments = Moments()
    for batch in np.split(values, cuts):
        moments.update(torch.from_numpy(batch))
    assert_moments(moments, values)


def test_moments_merge_with_those_of_no_images():
    values, moments = entropies(10), Moments()
    moments.merge(Moments())
    moments.update(torch.from_numpy(values))
    moments.merge(Moments())
    assert_moments(moments, values)


def _rank(rank: int, folder: str):
    where = {"init_method": f"file://{folder}/store", "timeout": timedelta(minutes=1)}
    dist.init_process_group("gloo", **where, rank=rank, world_size=2)
    moments, unseen = Moments(), Moments()
    moments.update(torch.from_numpy(entropies(101)[rank::2]))
    if rank == 1:
        unseen.update(torch.from_numpy(entropies(5)))
    moments.all_reduce()
    unseen.all_reduce()
    torch.save([moments.mean, moments.squares], f"{folder}/rank{rank}.pth")
    assert_moments(moments, entropies(101))
    assert_moments(unseen, entropies(5))
    dist.destroy_process_group()


def test_two_processes_agree_on_the_moments_of_all_images(tmp_path):
    other = mp.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    _rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
