"""The encoder against timm's, and what its trace promises. Letters as in models_vit."""

import copy
import functools
import itertools

import pytest
import timm
import torch
from conftest import TINY
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch._dynamo.testing import CompileCounter

from engine_finetune import Classifier
from models_vit import ARCHITECTURES, Block, DropPath, VisionTransformer, build_vit, compile_blocks, default_input_size

VARIANTS = {
    "plain": {},
    "no [cls]": {"class_token": False},
    "registers": {"reg_tokens": 3},
    "registers and [cls] without position": {"reg_tokens": 3, "no_embed_class": True},
    "registers without [cls]": {"reg_tokens": 3, "class_token": False},
    "layer scale": {"init_values": 0.1},
    "learned positions": {"pos_embed": "learned"},
    "no qkv bias, wide mlp": {"qkv_bias": False, "mlp_ratio": 6.0},
}


def timm_twin(num_classes=0, **options):
    """timm's encoder of the same structure as VisionTransformer(**TINY, **options)."""
    options.pop("pos_embed", None)
    pool = options.pop("global_pool", "token" if num_classes else "")
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return TimmViT(
        **TINY, num_classes=num_classes, global_pool=pool, dynamic_img_size=True, norm_layer=norm, **options
    ).eval()


def randomise(model):
    """Weights at which every parameter matters; fixed tables stay."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return randomise(VisionTransformer(**TINY, reg_tokens=2, init_values=0.3)).double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40)])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_block_equals_timms(options, size):
    torch.manual_seed(0)
    ours, theirs = randomise(VisionTransformer(**TINY, **options)), timm_twin(**options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, *size)
    expected = theirs.forward_intermediates(
        images, norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    for features, block in zip(ours(images, range(TINY["depth"])).values(), expected, strict=True):
        patches, prefix = block if isinstance(block, tuple) else (block, block[:, :0])
        assert (features.cls is None) == (not options.get("class_token", True))
        if features.cls is not None:
            torch.testing.assert_close(features.cls, prefix[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.registers, prefix[:, int(features.cls is not None) :], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.patches, patches, atol=1e-5, rtol=0)


def test_cls_classifier_equals_timms():
    torch.manual_seed(0)
    ours, theirs = randomise(Classifier(VisionTransformer(**TINY), 5)), timm_twin(num_classes=5)
    theirs.load_state_dict(ours.published_state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_token", [True, False])
def test_mean_patch_classifier_equals_timms(class_token):
    """timm's is what MAE's published fine-tuned models are: no norm of tokens, one behind their mean."""
    torch.manual_seed(0)
    ours = randomise(Classifier(VisionTransformer(**TINY, class_token=class_token), 5, global_pool=True))
    theirs = timm_twin(num_classes=5, global_pool="avg", fc_norm=True, class_token=class_token)
    theirs.load_state_dict(ours.published_state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    ours.requires_grad_(True)(images).sum().backward()
    without = {name for name, p in ours.named_parameters() if p.grad is None}
    assert not without


@pytest.mark.parametrize("global_pool", [False, True])
def test_classifier_weights_return_from_their_published_layout(global_pool):
    ours, copy = (Classifier(VisionTransformer(**TINY), 5, global_pool) for _ in range(2))
    copy.load_published_state_dict(ours.published_state_dict())
    for name, value in ours.state_dict().items():
        assert value.equal(copy.state_dict()[name]), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_timms_parameters(name):
    with torch.device("meta"):
        ours = build_vit(name)
        published = f"{name}_{default_input_size(name)}"
        # an architecture of our own has no name there, but timm's class takes its options
        build = functools.partial(timm.create_model, published) if timm.is_model(published) else TimmViT
        theirs = build(num_classes=0, **({} if timm.is_model(published) else ARCHITECTURES[name]))
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert [block.attn.num_heads for block in ours.blocks] == [block.attn.num_heads for block in theirs.blocks]


def test_stochastic_depth_grows_as_timms():
    ours, theirs = VisionTransformer(**TINY, drop_path=0.3), timm_twin(drop_path_rate=0.3)
    for ours_block, theirs_block in zip(ours.blocks, theirs.blocks, strict=True):
        for branch in ("drop_path1", "drop_path2"):
            rates = [getattr(getattr(b, branch), "drop_prob", 0.0) for b in (ours_block, theirs_block)]
            assert rates[0] == pytest.approx(rates[1])


def test_trace_reproduces_the_attention_and_the_residual_stream(encoder, images):
    steps = list(encoder.trace(images))
    assert [step.index for step in steps] == [0, 1, 2]
    for before, after in itertools.pairwise(steps):
        assert after.x is before.out
    for step, block in zip(steps, encoder.blocks, strict=True):
        v = block.attn.qkv(block.norm1(step.x))[..., -TINY["embed_dim"] :].unflatten(-1, (2, -1)).transpose(1, 2)
        attention = (step.q @ step.k.transpose(-2, -1) * step.scale).softmax(-1)
        heads = (attention @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(step.update, block.attn.proj(heads), atol=1e-12, rtol=0)
        middle = step.x + block.ls1(step.update)
        torch.testing.assert_close(step.out, middle + block.ls2(block.mlp(block.norm2(middle))), atol=1e-12, rtol=0)


def test_forward_returns_the_tokens_of_the_trace_for_the_chosen_blocks(encoder, images):
    steps = list(encoder.trace(images))
    chosen = encoder(images, [2, 0])
    assert sorted(chosen) == [0, 2] and list(encoder(images)) == [2]
    for index, features in chosen.items():
        tokens = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
        assert tokens.equal(steps[index].out)
        assert features.registers.shape[1] == 2 and features.cls_attention is None


def test_blocks_after_the_last_chosen_one_are_not_computed(encoder, images):
    encoder.blocks[2] = None
    assert list(encoder(images, [1])) == [1]


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_does_not_exist_is_refused(encoder, images, block):
    with pytest.raises(ValueError, match=rf"block {block} does not exist: this encoder has blocks 0 to 2"):
        encoder(images, [0, block])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_cls_attention_is_the_row_of_the_softmax_in_float32(images, precision):
    torch.manual_seed(0)
    encoder = randomise(VisionTransformer(**TINY, reg_tokens=2))
    with torch.no_grad(), torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        steps = list(encoder.trace(images.float()))
        features = encoder(images.float(), range(3), cls_attention=True)
    for step in steps:
        rows = (step.q.double() @ step.k.double().transpose(-2, -1) * step.scale).softmax(-1)
        expected = rows[:, :, 0, 3:]
        torch.testing.assert_close(features[step.index].cls_attention.double(), expected, atol=1e-6, rtol=0)


def test_initial_weights_are_those_of_mae():
    torch.manual_seed(0)
    encoder = VisionTransformer(**{**TINY, "embed_dim": 128})
    for name, parameter in encoder.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad  # MAE does not train its table
        elif name == "cls_token":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
        elif parameter.ndim > 1:  # Xavier, of the patch projection too
            rows, columns = parameter.flatten(1).shape
            bound = (6 / (rows + columns)) ** 0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        elif "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif not name.startswith("patch_embed"):
            assert (parameter == 0).all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: build_vit("vit_gigantic"), "unknown model 'vit_gigantic': choose one of"),
        (lambda: VisionTransformer(img_size=30, patch_size=8), "30 is not a multiple of the patch size 8"),
        (lambda: VisionTransformer(**{**TINY, "num_heads": 5}), "5 heads do not divide a width of 32"),
        (
            lambda: VisionTransformer(**TINY)(torch.zeros(1, 3, 32, 36)),
            "32 x 36 pixels cannot be cut into patches of 8",
        ),
        (lambda: Classifier(VisionTransformer(**TINY, class_token=False), 5), "needs an encoder with a"),
        (
            lambda: VisionTransformer(**TINY, class_token=False)(torch.zeros(1, 3, 32, 32), cls_attention=True),
            "this encoder has no [cls] token",
        ),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError) as error:
        mistake()
    assert message in str(error.value)


def test_compiled_blocks_share_their_code_and_change_nothing(encoder, images):
    compiled, counter = copy.deepcopy(encoder), CompileCounter()
    compile_blocks(compiled, backend=counter)
    for step, expected in zip(compiled.trace(images), encoder.trace(images), strict=True):
        assert step.index == expected.index
        torch.testing.assert_close(step.out, expected.out, atol=1e-12, rtol=0)
    assert counter.frame_count == 1
    assert compiled.state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_a_block_computes_only_the_tokens_that_are_wanted_of_it(norm_order):
    torch.manual_seed(0)
    block = randomise(Block(48, 3, init_values=0.3, norm_order=norm_order)).double()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    torch.testing.assert_close(block(x, kept=slice(3, None)).out, block(x).out[:, 3:])


def test_stochastic_depth_is_timms():
    x = torch.randn(6, 3, 4)
    for mode in (True, False):
        kept = []
        for drop in (DropPath(0.4), timm.layers.DropPath(0.4)):
            torch.manual_seed(1)
            kept.append(drop.train(mode)(x))
        assert kept[0].equal(kept[1])
