"""Decoding, and damaged images: refused with their path, or skipped with every batch and every rank in step."""

import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data_sets.images import ON_BAD_IMAGE, DamagedImage, Pixels, UnreadableImage, read_image
from data_sets.loader import KeyedDataset, Loader, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from data_sets.table import build_dataset
from data_sets.views import eval_transform, train_transform
from util import distributed

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


COLOURS = Image.fromarray(NOISE)
IMAGES = {
    "CMYK": lambda path: COLOURS.convert("CMYK").save(path, "JPEG"),
    "grey": lambda path: COLOURS.convert("L").save(path, "JPEG"),
    "palette with transparency": lambda path: COLOURS.quantize(16).save(path, "PNG", transparency=3),
    "RGBA": lambda path: Image.fromarray(np.dstack([NOISE, NOISE[..., 0]])).save(path, "PNG"),
    "grey with alpha": lambda path: COLOURS.convert("LA").save(path, "PNG"),
    "two levels": lambda path: COLOURS.convert("1").save(path, "PNG"),
    "WebP": lambda path: COLOURS.save(path, "WEBP"),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("save", IMAGES.values(), ids=IMAGES)
def test_every_8_bit_image_is_what_pillow_converts_it_to(tmp_path, save):
    save(tmp_path / "image.jpg")  # the content decides, not the name
    image = read_image(tmp_path / "image.jpg")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, Image.open(tmp_path / "image.jpg").convert("RGB"))


GRAY = (np.arange(512) * 8).reshape(16, 32).astype(np.uint16)  # 12 bits
COLOUR = np.repeat(GRAY[..., None], 3, axis=2)


def encoded(values, kind):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def png16(values, color_type):
    """Pillow writes no 16 bits of colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 32, 16, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values):
    """The same, uncompressed TIFF of 16-bit RGB."""
    data, tags = values.astype("<u2").tobytes(), []
    for tag, kind, count, value in (
        (256, 3, 1, 32), (257, 3, 1, 16), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140),
        (277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ):  # fmt: skip
        tags.append(struct.pack("<HHII", tag, kind, count, value))
    start = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(tags) + struct.pack("<I", 0)
    return start + struct.pack("<HHH", 16, 16, 16) + data


def jpeg2000(bits):
    """A file of 8-bit colour whose header says more bits, as the only thing that is read before it is refused."""
    data = bytearray(encoded(COLOUR.astype(np.uint8), "JPEG2000"))
    data[data.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    return bytes(data)


DEEP = {
    "16-bit PNG": lambda: encoded(GRAY, "PNG"),
    "16-bit colour PNG": lambda: png16(COLOUR, 2),
    "16-bit grey PNG with alpha": lambda: png16(COLOUR[..., :2], 4),
    "16-bit RGBA PNG": lambda: png16(np.repeat(COLOUR[..., :1], 4, 2), 6),
    "16-bit TIFF": lambda: encoded(GRAY, "TIFF"),
    "16-bit colour TIFF": lambda: tiff16(COLOUR),
    "32-bit integer TIFF": lambda: encoded(GRAY.astype(np.int32), "TIFF"),
    "float TIFF": lambda: encoded(GRAY.astype(np.float32) / 4095, "TIFF"),
    "16-bit PGM": lambda: b"P5 32 16 65535\n" + GRAY.astype(">u2").tobytes(),
    "16-bit PPM": lambda: b"P6 32 16 65535\n" + COLOUR.astype(">u2").tobytes(),
    "float PFM": lambda: b"Pf 32 16 -1.0\n" + GRAY.astype("<f4").tobytes(),
    "16-bit JPEG 2000": lambda: encoded(GRAY, "JPEG2000"),
    "12-bit colour JPEG 2000": lambda: jpeg2000(12),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("loader", ["pil", "tensor"])
@pytest.mark.parametrize("on_bad_image", ON_BAD_IMAGE)
def test_more_than_8_bits_are_refused_with_the_file_and_its_type(tmp_path, name, loader, on_bad_image):
    path = tmp_path / "val" / "a" / "scan.png"  # the content decides, not the name
    path.parent.mkdir(parents=True)
    path.write_bytes(DEEP[name]())
    images = build_dataset("image_folder", tmp_path, "val")
    dataset = KeyedDataset(images, eval_transform(16, loader=loader), 0, on_bad_image=on_bad_image)
    with pytest.raises(UnreadableImage, match=r"^cannot read image .*scan\.png: .*more than 8 bits.*(mode|bits|;16)"):
        dataset[0, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fewer_bits_of_gray_are_scaled_to_8(tmp_path, bits):
    top = 2**bits - 1
    values = np.arange(256) % (top + 1)
    (tmp_path / "image").write_bytes(f"P5 16 16 {top}\n".encode() + values.astype(np.uint8).tobytes())
    expected = np.round(values.reshape(16, 16) * 255 / top)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "image"))[..., 0], expected)


def test_low_colour_bitmaps_are_read(tmp_path):
    """BMP with 5, 6 and 5 bits of a pixel: Pillow calls them BGR;16."""
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 66 + 8, 0, 0, 66, 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "image").write_bytes(header + masks + struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF))
    assert read_image(tmp_path / "image").getpixel((0, 0)) == (0, 0, 255)
    assert read_image(tmp_path / "image").getpixel((1, 0)) == (255, 255, 255)


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "image.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 4, 4, 3), np.uint16), np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8)]
)
def test_arrays_of_other_pixels_are_refused(pixels):
    with pytest.raises(ValueError, match=r"they must be uint8, \(n, h, w, 3\)"):
        Pixels(pixels)


def test_exif_orientation_is_ignored_as_in_torchvision(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    Image.fromarray(NOISE).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").size == (32, 24)


# ---- damaged


def cut_jpeg(path):
    Image.fromarray(NOISE).resize((64, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1200])


def damage_header(path):
    Image.fromarray(NOISE).save(path, "JPEG")
    path.write_bytes(bytes(30) + path.read_bytes()[30:])


def damage_png(path):
    Image.fromarray(NOISE).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)


def cut_png(path):
    Image.fromarray(NOISE).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:700])


def write_text(path):
    path.write_text("<html>404 Not Found</html>")


def empty(path):
    path.write_bytes(b"")


@pytest.fixture
def folder(tmp_path):
    """Ten images of two classes for each split, of which `spoil` damages some."""
    for split in ("train", "val"):
        for number in range(10):
            path = tmp_path / split / ("cat", "dog")[number // 5] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (25 * number,) * 3).save(path)
    return tmp_path


def spoil(folder, *numbers, damage=write_text):
    for number in numbers:
        for split in ("train", "val"):
            damage(folder / split / ("cat", "dog")[number // 5] / f"{number}.jpg")


def pass_over(folder, split, workers=0, batch_size=5, seed=0, **options):
    train = split == "train"
    images = build_dataset("image_folder", folder, split)
    transform = train_transform(16) if train else eval_transform(16)
    dataset = KeyedDataset(images, transform, seed, on_bad_image="skip", train=train, **options)
    batches = GlobalBatches(10, batch_size, 1, seed=0) if train else EvaluationBatches(10, batch_size)
    return build_loader(dataset, batches, workers)


@pytest.mark.parametrize("loader", ["pil", "tensor"])
@pytest.mark.parametrize("damage", [cut_jpeg, damage_header, damage_png, cut_png, write_text, empty])
def test_damaged_image_is_one_line_with_its_path(folder, damage, loader):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    spoil(folder, 7, damage=damage)
    dataset = KeyedDataset(build_dataset("image_folder", folder, "val"), eval_transform(16, loader=loader), seed=0)
    for workers in (0, 1) if damage is cut_jpeg else (0,):
        with pytest.raises(DamagedImage, match=rf"^cannot read image {folder}/val/dog/7.jpg: [^\n]+$"):
            list(build_loader(dataset, EvaluationBatches(10, 4), workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_a_damaged_image_by_the_next_in_its_place(folder, workers):
    whole = [sample for batch in pass_over(folder, "train") for sample in zip(*batch, strict=True)]
    spoil(folder, 4, 5)
    batches = list(pass_over(folder, "train", workers))
    assert [len(batch.image) for batch in batches] == [5, 5]
    for (image, label, index, _, valid), expected in zip(
        (sample for batch in batches for sample in zip(*batch, strict=True)), whole, strict=True
    ):
        assert index == expected[2] and valid == (index not in (4, 5))
        if valid:
            assert image.equal(expected[0]) and label == expected[1]
        else:  # image 6, of the other class than 4, in one colour
            assert label == 1 and image[0].unique().numel() == 1
            torch.testing.assert_close(image[0, 0, 0], torch.tensor((150 / 255 - 0.485) / 0.229), atol=0.01, rtol=0)


def test_the_first_image_replaces_the_last_and_only_given_indices_replace(folder):
    spoil(folder, 2, 9)
    images = build_dataset("image_folder", folder, "train")

    def shown(index, **options):
        dataset = KeyedDataset(
            images, lambda image: torch.tensor(image.getpixel((9, 9))[0]), 0, 0, "skip", True, **options
        )
        return int(dataset[0, index].image)

    assert shown(9) == 0
    assert shown(9, indices=[9, 5, 3]) == 25 * 3
    assert shown(2, indices=[2, 9, 7]) == 25 * 7


def test_evaluation_leaves_damaged_images_out(folder):
    expected = torch.cat([batch.image for batch in pass_over(folder, "val")])
    spoil(folder, 0, 1, 2, 3, 4, 8)  # the first batch as a whole
    loader = pass_over(folder, "val")
    (batch,) = (batch for batch in loader if batch is not None)
    assert batch.index.tolist() == [5, 6, 7, 9] and batch.label.tolist() == [1, 1, 1, 1] and batch.valid.all()
    for image, index in zip(batch.image, batch.index.tolist(), strict=True):
        assert image.equal(expected[index])
    assert loader.damaged == (0, 1, 2, 3, 4, 8)


def test_damaged_images_of_all_ranks_are_counted_once_and_logged_once(folder, monkeypatch, caplog):
    spoil(folder, 1, 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda found: [found, {2, 6}])
    loader = pass_over(folder, "val")
    with caplog.at_level(logging.WARNING, "beyond_cls"):
        list(loader), list(loader)
    assert loader.damaged == (1, 2, 6)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"3 images could not be read and were left out: {folder}/val/cat/1.jpg, ")


PROGRAM = """
import json
import sys
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches, GlobalBatches
from data_sets.table import build_dataset
from data_sets.views import eval_transform
from util.distributed import distributed, gather_objects

with distributed("cpu") as world:
    found = []
    for split in ("train", "val"):
        images = build_dataset("image_folder", sys.argv[1], split)
        dataset = KeyedDataset(images, eval_transform(16), 0, on_bad_image="skip", train=split == "train")
        batches = GlobalBatches(10, 2, 1, seed=0) if split == "train" else EvaluationBatches(10, 2)
        loader = build_loader(dataset, batches, 0)
        found.append((gather_objects([batch.index.tolist() for batch in loader if batch is not None]), loader.damaged))
    if world.rank == 0:
        print(json.dumps(found))
"""


def test_ranks_stay_in_step_whatever_is_damaged(folder, tmp_path, run_ranks):
    spoil(folder, 0, 2, 4, 6, 8, 9)  # of the test set, rank 0 has none left
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_ranks(tmp_path / "program.py", folder)
    assert done.returncode == 0, done.stderr
    (train, damaged), (test, also_damaged) = json.loads(done.stdout.splitlines()[-1])
    assert [[len(batch) for batch in rank] for rank in train] == [[2, 2], [2, 2]]
    assert test == [[], [[1, 3], [5, 7]]]
    seen = {index for rank in train for batch in rank for index in batch}
    assert also_damaged == [0, 2, 4, 6, 8, 9] and set(damaged) == seen & set(also_damaged)


def test_a_missing_file_is_an_error_even_where_damaged_ones_are_skipped(folder):
    for split in ("train", "val"):
        loader = pass_over(folder, split)
        (folder / split / "cat" / "3.jpg").unlink()
        with pytest.raises(UnreadableImage, match=rf"^cannot read image {folder}/{split}/cat/3.jpg: .*No such file"):
            list(loader)


def test_only_damaged_images_are_an_error(folder):
    spoil(folder, *range(10))
    with pytest.raises(UnreadableImage, match="nor any that could replace it"):
        list(pass_over(folder, "train"))
    assert set(pass_over(folder, "val")) == {None}


def test_loader_without_skipping_gives_every_batch_as_it_is(folder):
    dataset = KeyedDataset(build_dataset("image_folder", folder, "val"), eval_transform(16), 0)
    loader = build_loader(dataset, EvaluationBatches(10, 4), 0)
    assert isinstance(loader, Loader) and [len(batch.image) for batch in loader] == [4, 4, 2]
