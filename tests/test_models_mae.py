"""The masked autoencoder against Hugging Face's, timm's encoder, and closed forms. Letters as in models_mae."""

import re

import pytest
import scipy.stats
import torch
from conftest import TINY
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from models_mae import DECODERS, MaskedAutoencoder, patchify, random_masking, unpatchify
from models_vit import VisionTransformer, build_vit

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

    def close(mine, other):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)

    kept, _ = random_masking(noise, mask_ratio)
    close(ours.encode(images, kept), theirs.vit(images, noise=noise).last_hidden_state)
    close(result.prediction, expected.logits)
    close(result.loss, expected.loss)
    assert result.mask.equal(expected.mask)

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
    indices, mask = random_masking(torch.rand(100, patches), ratio)
    assert indices.shape == (100, kept)
    assert (mask.sum(1) == patches - kept).all()
    assert (mask.gather(1, indices) == 0).all()


def test_masks_are_uniform():
    torch.manual_seed(0)
    draws, M, K = 20000, 16, 4
    _, mask = random_masking(torch.rand(draws, M), 0.75)
    share = K / M
    # counts of drawing without replacement: negatively correlated, hence the factor (M - 1) / M
    deviations = ((1 - mask).sum(0) - draws * share) ** 2 / (draws * share * (1 - share))
    assert 0.001 < scipy.stats.chi2.sf(deviations.sum().item() * (M - 1) / M, M - 1) < 0.999


def test_a_mask_depends_on_its_own_samples_noise_alone():
    noise = torch.rand(8, 16)
    order = torch.randperm(8)
    _, mask = random_masking(noise, 0.75)
    assert len(mask.unique(dim=0)) > 1
    assert random_masking(noise[order], 0.75)[1].equal(mask[order])


def test_the_encoder_sees_the_kept_patches_only():
    model = build()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    kept, mask = random_masking(noise, 0.75)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 192), 8, (4, 4))
    assert model.encode(images, kept).equal(model.encode(images + hidden, kept))


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
        kept = torch.zeros(1, patches // 4, dtype=torch.long)
        tokens = torch.zeros(1, 1 + patches // 4, model.encoder.embed_dim)
        assert model.decode(tokens, kept).shape == (1, patches, 3 * model.encoder.patch_size**2)


def test_the_papers_small_decoder_is_192_wide_with_8_blocks_of_16_heads():
    assert DECODERS["vit_small_patch16"] == {
        "decoder_embed_dim": 192, "decoder_depth": 8, "decoder_num_heads": 16
    }  # fmt: skip
