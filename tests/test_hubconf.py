"""The Python interface: equal to what the programs compute, from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def encoder():
    return hubconf.encoder(str(ROOT / "demo" / "mae.safetensors"))


def test_features_and_attention_are_those_of_explicit_attention(encoder):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features, flow = encoder.features(images, blocks=[0, -1]), encoder.attention(images)
    assert features[-1].patches.shape == (2, 64, 128) and features[0].cls.shape == (2, 128)
    for block, step in enumerate(encoder.backbone.trace(images)):
        attention = (step.q.double() @ step.k.double().transpose(-1, -2) * step.scale).softmax(-1)
        torch.testing.assert_close(
            flow["cls_self_attention"][block].double(), attention[:, :, 0, 0], rtol=1e-5, atol=1e-6
        )
        patches = attention[:, :, 0, 1:] / attention[:, :, 0, 1:].sum(-1, keepdim=True)
        entropy = torch.special.entr(patches).sum(-1)
        torch.testing.assert_close(flow["cls_patch_entropy"][block].double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[-1].patches, step.out[:, 1:])


def test_mistakes_name_what_exists(encoder):
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"block 6: .* 0 to 5"):
        encoder.features(images, blocks=[6])
    with pytest.raises(ValueError, match=r"patch_log_amplitude .* not of attention"):
        encoder.attention(images, ["all"])


def test_torch_hub_loads_it_from_another_folder(tmp_path):
    code = f"""
import torch
encoder = torch.hub.load({str(ROOT)!r}, "encoder", {str(ROOT / "demo" / "mae.safetensors")!r}, source="local")
print(tuple(encoder.features(torch.zeros(1, 3, 64, 64))[-1].cls.shape), encoder.record["family"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("(1, 128) mae"), done.stderr
