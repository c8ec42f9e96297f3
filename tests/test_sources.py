"""Lists, shards, tables and packs hold the images of the folder that they were made from, with equal results."""

import io
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from make_shards import write_parquet, write_webdataset
from miniatures import CLASSES, make_coco, make_imagenet, refused, save, write
from PIL import Image

import main_linprobe
from cli.console import parse
from data_sets import shards
from data_sets.images import UnreadableImage, fingerprint
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import GlobalBatches
from data_sets.shards import read_packed, verify, write_packed
from data_sets.table import DATASETS, build_dataset, build_splits
from data_sets.views import eval_transform, train_transform


@pytest.fixture(scope="module")
def sources(image_folder, tmp_path_factory):
    """{name: (kind of data set, folder)} of the same images in the same order."""
    root, splits = tmp_path_factory.mktemp("sources"), build_splits("image_folder", image_folder, 3)[:2]
    splits = dict(zip(("train", "val"), splits, strict=True))
    made = {"folder": ("image_folder", image_folder), "list": ("list", root / "list")}
    (root / "list").mkdir()
    for split, images in splits.items():
        rows = [f"{path},{images.classes[label]}" for path, label in images.samples]
        write(root / "list" / f"{split}.csv", "path,label", *rows)
        write_webdataset(root / "webdataset", images, split)
    made["webdataset"] = ("webdataset", root / "webdataset")
    for kind in shards.KINDS:
        write_packed(root / kind, "image_folder", splits, kind, 256, 1)
        made[kind] = ("image_folder", root / kind)
    return made


@pytest.fixture(scope="module")
def table(image_folder, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder, before = tmp_path_factory.mktemp("table"), datasets.config.HF_DATASETS_CACHE
    for split, images in zip(("train", "val"), build_splits("image_folder", image_folder, 3), strict=False):
        write_parquet(folder / "hf", images, split)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    yield "hf", folder / "hf"
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(params=["list", "webdataset", "original", "jpeg", "pixels", "hf"])
def source(request, sources):
    return (request.param, *(request.getfixturevalue("table") if request.param == "hf" else sources[request.param]))


RESULTS = {}  # {source: results.json}


def test_every_source_holds_the_folders_images_and_gives_its_results(source, image_folder, probe_command, tmp_path):
    name, dataset, folder = source
    expected, found = (build_splits(*pair, 3) for pair in (("image_folder", image_folder), (dataset, folder)))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours.classes, ours.targets) == (theirs.classes, theirs.targets)
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(ours, theirs, strict=True))
        assert (fingerprint(ours) == fingerprint(theirs)) == (name != "pixels")  # of PNG files that were not resized
    for run, kind, path in ((name, dataset, folder), ("folder", "image_folder", image_folder)):
        if run not in RESULTS:
            flags = ["--data_path", path, "--dataset", kind, "--batch_size", 12, "--epochs", 2, "--warmup_epochs", 0,
                     "--cls_features", "cls", "abmilp", "--output_dir", tmp_path / run, "--num_workers", 1]  # fmt: skip
            main_linprobe.main(parse(main_linprobe.get_args_parser(), [*probe_command, *map(str, flags)]))
            RESULTS[run] = json.loads((tmp_path / run / "results.json").read_text())
    changed = {"args", "command", "seconds", "finished", "started"}
    changed |= {"train_images", "test_images"} if name == "pixels" else set()
    ours, theirs = (
        {key: value for key, value in RESULTS[run].items() if key not in changed} for run in (name, "folder")
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", ["webdataset", "hf", "pixels"])
def test_images_of_several_labels_keep_them(tmp_path, monkeypatch, kind):
    make_coco(tmp_path)
    monkeypatch.setitem(DATASETS, "coco", DATASETS["coco"]._replace(classes=3, images=None))
    expected = build_splits("coco", tmp_path, 3)
    if kind == "hf":
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, images in zip(("train", "val"), expected, strict=False):
        if kind != "pixels":
            {"webdataset": write_webdataset, "hf": write_parquet}[kind](tmp_path / kind, images, split)
    if kind == "pixels":
        write_packed(tmp_path / kind, "coco", dict(zip(("train", "val"), expected, strict=False)), kind, 256, 1)
    found = build_splits("coco" if kind == "pixels" else f"multilabel_{kind}", tmp_path / kind, 3)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.classes == theirs.classes and np.array_equal(ours.targets, theirs.targets)
        assert np.array_equal(ours[0][0], theirs[0][0])
    if kind != "pixels":
        refused(r"labels of .*, expected one; data sets multilabel_\*", kind, tmp_path / kind, "train")


# ---- tar files


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (shade,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    return path


def test_labels_of_shards_come_from_cls_json_or_folders(tmp_path):
    tar(tmp_path / "train" / "a.tar", {"0.JPG": jpeg(1), "0.cls": b"dog\n", "1.png": jpeg(2), "1.cls": b"cat",
                                       "README": b"text"})  # fmt: skip
    images = build_dataset("webdataset", tmp_path, "train")
    assert (images.classes, images.targets) == (["cat", "dog"], [0, 1])
    tar(tmp_path / "my-val-0.tar", {"0.jpg": jpeg(1), "0.json": b'{"label": 10, "kind": "x|y"}',
                                    "1.jpg": jpeg(2), "1.json": b'{"label": 9, "kind": "z"}'})  # fmt: skip
    assert build_dataset("webdataset", tmp_path, "val").classes == ["9", "10"]
    images = build_dataset("multilabel_webdataset", tmp_path, "val", label_column="kind")
    assert (images.classes, images.targets.tolist()) == (["x", "y", "z"], [[1, 1, 0], [0, 0, 1]])
    tar(tmp_path / "train" / "a.tar", {"x/dog/0.jpg": jpeg(1), "x/cat/1.jpg": jpeg(2)})
    assert build_dataset("webdataset", tmp_path, "train").classes == ["cat", "dog"]


@pytest.mark.parametrize(("members", "message"), [
    ({"0.jpg": jpeg(1)}, "0 labels of .*0.jpg, expected one"),
    ({"0.jpg": jpeg(1), "0.png": jpeg(2), "0.cls": b"a"}, "has two members of kind image: 0.png"),
    ({"0.jpg": jpeg(1), "0.json": b"{"}, "0.json cannot be read"),
    ({"0.cls": b"1"}, "no image has a label"),
])  # fmt: skip
def test_wrong_samples_of_shards_are_one_line(tmp_path, members, message):
    tar(tmp_path / "train.tar", members)
    refused(message, "webdataset", tmp_path, "train")


def test_index_of_shards_is_made_once_and_again_after_a_change(tmp_path, monkeypatch, caplog):
    path = tar(tmp_path / "train.tar", {"a/0.jpg": jpeg(1), "b/1.jpg": jpeg(2)})

    def labels():
        return [label for _, label in build_dataset("webdataset", tmp_path, "train")]

    assert labels() == [0, 1]
    (index,) = tmp_path.glob(".index-*.json")
    with monkeypatch.context() as context:
        context.setattr(shards, "tar_members", lambda *_: pytest.fail("scanned again"))
        assert labels() == [0, 1]
    index.write_text(index.read_text().replace("b/1.jpg", "c/1.jpg"))  # damaged
    assert labels() == [0, 1]
    tar(path, {"a/0.jpg": jpeg(1), "b/1.jpg": jpeg(2), "b/2.jpg": jpeg(3)})
    assert labels() == [0, 1, 1]
    index.unlink()
    monkeypatch.setattr(shards, "save_index", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with caplog.at_level(logging.INFO, "beyond_cls"):
        assert labels() == [0, 1, 1]
    assert "index cannot be kept (Read-only file system)" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flipped", "compressed", "empty"])
def test_damaged_shards_are_one_line(tmp_path, damage):
    path = tar(tmp_path / "train.tar", {"a/0.jpg": jpeg(1), "b/1.jpg": jpeg(2)})
    data = bytearray(path.read_bytes())
    if damage == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            add(archive, "a/0.jpg", jpeg(1))
    else:
        second = data.index(b"b/1.jpg")
        data[second + 150] ^= 255  # in the header's checksum
        path.write_bytes({"cut": data[:-9000], "flipped": data, "empty": b""}[damage])
    refused(r"train\.tar cannot be read", "webdataset", tmp_path, "train")


def test_shard_that_changes_under_a_run_is_an_unreadable_image(tmp_path):
    path = tar(tmp_path / "val.tar", {"a/0.jpg": jpeg(1), "b/1.jpg": jpeg(2)})
    images = build_dataset("webdataset", tmp_path, "val")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"cannot read image .*val\.tar:a/0\.jpg: it is cut off"):
        KeyedDataset(images, eval_transform(16), 0)[0, 0]


# ---- ImageNet as it is distributed


def archives(root, folder):
    """Turn a miniature into the official archives."""
    classes = sorted((root / "train").iterdir())
    inner = {f"{path.name}.tar": {file.name: file.read_bytes() for file in path.iterdir()} for path in classes}
    for name, members in inner.items():
        tar(folder / "inner" / name, members)
    contents = {name: (folder / "inner" / name).read_bytes() for name in inner}
    tar(folder / "ILSVRC2012_img_train.tar", contents)
    tar(folder / "ILSVRC2012_img_val.tar", {file.name: file.read_bytes() for file in (root / "val").iterdir()})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")


@pytest.mark.parametrize("layout", ["archives", "archives unpacked once", "flat", "Kaggle", "Kaggle, from above"])
def test_imagenet_is_found_as_it_is_distributed(tmp_path, monkeypatch, layout):
    made, root = tmp_path / "made", tmp_path / "data"
    train, val = make_imagenet(made, "kaggle" if "Kaggle" in layout else "devkit")
    monkeypatch.setitem(DATASETS, "imagenet1k", DATASETS["imagenet1k"]._replace(classes=3, images=None))
    if "archives" in layout:
        archives(made, root)
        shutil.rmtree(root / "inner") if layout == "archives" else (root / "inner").rename(root / "train")
        if layout != "archives":
            (root / "ILSVRC2012_img_train.tar").unlink()
    elif layout == "flat":
        made.rename(root)
        (root / "val").rename(root / "ILSVRC2012_img_val")
    else:
        (root / "ILSVRC/Data").mkdir(parents=True)
        (made / "LOC_val_solution.csv").rename(root / "LOC_val_solution.csv")
        made.rename(root / "ILSVRC/Data/CLS-LOC")
    found = build_splits("imagenet1k", tmp_path if layout == "Kaggle, from above" else root, 3)
    for images, expected in zip(found[:2], (train, val), strict=True):
        assert [(name.rpartition("/")[2].rpartition(":")[2], label)
                for name, label in zip(images.names, images.targets, strict=True)] == sorted(
                    expected, key=lambda pair: pair[::-1] if images is found[0] else pair)  # fmt: skip


def test_missing_part_of_imagenet_is_named_with_the_parts_that_are_there(tmp_path):
    make_imagenet(tmp_path / "imagenet", "kaggle")
    (tmp_path / "imagenet/train").rename(tmp_path / "imagenet/training")
    there = (
        r"none of train, ILSVRC2012_img_train, ILSVRC2012_img_train\.tar is in it; there is val, LOC_val_solution\.csv;"
    )
    with pytest.raises(ValueError, match=there):
        build_dataset("imagenet1k", tmp_path / "imagenet", "train")
    refused("there is no part of ImageNet;", "imagenet1k", tmp_path / "imagenet/training/n01440764", "val")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("ImageId,PredictionString\n", "", "line 1 must be ImageId,PredictionString"),
    ("val_00000002", "val_00000001", "image ILSVRC2012_val_00000001 appears twice"),
    (",", " ", "line 1 must be"), (" 1 2 3 4", ", 1 2 3 4", "too many values"),
])  # fmt: skip
def test_wrong_list_of_kaggle_is_one_line(tmp_path, old, new, message):
    make_imagenet(tmp_path, "kaggle")
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(path.read_text().replace(old, new))
    refused(rf"LOC_val_solution\.csv cannot be read: .*{message}", "imagenet1k", tmp_path, "val", allow_subset=True)


# ---- one's own files


def test_one_folder_of_classes_is_split_by_seed(image_folder, tmp_path, probe_command):
    folder = image_folder / "train"
    train, test, classes = build_splits("image_folder", folder, 3, val_split=0.25, seed=1)
    assert np.bincount(train.targets).tolist() == [6, 6, 6] and np.bincount(test.targets).tolist() == [2, 2, 2]
    assert sorted(train.names + test.names) == sorted(build_dataset("image_folder", image_folder, "train").names)
    assert classes == 3 and build_splits("image_folder", folder, 3, val_split=0.25, seed=1)[1].names == test.names
    assert build_splits("image_folder", folder, 3, val_split=0.25, seed=2)[1].names != test.names
    with pytest.raises(ValueError, match=r"--val_split 0.25 splits one folder of classes: .* without train/ and val/"):
        build_splits("image_folder", image_folder, 3, val_split=0.25)
    flags = ["--data_path", folder, "--val_split", 0.25, "--seed", 1, "--batch_size", 6, "--epochs", 1,
             "--warmup_epochs", 0, "--output_dir", tmp_path / "run"]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*probe_command, *map(str, flags)]))
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert (result["n_train"], result["n_test"], result["args"]["val_split"]) == (18, 6, 0.25)
    assert result["test_images"] == fingerprint(test)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_lists_name_their_labels(tmp_path, suffix):
    for split, rows in (
        ("train", [("a/0.jpg", "cat|dog"), ("a/1.jpg", "owl"), ("a/2.jpg", "")]),
        ("test", [("b.jpg", "owl")]),
    ):
        for name, _ in rows:
            save(tmp_path / name)
        if suffix == "jsonl":
            lines = [json.dumps({"image": name, "tags": label.split("|")}) for name, label in rows]
        else:
            between = "\t" if suffix == "tsv" else ","
            lines = [between.join(line) for line in [("Tags", "file"), *((label, name) for name, label in rows)]]
        write(tmp_path / f"{split}.{suffix}", *lines)
    column = "tags" if suffix == "jsonl" else "Tags"
    train, test, _ = build_splits("multilabel_list", tmp_path, 3, label_column=column)
    assert train.classes == ["cat", "dog", "owl"] and train.targets.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert test.targets.tolist() == [[0, 0, 1]] and test[0][0].size == (12, 10)
    refused(r"2 labels of .*0\.jpg, expected one", "list", tmp_path, "train", label_column=column)


@pytest.mark.parametrize(("lines", "message"), [
    ([], "names no columns; expected one of path"), (["a.jpg,cat"], "names no columns; expected one of path"),
    (["path,label", "a.jpg"], "entry 1 is not a path and a label"), (["path,label", "b.jpg,cat"], "missing, the first"),
    (["path,label", "a.jpg,cat", "a.jpg,dog"], r"a\.jpg appears twice"), (["path,label", "a.jpg,"], "0 labels of"),
    (["path,label,class", "a.jpg,cat,cat"], "expected one of path"), (['path,label', 'a.jpg,"cat'], "mark not closed"),
    (["path,label,label", "a.jpg,cat,dog"], "names path, label, label; expected one"),
    (["path,label", "\udcff,cat"], "cannot be read"),
])  # fmt: skip
def test_wrong_lists_are_one_line(tmp_path, lines, message):
    save(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    refused(message, "list", tmp_path, "train")


def test_names_of_a_list_may_hold_ends_of_lines_and_its_faulty_lines_are_numbered(tmp_path):
    save(tmp_path / "a.jpg")
    write(tmp_path / "train.jsonl", "", json.dumps({"path": "a.jpg", "label": "a\u2028b"}, ensure_ascii=False))
    write(tmp_path / "val.csv", "path,label", 'a.jpg,"a\nb"')
    assert [build_dataset("list", tmp_path, split).classes for split in ("train", "val")] == [["a\u2028b"], ["a\nb"]]
    write(tmp_path / "train.jsonl", "", "[]")
    refused("line 2 cannot be read: it is not a JSON object", "list", tmp_path, "train")


@pytest.mark.parametrize("layout", ["COCO", "Roboflow"])
def test_own_data_in_cocos_format_count_their_own_classes(tmp_path, layout):
    train, val = make_coco(tmp_path)
    for split, name in (("train", "train"), ("val", "val" if layout == "COCO" else "valid")):
        source = tmp_path / f"annotations/instances_{split}2017.json"
        (tmp_path / f"{split}2017").rename(tmp_path / name)
        source.rename(
            tmp_path / (f"annotations/instances_{name}.json" if layout == "COCO" else f"{name}/_annotations.coco.json")
        )
    found = build_splits("multilabel_coco", tmp_path, None)
    for images, expected in zip(found[:2], (train, val), strict=True):
        names = [Path(name).name for name in images.names]
        assert list(zip(names, images.targets.tolist(), strict=True)) == list(expected)
    assert found[2] == CLASSES["coco"]


def test_flat_folders_are_for_programs_that_use_no_labels(image_folder, tmp_path):
    for number, path in enumerate(sorted(image_folder.glob("val/*/*"))):
        shutil.copy(path, tmp_path / f"{number}.png")
    images = build_dataset("image_folder", tmp_path, "val", labels=False)
    assert len(images) == 7 and set(images.targets) == {0} and images[0][0].size == (36, 40)
    refused(r"no 'val' folder in it", "image_folder", tmp_path, "val")
    for folder, count in ((image_folder, 7), (image_folder / "train", 24)):
        assert len(build_dataset("image_folder", folder, "val", labels=False)) == count


def test_names_that_are_no_utf8_are_read_and_recorded(image_folder, tmp_path, probe_command):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, tmp_path / "data" / split)
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / name)
    (tmp_path / "data/val" / name / f"{name}.png").write_text("damaged")
    flags = ["--data_path", tmp_path / "data", "--on_bad_image", "skip", "--batch_size", 12, "--epochs", 1,
             "--warmup_epochs", 0, "--save_predictions", "--output_dir", tmp_path / "run"]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*probe_command, *map(str, flags)]))
    probes = json.loads((tmp_path / "run/results.json").read_text())["probes"]
    assert next(iter(probes.values()))["last"]["n"] == 7


# ---- packs


def test_packed_images_are_resized_as_the_test_view_resizes_them(tmp_path):
    for number, size in enumerate([(90, 70), (40, 33), (64, 300)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        for split in ("train", "val"):
            path = tmp_path / "data" / split / "a" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    splits = {split: build_dataset("image_folder", tmp_path / "data", split) for split in ("train", "val")}
    write_packed(tmp_path / "pack", "image_folder", splits, "pixels", 36, 1)
    images = read_packed(tmp_path / "pack", "image_folder", "val")
    assert [min(image.size) for image, _ in images] == [36, 33, 36]
    view = eval_transform(32)  # resizes to 36
    assert all(view(a[0]).equal(view(b[0])) for a, b in zip(images, splits["val"], strict=True))
    for loader in ("tensor", "packed", "gpu"):  # the same windows of the same pixels
        datasets = [KeyedDataset(images, train_transform(16, loader=kind), 0) for kind in ("tensor", loader)]
        a, b = (next(iter(build_loader(dataset, GlobalBatches(3, 3, 1, 0), 0))).image for dataset in datasets)
        assert (a - b).abs().max() <= (0.02 if loader == "gpu" else 0)


def test_changed_and_foreign_packs_are_refused(sources, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 6000)
    splits = {"val": build_dataset("image_folder", image_folder, "val")}
    for kind in ("original", "pixels"):
        write_packed(tmp_path / kind, "image_folder", splits, kind, 256, 1)
        images = read_packed(tmp_path / kind, "image_folder", "val")
        verify(images)
        files = sorted((tmp_path / kind).glob("val-*.bin"))
        assert len(files) > 1 and all(np.array_equal(a[0], b[0]) for a, b in zip(images, splits["val"], strict=True))
        data = bytearray(files[1].read_bytes())
        data[100] ^= 1
        files[1].write_bytes(data)
        with pytest.raises(UnreadableImage, match=r"cannot read image .*: .*changed"):
            verify(images)
        files[1].write_bytes(data[:-1])
        refused(r"val-00001\.bin is missing or cut off: pack again", "image_folder", tmp_path / kind, "val")
    refused("packed from --dataset image_folder, not demo", "demo", tmp_path / "pixels", "val")
    (tmp_path / "pixels/val.json").write_text("{}")
    refused(r"val\.json cannot be read", "image_folder", tmp_path / "pixels", "val")
    with pytest.raises(ValueError, match="exists: name a new folder"):
        write_packed(tmp_path / "pixels", "image_folder", splits, "pixels", 256, 1)


def test_interrupted_packing_leaves_nothing(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "save_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        splits = {"val": build_dataset("image_folder", image_folder, "val")}
        write_packed(tmp_path / "pack", "image_folder", splits, "pixels", 256, 1)
    assert not any(tmp_path.iterdir())


# ---- Hugging Face


def test_data_sets_of_the_hub_are_loaded_at_one_revision(table, image_folder, monkeypatch, caplog):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    load, calls = datasets.load_dataset, []

    def loaded(name, revision=None):
        calls.append((name, revision))
        return load(str(table[1]))

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name: type("Info", (), {"sha": "abc"}))
    images = build_dataset("hf", Path("hf:org/name@v1"), "val")
    assert fingerprint(images) == fingerprint(build_dataset("image_folder", image_folder, "val"))
    with caplog.at_level(logging.INFO, "beyond_cls"):
        build_dataset("hf", Path("hf:org/name"), "val")
    assert calls == [("org/name", "v1"), ("org/name", "abc")] and "pin it with hf:org/name@abc" in caplog.text


def test_table_without_one_column_of_labels_names_the_flag(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"img": [jpeg(1), jpeg(2)], "coarse": ["a", "b"], "fine": [3, 1]}
    (tmp_path / "hf").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "hf/train.parquet")
    refused(r"one of labels \(--label_column\), got img, coarse, fine", "hf", tmp_path / "hf", "train")
    images = build_dataset("hf", tmp_path / "hf", "train", label_column="fine")
    assert (images.classes, images.targets) == (["1", "3"], [0, 1]) and images[0][0].getpixel((0, 0))[0] == 2
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(r"need datasets: pip install -r requirements-data\.txt", "hf", tmp_path / "hf", "train")
