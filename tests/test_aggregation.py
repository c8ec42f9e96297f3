"""Every head of AGGREGATIONS: by other people's implementations, by hand in float64, by counts; and their names."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import nn

from models_vit import Features, VisionTransformer
from probing.attentive import AttentivePool, EfficientPool
from probing.fixed import central_cells
from probing.heads import AGGREGATIONS, head_name, option_flags, parse_head
from probing.pooling import Tokens

ROOT = Path(__file__).resolve().parent.parent
D, GRID, HEADS = 16, (3, 3), 4
# one word per entry, at options that fit 16 channels and 9 patches, and words for what options change
WORDS = {name: name for name in AGGREGATIONS} | {"ap": "ap4", "ep": "ep8"}
MORE = [
    "ap1", "ap3", "ap5:content=all", "ep1", "ep4:shrink=2,content=all", "ca2", "cp2", "ca3:scale=release",
    "dino:scale=release", "abmilp:depth=3,act=gelu", "abmilp:depth=2,act=gated,hidden=5", "abmilp:sa=map",
    "abmilp:sa=both,content=all", "abmilp:depth=2,act=tanh,sa=residual", "abmilp:cond=pe,content=all,branches=2",
    "abmilp:cond=pe",
]  # fmt: skip
ALL = [*WORDS.values(), *MORE]


def build(word, width=D, grid=GRID, num_prefix=2):
    torch.manual_seed(0)
    name, options = parse_head(word, {})
    head = AGGREGATIONS[name].build(Tokens(width, grid, num_prefix), **dict(options)).double()
    for parameter in head.parameters():  # zeros at start would hide errors
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def features(B=5, seed=1):
    """[cls], one register and 9 patches, with attention as encoders and oracles give it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = {i: (2 * normal(B, HEADS, 11)).softmax(-1)[..., 2:] for i in range(-1, 9)}
    return Features(
        cls=normal(B, D), registers=normal(B, 1, D), patches=normal(B, 9, D) + 2, cls_attention=rows[-1],
        patch_attention=rows, oracle=rows[0].mean(1),
    )  # fmt: skip


@pytest.mark.parametrize("word", ALL)
def test_every_head_gives_a_vector_of_its_width_and_weights_of_sum_one(word):
    head, f = build(word), features()
    vector, weights = head(f)
    assert vector.shape == (5, head.width) and vector.dtype == torch.float64
    if weights is not None:
        all_tokens = "content=all" in word
        assert weights.shape in ((5, 9 + 2 * all_tokens), (5, weights.shape[1], 9 + 2 * all_tokens))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert (weights >= 0).all()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_heads_that_need_a_cls_token_read_it_or_its_attention_and_others_do_not(name):
    head, f = build(WORDS[name]), features()
    other = features(seed=2)
    changed = head(f._replace(cls=other.cls, cls_attention=other.cls_attention)).vector
    assert torch.equal(changed, head(f).vector) == (not AGGREGATIONS[name].needs_cls)


@pytest.mark.parametrize("word", [word for word in ALL if list(build(word).parameters())])
def test_gradients_of_every_head_are_those_of_finite_differences(word):
    head, f = build(word), features(B=2)
    coefficient = torch.randn(2, head.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (head(f).vector * coefficient).sum().backward()
    for parameter in head.parameters():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            parameter.data += step * direction
            values.append((head(f).vector * coefficient).sum().item())
            parameter.data -= step * direction
        slope = (values[0] - values[1]) / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


# ---- attentive probing


def multihead_attention(pool):
    """torch's, with the weights of an AttentivePool whose heads divide its width."""
    theirs = nn.MultiheadAttention(pool.width, pool.heads, batch_first=True).double()
    state = pool.state_dict()
    zero = torch.zeros_like(state["q.bias"])
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([state["q.weight"], state["k.weight"], state["v.weight"]]),
        "in_proj_bias": torch.cat([state["q.bias"], zero, state["v.bias"]]),
        "out_proj.weight": state["proj.weight"], "out_proj.bias": state["proj.bias"],
    })  # fmt: skip
    return theirs


@pytest.mark.parametrize("heads", [1, 4])
def test_attentive_probing_is_torchs_multihead_attention_between_three_layer_norms(heads):
    pool, x = build(f"ap{heads}").pool, features().patches
    theirs = multihead_attention(pool)
    q, k, v = pool.norm_q(pool.query).expand(5, -1, -1), pool.norm_k(x), pool.norm_v(x)
    expected, weights = theirs(q, k, v, average_attn_weights=False)
    vector, found = pool(x)
    torch.testing.assert_close(vector, expected[:, 0])
    torch.testing.assert_close(found, weights[:, 0, 0] if heads == 1 else weights[:, :, 0])
    coefficient = torch.randn_like(vector)
    wanted = torch.autograd.grad((expected[:, 0] * coefficient).sum(), [pool.query, *theirs.parameters()])
    names = [pool.query, pool.q.weight, pool.k.weight, pool.v.weight, pool.q.bias, pool.v.bias]
    query, q, k, v, q_bias, v_bias = torch.autograd.grad((vector * coefficient).sum(), names)
    torch.testing.assert_close(query, wanted[0])
    torch.testing.assert_close(torch.cat([q, k, v]), wanted[1])
    torch.testing.assert_close((q_bias, v_bias), (wanted[2][:D], wanted[2][2 * D :]))


def test_attentive_probing_is_timms_latent_attention_pool_where_they_coincide():
    """timm's has no LayerNorms before its keys and values, a key bias, and one matrix for both."""
    theirs = AttentionPoolLatent(D, num_heads=4, mlp_ratio=0, pos_embed="", norm_layer=None).double()
    theirs.mlp = None
    ours = AttentivePool(D, 4).double()
    x = nn.functional.layer_norm(features().patches, (D,), eps=0.0)  # LayerNorm changes these no more
    for norm in (ours.norm_q, ours.norm_k, ours.norm_v):
        norm.eps = 0.0
    query = nn.functional.layer_norm(torch.randn(1, 1, D, dtype=torch.float64), (D,), eps=0.0)
    theirs.latent.data, ours.query.data = query, query.clone()
    theirs.kv.bias.data[:D] = 0
    ours.q.load_state_dict(theirs.q.state_dict())
    ours.k.weight.data, ours.v.weight.data = theirs.kv.weight.data.chunk(2)
    ours.v.bias.data = theirs.kv.bias.data[D:]
    ours.proj.load_state_dict(theirs.proj.state_dict())
    torch.testing.assert_close(ours(x).vector, theirs(x).squeeze())


def test_attentive_probing_starts_uniform():
    x = features().patches.float()
    torch.testing.assert_close(AttentivePool(D, 4)(x).weights, torch.full((5, 4, 9), 1 / 9))


def test_heads_that_do_not_divide_the_width_are_narrower_and_mapped_back():
    pool, x = build("ap3").pool, features().patches
    assert pool.head_width == 5 and pool.q.weight.shape == (15, D) and pool.proj.weight.shape == (D, 15)
    q, k, v = pool.q(pool.norm_q(pool.query))[0, 0], pool.k(pool.norm_k(x)), pool.v(pool.norm_v(x))
    parts = []
    for h in range(3):
        own = slice(5 * h, 5 * h + 5)
        parts.append(((k[..., own] @ q[own] / math.sqrt(5)).softmax(1)[..., None] * v[..., own]).sum(1))
    torch.testing.assert_close(pool(x).vector, torch.cat(parts, dim=1) @ pool.proj.weight.T + pool.proj.bias)


@pytest.mark.parametrize(("width", "heads", "parameters"), [(768, 1, 2_366_976), (768, 12, 2_366_976)])
def test_attentive_probing_has_the_papers_number_of_parameters(width, heads, parameters):
    found = sum(p.numel() for p in AttentivePool(width, heads).parameters())
    assert found == parameters == 4 * width**2 + 10 * width


@pytest.mark.parametrize("shrink", [1, 2])
def test_efficient_probing_is_its_formula(shrink):
    pool, x = build(f"ep4:shrink={shrink}").pool, features().patches
    q, V, x = (t.detach().numpy() for t in (pool.query[0], pool.v.weight, x))
    part = D // shrink // 4
    vectors = []
    for tokens in x:
        scores = tokens @ q.T / np.sqrt(D)
        weights = np.exp(scores) / np.exp(scores).sum(0)
        vectors.append(np.concatenate([V[part * j : part * j + part] @ (weights[:, j] @ tokens) for j in range(4)]))
    np.testing.assert_allclose(pool(torch.tensor(x)).vector.detach().numpy(), np.stack(vectors), rtol=1e-10)


def test_efficient_probing_has_as_many_parameters_as_its_paper_says():
    assert sum(p.numel() for p in EfficientPool(768, 32).parameters()) == 768 * 768 + 32 * 768


# ---- without parameters


def test_fixed_weights_are_the_rows_of_the_encoders_attention_renormalised():
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=24, patch_size=8, embed_dim=D, depth=2, num_heads=4).double().eval()
    encoder.blocks[1].attn.qkv.weight.data *= 4
    images = torch.randn(8, 3, 24, 24, dtype=torch.float64)
    cells = central_cells(GRID, 2)
    f = encoder(images, cls_attention=True, patch_attention=cells)[1]
    *_, last = encoder.trace(images)
    A = (last.q @ last.k.transpose(-2, -1) * last.scale).softmax(-1)  # (B,H,N,N)
    x = f.patches

    def weighted(w):
        w = w / w.sum(1, keepdim=True)
        return (w[..., None] * x).sum(1), w

    torch.testing.assert_close(tuple(build("attn-mn", num_prefix=1)(f)), weighted(A[:, :, 0, 1:].mean(1)))
    central = torch.stack([A[:, :, 1 + cell, 1:].mean(1) for cell in cells]).mean(0)
    torch.testing.assert_close(tuple(build("ca2", num_prefix=1)(f)), weighted(central))
    heads = []
    for image in A[:, :, 0, 1:]:
        p = image / image.sum(1, keepdim=True)
        heads.append(image[int((-(p * p.log()).sum(1)).argmin())])
    assert len({int((A[i, :, 0, 1:] == heads[i]).all(1).nonzero()) for i in range(8)}) > 1  # not one head for all
    torch.testing.assert_close(tuple(build("attn-lcte", num_prefix=1)(f)), weighted(torch.stack(heads)))
    w = A[:, :, 0, 1:].flip(-1).mean(1)
    torch.testing.assert_close(tuple(build("dino", num_prefix=1)(f._replace(oracle=w))), weighted(w))
    # the published code's scale (test_fidelity.py) changes the vector; the weights that are told still sum to 1
    for word, weights in (("ca2", central), ("dino", w)):
        released = build(f"{word}:scale=release", num_prefix=1)(f._replace(oracle=w))
        torch.testing.assert_close(released.weights, weights / weights.sum(1, keepdim=True))


def test_central_patches_are_the_papers():
    assert central_cells((14, 14), 1) == [6 * 14 + 6]
    assert central_cells((14, 14), 2) == [6 * 14 + 6, 6 * 14 + 7, 7 * 14 + 6, 7 * 14 + 7]
    assert central_cells((7, 5), 1) == [3 * 5 + 2]
    assert central_cells((4, 4), 4) == list(range(16))
    f = features()
    torch.testing.assert_close(build("cp2")(f).vector, f.patches[:, central_cells(GRID, 2)].mean(1))
    with pytest.raises(ValueError, match="4 x 4 central patches do not fit in a grid of 3 x 3"):
        build("cp4")


# ---- names and options


@pytest.mark.parametrize("word", ALL)
def test_a_heads_name_reads_back(word):
    assert parse_head(head_name(*parse_head(word, {})), {}) == parse_head(word, {})


@pytest.mark.parametrize(
    ("word", "flags", "name"),
    [
        ("ap", {}, "ap12"),
        ("ap:heads=1", {}, "ap1"),
        ("ap", {"ap_heads": 16}, "ap16"),
        ("ap4", {"ap_heads": 16, "ap_content": "all"}, "ap4:content=all"),
        ("abmilp:depth=1", {"abmilp_depth": 3, "abmilp_act": "tanh"}, "abmilp"),
        ("abmilp", {"abmilp_depth": 3, "abmilp_act": "tanh"}, "abmilp:depth=3,act=tanh"),
        ("abmilp:act=relu", {"abmilp_depth": 3, "abmilp_act": "tanh"}, "abmilp:depth=3"),
        ("ca", {"aggregation_scale": "release"}, "ca1:scale=release"),
        ("cls", {"abmilp_depth": 3}, "cls"),
    ],
)
def test_flags_speak_for_heads_that_do_not_say_otherwise(word, flags, name):
    assert head_name(*parse_head(word, flags)) == name
    assert flags.keys() <= option_flags().keys()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mean", "unknown head 'mean': choose one of " + ", ".join(AGGREGATIONS)),
        ("cls3", "unknown head 'cls3'"),
        ("cls:depth=2", "cls has no options; not 'depth=2'"),
        ("abmilp:dept=2", "abmilp takes depth, act, .*, as in abmilp:option=value; not 'dept=2'"),
        ("abmilp:depth", "not 'depth'"),
        ("abmilp:depth=0", "depth=0: must be a whole number >= 1"),
        ("abmilp:depth=two", "depth=two: must be a whole number >= 1"),
        ("abmilp:sa=yes", "sa=yes: choose one of none, map, both, residual"),
        ("abmilp:depth=2,depth=3", "depth is set twice"),
        ("ap12:heads=4", "heads is set twice"),
        ("abmilp:act=tanh", "act has no effect with depth=1"),
        ("ap17", "needs 1 to 16 heads, got 17"),
        ("ep3", "splits a vector of width 16 / 1 into 3 equal parts"),
    ],
)
def test_a_head_that_cannot_be_is_refused_in_one_line(word, message):
    with pytest.raises(ValueError, match=message) as error:
        build(word)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_page_on_probing_lists_every_head_with_its_options(name):
    lines = (ROOT / "docs" / "probing.md").read_text().partition("## Heads")[2].partition("\n## ")[0].splitlines()
    options = [f"`{option}`" for option in AGGREGATIONS[name].options if option != AGGREGATIONS[name].number]
    rows = [line for line in lines if re.match(rf"\|[^|]*`{name}\d*`", line)]
    if not rows:
        row = f"| `{name}` | {AGGREGATIONS[name].description} | {', '.join(options)} |"
        pytest.fail(f"docs/probing.md, 'Heads', has no row for the head {name}: add this row:\n{row}", pytrace=False)
    assert len(rows) == 1, f"docs/probing.md has several rows for the head {name}"
    if missing := [option for option in options if option not in rows[0]]:
        pytest.fail(f"docs/probing.md: the row of the head {name} lacks its option {', '.join(missing)}", pytrace=False)
