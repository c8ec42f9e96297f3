"""The kernels' sums against their definitions in float64, and what they are compiled to.

Without a GPU the kernels run in Triton's interpreter. TRITON_INTERPRET is read when triton is first imported, which
torch may do for any other test, and it would replace the kernels that torch compiles. So this file is also a program:
a process of its own computes all cases, and leaves them to the tests.
"""

import functools
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attention.explicit import Operands

ROOT = Path(__file__).resolve().parent.parent
B, H = 2, 3
GRID = (7, 11)  # M = 77 is a multiple of no tile
M = GRID[0] * GRID[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def random_qk(
    num_prefix: int, d: int = 32, std: float = 2.0, dtype=torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Views of one qkv tensor, as encoders make them; logits have about this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    qkv = std**0.5 * torch.randn(B, num_prefix + M, 3, H, d, generator=generator)
    return qkv.to(dtype).permute(2, 0, 3, 1, 4)[:2].unbind(0)


def random_bias(num_prefix: int) -> Tensor:
    """(H,N,N), stored (N,N,H) as encoders make it."""
    tokens = num_prefix + M
    return 2 * torch.randn(tokens, tokens, H, generator=torch.Generator().manual_seed(1)).permute(2, 0, 1)


def random_case(num_prefix: int, d: int, biased: bool, dtype=torch.float32):
    return *random_qk(num_prefix, d, dtype=dtype), random_bias(num_prefix) if biased else None, num_prefix


def peaked():
    """Logits of several hundred."""
    q, k = random_qk(1)
    return 30 * q, k, None, 1


def one_hot():
    """Every query attends to itself, with a probability that float32 cannot tell from 1."""
    _, k = random_qk(1, std=1.0)
    return 50 * k, k, None, 1


def sink():
    """[cls] takes 99.999 % of the attention of every query, and the patches share the rest unevenly."""
    q, k = (x.clone() for x in random_qk(1))
    q[..., 0], k[..., 0] = 1.0, 0.0
    lse = (q @ k.mT / 32**0.5)[..., 1:].logsumexp(-1)
    k[:, :, 0], k[:, :, 0, 0] = 0.0, 1.0
    q[..., 0] = (lse + math.log(0.99999 / 0.00001)) * 32**0.5
    return q, k, None, 1


def masked():
    """Biases of -inf: query 3 has no patch key, query 4 none before the last tile, query 5 but one, key 9 no query."""
    bias = random_bias(1).clone()
    bias[:, 3, 1:] = -math.inf
    bias[:, 4, :70] = -math.inf
    bias[:, 5, 2:] = -math.inf
    bias[:, :, 9] = -math.inf
    return *random_qk(1), bias, 1


def not_a_number():
    q, k = (x.clone() for x in random_qk(1))
    q[0, 0, 5, 0] = math.nan
    return q, k, None, 1


def transposed():
    """Views whose channels are not side by side."""
    q, k = random_qk(5)
    return q.mT.contiguous().mT, k.mT.contiguous().mT, None, 5


WIDTHS = itertools.product([0, 1, 5], [16, 32, 64, 80])
BIASED = map(bool, (0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1))  # every P and every d, both ways
MODERATE = {  # name -> () -> (q, k, bias, P)
    **{
        f"P={p}, d={d}, {'bias' if biased else 'no bias'}": functools.partial(random_case, p, d, biased)
        for (p, d), biased in zip(WIDTHS, BIASED, strict=True)
    },
    "bfloat16": functools.partial(random_case, 5, 80, True, torch.bfloat16),
    "float16": functools.partial(random_case, 5, 80, True, torch.float16),
    "more prefix tokens than a tile": functools.partial(random_case, 70, 32, False),
    "sink": sink,
    "masked": masked,
    "transposed": transposed,
}
LARGE = {"peaked": peaked, "one-hot": one_hot}
CASES = {
    **MODERATE,
    **LARGE,
    "uniform": lambda: (torch.zeros(B, H, 1 + M, 32), random_qk(1)[1], None, 1),
    "NaN": not_a_number,
}


def definitions(q, k, bias, num_prefix) -> dict[str, Tensor]:
    """Everything in float64 from (B,H,N,N) matrices; a query whose patch logits are all -inf has no probabilities."""
    s = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    s = s if bias is None else s + bias.double()
    to_patches = s[..., num_prefix:]
    p = to_patches.softmax(-1).where(to_patches.amax(-1, keepdim=True) > -math.inf, 0)
    places = torch.cartesian_prod(*(torch.arange(extent).double() for extent in GRID))
    return {
        "own": s.diagonal(dim1=-2, dim2=-1),
        "prefix": s[..., :num_prefix],
        "patches": to_patches.logsumexp(-1),
        "patch_entropy": torch.special.entr(p).sum(-1),
        "distance": (p[:, :, num_prefix:] * torch.cdist(places, places)).sum(-1),
        "received": p[:, :, num_prefix:].sum(-2),
    }


def run(task: str, out: Path):
    """This file as a program: "sums" or "ptx"."""
    interpret = task == "sums" and not torch.cuda.is_available()
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(out.parent / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, task, str(out)]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    return run("sums", tmp_path_factory.mktemp("triton") / "sums.pth")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> dict[str, str]:
    return run("ptx", tmp_path_factory.mktemp("triton") / "ptx.pth")


def compute_sums() -> dict[str, dict[str, Tensor]]:
    from attention.kernel import kernel_sums

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def of(q, k, bias, num_prefix, **switches):
        q, k, bias = (x if x is None else x.to(device) for x in (q, k, bias))
        found = kernel_sums(Operands(q, k, q.shape[-1] ** -0.5, bias, num_prefix, GRID, **switches))
        return {name: x.cpu() for name, x in found._asdict().items() if x is not None}

    found = {name: of(*make(), distance=True, received=True) for name, make in CASES.items()}
    return found | {"switched off": of(*CASES["P=1, d=32, no bias"]())}


def compile_for_hopper() -> dict[str, str]:
    """Both kernels with everything switched on, compiled for compute capability 9.0, which takes no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from attention import kernel as kernels

    floats = {"own", "prefix", "patches", "entropy", "distance", "received", "bias"}
    assembly = {}
    for kernel in (kernels._query_kernel, kernels._key_kernel):
        for dtype, step, warps in (("fp32", 64, 8), ("bf16", 32, 4)):
            constants = {"q_d": 1, "k_d": 1, "bias_key": 1, "D": 64, "WIDTH": 64, "BLOCK": 64, "STEP": step}
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(floats, "*fp32") | {"scale": "fp32"}
            types |= dict.fromkeys("qk", f"*{dtype}") | dict.fromkeys(constants, "constexpr")
            types = {name: types[name] for name in kernel.arg_names}
            source = triton.compiler.ASTSource(kernel, types, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
            assert compiled.metadata.shared <= 227 * 1024
            assembly[f"{kernel.__name__} {dtype}"] = compiled.asm["ptx"]
    return assembly


@functools.cache
def expected(case: str) -> dict[str, Tensor]:
    return definitions(*CASES[case]())


def rounding(case: str) -> float:
    """The most by which float32 can round a logit of this case, whatever the order of the sum and with or without FMA.

    A dot product of d terms errs by at most gamma_n sum |q_c k_c|, gamma_n = n u / (1 - n u), u = 2^-24 (Higham 2002,
    Eq. 3.5); n = d + 2 with the products by the scale and the addition of a bias, of which LARGE cases have none.
    """
    q, k, bias, _ = CASES[case]()
    assert bias is None
    n_u = (q.shape[-1] + 2) * 2.0**-24
    return n_u / (1 - n_u) * float((q.double().abs() @ k.double().abs().mT).max()) / q.shape[-1] ** 0.5


def assert_as_defined(found, case, tolerance):
    """Logits, log-sum-exps and nats within this absolutely, sums over probabilities relatively."""
    for name, value in expected(case).items():
        summed = name in {"distance", "received"}
        limits = {"rtol": tolerance, "atol": 1e-30} if summed else {"rtol": 0, "atol": tolerance}
        torch.testing.assert_close(
            found[name].double(), value, **limits, msg=lambda text, name=name: f"{name}: {text}"
        )  # fmt: skip
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("case", MODERATE)
def test_sums_are_those_of_the_definition(sums, case):
    assert_as_defined(sums[case], case, 1e-5)


@pytest.mark.parametrize("case", LARGE)
def test_logits_of_several_hundred_keep_their_relative_precision(sums, case):
    """How float32 rounds these depends on the order in which a CPU's matrix product adds: the bound does not."""
    assert expected(case)["own"].abs().max() > 200
    # a log-sum-exp moves by no more than its logits, a probability by no more than two of them
    assert_as_defined(sums[case], case, 1e-5 + 2 * rounding(case))
    error = sums[case]["own"].double() - expected(case)["own"]
    assert error.square().mean().sqrt() < 1e-7 * expected(case)["own"].abs().max()  # as the kernel's docstring says


def test_one_hot_rows_have_no_entropy_and_no_distance(sums):
    found = sums["one-hot"]
    assert found["patch_entropy"].min() >= 0 and found["patch_entropy"][:, :, 1:].max() < 1e-6
    assert found["distance"].max() < 1e-6
    # the logit of a key's own query is computed twice, for the log-sum-exp and for the sum over queries
    torch.testing.assert_close(found["received"], torch.ones(B, H, M), rtol=0, atol=1e-6 + 2 * rounding("one-hot"))


@pytest.mark.parametrize("case", [case for case in CASES if case not in {"masked", "NaN"}])
def test_no_patch_gives_itself_more_than_everything(sums, case):
    num_prefix = CASES[case]()[3]
    assert (sums[case]["own"] - sums[case]["patches"])[:, :, num_prefix:].max() <= 2e-6


def test_a_sink_leaves_the_patches_their_own(sums):
    found = sums["sink"]
    share = (found["prefix"][..., 0] - torch.logaddexp(found["prefix"][..., 0], found["patches"])).exp()
    torch.testing.assert_close(share[:, :, 1:], torch.full((B, H, M), 0.99999), rtol=1e-6, atol=0)
    assert 0.5 < found["patch_entropy"].min() < found["patch_entropy"].max() < math.log(M)


def test_uniform_attention_has_known_sums(sums):
    found, places = sums["uniform"], torch.cartesian_prod(*map(torch.arange, GRID)).float()
    one = torch.ones(B, H, M)
    torch.testing.assert_close(found["patch_entropy"][:, :, 1:], one * math.log(M), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["received"], one, rtol=0, atol=2e-6)  # ln M is itself rounded, by up to 2.4e-7
    torch.testing.assert_close(found["distance"], one * torch.cdist(places, places).mean(1), rtol=2e-6, atol=0)


def test_a_query_without_patch_keys_has_zeros_and_not_nan(sums):
    found = sums["masked"]
    assert (found["patches"][:, :, 3] == -math.inf).all()
    assert (found["patch_entropy"][:, :, 3] == 0).all() and (found["distance"][:, :, 2] == 0).all()
    assert (found["received"][:, :, 8] == 0).all()
    assert not any(values.isnan().any() for values in found.values())


def test_nan_is_passed_on_and_stays_in_its_row(sums):
    found = sums["NaN"]
    for name in ("own", "patches", "patch_entropy"):
        where = torch.zeros(B, H, 1 + M, dtype=torch.bool)
        where[0, 0, 5] = True
        assert torch.equal(found[name].isnan(), where)
    assert found["distance"].isnan().sum() == 1 and found["received"][0, 0].isnan().all()


def test_what_is_not_asked_for_is_left_out_and_changes_nothing(sums):
    off, on = sums["switched off"], sums["P=1, d=32, no bias"]
    assert set(on) - set(off) == {"distance", "received"}
    assert all(torch.equal(value, on[name]) for name, value in off.items())


def test_kernels_compile_for_hopper_with_full_float32_and_tensor_core_bfloat16_products(ptx):
    assert len(ptx) == 4
    for name, assembly in ptx.items():
        assert "tf32" not in assembly
        assert ("wgmma" in assembly) == name.endswith("bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "must both be float32, bfloat16 or float16"),
        ({"grid": (7, 10)}, "78 tokens are not 1 prefix tokens and 7 x 10 patches"),
        ({"bias": torch.zeros(H, M, M)}, "does not fit 3 heads of 78 tokens"),
    ],
)
def test_unfit_inputs_are_refused(change, message):
    from attention.kernel import kernel_sums

    q, k = random_qk(1, dtype=change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        kernel_sums(Operands(q, k, 1.0, change.get("bias"), 1, change.get("grid", GRID)))


if __name__ == "__main__":
    torch.save({"sums": compute_sums, "ptx": compile_for_hopper}[sys.argv[1]](), sys.argv[2])
