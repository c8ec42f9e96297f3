"""The figure of reconstructions shows what is there. Letters as in models_mae."""

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from data_sets.table import build_dataset
from engine_pretrain import GREY, examples, reconstruct, save_picture, tiled
from models_mae import MaskedAutoencoder, normalised, patchify, unpatchify
from models_vit import VisionTransformer


@pytest.fixture(params=[True, False], ids=["normalised", "pixels"])
def model(request):
    torch.manual_seed(0)
    return MaskedAutoencoder(VisionTransformer(**TINY), 24, 1, 2, norm_pix_loss=request.param)


@pytest.fixture
def sample(image_folder):
    return examples(build_dataset("image_folder", image_folder, "train"), 32, seed=0, patches=16)


def test_examples_are_spread_over_the_data_set_and_the_same_each_time(image_folder, sample):
    images = build_dataset("image_folder", image_folder, "train")
    again = examples(images, 32, seed=0, patches=16)
    assert again.image.equal(sample.image) and again.noise.equal(sample.noise)
    assert sample.label.tolist() == [0, 0, 1, 1, 2, 2] and sample.noise.shape == (6, 16)
    assert len(examples(images, 32, 0, 16, count=100).image) == 24


def test_pictures_are_the_image_what_was_seen_of_it_and_what_was_made_of_that(model, sample):
    images, noise = sample.image, sample.noise
    pictures = reconstruct(model, images, noise, 0.75, torch.float32)
    assert pictures.shape == (6, 4, 32, 32, 3) and pictures.min() >= 0 and pictures.max() <= 1
    image, masked, result, mixed = pictures.swapaxes(0, 1)
    _, mask = model.predict_all(images, noise)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 192), 8, (4, 4)).movedim(1, -1).numpy() > 0
    assert hidden.mean() == 0.75
    assert (masked[hidden] == GREY).all() and (masked[~hidden] == image[~hidden]).all()
    assert (mixed[hidden] == result[hidden]).all() and (mixed[~hidden] == image[~hidden]).all()


def test_a_perfect_prediction_gives_the_image_back(model, sample, monkeypatch):
    def perfect(images, noise, mask_ratio):
        patches = patchify(images, 8)
        return normalised(patches) if model.norm_pix_loss else patches, torch.ones(len(images), 16)

    monkeypatch.setattr(model, "predict_all", perfect)
    image, masked, result, _ = reconstruct(model, sample.image, sample.noise, 0.75, torch.float32).swapaxes(0, 1)
    np.testing.assert_allclose(result, image, atol=1e-5)
    assert (masked == GREY).all()


def test_pictures_are_saved_with_a_row_per_image(model, sample, tmp_path):
    pictures = reconstruct(model, sample.image[:2], sample.noise[:2], 0.75, torch.bfloat16)
    picture = tiled(pictures)
    assert picture.shape == (2 * 32, 4 * 32, 3) and (picture[32:, 32:64] == pictures[1, 1]).all()
    save_picture(picture, tmp_path / "two.png")
    saved = np.asarray(Image.open(tmp_path / "two.png"))
    assert saved.shape == (512, 1024, 3) and (saved[::8, ::8] == np.rint(255 * picture)).all()


def test_a_damaged_image_is_replaced(image_folder, tmp_path):
    folder = tmp_path / "train" / "red"
    folder.mkdir(parents=True)
    (folder / "a.png").write_text("no image")
    (folder / "b.png").write_bytes(next((image_folder / "train" / "red").iterdir()).read_bytes())
    sample = examples(build_dataset("image_folder", tmp_path, "train"), 32, 0, 16)
    assert len(sample.image) == 2 and sample.image[0].equal(sample.image[1])
