"""Miniature copies of the data sets, in the layout that their authors distribute."""

import functools
import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat as save_uncompressed

from data_sets.table import build_dataset

savemat = functools.partial(save_uncompressed, do_compression=True)  # as published files are


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade,) * 3).save(path, "JPEG")


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def refused(message, *args, **options):
    """The error of build_dataset with these arguments: one line that matches the message."""
    with pytest.raises(ValueError, match=message) as error:
        build_dataset(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- miniatures: each returns the expected (train, val) as lists of (name, label)

WNIDS = ("n01440764", "n01443537", "n02058221")


def make_imagenet(root, flat=None):
    """flat: how the labels of a flat val folder come, "kaggle" or "devkit"."""
    splits = {"train": [], "val": []}
    for number in range(9):
        name = f"{WNIDS[number // 3]}_{number}.JPEG"
        save(root / "train" / WNIDS[number // 3] / name)
        splits["train"].append((name, number // 3))
    labels = [2, 0, 1, 0, 2, 1]
    for number, label in enumerate(labels, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        save(root / "val" / ("" if flat else WNIDS[label]) / name)
        splits["val"].append((name, label))
    if flat == "kaggle":
        rows = [
            f"{name.removesuffix('.JPEG')},{WNIDS[k]} 1 2 3 4 {WNIDS[k]} 5 6 7 8" for name, k in splits["val"][::-1]
        ]
        write(root / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    if flat == "devkit":  # it numbers the classes in another order and lists classes of classes too
        order = {0: 3, 1: 1, 2: 2}
        kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
        rows = sorted((order[k], wnid, "word", "gloss", 0) for k, wnid in enumerate(WNIDS))
        rows.append((4, "n00001740", "entity", "gloss", 3))
        folder = root / "ILSVRC2012_devkit_t12" / "data"
        folder.mkdir(parents=True)
        savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
        write(folder / "ILSVRC2012_validation_ground_truth.txt", *(order[label] for label in labels))
    splits["val"].sort(key=lambda sample: sample if flat else sample[::-1])
    return splits["train"], splits["val"]


def make_imagenet1pct(root):
    train, val = make_imagenet(root)
    chosen = [train[8], train[0], train[4]]
    write(root / "1percent.txt", *(name for name, _ in chosen))
    return chosen, val


def make_cub(root):
    folder = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    write(folder / "classes.txt", *(f"{k} {name}" for k, name in enumerate(names, 1)))
    splits, lists = ([], []), ([], [], [])
    for image in range(1, 10):
        k, is_train = (image - 1) // 3, image % 3 != 0
        path = f"{names[k]}/Bird_{image:04d}.jpg"
        save(folder / "images" / path)
        splits[not is_train].append((path.split("/")[1], k))
        for column, value in zip(lists, (path, k + 1, int(is_train)), strict=True):
            column.append(f"{image} {value}")
    for name, column in zip(("images", "image_class_labels", "train_test_split"), lists, strict=True):
        write(folder / f"{name}.txt", *column)
    return splits


def make_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})
    splits = []
    for part, labels in (("train", [2, 1, 1]), ("test", [1, 2])):
        rows = [(1, 2, 3, 4, label, f"{n:05d}.jpg") for n, label in enumerate(labels, 1)]
        kinds = [(name, "i4") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")] + [("fname", "O")]
        target = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        savemat(folder / target, {"annotations": np.array(rows, dtype=kinds)})
        for row in rows:
            save(folder / f"cars_{part}" / row[-1])
        splits.append([(row[-1], row[4] - 1) for row in rows])
    return splits


def make_pets(root):
    folder = root / "oxford-iiit-pet"
    rows = {"trainval": ["Abyssinian_2 1 1 1", "american_bulldog_1 2 2 1", "Abyssinian_10 1 1 1"],
            "test": ["american_bulldog_7 2 2 1", "Abyssinian_5 1 1 1"]}  # fmt: skip
    for part, lines in rows.items():
        write(folder / "annotations" / f"{part}.txt", *lines)
        for line in lines:
            save(folder / "images" / f"{line.split()[0]}.jpg")
    return [[(f"{line.split()[0]}.jpg", int(line.split()[1]) - 1) for line in lines] for lines in rows.values()]


def make_food(root):
    folder = root / "food-101"
    content = {"train": {"apple_pie": ["apple_pie/7", "apple_pie/3"], "waffles": ["waffles/9"]},
               "test": {"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2"]}}  # fmt: skip
    splits = []
    for part, classes in content.items():
        write(folder / "meta" / f"{part}.json", json.dumps(classes))
        splits.append([(f"{n.split('/')[1]}.jpg", int(k == "waffles")) for k, names in classes.items() for n in names])
        for names in classes.values():
            for name in names:
                save(folder / "images" / f"{name}.jpg")
    return splits


def make_coco(root, year=2017):
    """Three categories with gaps in their ids, listed in another order; an image without a box and one with a crowd."""
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    splits = []
    for split, boxes in (("train", {9: [3, 3, 1], 4: [90], 30: []}), ("val", {8: [1], 2: []})):
        images = [{"id": image, "file_name": f"{image:012d}.jpg"} for image in boxes]
        annotations = [{"image_id": image, "category_id": category, "iscrowd": int(category == 90)}
                       for image, of_image in boxes.items() for category in of_image]  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{split}{year}.json", json.dumps(content))
        for image in images:
            save(root / f"{split}{year}" / image["file_name"])
        splits.append([(f"{image:012d}.jpg", [int(k in boxes[image]) for k in (1, 3, 90)]) for image in sorted(boxes)])
    return splits


def make_nus(root, drop_unlabelled=False):
    folder, concepts = root / "NUS-WIDE", ["airport", "animal", "zebra"]
    write(folder / "ConceptsList" / "Concepts81.txt", *concepts)
    splits = []
    for part, rows in (("Train", [[1, 0, 1], [0, 0, 0], [0, 1, 0]]), ("Test", [[0, 0, 0], [0, 0, 1]])):
        names = [f"actor/{part}_{number}.jpg" for number in range(len(rows))]
        write(folder / "ImageList" / f"{part}Imagelist.txt", *(name.replace("/", "\\") for name in names))
        for k, concept in enumerate(concepts):
            column = (row[k] for row in rows)
            write(folder / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{part}.txt", *column)
        for name in names:
            save(folder / "Flickr" / name)
        kept = [(name.split("/")[1], row) for name, row in zip(names, rows, strict=True)]
        splits.append([sample for sample in kept if any(sample[1]) or not drop_unlabelled])
    return splits


MINIATURES = {
    "imagenet1k": make_imagenet,
    "imagenet1pct": make_imagenet1pct,
    "cub200": make_cub,
    "stanford_cars": make_cars,
    "oxford_pets": make_pets,
    "food101": make_food,
    "coco": make_coco,
    "coco2014": functools.partial(make_coco, year=2014),
    "nus_wide": make_nus,
    "nus_wide_labelled": functools.partial(make_nus, drop_unlabelled=True),
}
CLASSES = {"imagenet1k": 3, "imagenet1pct": 3, "cub200": 3, "coco": 3, "coco2014": 3, "nus_wide": 3,
           "nus_wide_labelled": 3}  # the others have two  # fmt: skip


# arrays: each returns (folder, pixels (n,3,h,w), labels, number of training images)

RNG = np.random.default_rng(0)


def make_cifar10(root):
    folder, pixels, labels = (
        root / "cifar-10-batches-bin",
        RNG.integers(0, 256, (12, 3, 32, 32), np.uint8),
        [*range(2)] * 6,
    )
    write(folder / "batches.meta.txt", "airplane", "automobile", "")
    for number, part in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        mine = slice(2 * number, 2 * number + 2)
        records = [bytes([k]) + image.tobytes() for k, image in zip(labels[mine], pixels[mine], strict=True)]
        (folder / part).write_bytes(b"".join(records))
    return folder, pixels, labels, 10


def make_cifar100(root):
    folder, pixels, labels = (
        root / "cifar-100-binary",
        RNG.integers(0, 256, (12, 3, 32, 32), np.uint8),
        [2, 0, 1, 2] * 3,
    )
    write(folder / "fine_label_names.txt", "apple", "aquarium_fish", "baby")
    write(folder / "coarse_label_names.txt", "fish", "people")
    for part, mine in (("train.bin", slice(0, 9)), ("test.bin", slice(9, 12))):
        records = [bytes([7, k]) + image.tobytes() for k, image in zip(labels[mine], pixels[mine], strict=True)]
        (folder / part).write_bytes(b"".join(records))
    return folder, pixels, labels, 9


def make_stl10(root):
    folder, pixels, labels = root / "stl10_binary", RNG.integers(0, 256, (5, 3, 96, 96), np.uint8), [1, 0, 1, 1, 0]
    write(folder / "class_names.txt", "airplane", "bird")
    for part, mine in (("train", slice(0, 3)), ("test", slice(3, 5))):
        (folder / f"{part}_X.bin").write_bytes(np.ascontiguousarray(pixels[mine].transpose(0, 1, 3, 2)).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(k + 1 for k in labels[mine]))
    return folder, pixels, labels, 3


ARRAYS = {"cifar10": (make_cifar10, 2), "cifar100": (make_cifar100, 3), "stl10": (make_stl10, 2)}
