"""Training from kept features: the run without them, where each epoch has its view; what does not fit is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from interruptions import in_processes
from miniatures import make_coco
from PIL import Image

import main_linprobe
from cli.console import parse
from data_sets.table import DATASETS
from probing import feature_cache

EPOCHS = 3


@pytest.fixture
def command(probe_command):
    flags = f"--epochs {EPOCHS} --warmup_epochs 1 --blr 40 --batch_size 6 --accum_iter 2"
    return [*probe_command, *flags.split()]


def run(command, folder, *words):
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, *words, "--output_dir", str(folder)]))
    state = torch.load(folder / f"checkpoint-{EPOCHS - 1}.pth", weights_only=True)["probes"]
    return state, json.loads((folder / "results.json").read_text())["probes"]


def assert_same(found, expected, tolerance=1e-4, scores=slice(None)):
    """To rounding: at this rate it grows to some 1e-5 within the run, and differs by CPU (AVX2, AVX-512)."""
    for name, state in expected[0].items():
        for key in state:
            if "score.0.bias" not in key:
                torch.testing.assert_close(found[0][name][key], state[key], rtol=tolerance, atol=tolerance)
        values, others = (list(run[1][name]["last"].items())[scores] for run in (found, expected))
        assert dict(values) == pytest.approx(dict(others), rel=tolerance)


OF_TOKENS = "abmilp:content=all ap2 attn-mn ca1 alf earlier@0-2:by=attn-mn fused@1-2 --return_block 0 2"
HEADS = {"vectors": ["cls", "both", "attn-lcte", "ca2", "cp1"], "tokens": ["cls", *OF_TOKENS.split()]}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_a_view_for_each_epoch_is_the_run_without_a_cache(command, heads, tmp_path):
    words = ["--cls_features", *heads]
    expected = run(command, tmp_path / "plain", *words)
    words += ["--cache_views", str(EPOCHS)]
    assert_same(run(command, tmp_path / "memory", *words), expected)
    words += ["--cache_dir", str(tmp_path / "cache")]
    assert_same(run(command, tmp_path / "file", *words), expected)
    files = sorted((tmp_path / "cache").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    assert_same(run(command, tmp_path / "again", *words), expected)
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize("place", [[], ["--cache_dir", "cache"]], ids=["memory", "file"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(command, place, tmp_path):
    words = ["--cls_features", "abmilp", "--cache_views", "2", *(place and [place[0], str(tmp_path / "cache")])]
    expected, _ = run(command, tmp_path / "run", *words)
    (tmp_path / "run" / f"checkpoint-{EPOCHS - 1}.pth").unlink()
    again, _ = run(command, tmp_path / "run", *words, "--resume", "auto")
    for name, state in expected.items():
        assert all(value.equal(again[name][key]) for key, value in state.items())


def test_without_augmentation_one_view_is_all(command, tmp_path):
    expected = run(command, tmp_path / "plain", "--crop", "center", "--val_fraction", "0.3", "--bn_group", "12")
    words = ["--crop", "center", "--val_fraction", "0.3", "--bn_group", "12", "--cache_views", "1"]
    assert_same(run(command, tmp_path / "kept", *words), expected)


def test_a_file_serves_the_same_features_alone(command, tmp_path):
    """Another seed, crop, precision, head or block is another file."""
    words = ["--cache_views", "1", "--cache_dir", str(tmp_path / "cache"), "--cls_features"]
    for number, change in enumerate((["cls"], ["cls", "--seed", "1"], ["cls", "--crop", "center"], ["pos"],
                                     ["cls", "--return_block", "0"], ["cls", "--amp", "bfloat16"])):  # fmt: skip
        run(command, tmp_path / str(number), *words, *change)
        assert len(list((tmp_path / "cache").glob("*.f32"))) == number + 1


def test_damaged_images_are_skipped_as_without_a_cache(command, image_folder, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(image_folder, copy)
    for path in (copy / "train" / "red" / "00.png", copy / "val" / "green" / "01.png"):
        path.write_bytes(b"not an image")
    words = ["--data_path", str(copy), "--on_bad_image", "skip"]
    expected = run(command, tmp_path / "plain", *words)
    assert next(iter(expected[1].values()))["last"]["n"] == 6
    assert_same(run(command, tmp_path / "kept", *words, "--cache_views", str(EPOCHS)), expected)


def test_images_of_several_labels_are_kept_with_them(command, tmp_path, monkeypatch):
    make_coco(tmp_path / "coco")
    monkeypatch.setitem(DATASETS, "coco", DATASETS["coco"]._replace(classes=3))
    words = ["--data_path", str(tmp_path / "coco"), "--dataset", "coco", "--allow_subset", "--batch_size", "3",
             "--accum_iter", "1"]  # fmt: skip
    expected = run(command, tmp_path / "plain", *words)
    # three images that hardly differ: normalising them magnifies the encoder's rounding, and the scores of two test
    # images follow it; their loss, and the counts behind it, do not
    found = run(command, tmp_path / "kept", *words, "--cache_views", str(EPOCHS))
    assert_same(found, expected, 1e-3, slice(-3, None))


def test_what_does_not_fit_is_refused_with_the_arithmetic(command, tmp_path, monkeypatch):
    words = [*command, "--cls_features", "abmilp", "--cache_views", "3", "--output_dir", str(tmp_path / "run")]
    arithmetic = r"\(24 train images x 3 views \+ 7 test images\) x 544 values x 4 bytes = 0\.00 GiB, and {} has 0\.00"
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 170_000)
    with pytest.raises(ValueError, match=arithmetic.format("memory")):
        main_linprobe.main(parse(main_linprobe.get_args_parser(), words))
    monkeypatch.setattr(feature_cache, "free_disk", lambda folder: 170_000)
    with pytest.raises(ValueError, match=arithmetic.format(".*cache")):
        main_linprobe.main(parse(main_linprobe.get_args_parser(), [*words, "--cache_dir", str(tmp_path / "cache")]))
    assert not (tmp_path / "cache").exists()
    assert feature_cache.free_disk(tmp_path / "not" / "there") > 0


@pytest.fixture
def demo(tmp_path):
    """Flags for programs that know no miniature models."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 9)):
        for index in range(count):
            path = tmp_path / "images" / split / f"class{index % 3}" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return [
        "--model", "vit_demo_patch8", "--data_path", tmp_path / "images", "--input_size", "16", "--amp", "float32",
        "--device", "cpu", "--num_workers", "0", "--epochs", EPOCHS, "--warmup_epochs", "1", "--blr", "40",
        "--batch_size", "6", "--cls_features", "cls", "abmilp", "--knn", "3",
    ]  # fmt: skip


def test_two_processes_share_the_work_and_the_features(demo, tmp_path):
    expected = run([str(word) for word in demo], tmp_path / "one", "--accum_iter", "2")
    alone = json.loads((tmp_path / "one" / "results.json").read_text())
    for place in ([], ["--cache_dir", tmp_path / "cache"]):
        folder = tmp_path / f"two{len(place)}"
        words = list(map(str, [*demo, "--cache_views", EPOCHS, *place, "--output_dir", folder]))
        output = tmp_path / "output"
        assert in_processes(2, "main_linprobe", words, output) == [0, 0], output.read_text()
        state = torch.load(folder / f"checkpoint-{EPOCHS - 1}.pth", weights_only=True)["probes"]
        results = json.loads((folder / "results.json").read_text())
        assert_same((state, results["probes"]), expected)
        assert results["knn"].keys() == alone["knn"].keys()
        assert results["knn"]["cls/block5"] == alone["knn"]["cls/block5"]


def test_features_of_other_pixels_are_not_taken_for_these(command, image_folder, tmp_path):
    """Equal names, sizes of images and labels: the pixels differ."""
    copy = tmp_path / "inverted"
    for path in image_folder.rglob("*.png"):
        target = copy / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    kept = ["--cache_views", "1", "--cache_dir", str(tmp_path / "cache")]
    run(command, tmp_path / "first", *kept)
    changed = ["--data_path", str(copy)]
    expected = run(command, tmp_path / "plain", *changed, "--cache_views", "1")
    assert_same(run(command, tmp_path / "second", *changed, *kept), expected, 0)


def test_features_of_other_code_are_made_anew(command, tmp_path, monkeypatch):
    kept = ["--cache_views", "1", "--cache_dir", str(tmp_path / "cache")]
    run(command, tmp_path / "first", *kept)
    monkeypatch.setattr(main_linprobe, "code_digest", lambda: "0")
    run(command, tmp_path / "second", *kept)
    assert len(list((tmp_path / "cache").glob("*.f32"))) == 2


@pytest.mark.parametrize("suffix", ["f32", "safetensors"])
@pytest.mark.parametrize("position", [0.02, 0.5, 0.99])
def test_a_changed_byte_of_the_cache_is_named(command, suffix, position, tmp_path):
    words = ["--cache_views", "1", "--cache_dir", str(tmp_path / "cache")]
    expected = run(command, tmp_path / "first", *words)
    (path,) = (tmp_path / "cache").glob(f"*.{suffix}")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cached features are damaged: delete .*{path.stem}"):
        run(command, tmp_path / "second", *words)
    for damaged in (tmp_path / "cache").iterdir():
        damaged.unlink()
    if suffix == "f32":
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"--cache_dir .* cannot be written"):
            run(command, tmp_path / "linked", *words)
        path.unlink()
    assert_same(run(command, tmp_path / "third", *words), expected, 0)
