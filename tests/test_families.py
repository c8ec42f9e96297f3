"""Every family: a file as its authors publish it, loaded, gives another implementation's tokens and attention.

The other implementation is timm where it has the architecture (plain ViTs, DINOv2, BEiT), PyTorch's own encoder layer
for post-norm blocks, and the formulas of the paper for CAPI. It runs in float64.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from scipy.interpolate import RectBivariateSpline
from scipy.optimize import brentq
from timm.models.beit import Beit
from torch import Tensor, nn

import main_analyze_attention
import main_linprobe
import models_vit
from attention.measure import applicable, measure
from attention.metrics import METRICS, Sizes
from cli.console import parse
from encoders.catalogue import CATALOGUE, cache_path, families_called
from encoders.contents import flattened
from encoders.families import FAMILIES
from encoders.load import load_encoder
from encoders.reading import converted, detect_family, read_as
from models_vit import VisionTransformer, build_vit
from probing.bank import ProbeBank, ProbeSpec
from util.pos_embed import resample_pos_embed, resample_relative_table, rotary_coordinates, sincos_pos_embed
from util.tensor_files import save_encoder

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Size(NamedTuple):
    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    vocabulary: int = 8192

    @property
    def image(self) -> int:
        return self.patch * self.grid


TINY = Size(48, 2, 4, 8, 4, vocabulary=16)
SMALL, BASE, LARGE = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
HUGE = (1280, 32, 16)


class Published(NamedTuple):
    content: dict  # of the file
    run: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]  # images -> tokens, attention of every block


def randomised(model: nn.Module) -> nn.Module:
    """No parameter keeps a special value: biases, scales and tables all matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def noise(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors by name; a double underscore stands for a dot."""
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def run_timm(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    tokens, attention = [], []
    model = model.double()
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.register_forward_hook(lambda module, args, out: tokens.append(out)))
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda module, args: attention.append(args[0])))
    model.forward_features(images.double())
    for handle in handles:
        handle.remove()
    return tokens, attention


def timm_vit(size: Size, **options) -> nn.Module:
    options = {"num_heads": size.heads, "num_classes": 0, "norm_layer": LAYER_NORM, **options}
    model = timm.models.VisionTransformer(
        img_size=size.image, patch_size=size.patch, embed_dim=size.width, depth=size.depth, **options
    )
    return randomised(model)


def timm_beit(size: Size, **options) -> nn.Module:
    return randomised(
        Beit(
            img_size=size.image, patch_size=size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads,
            init_values=0.1, use_abs_pos_emb=False, norm_layer=LAYER_NORM, **options,
        )
    )  # fmt: skip


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.float() for key, value in model.state_dict().items() if "relative_position_index" not in key}


def plain(state: dict, model: nn.Module, key: str | None = None, **beside) -> Published:
    return Published(state if key is None else {key: state, **beside}, partial(run_timm, model))


# ---------------------------------------------------------------------------------------------------------------------
# the layouts
# ---------------------------------------------------------------------------------------------------------------------

RUN = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 799, "args": argparse.Namespace(lr=1e-3)}


def mae(size: Size) -> Published:
    model = timm_vit(size)
    decoder = noise(
        mask_token=(1, 1, 512), decoder_pos_embed=(1, size.grid**2 + 1, 512), decoder_embed__weight=(512, size.width),
        decoder_blocks__0__norm1__weight=(512,), decoder_norm__bias=(512,), decoder_pred__bias=(3 * size.patch**2,),
    )  # fmt: skip
    return plain({**state_of(model), **decoder}, model, "model", **RUN)


def mae_ft(size: Size) -> Published:
    model = timm_vit(size, num_classes=10)
    return plain(state_of(model), model, "model", **RUN, history=[])


def mae_ft_mean(size: Size) -> Published:
    model = timm_vit(size, num_classes=10, global_pool="avg")
    return plain(state_of(model), model, "model")


def beit_index(size: Size) -> Tensor:
    return torch.zeros(size.grid**2 + 1, size.grid**2 + 1, dtype=torch.long)


def simmim(size: Size) -> Published:
    model = timm_beit(size, use_shared_rel_pos_bias=True, global_pool="token", num_classes=0)
    encoder = {**state_of(model), **noise(mask_token=(1, 1, size.width))}
    encoder["rel_pos_bias.relative_position_index"] = beit_index(size)
    decoder = noise(decoder__0__weight=(3 * 16**2, size.width, 1, 1), decoder__0__bias=(3 * 16**2,))
    return plain({**prefixed("encoder.", encoder), **decoder}, model, "model", **RUN)


def simmim_ft(size: Size) -> Published:
    model = timm_beit(size, use_rel_pos_bias=True, global_pool="avg", num_classes=10)
    index = {f"blocks.{i}.attn.relative_position_index": beit_index(size) for i in range(size.depth)}
    return plain({**state_of(model), **index}, model, "model", **RUN)


def beitv2(size: Size) -> Published:
    model = timm_beit(size, use_shared_rel_pos_bias=True, global_pool="token", num_classes=0)
    state = state_of(model)
    first = {key.removeprefix("blocks.0."): value for key, value in state.items() if key.startswith("blocks.0.")}
    state |= prefixed("cls_pt_layers.0.", first) | prefixed("cls_pt_layers.1.", first)
    state |= noise(mask_token=(1, 1, size.width), lm_head__weight=(size.vocabulary, size.width))
    state["rel_pos_bias.relative_position_index"] = beit_index(size)
    return plain(state, model, "model")


def data2vec(size: Size) -> Published:
    model = timm_beit(size, use_shared_rel_pos_bias=True, global_pool="token", num_classes=0)
    state = state_of(model) | noise(
        mask_token=(1, 1, size.width), lm_head__weight=(size.width, size.width), lm_head__bias=(size.width,)
    )
    state["rel_pos_bias.relative_position_index"] = beit_index(size)
    return plain(state, model, "model", model_ema={key: -value for key, value in state.items()}, **RUN)


def maskfeat(size: Size) -> Published:
    model = timm_vit(size)
    state = {key: value for key, value in state_of(model).items() if not key.startswith("norm.")}
    state |= noise(
        mask_token=(1, 1, size.width), hogs__0__weight_x=(3, 1, 3, 3), hogs__0__weight_y=(3, 1, 3, 3),
        pred_head__projections__0__weight=(108, size.width), pred_head__projections__0__bias=(108,),
    )  # fmt: skip
    return plain(state, model, "model_state", epoch=1599, optimizer_state={}, cfg="TASK: ssl")


def ijepa(size: Size) -> Published:
    model = timm_vit(size, class_token=False, global_pool="avg", fc_norm=False)
    state = prefixed("module.", state_of(model))
    other = {key: -value for key, value in state.items()}
    predictor = noise(module__mask_token=(1, 1, 384), module__predictor_pos_embed=(1, size.grid**2, 384))
    return plain(state, model, "target_encoder", encoder=other, predictor=predictor, opt={}, scaler={}, epoch=300)


def dino(size: Size) -> Published:
    model = timm_vit(size)
    return plain(state_of(model), model)


def student_and_teacher(size: Size, loss: str, **extra: tuple[int, ...]) -> Published:
    model = timm_vit(size)
    teacher = prefixed("backbone.", state_of(model)) | noise(head__mlp__0__weight=(32, size.width))
    teacher |= noise(head__last_layer__weight_g=(16, 1), head__last_layer__weight_v=(16, 32))
    student = prefixed("module.", {key: -value for key, value in teacher.items()} | noise(**extra))
    return plain(teacher, model, "teacher", student=student, **RUN, **{loss: noise(center=(1, 16))})


def ibot(size: Size) -> Published:
    model = timm_vit(size)
    return plain(state_of(model), model, "state_dict")


def mocov3(size: Size) -> Published:
    model = timm_vit(size, num_heads=12)
    base = state_of(model) | noise(head__0__weight=(16, size.width), head__1__running_mean=(16,))
    state = prefixed("base_encoder.", base) | prefixed("momentum_encoder.", {k: -v for k, v in base.items()})
    state |= noise(predictor__0__weight=(16, 16))
    return plain(prefixed("module.", state), model, "state_dict", epoch=300, arch="vit_small", optimizer={}, scaler={})


def mocov3_deit(size: Size) -> Published:
    """The fixed table has the row in its first channels."""
    model = timm_vit(size, num_heads=12)
    model.pos_embed.data = sincos_pos_embed(size.width, (size.grid, size.grid), 1).roll(size.width // 2, dims=-1)
    return plain(state_of(model), model, "model")


def msn(size: Size) -> Published:
    model = timm_vit(size)
    state = state_of(model) | noise(fc__fc1__weight=(16, size.width), fc__bn1__running_var=(16,), fc__fc3__bias=(8,))
    state = prefixed("module.", state)
    other = {key: -value for key, value in state.items()}
    return plain(state, model, "target_encoder", encoder=other, opt={}, prototypes=torch.randn(4, 8), epoch=800)


def mim_refiner(size: Size) -> Published:
    model = timm_vit(size, no_embed_class=True)
    state = state_of(model)
    state["cls_tokens.tokens"] = state.pop("cls_token")
    state["pos_embed.embed"] = state.pop("pos_embed").unflatten(1, (size.grid, size.grid))
    return plain(state, model, "state_dict", epoch=20)


def mim_refiner_d2v2(size: Size) -> Published:
    """The reference is PyTorch's post-norm encoder layer."""
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True
        )
        for _ in range(size.depth)
    )
    model = randomised(nn.ModuleDict({"blocks": layers, "embed_norm": LAYER_NORM(size.width)}))
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2"
    }  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        for theirs, published in names.items():
            key = key.replace(theirs, published)
        state[key] = value
    state |= {
        "patch_embed.proj.weight": torch.randn(size.width, 3, size.patch, size.patch) / 10,
        "patch_embed.proj.bias": torch.randn(size.width),
        "pos_embed.embed": torch.randn(1, size.grid, size.grid, size.width),
        "cls_tokens.tokens": torch.randn(1, 1, size.width),
    }

    def run(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        model.double()
        kernel, bias = (state[f"patch_embed.proj.{name}"].double() for name in ("weight", "bias"))
        patches = nn.functional.conv2d(images.double(), kernel, bias, size.patch).permute(0, 2, 3, 1)
        patches = (patches + state["pos_embed.embed"]).flatten(1, 2)
        x = torch.cat([state["cls_tokens.tokens"].double().expand(len(images), -1, -1), patches], dim=1)
        x, tokens, attention = model["embed_norm"](x), [], []
        for layer in layers:
            attention.append(layer.self_attn(x, x, x, average_attn_weights=False)[1])
            x = layer(x)
            tokens.append(x)
        return tokens, attention

    return Published({"state_dict": state, "epoch": 20}, run)


def dinov2(size: Size) -> Published:
    model = timm_vit(size, init_values=1.0)
    return plain(state_of(model) | noise(mask_token=(1, size.width)), model)


def dinov2_reg(size: Size) -> Published:
    """timm has the position of [cls] in the token; the published files have it in the table."""
    model = timm_vit(size, init_values=1.0, reg_tokens=4, no_embed_class=True)
    state = state_of(model) | noise(mask_token=(1, size.width))
    position = torch.randn(1, 1, size.width)
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["register_tokens"] = state.pop("reg_token")
    return plain(state, model)


def capi(size: Size) -> Published:
    """The reference is the paper's formulas: x + f(RMSNorm(x)), and q, k turned by 2 pi frequency . coordinate."""
    D, d, depth = size.width, size.width // size.heads, size.depth
    state = noise(registers=(1, 16, D), patch_embed__weight=(D, 3, size.patch, size.patch), patch_embed__bias=(D,))
    state["patch_embed.weight"] /= 10
    for i in range(depth):
        parts = noise(
            residual1__norm__weight=(D,), residual1__fn__q_proj__weight=(D, D), residual1__fn__k_proj__weight=(D, D),
            residual1__fn__v_proj__weight=(D, D), residual1__fn__proj__weight=(D, D), residual1__fn__rope__freqs=(2, d),
            residual2__norm__weight=(D,), residual2__fn__fc1__weight=(4 * D, D), residual2__fn__fc2__weight=(D, 4 * D),
        )  # fmt: skip
        parts = {name: value / math.sqrt(D) if value.ndim == 2 and len(value) > 2 else value
                 for name, value in parts.items()}  # fmt: skip
        state |= prefixed(f"encoder.blocks.{i}.", parts)

    def run(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        p = {key: value.double() for key, value in state.items()}
        side = [i / 4 for i in range(4)]
        where = (
            [(t, 0) for t in side] + [(1, t) for t in side] + [(1 - t, 1) for t in side] + [(0, 1 - t) for t in side]
        )
        steps = [i / (size.grid - 1) for i in range(size.grid)]
        where = torch.tensor(where + [(row, column) for row in steps for column in steps], dtype=torch.float64)

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

        def turn(x: Tensor, freqs: Tensor) -> Tensor:  # channels i and i + d/2 are a complex number
            angle = torch.einsum("na,ad->nd", where, freqs)
            a, b = x[..., : d // 2], x[..., d // 2 :]
            first, second = angle[:, : d // 2], angle[:, d // 2 :]
            return torch.cat([a * first.cos() - b * first.sin(), b * second.cos() + a * second.sin()], dim=-1)

        x = nn.functional.conv2d(images.double(), p["patch_embed.weight"], p["patch_embed.bias"], size.patch)
        x = torch.cat([p["registers"].expand(len(images), -1, -1), x.flatten(2).mT], dim=1)
        tokens, attention = [], []
        for i in range(depth):
            b = {
                k.removeprefix(f"encoder.blocks.{i}."): v for k, v in p.items() if k.startswith(f"encoder.blocks.{i}.")
            }
            y = rms(x, b["residual1.norm.weight"])
            q, k, v = (
                (y @ b[f"residual1.fn.{n}_proj.weight"].T).unflatten(2, (size.heads, d)).transpose(1, 2) for n in "qkv"
            )
            q, k = turn(q, b["residual1.fn.rope.freqs"]), turn(k, b["residual1.fn.rope.freqs"])
            attention.append((q @ k.mT / math.sqrt(d)).softmax(-1))
            x = x + (attention[-1] @ v).transpose(1, 2).flatten(2) @ b["residual1.fn.proj.weight"].T
            hidden = nn.functional.gelu(rms(x, b["residual2.norm.weight"]) @ b["residual2.fn.fc1.weight"].T)
            x = x + hidden @ b["residual2.fn.fc2.weight"].T
            tokens.append(x)
        return tokens, attention

    left = noise(mask_token=(1, D), decoder__blocks__0__residual1__norm__weight=(D,))
    head = noise(head__last_layer__weight_g=(16, 1), head__last_layer__weight_v=(16, D))
    return Published({**prefixed("backbone.", state | left), **head}, run)


def plain_timm(size: Size) -> Published:
    model = timm_vit(size, num_classes=10)
    return plain(state_of(model), model)


LAYOUTS: dict[str, Callable[[Size], Published]] = {name: globals().get(name) for name in FAMILIES} | {
    "dino_full": partial(student_and_teacher, loss="dino_loss"),
    "ibot_full": partial(student_and_teacher, loss="ibot_loss", backbone__masked_embed=(1, TINY.width)),
    "timm": plain_timm,
}

# A published size of each family (width, depth, heads), its patch and grid, and the encoder's name here
FULL = {
    "mae": (HUGE, 14, 16, "vit_huge_patch14"),
    "mae_ft": (BASE, 16, 14, "vit_base_patch16"),
    "mae_ft_mean": (LARGE, 16, 14, "vit_large_patch16"),
    "simmim": (BASE, 16, 14, "vit_base_patch16"),
    "simmim_ft": (BASE, 16, 14, "vit_base_patch16"),
    "beitv2": (LARGE, 16, 14, "vit_large_patch16"),
    "data2vec": (LARGE, 16, 14, "vit_large_patch16"),
    "maskfeat": (LARGE, 16, 14, "vit_large_patch16"),
    "ijepa": (HUGE, 14, 16, "vit_huge_patch14"),
    "capi": (LARGE, 14, 16, "vit_large_patch14"),
    "dino": (SMALL, 8, 28, "vit_small_patch8"),
    "dino_full": (BASE, 8, 28, "vit_base_patch8"),
    "ibot": (LARGE, 16, 14, "vit_large_patch16"),
    "ibot_full": (SMALL, 16, 14, "vit_small_patch16"),
    "mocov3": (SMALL, 16, 14, "vit_small_patch16"),
    "mocov3_deit": (SMALL, 16, 14, "vit_small_patch16"),
    "msn": (LARGE, 7, 32, "vit_large_patch7"),
    "mim_refiner": ((2560, 24, 32), 14, 16, "vit_2b_patch14"),
    "mim_refiner_d2v2": (HUGE, 14, 16, "vit_huge_patch14"),
    "dinov2": (BASE, 14, 37, "vit_base_patch14"),
    "dinov2_reg": (LARGE, 14, 37, "vit_large_patch14"),
    "timm": (BASE, 16, 14, "vit_base_patch16"),
}
# files that nothing but their authors' names of them tell from timm's: such a name, and what else they could be of
ANONYMOUS = {
    "dino": ("dino_vitbase8_pretrain.pth", ("dino",)),
    "ibot": ("checkpoint_teacher.pth", ("dino", "ibot")),
    "mae_ft_mean": ("mae_finetuned_vit_base.pth", ("mae_ft_mean",)),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    options = {"img_size": TINY.image, **models_vit.sizes(TINY.width, TINY.depth, TINY.heads, TINY.patch)}
    monkeypatch.setitem(models_vit.ARCHITECTURES, "tiny", options)


@pytest.fixture
def file(tmp_path) -> Callable[[dict], str]:
    def write(content: dict) -> str:
        torch.save(content, tmp_path / "file.pth")
        return str(tmp_path / "file.pth")

    return write


def published(name: str, size: Size = TINY) -> Published:
    torch.manual_seed(0)
    return LAYOUTS[name](size)


def pictures(rows: int = TINY.grid, columns: int = TINY.grid) -> Tensor:
    return torch.randn(2, 3, rows * TINY.patch, columns * TINY.patch, generator=torch.Generator().manual_seed(3))


def attention_of(step: models_vit.BlockTrace) -> Tensor:
    logits = step.q.double() @ step.k.double().mT * step.scale
    return (logits if step.logit_bias is None else logits + step.logit_bias).softmax(-1)


def errors(backbone: VisionTransformer, reference: Published, images: Tensor) -> tuple[float, float]:
    """Largest error of tokens, relative to the block's largest, and of attention, relative to each probability."""
    with torch.no_grad():
        steps = list(backbone.trace(images))
    tokens, attention = reference.run(images)
    assert len(steps) == len(tokens) == len(attention)
    return (
        max(((s.out - t).abs().max() / t.abs().max()).item() for s, t in zip(steps, tokens, strict=True)),
        max(((attention_of(s) - a).abs() / a).max().item() for s, a in zip(steps, attention, strict=True)),
    )


def test_every_family_has_a_published_layout_and_size():
    """A new family needs a function of its name that makes a file, and an entry of FULL."""
    assert all(map(callable, LAYOUTS.values())) and FULL.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_published_file_gives_the_references_tokens_and_attention(name, file):
    reference = published(name)
    path = file(reference.content)
    if name in ANONYMOUS:
        path = str(Path(path).rename(Path(path).with_name(ANONYMOUS[name][0])))
    encoder = load_encoder(path, "tiny")
    assert encoder.record["family"] == name
    tokens, attention = errors(encoder.backbone, reference, pictures())
    assert tokens < 5e-6 and attention < 1e-5  # another eps in a norm moves the attention by 3e-5 or more


@pytest.mark.parametrize("name", ANONYMOUS)
def test_a_plain_vit_without_evidence_is_read_as_timm_with_a_warning(name, file, caplog):
    """At its own size, the encoder is the same whosever it is; at another one, the rules of resampling differ."""
    reference, others = published(name), ANONYMOUS[name][1]
    path = Path(file(reference.content))
    encoder = load_encoder(str(path), "tiny")
    assert encoder.record["family"] == "timm"
    assert f"can be of the families timm, {', '.join(others)}, the same encoder" in caplog.text
    assert errors(encoder.backbone, reference, pictures())[0] < 5e-6
    with pytest.raises(ValueError, match=r"positions for 4 x 4 patches, the images 6 x 5: .* name one with --family"):
        encoder.backbone(pictures(6, 5))
    named = load_encoder(str(path), "tiny", family=name).backbone
    assert named(pictures(6, 5))[1].patches.shape == (2, 30, TINY.width)


@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "pytorch-lightning_version": "2.1"}], ids=["alone", "lightning"])
def test_an_entry_alone_is_no_evidence_for_ibot(beside, file):
    content = {"state_dict": state_of(timm_vit(TINY)), **beside}
    assert load_encoder(file(content), "tiny").record["family"] == "timm"
    assert family_in(content, "checkpoint_teacher.pth")[0] == ("timm" if beside else "ibot")
    content["state_dict"]["masked_embed"] = torch.ones(1, TINY.width)
    assert load_encoder(file(content), "tiny").record["family"] == "ibot"


def family_in(content, name="file.pth", key=None):
    detected = detect_family(Path(name), flattened(content), key)
    return detected.family, detected.others


def test_what_deit_publishes_is_not_called_fine_tuned_mae():
    content = {"model": state_of(timm_vit(TINY, num_classes=10))}
    assert family_in(content) == ("timm", ("mae_ft",))
    assert family_in({**content, "history": []}) == ("mae_ft", ())


def test_maes_encoder_is_shown_by_its_fixed_table():
    state = state_of(timm_vit(TINY))
    assert family_in({"model": state}) == ("timm", ("mae", "dino"))
    state["pos_embed"] = sincos_pos_embed(TINY.width, (TINY.grid, TINY.grid), 1)
    assert family_in({"model": state}) == ("mae", ())
    assert family_in(state) == ("timm", ("dino",))
    assert family_in({"x": state, "model": {}}, key="x")[0] == "mae"


def test_published_urls_and_file_names_show_their_family():
    for entry in CATALOGUE.values():
        if entry.url:
            assert entry.family in families_called(cache_path(entry.url))
            assert entry.family in families_called(Path("folder") / Path(entry.url).name)
    assert not families_called(Path("checkpoint.pth"))


@pytest.mark.parametrize("name", FAMILIES)
def test_published_size_fits_the_encoder_of_its_name(name):
    size, patch, grid, model = FULL[name]
    with torch.device("meta"):
        content = flattened(published(name, Size(*size, patch, grid)).content)
        family = FAMILIES[name]
        state = converted(content, family, None)
        backbone = build_vit(model, **{**family.vit, **family.read(state, None), "img_size": patch * grid})
    wanted = {key: value.shape for key, value in backbone.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == wanted


def weights_in(content: dict, name: str) -> dict:
    return content if FAMILIES[name].key is None else content[FAMILIES[name].key]


def used_key(content: dict, name: str) -> str:
    """A weight matrix of the encoder, as the file calls it."""
    wanted = (key for key in weights_in(content, name) if key.endswith("fc1.weight") and "blocks.0" in key)
    return next(key for key in wanted if FAMILIES[name].drop_rule(key.removeprefix("module.")) is None)


def forget(weights: dict, key: str) -> None:
    del weights[key]


def add(weights: dict, key: str) -> None:
    weights[key.replace("fc1", "fc3")] = torch.ones(2)


def reshape(weights: dict, key: str) -> None:
    weights[key] = weights[key][:-1]


def spoil(weights: dict, key: str) -> None:
    weights[key][0, 0] = math.nan


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "change, message",
    [
        (forget, "missing blocks.0.mlp.fc1.weight"),
        (add, "not used blocks.0.mlp.fc3.weight"),
        (reshape, r"blocks.0.mlp.fc1.weight is \(191, 48\), wanted \(192, 48\)"),
        (spoil, "blocks.0.mlp.fc1.weight holds NaN"),
    ],
)
def test_one_changed_tensor_is_refused(name, change, message, file):
    content = published(name).content
    change(weights_in(content, name), used_key(content, name))
    with pytest.raises(ValueError, match=message):
        load_encoder(file(content), "tiny", family=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_of_another_architecture_is_answered_with_its_name(name, file):
    size, patch, grid, model = FULL[name]
    with torch.device("meta"):
        content = flattened(published(name, Size(*size, patch, grid)).content)
    for other in {"vit_demo_patch8", "vit_base_patch4", "tiny"}:
        (problem,) = read_as(content, name, other).problems
        assert problem.endswith(f"write --model {model}")
    assert all("without values (device meta)" in problem for problem in read_as(content, name, model).problems)
    with pytest.raises(ValueError, match=r"has width 48, 2 blocks .* write --model tiny$"):
        load_encoder(file(published(name).content), "vit_base_patch16", family=name)


def test_all_problems_of_a_file_are_in_one_error(file):
    content = published("simmim").content
    del content["model"]["encoder.blocks.0.attn.q_bias"], content["model"]["encoder.blocks.1.gamma_2"]
    content["model"]["encoder.norm.weight"][0] = math.inf
    with pytest.raises(ValueError) as error:
        load_encoder(file(content), "tiny", family="simmim")
    for problem in (
        "missing blocks.0.attn.qkv.bias, blocks.1.ls2.gamma",
        "not used blocks.0.attn.v_bias",
        "norm.weight holds NaN or infinity",
    ):
        assert problem in str(error.value)


def test_tensors_outside_the_prefix_are_refused_by_name(file):
    content = published("simmim").content
    content["model"]["norm.weight"] = torch.ones(48)
    with pytest.raises(ValueError, match=r"not under encoder\.: norm\.weight"):
        load_encoder(file(content), "tiny", family="simmim")


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "global_pool": "avg"},
        {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 3},
        {"qkv_bias": False, "proj_bias": False, "pos_embed": "none"},
    ],
    ids=str,
)
def test_variants_of_timms_plain_vit_are_read_from_their_keys(options, file):
    model = timm_vit(TINY, **options)
    reference = plain(state_of(model), model)
    backbone = load_encoder(file(reference.content), "tiny", family="timm").backbone
    tokens, attention = errors(backbone, reference, pictures())
    assert tokens < 1e-5 and attention < 1e-4


def test_mocov3_with_the_heads_of_its_architecture_is_another_encoder(file, caplog):
    reference = published("mocov3")
    path = file(reference.content)
    encoder = load_encoder(path, "tiny")
    assert encoder.backbone.num_heads == 12 != TINY.heads
    other = load_encoder(path, "tiny", num_heads=TINY.heads).backbone
    assert "num_heads is 4, but its authors use 12" in caplog.text
    images = pictures()
    with torch.no_grad():
        ours, theirs = (list(backbone.trace(images))[-1].out for backbone in (encoder.backbone, other))
    assert (ours - theirs).abs().max() > 0.01


@pytest.mark.parametrize(
    "name, key",
    [
        ("mocov3", "momentum_encoder"),
        ("mocov3", "module.momentum_encoder"),
        ("dino_full", "student"),
        ("ibot_full", "student"),
        ("ijepa", "encoder"),
        ("msn", "encoder"),
        ("data2vec", "model_ema"),
    ],
)
def test_checkpoint_key_chooses_the_other_encoder(name, key, file):
    """The layouts give the other encoder the negated weights."""
    path = file(published(name).content)
    default = load_encoder(path, "tiny", family=name).backbone.state_dict()
    chosen = load_encoder(path, "tiny", family=name, checkpoint_key=key).backbone.state_dict()
    for parameter in ("blocks.1.attn.proj.weight", "patch_embed.proj.bias"):
        torch.testing.assert_close(chosen[parameter], -default[parameter])


def test_safetensors_hold_any_family(tmp_path):
    reference = published("simmim")
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(reference.content["model"], path)
    encoder = load_encoder(str(path), "tiny")  # its keys are like no other's
    assert encoder.record["family"] == "simmim"
    assert errors(encoder.backbone, reference, pictures())[0] < 1e-5

    plain_path = tmp_path / "plain.safetensors"
    state = published("ibot").content["state_dict"]
    safetensors.torch.save_file(state, plain_path)
    assert family_in(state, plain_path) == ("timm", ("mae", "dino", "ibot"))
    save_encoder(plain_path, state, {"family": "ibot"})
    assert load_encoder(str(plain_path), "tiny").record["family"] == "ibot"


# ---------------------------------------------------------------------------------------------------------------------
# geometry
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_images_of_other_sizes(name, file):
    backbone = load_encoder(file(published(name).content), "tiny", family=name).backbone
    with torch.no_grad():
        step = list(backbone.trace(pictures(6, 5)))[-1]
    assert step.out.shape == (2, backbone.num_prefix_tokens + 30, TINY.width)
    assert step.out.isfinite().all()


@pytest.mark.parametrize("old, new", [(14, 16), (14, 24), (14, 10)])
def test_relative_tables_are_resampled_as_in_beits_finetuning(old, new):
    """BEiT interpolates with FITPACK's bicubic spline, at distances 1, 1 + q, 1 + q + q^2, ... that end at the edge."""
    source, target = 2 * old - 1, 2 * new - 1
    table = torch.randn(source**2 + 3, 3)
    found = resample_relative_table(table, (old, old), (new, new))

    ratio = brentq(lambda q: sum(q**k for k in range(old - 1)) - (new - 1), 1.0, 1.5) if new > old else 1.01
    far = np.cumsum(np.maximum(ratio, 1.01) ** np.arange(old - 1))
    knots, points = np.concatenate([-far[::-1], [0], far]), np.arange(target) - (new - 1)
    for head in range(3):
        spline = RectBivariateSpline(knots, knots, table[:-3, head].reshape(source, source).double().numpy())
        expected = torch.from_numpy(spline(points, points)).float()
        torch.testing.assert_close(found[:-3, head].reshape(target, target), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[-3:], table[-3:])


@pytest.mark.parametrize("old, new", [((14, 14), (14, 14)), ((14, 14), (10, 20)), ((3, 3), (4, 4))])
def test_relative_tables_of_one_value_keep_it(old, new):
    table = torch.full(((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 2), 0.7)
    found = resample_relative_table(table, old, new)
    torch.testing.assert_close(found, torch.full(((2 * new[0] - 1) * (2 * new[1] - 1) + 3, 2), 0.7))


def test_resampled_positions_follow_the_rules_of_their_code():
    table = torch.randn(1, 1 + 16, 8)
    patches = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    for rule, options in {
        "plain": {"size": (3, 2)},
        "antialias": {"size": (3, 2), "antialias": True},
        "offset": {"scale_factor": (3.1 / 4, 2.1 / 4)},
    }.items():
        expected = nn.functional.interpolate(patches, mode="bicubic", **options).permute(0, 2, 3, 1).flatten(1, 2)
        found = resample_pos_embed(table, (4, 4), (3, 2), 1, rule)
        torch.testing.assert_close(found, torch.cat([table[:, :1], expected], dim=1))


def test_rotary_coordinates_span_the_unit_square_whatever_the_grid():
    where = rotary_coordinates((2, 3), 4)
    edge, patches = [(0, 0), (1, 0), (1, 1), (0, 1)], [(r, c) for r in (0, 1) for c in (0, 0.5, 1)]
    torch.testing.assert_close(where, torch.tensor(edge + patches, dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# what the programs do with them
# ---------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    image: Tensor


def analysed(backbone, amp, reduction):
    """Everything that there is to measure of two pictures."""
    sizes = Sizes.of(backbone, TINY.grid * backbone.patch_size)
    metrics = applicable(list(METRICS), backbone)
    return measure(backbone, [Batch(pictures())], metrics, sizes, amp, reduction, torch.device("cpu"))


@pytest.mark.parametrize("name", FAMILIES)
def test_analysis_and_probes_take_every_family(name, file):
    backbone = load_encoder(file(published(name).content), "tiny", family=name).backbone
    found = analysed(backbone, torch.float32, "auto")
    assert (("cls_self_attention", 0) in found) == backbone.has_cls
    assert (("patch_register_attention", 0) in found) == (backbone.num_registers > 0)
    assert all((metric, TINY.depth - 1) in found and entry["count"] == 2 for (metric, _), entry in found.items())

    heads = [*(("cls", "both") if backbone.has_cls else ()), "pos", "abmilp"]
    specs = [ProbeSpec(head, block, 0.1, 0) for head in heads for block in range(TINY.depth)]
    bank = ProbeBank(specs, backbone, (TINY.grid, TINY.grid), 5)
    with torch.no_grad():
        logits = bank(backbone(pictures(), bank.blocks, cls_attention=backbone.has_cls))
    assert all(values.shape == (2, 5) and values.isfinite().all() for values in logits)


# with [cls]; registers and rotary positions; relative positions; patches alone; one of several entries of a file
@pytest.mark.parametrize("name", ["mae", "capi", "simmim", "ijepa", "dino_full"])
def test_both_programs_take_each_kind_of_family(name, file, image_folder, capsys):
    path = file(published(name).content)
    has_cls = FAMILIES[name].vit.get("class_token", True)
    argv = ["--model", "tiny", "--finetune", path, "--family", name, "--data_path", str(image_folder), "--device",
            "cpu", "--amp", "float32", "--num_workers", "0", "--batch_size", "7", "--output_dir", ""]  # fmt: skip
    main_analyze_attention.main(parse(main_analyze_attention.get_args_parser(), argv))
    heads = ["--cls_features", *(["cls"] if has_cls else []), "pos", "abmilp", "--epochs", "1", "--warmup_epochs", "0"]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*argv, *heads]))
    printed = capsys.readouterr().out
    assert ("cls_patch_entropy" in printed) == has_cls and "patch_patch_entropy" in printed
    assert "abmilp/block1/blr0.1/seed0: top-1" in printed and ("cls/block1" in printed) == has_cls


def test_all_reductions_and_bfloat16_take_rotary_and_relative_positions(file):
    for name in ("capi", "simmim"):
        backbone = load_encoder(file(published(name).content), "tiny", family=name).backbone
        exact = analysed(backbone, torch.float32, "explicit")
        assert_near(analysed(backbone, torch.float32, "tiled"), exact, 1e-5)
        rough = analysed(backbone, torch.bfloat16, "explicit")
        of_attention = {place: entry for place, entry in rough.items() if not METRICS[place[0]].of_tokens}
        assert_near(of_attention, exact, 0.05)


def assert_near(found, expected, tolerance):
    for place, entry in found.items():
        assert entry["mean"] == pytest.approx(expected[place]["mean"], rel=tolerance, abs=tolerance), place
