"""Contestants of the pretraining benchmark do the same work."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from benchmark_loader import decoded_on, loading
from benchmark_pretrain import hugging_face_twin, pretraining_steps

from models_mae import MaskedAutoencoder
from models_vit import build_vit


def settings(**options):
    return argparse.Namespace(**{
        "model": "vit_demo_patch8", "input_size": 32, "batch_size": 2, "amp": "bfloat16", "compile": False,
        "only": None, "data_path": None, "dataset": "image_folder", **options,
    })  # fmt: skip


def test_twins_have_the_same_parameters():
    """Of ViT-B and its published decoder."""
    with torch.device("meta"):
        model = MaskedAutoencoder(build_vit("vit_base_patch16"))
        twin = hugging_face_twin(model, "sdpa")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())
    assert len(model.decoder_blocks) == len(twin.decoder.decoder_layers) == 8


def test_steps_train():
    steps = pretraining_steps(settings(), torch.device("cpu"))
    assert list(steps) == ["pretraining step", "Hugging Face, sdpa", "Hugging Face, eager"]
    for name, step in steps.items():
        losses = [float(step()) for _ in range(8)]
        assert losses[-1] < losses[0], name


def test_only_the_chosen_contestant_is_built():
    assert list(pretraining_steps(settings(only="Hugging Face, sdpa"), torch.device("cpu"))) == ["Hugging Face, sdpa"]


def test_loaders_go_on_to_the_next_epoch(image_folder):
    contestants = loading(settings(data_path=image_folder, batch_size=10), torch.device("cpu"))
    assert len(contestants) == 6
    for name, batch in contestants.items():
        images = [batch()[0] for _ in range(5)]  # two to an epoch
        assert all(image.shape == (10, 3, 32, 32) and image.dtype == torch.float32 for image in images), name
        assert images[0].equal(images[2]) == name.endswith("test")
    with pytest.raises(ValueError, match="name a data set with --data_path"):
        loading(settings(), torch.device("cpu"))


def test_files_that_a_device_decodes_are_views_of_them(tmp_path):
    """What a GPU does, on a CPU."""
    image = Image.fromarray(np.full((20, 30, 3), 200, np.uint8))
    files = [str(tmp_path / name) for name in ("a.JPEG", "b.jpg")]
    for file in files:
        image.save(file, "JPEG")
    view = v2.Compose([v2.RandomResizedCrop(8), v2.ToDtype(torch.float32, scale=True)])
    batch = decoded_on(torch.device("cpu"), files, view, settings(batch_size=5))()
    assert batch.shape == (5, 3, 8, 8) and abs(float(batch.mean()) - 200 / 255) < 0.01
