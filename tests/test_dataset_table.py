"""Every data set, from miniature copies in the layout that its authors distribute, and what is said of damaged ones."""

import hashlib
import json
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from miniatures import ARRAYS, CLASSES, MINIATURES, make_pets, refused, save, write
from scipy.io import savemat

from data_sets.readers import parse_matlab
from data_sets.table import DATASETS, build_dataset, build_splits

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "datasets.md").read_text()


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """Make the miniature of a data set and have its counts stand for the official ones."""

    def make(name, **options):
        train, val = MINIATURES[name](tmp_path, **options)
        expect(monkeypatch, name, CLASSES.get(name, 2), len(train), len(val))
        return tmp_path, train, val

    return make


def expect(monkeypatch, name, classes, train, val):
    entry = DATASETS[name]._replace(classes=classes, images={"train": train, "val": val})
    monkeypatch.setitem(DATASETS, name, entry)


def content(images):
    return [(Path(path).name, np.asarray(target).tolist()) for path, target in images.samples]


@pytest.mark.parametrize("name", MINIATURES)
def test_images_and_labels_are_those_of_the_official_lists(miniature, name):
    root, train, val = miniature(name)
    images, test_images, classes = build_splits(name, root, None)
    assert (content(images), content(test_images), classes) == (list(train), list(val), CLASSES.get(name, 2))
    for split in (images, test_images):
        assert len(split.targets) == len(split)
        image, label = split[0]
        assert image.mode == "RGB" and np.array_equal(label, split.targets[0])
    if DATASETS[name].multi_label:
        assert images.targets.dtype == np.uint8 and images.targets.shape == (len(images), classes)
    else:
        assert all(type(target) is int for target in images.targets)


@pytest.mark.parametrize("name", ["cub200", "stanford_cars", "oxford_pets", "food101", "nus_wide"])
def test_data_path_may_be_the_folder_of_the_data_set_or_its_parent(miniature, name):
    root, train, _ = miniature(name)
    (folder,) = root.iterdir()
    assert content(build_dataset(name, folder, "train")) == list(train)


@pytest.mark.parametrize("flat", ["kaggle", "devkit"])
def test_flat_validation_images_take_their_labels_from_either_list(miniature, flat):
    root, train, val = miniature("imagenet1k", flat=flat)
    images, test_images, _ = build_splits("imagenet1k", root, 3)
    assert (content(images), content(test_images)) == (train, val)


def test_classes_have_the_official_names(miniature):
    names = {name: build_dataset(name, miniature(name)[0], "val").classes for name in ("oxford_pets", "coco", "cub200")}
    assert names["oxford_pets"] == ["Abyssinian", "American Bulldog"]
    assert names["coco"] == ["person", "car", "toothbrush"]
    assert names["cub200"][0] == "001.Black_footed_Albatross"


@pytest.mark.parametrize("split", ["train", "val"])
def test_lists_are_read_as_torchvision_reads_them(miniature, split):
    for name, theirs, part in (
        ("stanford_cars", torchvision.datasets.StanfordCars, {"train": "train", "val": "test"}),
        ("oxford_pets", torchvision.datasets.OxfordIIITPet, {"train": "trainval", "val": "test"}),
        ("food101", torchvision.datasets.Food101, {"train": "train", "val": "test"}),
    ):
        root, *_ = miniature(name)
        ours, reference = build_dataset(name, root, split), theirs(root, split=part[split])
        assert ours.classes == reference.classes
        for index in range(len(reference)):
            assert ours[index][1] == reference[index][1]
            np.testing.assert_array_equal(ours[index][0], reference[index][0])


# ---- arrays, and what is downloaded


@pytest.fixture
def array(tmp_path, monkeypatch):
    def make(name):
        folder, pixels, labels, cut = ARRAYS[name][0](tmp_path)
        expect(monkeypatch, name, ARRAYS[name][1], cut, len(labels) - cut)
        return folder, pixels, labels, cut

    return make


@pytest.mark.parametrize("name", ARRAYS)
def test_binary_records_are_images_and_labels(array, name):
    folder, pixels, labels, cut = array(name)
    for root in (folder.parent, folder):
        train, val, _ = build_splits(name, root, None)
        assert (train.targets, val.targets) == (labels[:cut], labels[cut:])
        for images, expected in ((train, pixels[:cut]), (val, pixels[cut:])):
            shown = [np.asarray(images[index][0]) for index in range(len(images))]
            np.testing.assert_array_equal(shown, expected.transpose(0, 2, 3, 1))


def test_stl10_is_read_as_torchvision_reads_it(array, monkeypatch):
    folder, *_ = array("stl10")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    reference = torchvision.datasets.STL10(folder.parent, "train")
    ours = build_dataset("stl10", folder.parent, "train")
    assert ours.classes == reference.classes
    for mine, theirs in zip(ours, reference, strict=False):
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1] == theirs[1]


@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_binary_files_are_named(array, name):
    folder, *_ = array(name)
    path = next(path for path in sorted(folder.iterdir()) if path.name.startswith(("test.", "test_b", "test_X")))
    path.write_bytes(path.read_bytes()[:-1])
    refused(rf"{path} cannot be read: it has [\d,]+ bytes, not a multiple of", name, folder.parent, "val")


@pytest.mark.parametrize(("name", "part", "at"), [("cifar10", "test_batch.bin", 0), ("cifar100", "test.bin", 1),
                                                  ("stl10", "test_y.bin", 0)])  # fmt: skip
def test_label_out_of_range_in_a_binary_file_is_named(array, name, part, at):
    folder, *_ = array(name)
    data = bytearray((folder / part).read_bytes())
    data[at] = 200
    (folder / part).write_bytes(data)
    refused(rf"{folder / part}: label 200 of entry 1 is not between", name, folder.parent, "val")


def make_imagenette(root):
    for split in ("train", "val"):
        for wnid in DATASETS["imagenette"].options["names"]:
            for number in range(2):
                save(root / "imagenette2-320" / split / wnid / f"{wnid}_{number}.JPEG")


SERVED = {
    "imagenette": (make_imagenette, ["imagenette2-320"], (10, 20, 20)),
    "oxford_pets": (make_pets, ["oxford-iiit-pet/images", "oxford-iiit-pet/annotations"], (2, 3, 2)),
}


@pytest.fixture(params=SERVED)
def archived(request, tmp_path, monkeypatch, serve):
    """A data set whose archives are served on this machine: (name, folder of the server)."""
    name, (make, parts, counts) = request.param, SERVED[request.param]
    server = tmp_path / "server"
    server.mkdir()
    address = serve(server)
    make(tmp_path / "made")
    addresses = []
    for number, folder in enumerate(parts):
        archive = server / f"{number}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "made" / folder, arcname=Path(folder).name)
        addresses.append((f"{address}/{archive.name}", hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(archives=addresses))
    expect(monkeypatch, name, *counts)
    return name, server


def test_archives_are_downloaded_once_and_their_hash_is_checked(archived, tmp_path, monkeypatch):
    name, server = archived
    train, val, _ = build_splits(name, tmp_path / "data", None)
    with monkeypatch.context() as context:
        entry = DATASETS[name]
        other = [(url, "0" * 32) for url, _ in entry.archives]
        context.setitem(DATASETS, name, entry._replace(archives=other))
        with pytest.raises(ValueError, match=r"is missing, and http.* cannot be downloaded: File not found or corr"):
            build_splits(name, tmp_path / "other", None)
    shutil.rmtree(server)
    again = build_splits(name, tmp_path / "data", None)
    assert [len(images) for images in again[:2]] == [len(train), len(val)]
    with pytest.raises(ValueError, match=r"is missing, and http.* cannot be downloaded: HTTP Error 404") as error:
        build_splits(name, tmp_path / "elsewhere", None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("archived", ["imagenette"], indirect=True)
def test_an_interrupted_extraction_and_other_classes_are_refused(archived, tmp_path):
    train, *_ = build_splits("imagenette", tmp_path / "data", None)
    assert train.classes[0] == "tench" and train.classes[-1] == "parachute"
    Path(train.samples[-1][0]).unlink()
    with pytest.raises(ValueError, match="19 train images instead of 20: 1 are missing"):
        build_splits("imagenette", tmp_path / "data", None)
    folder = tmp_path / "data/imagenette2-320/train"
    (folder / "n01440764").rename(folder / "n01440765")
    with pytest.raises(ValueError, match=r"other classes than Imagenette's: n01440765"):
        build_splits("imagenette", tmp_path / "data", None, allow_subset=True)


# ---- mistakes


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if entry.images and name != "imagenette"])
def test_missing_data_set_is_one_line_with_its_source(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)
    with pytest.raises(ValueError) as error:
        build_dataset(name, tmp_path, "train")
    words = str(error.value)
    assert words.startswith(f"--dataset {name} --data_path {tmp_path}: ") and "\n" not in words
    assert words.endswith(f"; it comes from {DATASETS[name].source}")
    assert re.search("https?://", DATASETS[name].source), f"data_sets/table.py: the source of {name} has no address"
    refused(r"there is no such folder|cannot be downloaded", name, tmp_path / "absent", "train")


@pytest.mark.parametrize("name", MINIATURES)
def test_other_counts_than_the_official_ones_are_refused_unless_a_subset_is_asked_for(miniature, name, monkeypatch):
    root, train, val = miniature(name)
    expect(monkeypatch, name, CLASSES.get(name, 2), 5000, len(val))
    words = f"{len(train)} train images instead of 5,000: {5000 - len(train):,} are missing; --allow_subset"
    refused(words, name, root, "train")
    assert len(build_dataset(name, root, "train", allow_subset=True)) == len(train)
    expect(monkeypatch, name, 7, 5000, len(val))
    refused(rf"the train split has {CLASSES.get(name, 2)} classes instead of 7", name, root, "train", allow_subset=True)
    expect(monkeypatch, name, CLASSES.get(name, 2), 1, len(val))
    refused("too many", name, root, "train")


def drop_last_image(root, name):
    path = Path(build_dataset(name, root, "train").samples[-1][0])
    path.unlink()
    return path


@pytest.mark.parametrize("name", [name for name in MINIATURES if name != "imagenet1k"])
def test_missing_listed_images_are_named_or_left_out(miniature, name):
    root, train, _ = miniature(name)
    path = drop_last_image(root, name)
    refused(rf"1 of the {len(train)} listed images are missing, the first {path}", name, root, "train")
    left = build_dataset(name, root, "train", allow_subset=True)
    assert content(left) == list(train)[:-1] and len(left.targets) == len(train) - 1
    for remaining in [*root.rglob("*.jp*g"), *root.rglob("*.JPEG")]:
        remaining.unlink()
    refused("are missing, the first", name, root, "train", allow_subset=True)


LISTS = [
    ("imagenet1pct", "1percent.txt"), ("cub200", "CUB_200_2011/train_test_split.txt"),
    ("stanford_cars", "stanford_cars/devkit/cars_train_annos.mat"),
    ("stanford_cars", "stanford_cars/devkit/cars_meta.mat"),
    ("oxford_pets", "oxford-iiit-pet/annotations/trainval.txt"),
    ("food101", "food-101/meta/train.json"), ("coco", "annotations/instances_train2017.json"),
    ("nus_wide", "NUS-WIDE/ImageList/TrainImagelist.txt"),
    ("nus_wide", "NUS-WIDE/Groundtruth/TrainTestLabels/Labels_animal_Train.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path"), LISTS)
@pytest.mark.parametrize("damage", ["remove", "empty", "binary", "text"])
def test_damaged_and_missing_lists_are_named_in_one_line(miniature, name, path, damage):
    root, *_ = miniature(name)
    path = root / path
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "binary": bytes(range(128, 256)), "text": b"404\nNot Found\n\n"}[damage])
    with pytest.raises(ValueError) as error:
        build_dataset(name, root, "train")
    known_by_it = damage == "remove" and path.name == "cars_meta.mat"  # by which the folder is known
    assert known_by_it or str(path) in str(error.value)
    assert "\n" not in str(error.value)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FOOD, NUS = "food-101/meta/train.json", "NUS-WIDE/ImageList/TrainImagelist.txt"
CUB_IMAGES = "CUB_200_2011/images.txt"
CUB, PETS = "CUB_200_2011/train_test_split.txt", "oxford-iiit-pet/annotations/trainval.txt"
COCO, ZEBRA = "annotations/instances_train2017.json", "NUS-WIDE/Groundtruth/TrainTestLabels/Labels_zebra_Train.txt"


@pytest.mark.parametrize(
    ("name", "path", "old", "new", "message"),
    [
        ("cub200", CUB, "2 1\n", "2 one\n", "line 2: '2 one' cannot be read"),
        ("cub200", CUB, "2 1\n", "2 2\n", "does not state 0 or 1 for each image of .*images.txt"),
        ("cub200", CUB, "2 1\n", "", "does not state 0 or 1 for each image"),
        ("cub200", CUB, "2 1\n", "77 1\n", "does not state 0 or 1 for each image"),
        ("oxford_pets", PETS, "_2 1 1 1", "_2 0 1 1", "label 0 of entry 1 is not"),
        ("oxford_pets", PETS, "_2 1 1 1", "_2 1 1", "line 1: .* cannot be read"),
        ("food101", "food-101/meta/train.json", '["waffles/9"]', "9", "cannot be read: .*not iterable"),
        ("coco", COCO, '"category_id": 90', '"category_id": 91', "category 91, one of"),
        ("coco", COCO, '"image_id": 9,', '"image_id": 10,', "box 1 is of image 10"),
        ("coco", COCO, '"categories"', '"kinds"', "it has no 'categories'"),
        ("coco", COCO, '"file_name"', '"name_of_file"', "it has no 'file_name'"),
        ("coco", COCO, '"category_id": 90', '"category_id": [90]', "cannot be read: .*unhashable"),
        ("coco", COCO, '{"images"', "[" * 100_000, "cannot be read: .*maximum recursion depth"),
        ("nus_wide", ZEBRA, "1\n", "2\n", "does not state 0 or 1 for each of the 3 entries"),
        ("nus_wide", ZEBRA, "1\n", "", "does not state 0 or 1 for each of the 3 entries"),
        ("imagenet1pct", "1percent.txt", "n02058221_8", "n99999999_8", "n99999999.* is none of the classes"),
        ("imagenet1pct", "1percent.txt", "n02058221_8", "n01440764_0", "image .*n01440764_0.JPEG appears twice"),
    ],
)  # fmt: skip
def test_errors_in_lists_name_the_file(miniature, name, path, old, new, message):
    root, *_ = miniature(name)
    change(root / path, old, new)
    assert path in refused(message, name, root, "train")


def coco_entry(kind, **changes):
    """Repeat an entry of a list in COCO's file, with changes."""

    def damage(root):
        content = json.loads((root / COCO).read_text())
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = 100 + number
        content[kind].append(content[kind][0] | changes)
        (root / COCO).write_text(json.dumps(content))

    return damage


def no_boxes(root):
    content = json.loads((root / COCO).read_text())
    (root / COCO).write_text(json.dumps({**content, "annotations": []}))


def edit(path, old, new):
    return lambda root: change(root / path, old, new)


def repeat(path, line):
    return edit(path, line, f"{line}\n{line}")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("coco", no_boxes, "holds no boxes, hence no labels"),
        ("coco", coco_entry("images"), "images: id 9 appears twice"),
        ("coco", coco_entry("images", id=77), r"image .*000000000009\.jpg appears twice"),
        ("coco", coco_entry("annotations"), "annotations: id 100 appears twice"),
        ("coco", coco_entry("categories"), "categories: id 90 appears twice"),
        ("coco", coco_entry("categories", id=4), "class toothbrush appears twice"),
        ("coco", edit(COCO, '"annotations":', '"annotations": [], "annotations":'), "entry annotations appears twice"),
        ("coco", edit(COCO, '"category_id": 90', '"category_id": 1, "category_id": 90'), "entry category_id appears"),
        ("food101", edit(FOOD, '{"', '{"waffles": [], "'), "entry waffles appears twice"),
        ("cub200", repeat(CUB_IMAGES, "3 001.Black_footed_Albatross/Bird_0003.jpg"), "entry 3 appears twice"),
        ("cub200", repeat(CUB, "2 1"), "entry 2 appears twice"),
        ("cub200", edit(CUB_IMAGES, "0002.jpg", "0001.jpg"), r"0001\.jpg appears twice"),
        ("oxford_pets", repeat(PETS, "Abyssinian_2 1 1 1"), "entry Abyssinian_2 appears twice"),
        ("oxford_pets", edit(PETS, "Abyssinian_10 1", "Abyssinian_10 2"), "two breeds: class 2 appears twice"),
        ("food101", edit(FOOD, '"apple_pie/3"', '"apple_pie/7"'), r"apple_pie/7\.jpg appears twice"),
        ("nus_wide", edit(NUS, "Train_2", "Train_0"), r"Train_0\.jpg appears twice"),
        ("nus_wide", repeat("NUS-WIDE/ConceptsList/Concepts81.txt", "zebra"), "class zebra appears twice"),
    ],
)  # fmt: skip
def test_what_is_listed_twice_or_contradicts_itself_is_refused(miniature, name, damage, message):
    root, *_ = miniature(name)
    build_dataset(name, root, "train")
    damage(root)
    refused(message, name, root, "train")


def test_an_image_in_both_lists_is_refused(miniature):
    root, *_ = miniature("food101")
    edit(FOOD.replace("train", "test"), "apple_pie/2", "apple_pie/3")(root)
    with pytest.raises(ValueError, match=r"1 images are in both splits, such as .*apple_pie/3\.jpg"):
        build_splits("food101", root, None)


def test_labels_of_cars_out_of_range_and_test_annotations_without_labels_are_refused(miniature):
    root, *_ = miniature("stanford_cars")
    folder = root / "stanford_cars"
    kinds = [("class", "i4"), ("fname", "O")]
    rows = np.array([(3, "00001.jpg"), (1, "00002.jpg")], dtype=kinds)
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows}, do_compression=True)
    refused(r"cars_test_annos_withlabels.mat: label 3 of entry 1 is not between 1 and 2", "stanford_cars", root, "val")
    unlabelled = np.array([("00001.jpg",), ("00002.jpg",)], dtype=kinds[1:])
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": unlabelled}, do_compression=True)
    refused("no field of name class", "stanford_cars", root, "val")


@pytest.mark.parametrize("damage", ["cut off", "bit flipped", "no elements", "not compressed"])
def test_damaged_matlab_files_are_refused_before_scipy_reads_them(tmp_path, monkeypatch, damage):
    """scipy's compiled reader crashes over some damaged files."""
    path = tmp_path / "cars_meta.mat"
    savemat(path, {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)}, do_compression=True)
    assert parse_matlab(path.read_bytes(), "class_names").tolist() == ["AM General Hummer", "Acura RL"]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    savemat(path, {"class_names": np.zeros(3)})
    whole = path.read_bytes()
    damaged = {"cut off": data[:-5], "bit flipped": data, "no elements": data[:128], "not compressed": whole}[damage]
    monkeypatch.setattr("scipy.io.loadmat", lambda *args, **options: pytest.fail("scipy has read it"))
    with pytest.raises((ValueError, zlib.error)):
        parse_matlab(bytes(damaged), "class_names")


# ---- the table itself, and real images


def test_official_counts_are_the_papers():
    """PAPER.md, section 9, restated: classes, images for training and for testing, protocol."""
    official = {
        "imagenet1k": (1000, 1_281_167, 50_000, "P-LP"), "imagenet1pct": (1000, 12_811, 50_000, "P-SGD"),
        "food101": (101, 75_750, 25_250, "P-LP"), "nus_wide": (81, 161_789, 107_859, "P-LP"),
        "coco": (80, 118_287, 5_000, "P-LP"), "cub200": (200, 5_994, 5_794, "P-SGD"),
        "stanford_cars": (196, 8_144, 8_041, "P-SGD"), "oxford_pets": (37, 3_680, 3_669, "P-SGD"),
    }  # fmt: skip
    found = {
        name: (entry.classes, entry.images["train"], entry.images["val"], entry.protocol)
        for name, entry in DATASETS.items()
        if entry.protocol
    }
    if missing := [name for name in found if name not in official]:
        pytest.fail(
            f"tests/test_dataset_table.py: `official` has no {', '.join(missing)}: restate its classes, images "
            "for training and for testing, as its authors count them, and its protocol",
            pytrace=False,
        )
    assert found == official
    several = {"nus_wide", "nus_wide_labelled", "coco", "coco2014"}
    several |= {name for name in DATASETS if name.startswith("multilabel_")}
    if odd := several ^ {name for name, entry in DATASETS.items() if entry.multi_label}:
        pytest.fail(f"tests/test_dataset_table.py: `several` and DATASETS disagree on whether images of "
                    f"{', '.join(sorted(odd))} have several labels", pytrace=False)  # fmt: skip


def readme_row(name):
    entry = DATASETS[name]
    counts = entry.images and [
        f"{entry.images[split]:,}" if split in entry.images else "–" for split in ("train", "val")
    ]
    images = "any" if counts is None else " / ".join(counts)
    return f"| `{name}` | {entry.description} | {entry.classes or 'any'} | {images} | {entry.protocol or '–'} |"


def test_page_lists_every_data_set():
    rows = "\n".join(readme_row(name) for name in DATASETS)
    if rows not in PAGE:
        pytest.fail(f"the table of docs/datasets.md is behind DATASETS; its rows are:\n{rows}", pytrace=False)


needs_coco = pytest.mark.skipif(not (DATA / "coco256").is_dir(), reason="no shared/data/coco256 here")


@needs_coco
def test_real_sample_of_coco_is_refused_as_coco_and_taken_as_a_subset():
    refused("128 train images instead of 118,287: 118,159 are missing", "coco", DATA / "coco256", "train")
    train, val, classes = build_splits("coco", DATA / "coco256", 80, allow_subset=True)
    assert (len(train), len(val), classes) == (128, 128, 80)
    assert train.classes[:2] == ["person", "bicycle"] and train.classes[-1] == "toothbrush"
    assert [train.classes[k] for k in np.flatnonzero(train.targets[0])] == ["bowl", "orange", "broccoli"]  # a lunch
    assert train.targets.any(0).sum() > 50 and val[5][0].mode == "RGB"


@pytest.mark.skipif(not (DATA / "imagenet_sample").is_dir(), reason="no shared/data/imagenet_sample here")
def test_real_sample_of_imagenet_has_its_thousand_classes():
    images = build_dataset("imagenet1k", DATA / "imagenet_sample", "val", allow_subset=True)
    assert (len(images), len(images.classes), images.classes[0]) == (1000, 1000, "n01440764")
    refused("1,000 val images instead of 50,000: 49,000 are missing", "imagenet1k", DATA / "imagenet_sample", "val")


@pytest.mark.skipif(not (DATA / "tiny_imagenet").is_dir(), reason="no shared/data/tiny_imagenet here")
def test_list_of_one_percent_takes_its_images_from_real_folders(tmp_path, monkeypatch):
    folders = sorted((DATA / "tiny_imagenet" / "train").iterdir())
    names = [path.name for folder in folders[:20] for path in sorted(folder.iterdir())[:2]]
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(DATA / "tiny_imagenet" / split)
    write(tmp_path / "1percent.txt", *names)
    expect(monkeypatch, "imagenet1pct", 200, 40, 4000)
    train, val, classes = build_splits("imagenet1pct", tmp_path, 200)
    assert (len(train), len(val), classes) == (40, 4000, 200)
    assert [Path(path).parent.name for path, _ in train.samples] == [train.classes[k] for k in train.targets]
