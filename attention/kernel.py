"""The sums that attention statistics are made of, by GPU kernels that pass over the logits and store nothing N x N.

Letters: B images, H heads, N tokens (prefix first), P prefix tokens ([cls], registers), M patches, d head width.
Query i attends to key j with logit s_ij = scale * q_i . k_j + bias_ij; p_ij is its softmax over the patch keys alone.

Both kernels hold BLOCK rows and pass over the columns, STEP at a time: rows are queries and columns keys, or the other
way round for what a key receives. WIDTH is d padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.explicit import Operands, Sums


@triton.jit
def _load_tokens(x, start, tokens, stride_token, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """(COUNT,WIDTH) of one head; 0 beyond the last token and beyond the head width D."""
    tile, channels = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    x += tl.cast(start, tl.int64) * stride_token
    inside = (start + tile < tokens)[:, None] & (channels < D)[None, :]
    return tl.load(x + tile[:, None] * stride_token + channels[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def _logits(
    held, row, x, column, tokens, stride_token, stride_d, bias, stride_row, stride_column, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits of the held rows and the columns, tokens of x, from these two tokens on; no meaning beyond the last."""
    other = _load_tokens(x, column, tokens, stride_token, stride_d, D, WIDTH, COLUMNS)
    if bias is not None:  # loaded before the product, since the later of the two decides how the registers are laid out
        i, j = tl.arange(0, held.shape[0]), tl.arange(0, COLUMNS)
        bias += tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
        inside = (row + i < tokens)[:, None] & (column + j < tokens)[None, :]
        added = tl.load(bias + i[:, None] * stride_row + j[None, :] * stride_column, mask=inside, other=0.0)
    # float32 is multiplied as such, not rounded to TF32; products of half-precision numbers are exact in any case
    logits = tl.dot(held, tl.trans(other), input_precision="ieee") * scale
    if bias is not None:
        logits += added.to(tl.float32)
    return logits


@triton.jit
def _query_kernel(
    q, k, bias, own, prefix, patches, entropy, distance,
    scale, heads, tokens, P, grid_columns,
    q_image, q_head, q_token, q_d, k_image, k_head, k_token, k_d, bias_head, bias_query, bias_key,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of queries against all keys. Outputs are contiguous; bias and distance may be None."""
    NARROW: tl.constexpr = 16  # the least that tl.dot takes
    tiles = tl.cdiv(tokens, BLOCK)
    pair = tl.cast(tl.program_id(0) // tiles, tl.int64)  # image and head; its tiles run together and share keys in L2
    image, head = pair // heads, pair % heads
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    if bias is not None:
        bias += head * bias_head
    row = tl.program_id(0) % tiles * BLOCK
    i = row + tl.arange(0, BLOCK)
    exists = i < tokens
    out = pair * tokens + i
    queries = _load_tokens(q, row, tokens, q_token, q_d, D, WIDTH, BLOCK)

    for column in range(0, P, NARROW):
        j = column + tl.arange(0, NARROW)
        s = _logits(queries, row, k, column, tokens, k_token, k_d, bias, bias_query, bias_key, scale, D, WIDTH, NARROW)
        tl.store(prefix + out[:, None] * P + j[None, :], s, mask=exists[:, None] & (j < P)[None, :])
        s_ii = tl.sum(tl.where(i[:, None] == j[None, :], s, 0.0), 1)
        tl.store(own + out, s_ii, mask=(i >= column) & (i < tl.minimum(column + NARROW, P)))

    # With z = s - maximum: total = sum e^z, slope = sum e^z z, way = sum e^z |r_i - r_j|
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    way = tl.zeros([BLOCK], tl.float32)
    row_i = ((i - P) // grid_columns).to(tl.float32)
    column_i = ((i - P) % grid_columns).to(tl.float32)
    for column in range(P, tokens, STEP):
        j = column + tl.arange(0, STEP)
        s = _logits(queries, row, k, column, tokens, k_token, k_d, bias, bias_query, bias_key, scale, D, WIDTH, STEP)
        if (column < row + BLOCK) & (row < column + STEP):  # own logits are those that are summed: p_ii never exceeds 1
            s_ii = tl.sum(tl.where(i[:, None] == j[None, :], s, 0.0), 1)
            tl.store(own + out, s_ii, mask=exists & (i >= column) & (i < column + STEP))
        s = tl.where((j < tokens)[None, :], s, float("-inf"))
        new = tl.maximum(maximum, tl.max(s, 1))
        new_or_0 = tl.where(new == float("-inf"), 0.0, new)  # -inf minus itself would be NaN
        z = s - new_or_0[:, None]
        e = tl.exp(z)
        moved = tl.where(maximum == float("-inf"), 0.0, maximum - new_or_0)  # without a maximum, the sums are still 0
        shrink = tl.exp(moved)
        slope = shrink * (slope + moved * total) + tl.sum(tl.where(e > 0, e * z, 0.0), 1)  # 0 ln 0 = 0
        total = shrink * total + tl.sum(e, 1)
        if distance is not None:
            down = row_i[:, None] - ((j - P) // grid_columns).to(tl.float32)[None, :]
            across = column_i[:, None] - ((j - P) % grid_columns).to(tl.float32)[None, :]
            way = shrink * way + tl.sum(e * tl.sqrt(down * down + across * across), 1)
        maximum = new

    total = tl.where(total == 0, 1.0, total)  # of a query with no patch key; every other total is at least 1
    h = tl.log(total) - slope / total  # both terms are positive: nothing cancels
    tl.store(patches + out, maximum + tl.log(total), mask=exists)
    tl.store(entropy + out, tl.where(h < 0, 0.0, h), mask=exists)  # unlike a maximum, this keeps NaN
    if distance is not None:
        tl.store(distance + pair * (tokens - P) + (i - P), way / total, mask=exists & (i >= P))


@triton.jit
def _key_kernel(
    q, k, bias, patches, received,
    scale, heads, tokens, P,
    q_image, q_head, q_token, q_d, k_image, k_head, k_token, k_d, bias_head, bias_query, bias_key,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of patch keys against all patch queries, whose log-sum-exps are known: what each key receives."""
    tiles = tl.cdiv(tokens - P, BLOCK)
    pair = tl.cast(tl.program_id(0) // tiles, tl.int64)
    image, head = pair // heads, pair % heads
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    if bias is not None:
        bias += head * bias_head
    row = P + tl.program_id(0) % tiles * BLOCK
    keys = _load_tokens(k, row, tokens, k_token, k_d, D, WIDTH, BLOCK)
    taken = tl.zeros([BLOCK], tl.float32)
    for column in range(P, tokens, STEP):
        i = column + tl.arange(0, STEP)
        s = _logits(keys, row, q, column, tokens, q_token, q_d, bias, bias_key, bias_query, scale, D, WIDTH, STEP)
        lse = tl.load(patches + pair * tokens + i, mask=i < tokens, other=float("inf"))  # e^-inf = 0 beyond the end
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query with no patch key gives nothing
        taken += tl.sum(tl.exp(s - lse[None, :]), 1)
    j = row + tl.arange(0, BLOCK)
    tl.store(received + pair * (tokens - P) + (j - P), taken, mask=j < tokens)


def kernel_sums(operands: Operands) -> Sums:
    """Sums in float32, without gradients; q and k may have any strides. Rows without a finite patch logit sum to 0.

    Inputs are float32, bfloat16 or float16; sums are float32 throughout, and rounding of the logits is their largest
    error, about 1e-7 times the largest logit (a bound: tests/test_attention_triton.py). The grid is row-major, after
    the prefix. `distance` costs a square root per logit, `received` a second pass over queries and keys.
    Tensors are on a GPU, or on the CPU in a process started with TRITON_INTERPRET=1.
    Raises ValueError for other types of input, and where the tokens are not the prefix and the grid.
    """
    q, k, scale, logit_bias, num_prefix, (rows, columns), distance, received = operands
    images, heads, tokens, width = q.shape
    if q.dtype != k.dtype or q.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"queries and keys must both be float32, bfloat16 or float16, not {q.dtype} and {k.dtype}")
    if rows * columns < 1 or tokens != num_prefix + rows * columns:
        raise ValueError(f"{tokens} tokens are not {num_prefix} prefix tokens and {rows} x {columns} patches")
    if logit_bias is not None and logit_bias.shape != (heads, tokens, tokens):
        raise ValueError(f"a bias of shape {tuple(logit_bias.shape)} does not fit {heads} heads of {tokens} tokens")
    if not q.is_cuda and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # the same numbers; the interpreter would multiply the bits of bfloat16 as integers
    bias_strides = (0, 0, 0)
    if logit_bias is not None:
        logit_bias = logit_bias.contiguous()  # encoders store (N,N,H), and every image reads along the keys
        bias_strides = logit_bias.stride()

    def empty(*shape: int) -> Tensor:
        return torch.empty(images, heads, *shape, dtype=torch.float32, device=q.device)

    patches = tokens - num_prefix
    sums = Sums(
        own=empty(tokens),
        prefix=empty(tokens, num_prefix),
        patches=empty(tokens),
        patch_entropy=empty(tokens),
        distance=empty(patches) if distance else None,
        received=empty(patches) if received else None,
    )
    strides = (*q.stride(), *k.stride(), *bias_strides)
    block = 64
    shapes = {"D": width, "WIDTH": max(16, triton.next_power_of_2(width)), "BLOCK": block}
    if q.dtype == torch.float32:  # 4 x 4 sums per thread, so that an operand read from shared memory is used 4 times
        shapes |= {"STEP": 64, "num_warps": 8, "num_stages": 2}
    else:  # one warp group's tensor-core product; narrow steps leave registers for six such groups, and pad less
        shapes |= {"STEP": 32, "num_warps": 4, "num_stages": 3}
    with torch.cuda.device_of(q):  # Triton launches on the current GPU; nothing happens for CPU tensors
        _query_kernel[(images * heads * triton.cdiv(tokens, block),)](
            q, k, logit_bias, *sums[:5], scale, heads, tokens, num_prefix, columns, *strides, **shapes
        )
        if received:
            _key_kernel[(images * heads * triton.cdiv(patches, block),)](
                q, k, logit_bias, sums.patches, sums.received, scale, heads, tokens, num_prefix, *strides, **shapes
            )
    return sums
