"""The metrics against the paper's formulas in float64 and against closed forms; the moments against numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attention import reductions as attention_reductions
from attention.metrics import GROUPS, METRICS, PAPER_METRICS, REFERENCES, Reduced, Sizes, reduce_attention
from attention.reductions import FLOAT32_LOGITS, REDUCTIONS, choose_reduction
from models_vit import BlockTrace, attention_row, build_vit

B, H, D_HEAD, M = 2, 3, 64, 70  # M is no multiple of the query chunk
GRID, PATCH = (7, 10), 16  # of M patches
ON_CPU = ("explicit", "tiled")
WANTED = {need for metric in METRICS.values() for need in metric.needs}
ATTENTION_METRICS = {name: metric for name, metric in METRICS.items() if not metric.of_tokens}


def make_trace(q, k, logit_bias=None) -> BlockTrace:
    batch, heads, tokens, width = q.shape
    generator = torch.Generator().manual_seed(1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    x, update = (torch.randn(batch, tokens, heads * width, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(q.shape, generator=generator).to(dtype)
    return BlockTrace(0, x, q, k, width**-0.5, logit_bias, update, x, v)


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
    """Logits of several thousand, nearly all of it common to the keys of a row."""
    q, k = random_qk(1)
    return make_trace(q, k + 1000 * random_qk(1, seed=1)[1][:, :, :1])


def drain():
    """[cls] attends to itself, and leaves the patches together e^-200, which float32 does not have."""
    q, k = random_qk(1)
    q[:, :, 0, 0] = 200 * D_HEAD**0.5
    k[..., 0] = 0.0
    k[:, :, 0, 0] = 1.0
    return make_trace(q, k)


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
    "drain": (drain(), 1, True),
    "logits of 50": (large_logits(), 1, True),
    "common key": (common_key(), 1, True),
    "no prefix": (random_case(0), 0, False),
    "registers": (random_case(5), 5, True),
    "registers without cls": (random_case(4), 4, False),
    "bias": (biased(1), 1, True),
    "bias without cls": (biased(0), 0, False),
}


EVERY_REDUCTION = [(case, reduction) for case in CASES for reduction in ON_CPU]


def sizes(num_prefix: int, has_cls: bool) -> Sizes:
    return Sizes(num_prefix + M, M, num_prefix - has_cls, GRID, PATCH)


def reduced_by(reduction: str, trace: BlockTrace, num_prefix: int, has_cls: bool) -> Reduced:
    return reduce_attention(trace, num_prefix, has_cls, reduction, WANTED, sizes(num_prefix, has_cls))


def measured(num_prefix: int, has_cls: bool) -> dict:
    """The metrics of attention for an encoder with these tokens."""
    absent = {need for need, there in (("cls", has_cls), ("registers", num_prefix > has_cls)) if not there}
    return {name: metric for name, metric in ATTENTION_METRICS.items() if not absent & set(metric.needs)}


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


def distance(a: torch.Tensor) -> np.ndarray:
    """Park et al.'s attention distance of renormalised attention (B,H,M,M), written out."""
    total = np.zeros(a.shape[:2])
    for i in range(M):
        for j in range(M):
            step = np.hypot(i // GRID[1] - j // GRID[1], i % GRID[1] - j % GRID[1])
            total += a[:, :, i, j].numpy() * PATCH * step / M
    return total


def mutual_information(a: torch.Tensor) -> np.ndarray:
    """Park et al.'s normalised mutual information of renormalised attention (B,H,M,M), written out."""
    joint = a.numpy() / M
    key = joint.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.where(joint > 0, joint * np.log(joint / (key[:, :, None] / M)), 0).sum((2, 3))
        key_entropy = -np.where(key > 0, key * np.log(key), 0).sum(2)
    return information / np.sqrt(np.log(M) * key_entropy)


def effective_rank(update: torch.Tensor) -> torch.Tensor:
    singular = torch.from_numpy(np.linalg.svd(update.double().numpy(), compute_uv=False))
    return entropy(singular).exp()[:, None]


def among_patches(a, p):
    return a[:, :, p:, p:] / a[:, :, p:, p:].sum(-1, keepdim=True)


DEFINITIONS = {  # a (B,H,N,N), p prefix tokens, trace -> (B,H)
    "cls_self_attention": lambda a, p, trace: a[:, :, 0, 0],
    "patch_self_attention": lambda a, p, trace: diagonal(a[:, :, p:]).mean(-1),
    "cls_self_attention_relative": lambda a, p, trace: a[:, :, 0, 0] / a[:, :, 0, p:].sum(-1),
    "cls_self_attention_log_ratio": lambda a, p, trace: (a[:, :, 0, 0] / a[:, :, 0, p:].sum(-1)).log(),
    "patch_self_attention_relative": lambda a, p, trace: (diagonal(a[:, :, p:]) / a[:, :, p:, p:].sum(-1)).mean(-1),
    "cls_patch_attention": lambda a, p, trace: a[:, :, 0, p:].mean(-1),
    "patch_cls_attention": lambda a, p, trace: a[:, :, p:, 0].mean(-1),
    "cls_register_attention": lambda a, p, trace: a[:, :, 0, 1:p].sum(-1),
    # with [cls], registers begin at 1; the only case without is "registers without cls"
    "patch_register_attention": lambda a, p, trace: a[:, :, p:, 0 if p == 4 else 1 : p].sum(-1).mean(-1),
    "cls_patch_entropy": lambda a, p, trace: entropy(a[:, :, 0, p:]),
    "cls_patch_entropy_of_mean": lambda a, p, trace: entropy(a[:, :, 0, p:].mean(1))[:, None],
    "patch_patch_entropy": lambda a, p, trace: entropy(a[:, :, p:, p:]).mean(-1),
    "cls_update_ratio": lambda a, p, trace: ratio(trace)[:, :, 0],
    "patch_update_ratio": lambda a, p, trace: ratio(trace)[:, :, p:].mean(-1),
    "patch_patch_distance": lambda a, p, trace: torch.from_numpy(distance(among_patches(a, p))),
    "patch_patch_mutual_information": lambda a, p, trace: torch.from_numpy(mutual_information(among_patches(a, p))),
    "patch_sink_attention": lambda a, p, trace: among_patches(a, p).mean(2).sort(-1).values[..., -4:].sum(-1),
    "cls_sink_attention": lambda a, p, trace: (
        (a[:, :, 0, p:] / a[:, :, 0, p:].sum(-1, keepdim=True)).sort(-1).values[..., -4:].sum(-1)
    ),
    "patch_sink_value_ratio": lambda a, p, trace: (
        (among_patches(a, p).mean(2) * trace.v[:, :, p:].double().norm(dim=-1)).sum(-1)
        / trace.v[:, :, p:].double().norm(dim=-1).mean(-1)
    ),
    "patch_update_rank": lambda a, p, trace: effective_rank(trace.update[:, p:]),
}


def assert_metrics_match(reduced, trace, num_prefix, has_cls, tolerance):
    exact = attention(trace)
    for name, metric in measured(num_prefix, has_cls).items():
        if name not in DEFINITIONS:  # test_every_metric_has_a_definition asks for it
            continue
        expected = DEFINITIONS[name](exact, num_prefix, trace)
        # a difference of entropies is as exact as they are
        absolute = metric.unit == "nats" or name == "patch_patch_mutual_information"
        allowed = tolerance if absolute else tolerance * expected.abs()
        error = (metric.compute(reduced).double() - expected).abs()
        assert (error <= allowed).all(), f"{name}: off by {error.max():.1e} at values up to {expected.max():.1e}"


def test_every_metric_has_a_definition():
    if missing := [name for name in ATTENTION_METRICS if name not in DEFINITIONS]:
        pytest.fail(f"tests/test_attention_stats.py: DEFINITIONS has no independent definition of {', '.join(missing)}"
                    ": write one from the formula, of the whole attention matrix", pytrace=False)  # fmt: skip
    if unknown := [name for name in DEFINITIONS if name not in ATTENTION_METRICS]:
        pytest.fail(f"tests/test_attention_stats.py: DEFINITIONS has {', '.join(unknown)}, and METRICS does not: "
                    "remove what is gone", pytrace=False)  # fmt: skip


def test_groups_are_of_metrics_that_exist():
    assert GROUPS["all"] == tuple(METRICS) and not set(GROUPS["flow"]) & set(GROUPS["park"])
    assert set(PAPER_METRICS) <= set(METRICS)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_metrics_are_those_of_the_paper(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced = reduced_by(reduction, trace, num_prefix, has_cls)
    assert_metrics_match(reduced, trace, num_prefix, has_cls, tolerance=1e-5)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_every_row_is_that_of_the_definition(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced, a = reduced_by(reduction, trace, num_prefix, has_cls), attention(trace)
    queries = {"patches": slice(num_prefix, None), "cls": 0}
    for kind in ("patches", "cls") if has_cls else ("patches",):
        rows, of = getattr(reduced, kind), queries[kind]
        to_patches = a[..., num_prefix:]
        expected = {
            "to_self": diagonal(a),
            "to_cls": a[..., 0],
            "to_registers": a[..., int(has_cls) : num_prefix].sum(-1),
            "to_patch": to_patches.mean(-1),
        }
        for field, value in expected.items():
            if field != "to_cls" or has_cls:
                torch.testing.assert_close(getattr(rows, field).double(), value[:, :, of], rtol=1e-5, atol=1e-37)
        ratio_error = (rows.to_self_log_ratio - (diagonal(a) / to_patches.sum(-1)).log()[:, :, of]).abs()
        assert ratio_error.max() < 1e-5
        error = (rows.patch_entropy - entropy(to_patches)[:, :, of]).abs()
        assert error.max() < 1e-5 and rows.patch_entropy.min() >= 0
    assert (reduced.cls is None) == (not has_cls) == (reduced.patches.to_cls is None)


@pytest.mark.parametrize("reduction", ON_CPU)
def test_float64_is_exact(reduction):
    trace = make_trace(*(tensor.double() for tensor in random_qk(3)))
    reduced = reduced_by(reduction, trace, 3, True)
    assert_metrics_match(reduced, trace, 3, True, tolerance=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ON_CPU)
def test_half_precision_inputs_lose_nothing_in_the_reduction(reduction, dtype):
    trace = make_trace(*(tensor.to(dtype) for tensor in random_qk(1, std=4.0)))
    assert_metrics_match(reduced_by(reduction, trace, 1, True), trace, 1, True, tolerance=2e-5)

    full = attention(make_trace(*random_qk(1, std=4.0)))
    naive = (trace.q @ trace.k.mT * trace.scale).softmax(-1)
    ours = METRICS["patch_patch_entropy"].compute(reduced_by(reduction, trace, 1, True))
    exact, low = (DEFINITIONS["patch_patch_entropy"](a.double(), 1, None) for a in (full, naive))
    assert (ours - exact).abs().max() <= 2 * (low - exact).abs().max()


@pytest.mark.parametrize("heads", [0.001, 0.04, 0.5, 1, 2, 4, 6], ids=lambda heads: f"{heads} heads")
@pytest.mark.parametrize("case", ["registers", "bias", "no prefix", "registers without cls"])
def test_tiles_of_any_number_of_heads_or_queries_give_the_same_sums(case, heads, monkeypatch):
    trace, num_prefix, has_cls = CASES[case]
    monkeypatch.setattr(attention_reductions, "TILE_BYTES", int(4 * (num_prefix + M) ** 2 * heads))
    assert_metrics_match(reduced_by("tiled", trace, num_prefix, has_cls), trace, num_prefix, has_cls, 1e-5)


@pytest.mark.parametrize("reduction", ON_CPU)
def test_uniform_attention_has_known_values(reduction):
    trace, num_prefix, _ = CASES["uniform"]
    reduced, bounds = reduced_by(reduction, trace, num_prefix, True), sizes(num_prefix, True)
    for metric in measured(num_prefix, True).values():
        if metric.uniform:
            values = metric.compute(reduced)
            expected = torch.full_like(values, REFERENCES[metric.uniform](bounds))
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6 if metric.uniform == "0" else 0)


@pytest.mark.parametrize(("case", "reduction"), EVERY_REDUCTION)
def test_metrics_stay_within_their_bounds(case, reduction):
    trace, num_prefix, has_cls = CASES[case]
    reduced, bounds = reduced_by(reduction, trace, num_prefix, has_cls), sizes(num_prefix, has_cls)
    for metric in measured(num_prefix, has_cls).values():
        values = metric.compute(reduced)
        assert values.shape in {(B, H), (B, 1)}
        if metric.lower:
            assert values.min() >= REFERENCES[metric.lower](bounds)
        if metric.upper:
            assert values.max() <= REFERENCES[metric.upper](bounds) * (1 + 1e-6)


def test_one_hot_attention_has_no_entropy_and_a_sink_leaves_the_patches_their_own():
    trace, num_prefix, _ = CASES["one-hot"]
    reduced = reduced_by("auto", trace, num_prefix, True)
    assert reduced.patches.patch_entropy.max() < 1e-12
    assert reduced.patches.to_self.min() > 1 - 1e-12
    trace, num_prefix, _ = CASES["sink"]
    reduced = reduced_by("auto", trace, num_prefix, True)
    torch.testing.assert_close(reduced.patches.to_cls, torch.full((B, H, M), 0.99999).double(), rtol=1e-6, atol=0)
    assert 3.5 < reduced.patches.patch_entropy.min() < reduced.patches.patch_entropy.max() < math.log(M) - 0.02


def test_queries_that_all_attend_to_one_patch_share_no_information_with_it():
    q, k = random_qk(0)
    q[..., 0], k[..., 0] = 100.0, 0.0
    k[:, :, 3, 0] = 100.0
    information = METRICS["patch_patch_mutual_information"].compute(reduced_by("auto", make_trace(q, k), 0, False))
    assert torch.equal(information, torch.zeros(B, H).double())


def test_only_heads_with_large_logits_are_reduced_again_in_float64(monkeypatch):
    q, k = random_qk(1)
    q[1, 2] *= 200  # one head of one image
    again = []
    tiled = REDUCTIONS["tiled"]
    monkeypatch.setitem(REDUCTIONS, "tiled", lambda x: again.append((x.q.shape, x.q.dtype)) or tiled(x))
    reduce_attention(make_trace(q, k), 1, True, "tiled")
    assert again == [((B, H, 1 + M, D_HEAD), torch.float32), ((1, 1, 1 + M, D_HEAD), torch.float64)]
    assert FLOAT32_LOGITS * 6e-7 < 1e-5


def test_automatic_choice_is_the_fastest_of_the_device_and_others_are_refused_with_the_reason():
    cpu = torch.device("cpu")
    assert [choose_reduction(name, cpu) for name in ("auto", *ON_CPU)] == ["tiled", *ON_CPU]
    assert choose_reduction("auto", torch.device("mps")) == "explicit"
    with pytest.raises(ValueError, match="triton does not run on cpu: use auto or explicit"):
        choose_reduction("triton", cpu)


@pytest.mark.parametrize("reduction", ON_CPU)
def test_autocast_of_the_caller_changes_nothing(reduction):
    trace = CASES["random"][0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = reduced_by(reduction, trace, 1, True)
    outside = reduced_by(reduction, trace, 1, True)
    for field, value in flat(inside).items():
        assert torch.equal(value, flat(outside)[field]), field


def flat(reduced: Reduced) -> dict[str, torch.Tensor]:
    rows = {f"{kind}.{name}": v for kind in ("cls", "patches") for name, v in getattr(reduced, kind)._asdict().items()}
    return rows | {name: v for name, v in reduced._asdict().items() if isinstance(v, torch.Tensor)}


class LargestStorage(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("reduction", ["explicit", "auto"])
def test_no_attention_matrix_of_a_long_sequence_is_built_or_kept(reduction):
    of_model = Sizes(4097, 4096, 0, (64, 64), 16)
    q, k = torch.randn(2, 1, 1, 4097, 16) / 2
    with LargestStorage() as largest:
        reduced = reduce_attention(make_trace(q, k), 1, True, reduction, WANTED, of_model)
    assert largest.bytes < 4 * 4097**2 / 10
    assert all(values.untyped_storage().nbytes() < 100_000 for values in reduced.patches)


def test_trace_of_a_model_gives_one_number_per_image_and_head():
    model = build_vit("vit_demo_patch8", img_size=32, depth=2, reg_tokens=2).eval()
    of_model = Sizes(19, 16, 2, (4, 4), 8)
    with torch.no_grad():
        for step in model.trace(torch.randn(3, 3, 32, 32)):
            reduced = reduce_attention(step, 3, True, wanted=WANTED, sizes=of_model)
            for name, metric in ATTENTION_METRICS.items():
                numbers = metric.record(reduced)
                assert numbers.shape == (3, 1 + (model.num_heads if metric.axis == "head" else 1)), name
                torch.testing.assert_close(numbers[:, 0], metric.compute(reduced).mean(1))
            expected = attention(step)[:, :, 0, 3:]
            torch.testing.assert_close(attention_row(step, 0, 3).double(), expected, atol=1e-6, rtol=0)
