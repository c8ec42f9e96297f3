"""An oracle gives the mean [cls] attention of its own last block, on images as it is used to them."""

import pytest
import torch

from encoders.load import Encoder, Oracle
from models_vit import VisionTransformer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def encoder(mean=(0.5,) * 3, std=(0.5,) * 3, **options):
    torch.manual_seed(len(options))
    return Encoder(VisionTransformer(**{**TINY, **options}), mean, std, {"family": "mae"})


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.1, 0.2, 0.3)])
def test_attention_is_that_of_the_last_block_on_images_standardised_for_the_oracle(mean):
    probed, other = encoder(), encoder(mean=mean, std=(0.4, 0.5, 0.6), depth=3)
    pixels = torch.rand(4, 3, 16, 16)
    found = Oracle(other, probed, 16)((pixels - 0.5) / 0.5)
    own = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    expected = other.backbone(own, cls_attention=True)[2].cls_attention.mean(1)
    assert found.shape == (4, 4) and not found.requires_grad
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"class_token": False}, r"no \[cls\] token"), ({"patch_size": 4}, "its patches have 4 pixels, the probed .* 8")],
)
def test_an_oracle_of_another_kind_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Oracle(encoder(**options), encoder(), 16)
