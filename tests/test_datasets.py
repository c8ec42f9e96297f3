"""Order, augmentation and loaders as functions of (seed, epoch, sample), and the data sets' errors."""

import itertools

import numpy as np
import pytest
import torch
from miniatures import refused
from PIL import Image

from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches, hold_out
from data_sets.table import build_dataset, build_splits
from data_sets.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform, train_transform
from util import distributed


@pytest.fixture
def as_rank(monkeypatch):
    def pretend(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)

    return pretend


# ---- augmentation


def samples(folder, workers=0, seed=0, epoch=0):
    dataset = KeyedDataset(build_dataset("image_folder", folder, "train"), train_transform(16), seed, noise=4)
    batches = GlobalBatches(len(dataset), batch_size=4, accum_iter=1, seed=0)
    batches.epoch = epoch
    return list(build_loader(dataset, batches, workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_are_the_same_for_any_number_of_workers(image_folder, workers):
    for batch, expected in zip(samples(image_folder, workers), samples(image_folder), strict=True):
        for field, other in zip(batch, expected, strict=True):
            assert field.equal(other)


def test_augmentation_and_noise_depend_on_seed_epoch_and_index(image_folder):
    def item(seed, epoch, index):
        images = build_dataset("image_folder", image_folder, "train")
        return KeyedDataset(images, train_transform(16), seed, noise=4)[epoch, index]

    first = item(0, 0, 5)
    torch.rand(7)  # the global generator has no say
    again = item(0, 0, 5)
    assert again.image.equal(first.image) and again.noise.equal(first.noise)
    for other in (item(1, 0, 5), item(0, 1, 5), item(0, 0, 6)):
        assert not other.image.equal(first.image) and not other.noise.equal(first.noise)
    assert (first.index, item(0, 0, 6).index) == (5, 6)


def test_making_a_sample_leaves_the_global_generator_alone(image_folder):
    before = torch.get_rng_state()
    samples(image_folder)
    # a loader's iterator draws one seed for its workers; nothing else may be drawn
    torch.set_rng_state(before)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    samples(image_folder)
    assert torch.get_rng_state().equal(expected)


# ---- order


@pytest.mark.parametrize(("world", "accum_iter"), [(2, 2), (4, 1), (1, 4)])
def test_any_split_of_the_effective_batch_sees_the_same_chunks(as_rank, world, accum_iter):
    expected = GlobalBatches(100, batch_size=3, accum_iter=4, seed=7)
    expected.epoch = 5
    per_rank = []
    for rank in range(world):
        as_rank(rank, world)
        per_rank.append(GlobalBatches(100, batch_size=3, accum_iter=accum_iter, seed=7))
        per_rank[-1].epoch = 5
        assert len(per_rank[-1]) == len(list(per_rank[-1])) == 8 * accum_iter
    chunks = list(itertools.chain.from_iterable(zip(*per_rank, strict=True)))
    assert chunks == list(expected)


def test_an_epoch_is_a_permutation_of_its_own():
    batches = GlobalBatches(20, batch_size=5, accum_iter=2, seed=0)
    epochs = []
    for batches.epoch in (0, 1):
        keys = list(itertools.chain.from_iterable(batches))
        assert {epoch for epoch, _ in keys} == {batches.epoch}
        epochs.append([index for _, index in keys])
        assert sorted(epochs[-1]) == list(range(20))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("images", "batch_size", "accum_iter", "world", "steps"),
    [
        (1_281_167, 2048, 2, 4, 78), (75_750, 2048, 2, 4, 4), (118_287, 2048, 2, 4, 7), (161_789, 2048, 2, 4, 9),
        (5_994, 256, 1, 4, 5), (8_144, 256, 1, 4, 7), (3_680, 1024, 1, 1, 3), (12_811, 512, 2, 1, 12),
    ],
)  # fmt: skip
def test_an_incomplete_batch_is_dropped_as_in_the_paper(as_rank, images, batch_size, accum_iter, world, steps):
    as_rank(world - 1, world)
    batches = GlobalBatches(images, batch_size, accum_iter, seed=0)
    assert (batches.steps, len(batches), batches.effective) == (
        steps, steps * accum_iter, batch_size * accum_iter * world
    )  # fmt: skip


@pytest.mark.parametrize(("images", "world"), [(101, 2), (101, 1), (3, 4)])
def test_evaluation_covers_every_image_once(as_rank, images, world):
    seen = []
    for rank in range(world):
        as_rank(rank, world)
        batches = EvaluationBatches(images, batch_size=8)
        assert len(batches) == len(list(batches))
        seen += [index for batch in batches for _, index in batch]
    assert sorted(seen) == list(range(images))


# ---- transforms


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (40, 36)])
def test_evaluation_shows_the_centre_after_resizing_the_shorter_side_to_eight_sevenths(size):
    image = Image.effect_noise(size, 80).convert("RGB")
    scale = 256 / min(size)
    resized = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    expected = (pixels - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(eval_transform(224)(image).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_training_flips_half_of_the_images_unless_told_otherwise():
    image = Image.new("RGB", (32, 32))
    image.paste("white", (0, 0, 16, 32))

    def flipped(**options):
        augment = train_transform(32, scale=(1.0, 1.0), **options)
        torch.manual_seed(0)
        views = [augment(image) for _ in range(200)]
        return sum((view[0, :, 0].mean() < view[0, :, -1].mean()).item() for view in views)

    assert 75 < flipped() < 125
    assert flipped(hflip=False) == 0


# ---- mistakes


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root.rmdir(), "there is no such folder"),
        (lambda root: None, "no 'train' folder in it"),
        (lambda root: (root / "train").mkdir(), "holds no folder of a class"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "is not an image folder"),
    ],
)
def test_a_folder_without_images_is_named(tmp_path, prepare, message):
    prepare(tmp_path)
    refused(message, "image_folder", tmp_path, "train")


def test_an_unknown_data_set_is_refused_with_those_there_are(tmp_path):
    refused(r"'imagenet': did you mean imagenet1k, .* There are image_folder, ", "imagenet", tmp_path, "train")


def test_splits_of_different_classes_are_refused(image_folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(image_folder / split)
    assert build_splits("image_folder", tmp_path, 3)[2] == 3
    with pytest.raises(ValueError, match=r"has one class, '\(unlabelled\)': a probe needs at least two"):
        build_splits("image_folder", image_folder / "train" / "red", None, val_split=0.2)
    with pytest.raises(ValueError, match=r"--nb_classes 1000, but .* has 3 classes"):
        build_splits("image_folder", tmp_path, 1000)
    (tmp_path / "val").unlink()
    (tmp_path / "val").mkdir()
    for name in ("red", "rose"):
        (tmp_path / "val" / name).symlink_to(image_folder / ("val" if name == "red" else "train") / "red")
    with pytest.raises(ValueError, match="train has 3 classes and val 2; only in val: rose"):
        build_splits("image_folder", tmp_path, None)
    (tmp_path / "val" / "rose").unlink()
    _, val, classes = build_splits("image_folder", tmp_path, 3)  # a test set of fewer classes
    assert (val.classes, set(val.targets), classes) == (["blue", "green", "red"], {2}, 3)
    (tmp_path / "val" / "green").mkdir()  # a class without test images
    assert build_splits("image_folder", tmp_path, 3)[1].targets == val.targets


@pytest.mark.parametrize(("sizes", "message"), [((13, 2), "is larger than the 25 training"), ((0, 1), "be positive")])
def test_an_impossible_batch_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatches(25, *sizes, seed=0)


def test_held_out_images_are_a_fraction_of_every_class_and_a_function_of_the_seed():
    targets = np.repeat(np.arange(6), [40, 20, 10, 3, 2, 1])
    kept, held = hold_out(targets, 0.1, seed=0)
    assert sorted([*kept, *held]) == list(range(76))
    assert np.bincount(targets[held], minlength=6).tolist() == [4, 2, 1, 1, 1, 0]
    assert hold_out(targets, 0.1, seed=0) == (kept, held) != hold_out(targets, 0.1, seed=1)
    several = (np.random.default_rng(0).random((30, 4)) < 0.3).astype(np.uint8)
    assert len(hold_out(several, 0.2, seed=0)[1]) == 6
    with pytest.raises(ValueError, match="leaves a part without images"):
        hold_out([0, 1, 2], 0.1, seed=0)


def test_groups_of_images_are_the_same_however_batches_are_split(monkeypatch):
    def groups(batch_size, accum_iter, world):
        found = []
        for rank in range(world):
            monkeypatch.setattr("util.distributed.rank", lambda rank=rank: rank)
            monkeypatch.setattr("util.distributed.world_size", lambda: world)
            batches = GlobalBatches(101, batch_size, accum_iter, seed=0, group=8, indices=range(1, 101))
            flat = [index for batch in batches for _, index in batch]
            found += [(place // (batches.accum_iter * batch_size), frozenset(flat[place : place + 8]))
                      for place in range(0, len(flat), 8)]  # fmt: skip
        return sorted(found, key=lambda pair: (pair[0], min(pair[1])))

    assert groups(16, 2, 1) == groups(8, 4, 1) == groups(4, 8, 1) == groups(4, 2, 4) == groups(8, 2, 2)
