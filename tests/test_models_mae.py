"""The masked autoencoder against Hugging Face's, timm's encoder, and closed forms. Letters as in models_mae."""

import re

import pytest
import scipy.stats
import torch
from conftest import TINY
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from models_mae import DECODERS, MaskedAutoencoder, denormalised, normalised, patchify, random_masking, take, unpatchify
from models_vit import VisionTransformer, attend, build_vit

DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}


def build(**options):
    """An autoencoder at whose weights every parameter matters."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(VisionTransformer(**TINY), **DECODER, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hugging_face_names(state):
    """Our published state dict under Hugging Face's names: separate q, k and v."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^decoder_blocks\.", "decoder.decoder_layers.", key)
        name = re.sub(r"^blocks\.", "vit.layers.", name)
        name = re.sub(r"^(cls_token|pos_embed|patch_embed)", r"vit.embeddings.\1", name)
        name = re.sub(r"^norm\.", "vit.layernorm.", name)
        name = re.sub(r"^(mask_token|decoder_)", r"decoder.\1", name)
        name = name.replace("embeddings.pos_embed", "embeddings.position_embeddings")
        name = name.replace("patch_embed.proj", "patch_embeddings.projection")
        name = name.replace("attn.proj", "attention.o_proj").replace("attn.qkv", "attention.qkv")
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        parts = dict(zip("qkv", value.chunk(3), strict=True)) if "qkv" in name else {"": value}
        renamed |= {name.replace("qkv", f"{part}_proj"): piece for part, piece in parts.items()}
    return renamed


def hugging_face_twin(model, mask_ratio):
    config = ViTMAEConfig(
        hidden_size=TINY["embed_dim"], num_hidden_layers=TINY["depth"], num_attention_heads=TINY["num_heads"],
        intermediate_size=4 * TINY["embed_dim"], image_size=TINY["img_size"], patch_size=TINY["patch_size"],
        decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=4 * 24, layer_norm_eps=1e-6, mask_ratio=mask_ratio,
        norm_pix_loss=model.norm_pix_loss, attn_implementation="eager",
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


@pytest.mark.parametrize(("mask_ratio", "norm_pix_loss"), [(0.75, True), (0.75, False), (0.4, True)])
def test_tokens_prediction_loss_and_gradients_equal_hugging_faces(mask_ratio, norm_pix_loss):
    ours = build(norm_pix_loss=norm_pix_loss)
    theirs = hugging_face_twin(ours, mask_ratio)
    theirs.load_state_dict(hugging_face_names(ours.published_state_dict()), strict=True)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    result, expected = ours(images, noise, mask_ratio), theirs(images, noise=noise)
    predictions, mask = ours.predict_all(images, noise, mask_ratio)

    def close(mine, other):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)

    close(ours.encode(patchify(images, 8), result.kept), theirs.vit(images, noise=noise).last_hidden_state)
    close(predictions, expected.logits)
    close(result.prediction, take(expected.logits, result.masked))
    close(result.loss, expected.loss)
    assert mask.equal(expected.mask)

    result.loss.backward()
    expected.loss.backward()
    mine = {n.removeprefix("encoder."): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    other = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = hugging_face_names(mine)
    assert mine.keys() == other.keys()
    for name, gradient in mine.items():
        close(gradient, other[name])


def test_published_encoder_loads_strictly_into_timms_plain_vit():
    state = build().published_state_dict()
    encoder = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
    assert len(encoder) < len(state)
    TimmViT(**TINY, num_classes=0, norm_layer=nn.LayerNorm).load_state_dict(encoder, strict=True)


def test_weights_return_from_their_published_layout():
    model, copy = build(), MaskedAutoencoder(VisionTransformer(**TINY), **DECODER)
    state = model.published_state_dict()
    copy.load_published_state_dict(state)
    for name, value in model.state_dict().items():
        assert value.equal(copy.state_dict()[name]), name
    del state["mask_token"]
    with pytest.raises(RuntimeError, match="mask_token"):
        copy.load_published_state_dict(state)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (50, 0.75, 12), (16, 0.5, 8)])
def test_each_mask_keeps_exactly_its_share(patches, ratio, kept):
    visible, masked = random_masking(torch.rand(100, patches), ratio)
    assert visible.shape == (100, kept) and masked.shape == (100, patches - kept)
    every = torch.arange(patches).expand(100, -1)
    assert torch.cat([visible, masked], dim=1).sort(dim=1).values.equal(every)


def test_masks_are_uniform():
    torch.manual_seed(0)
    draws, M, K = 20000, 16, 4
    visible, _ = random_masking(torch.rand(draws, M), 0.75)
    share = K / M
    # counts of drawing without replacement: negatively correlated, hence the factor (M - 1) / M
    deviations = (visible.flatten().bincount(minlength=M) - draws * share) ** 2 / (draws * share * (1 - share))
    assert 0.001 < scipy.stats.chi2.sf(deviations.sum().item() * (M - 1) / M, M - 1) < 0.999


def test_a_mask_depends_on_its_own_samples_noise_alone():
    noise = torch.rand(8, 16)
    order = torch.randperm(8)
    kept, _ = random_masking(noise, 0.75)
    assert len(kept.unique(dim=0)) > 1
    assert random_masking(noise[order], 0.75)[0].equal(kept[order])


def test_the_encoder_sees_the_kept_patches_only():
    model = build()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    kept, masked = random_masking(noise, 0.75)
    patches = patchify(images, 8)
    other = patches.scatter_add(1, masked[..., None].expand(-1, -1, 192), torch.ones(2, 12, 192))
    assert not other.equal(patches) and model.encode(patches, kept).equal(model.encode(other, kept))
    patches[0, kept[0, 0], 0] += 1
    assert not model.encode(patches, kept).equal(model.encode(other, kept))


def test_the_encoder_embeds_visible_patches_as_it_does_whole_images():
    torch.manual_seed(0)
    model = MaskedAutoencoder(VisionTransformer(**TINY, reg_tokens=2, pre_norm=True, final_norm="none"), **DECODER)
    images, everything = torch.randn(3, 3, 32, 32), torch.arange(16).expand(3, -1)
    (features,) = model.encoder(images).values()
    expected = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
    torch.testing.assert_close(model.encode(patchify(images, 8), everything), expected, atol=1e-5, rtol=0)


def test_predictions_do_not_depend_on_the_order_of_the_patches_in_the_decoder():
    model = build()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    result = model(images, noise)
    tokens = model.encode(patchify(images, 8), result.kept)
    mixed = torch.randperm(12)
    decoded = model.decode(tokens, result.kept, result.masked[:, mixed])
    torch.testing.assert_close(model.predict(decoded[:, -12:]), result.prediction[:, mixed], atol=1e-5, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_that_is_trained_in_bfloat16_on_a_cpu_is_the_same_function(biased):
    """Output and gradients err at most twice as much as PyTorch's own plain products, both against float64."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, 20, 16, dtype=torch.bfloat16) for _ in range(4))
    bias = torch.randn(3, 20, 20) if biased else None

    def results(attention, dtype):
        parts = [part.to(dtype).requires_grad_() for part in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = attention(*parts, bias, 0.25)
        assert found.dtype == dtype
        return found, *torch.autograd.grad(found, parts, upstream.to(dtype))

    def plain(q, k, v, bias, scale):
        bias = None if bias is None else bias.to(q.dtype)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    truth, ours, theirs = (
        results(*words) for words in ((plain, torch.float64), (attend, torch.bfloat16), (plain, torch.bfloat16))
    )
    for exact, mine, other in zip(truth, ours, theirs, strict=True):
        assert mine.shape == exact.shape
        assert (mine - exact).norm() <= max(2 * (other - exact).norm(), 0.01 * exact.norm())


def test_pixels_return_from_their_normalised_form():
    patches = 3 + 2 * torch.randn(2, 5, 48)
    torch.testing.assert_close(denormalised(normalised(patches), patches), patches)
    assert normalised(torch.ones(1, 1, 48)).abs().max() == 0  # a patch of one colour


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 32 x 40 pixels: this autoencoder takes 32 x 32"):
        build()(torch.zeros(1, 3, 32, 40), torch.rand(1, 20))


def test_patchify_is_row_major_and_unpatchify_its_inverse():
    images = torch.randn(2, 3, 24, 40)
    patches = patchify(images, 8)
    assert patches.shape == (2, 15, 192)
    assert patches[1, 7].equal(images[1, :, 8:16, 16:24].permute(1, 2, 0).flatten())  # row 1, column 2
    assert unpatchify(patches, 8, (3, 5)).equal(images)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_fits_its_encoder(name):
    with torch.device("meta"):
        model = MaskedAutoencoder(build_vit(name), **DECODERS[name])
        patches = model.encoder.grid_size[0] ** 2
        kept, masked = (torch.zeros(1, n, dtype=torch.long) for n in (patches // 4, patches - patches // 4))
        tokens = torch.zeros(1, 1 + patches // 4, model.encoder.embed_dim)
        decoded = model.predict(model.decode(tokens, kept, masked))
        assert decoded.shape == (1, 1 + patches, 3 * model.encoder.patch_size**2)


@pytest.mark.parametrize(
    ("model", "width"),
    [
        ("vit_small_patch16", 192), ("vit_small_patch8", 192), ("vit_base_patch16", 512), ("vit_base_patch8", 512),
        ("vit_large_patch16", 512), ("vit_huge_patch14", 512),
    ],
)  # fmt: skip
def test_decoders_are_the_papers_192_wide_for_small_and_the_published_512_for_larger_encoders(model, width):
    assert DECODERS[model] == {"decoder_embed_dim": width, "decoder_depth": 8, "decoder_num_heads": 16}
