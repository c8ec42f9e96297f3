"""Boxes from every format that they are published in, brought to the image that the encoder sees."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from aggregation.boxes import BOX_SOURCES, Annotation, ImageBoxes, _annotations, read_boxes
from data_sets.demo import generate
from data_sets.table import build_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 3)]
BOXES = {NAMES[0]: [(10, 5, 59, 30)], NAMES[1]: [(0, 0, 79, 39), (3, 4, 5, 6)], NAMES[2]: [(79, 39, 80, 40)]}
WIDTH, HEIGHT = 80, 40


def make_images(root: Path) -> None:
    """Three images of 80 x 40 pixels in two classes."""
    for number, name in enumerate(NAMES):
        folder = root / "val" / f"n{number % 2:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(folder / f"{name}.JPEG")


@pytest.fixture
def root(tmp_path) -> Path:
    make_images(tmp_path / "data")
    return tmp_path / "data"


def read(path: Path, root: Path, chosen=range(3), **options) -> ImageBoxes:
    return read_boxes(path, None, build_dataset("image_folder", root, "val"), root, chosen, **options)


def path_in(root: Path, name: str) -> str:
    return next(root.glob(f"val/*/{name}.JPEG")).relative_to(root).as_posix()


def write_xml(folder: Path, root: Path) -> Path:
    folder.mkdir()
    for name, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>n0</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
            "</object>" for a, b, c, d in boxes
        )  # fmt: skip
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}</filename>{size}{objects}</annotation>")
    return folder


def write_kaggle(folder: Path, root: Path) -> Path:
    folder.mkdir()
    lines = [f"{name},{' '.join('n0 ' + ' '.join(map(str, box)) for box in boxes)} " for name, boxes in BOXES.items()]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    return folder / "LOC_val_solution.csv"


def write_wsol(folder: Path, root: Path) -> Path:
    folder.mkdir()
    rows = [f"val/{name}.JPEG,{','.join(map(str, box))}" for name, boxes in BOXES.items() for box in boxes]
    (folder / "localization.txt").write_text("\n".join(rows))
    (folder / "image_sizes.txt").write_text("\n".join(f"val/{name}.JPEG,{WIDTH},{HEIGHT}" for name in BOXES))
    return folder


def write_csv(folder: Path, root: Path) -> Path:
    rows = [f"{path_in(root, name)},{','.join(map(str, box))}" for name, boxes in BOXES.items() for box in boxes]
    (root / "boxes.csv").write_text("\n".join(["path,x0,y0,x1,y1", *rows]) + "\n")
    return root / "boxes.csv"


def write_csv_elsewhere(folder: Path, root: Path) -> Path:
    """Other columns beside those that are read, as Tiny ImageNet has them; not in the folder of the images."""
    folder.mkdir()
    rows = [f"val,{path_in(root, name)},a b,{WIDTH},{HEIGHT},{','.join(map(str, box))}"
            for name, boxes in BOXES.items() for box in boxes]  # fmt: skip
    (folder / "boxes.csv").write_text("\n".join(["split,file,words,w,h,x0,y0,x1,y1", *rows]) + "\n")
    return folder / "boxes.csv"


WRITERS = {
    "imagenet-xml": write_xml, "imagenet-csv": write_kaggle, "wsol": write_wsol, "csv": write_csv,
    "csv elsewhere": write_csv_elsewhere,
}  # fmt: skip


def by_name(boxes: ImageBoxes) -> dict[str, int]:
    """{name of an image: its index}"""
    return {Path(file).stem: index for index, (file, _) in enumerate(boxes.images.samples)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_boxes(root, tmp_path, name):
    path = WRITERS[name](tmp_path / "annotations", root)
    assert [kind for kind, source in BOX_SOURCES.items() if source.fits(path)] == [name.split()[0]]
    boxes = read(path, root)
    for image, index in by_name(boxes).items():
        found, size = boxes.original(index)
        assert found.tolist() == [list(box) for box in BOXES[image]] and size == (WIDTH, HEIGHT)


def test_all_sources_are_tested():
    if untested := BOX_SOURCES.keys() - {name.split()[0] for name in WRITERS}:
        pytest.fail(f"tests/test_boxes.py: WRITERS has no {', '.join(sorted(untested))}: write a function that writes "
                    "BOXES in that format, by which reading it is tested", pytrace=False)  # fmt: skip
    assert {name.split()[0] for name in WRITERS} == BOX_SOURCES.keys()


def test_the_page_on_aggregation_lists_every_source():
    page = (Path(__file__).resolve().parents[1] / "docs" / "aggregation.md").read_text()
    if rows := [
        f"| `{name}` | {BOX_SOURCES[name].description} |" for name in BOX_SOURCES if f"| `{name}` |" not in page
    ]:
        pytest.fail("docs/aggregation.md has no row for a format of boxes: add\n" + "\n".join(rows), pytrace=False)


def scaled(name: str, sides: tuple[int, int]) -> list[list[int]]:
    """The boxes of an image in 224 x 224 pixels, if they were drawn in an image of these sides."""
    return [[int(value * 224 / side) for value, side in zip(box, sides * 2, strict=True)] for box in BOXES[name]]


def test_resized_boxes_are_cut_off_to_whole_pixels(root, tmp_path):
    boxes = read(write_csv(tmp_path, root), root)
    for image, index in by_name(boxes).items():
        assert boxes.resized(index, 224).tolist() == scaled(image, (WIDTH, HEIGHT))


def test_cropped_boxes_are_where_the_pixels_go():
    """A white rectangle is drawn, and found in what torchvision makes of the image."""
    image = np.zeros((50, 90), np.uint8)
    image[10:41, 30:71] = 255
    seen = center_crop(resize(Image.fromarray(image), int(32 * 256 / 224)), 32)
    rows, columns = np.nonzero(np.asarray(seen).max(1) > 127)[0], np.nonzero(np.asarray(seen).max(0) > 127)[0]
    expected = [columns[0], rows[0], columns[-1], rows[-1]]
    found = boxes_of_one((90, 50), [(30, 10, 70, 40)]).cropped(0, 32)[0]
    assert np.abs(found - expected).max() <= 1


def boxes_of_one(size, boxes):
    return ImageBoxes(None, [Annotation(boxes, size)], Path("boxes.csv"))


def test_boxes_outside_of_the_crop_are_left_out():
    boxes = boxes_of_one((128, 64), [(0, 0, 10, 63), (40, 0, 127, 63)])
    found = boxes.cropped(0, 56)  # resized to 128 x 64, of which columns 36 to 91 and rows 4 to 59 are left
    assert found.tolist() == [[4, 0, 55, 55]]


def test_box_of_an_image_of_another_size_is_refused(root, tmp_path):
    (root / "boxes.csv").write_text(f"path,x0,y0,x1,y1\n{path_in(root, NAMES[0])},0,0,400,30\n")
    with pytest.raises(ValueError, match=r"a box of .*00000001.JPEG exceeds the image of 80 x 40 pixels"):
        read(root / "boxes.csv", root, [0]).resized(0, 224)


def broken(tmp_path: Path, root: Path, name: str, old: str, new: str) -> Path:
    tmp_path.mkdir(exist_ok=True)
    path = WRITERS[name](tmp_path / "annotations", root)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    for file in files:
        file.write_text(file.read_text().replace(old, new))
    return path


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("csv", "x0,", "left,", r"none of the known formats: imagenet-xml, folder"),
        ("csv", "path,", "image,", r"0 columns called path .*: image, x0, y0, x1, y1"),
        ("csv", "path,", "path,x0,", r"2 columns called x0"),
        ("csv", ",10,5,59,30", ",10,5,59", r"line 2 does not have 5 columns"),
        ("csv", ",10,5,", ",10.5,5,", r"line 2: 10.5, 5, 59, 30 are not four integers"),
        ("csv", ",10,5,59,", ",60,5,59,", r"line 2: 60, 5, 59, 30 is not a box"),
        ("csv", ",10,5,", ",-1,5,", r"line 2: -1, 5, 59, 30 is not a box"),
        ("csv", "val/n00000000/ILSVRC2012_val_00000001.JPEG", "", r"line 2: the image has no name"),
        ("csv elsewhere", ",w,h,", ",w,tall,", r"0 columns called h instead of 1"),
        ("csv elsewhere", ",80,40,", ",8,40,", r"exceeds its image of 8 x 40 pixels"),
        ("csv elsewhere", ",80,40,", ",0,0,", r"line 2: no image has 0 x 0 pixels"),
        ("csv elsewhere", ",80,40,0,", ",160,80,0,", r"line 4: val/.*2.JPEG has two sizes, \(160, 80\) and \(80, 40\)"),
        ("csv elsewhere", ",80,40,", ",80,80,", r"drawn in an image of 80 x 80 pixels, but the file has 80 x 40"),
        ("wsol", ",10,5,59,30", ",10,5,59", r"localization.txt, line 1 does not have 5 columns"),
        ("csv elsewhere", ",80,40,", ",80.5,40,", r"line 2: 80.5, 40 are not a width and height in pixels"),
        ("wsol", ",80,40", ",wide,40", r"localization.txt, line 1: wide, 40 are not a width and height"),
        ("imagenet-csv", "n0 10 5 59 30", "n0 10 5 59", r"line 2: .* is not of the form WNID X0 Y0 X1 Y1"),
        ("imagenet-xml", "<xmin>10</xmin>", "", r"00000001.xml: , 5, 59, 30 are not four integers"),
        ("imagenet-xml", "</annotation>", "", r"00000001.xml is not an annotation in XML"),
        ("imagenet-xml", "<height>40</height>", "<height>90</height>", r"80 x 90 pixels, but the file has 80 x 40"),
        ("csv", "00000002", "00000009", r"1 images with boxes do not exist, the first val/n00000001/.*09"),
        ("wsol", "00000002", "00000009", r"1 images with boxes do not exist, the first ILSVRC2012_val_00000009"),
    ],
)  # fmt: skip
def test_mistakes_name_their_place(root, tmp_path, name, old, new, message):
    with pytest.raises(ValueError, match=message):
        read(broken(tmp_path, root, name, old, new), root).original(0)


def test_whole_numbers_may_be_written_as_floats(root, tmp_path):
    path = broken(tmp_path, root, "csv elsewhere", ",80,40,", ",80.0,40.0,")
    path.write_text(path.read_text().replace(",10,5,59,30", ",10.0,5.0,59.0,30.0"))
    boxes = read(path, root)
    assert boxes.original(by_name(boxes)[NAMES[0]])[0].tolist() == [list(BOXES[NAMES[0]][0])]


def test_boxes_drawn_in_a_larger_copy_of_the_image_are_scaled(root, tmp_path):
    boxes = read(broken(tmp_path, root, "csv elsewhere", ",80,40,", ",161,80,"), root)
    for image, index in by_name(boxes).items():
        assert boxes.resized(index, 224).tolist() == scaled(image, (161, 80))


@pytest.mark.parametrize("prefix", ["./val/", "val//", "val\\"])
def test_paths_of_one_image_may_be_written_in_several_ways(root, tmp_path, prefix):
    """Else its second box would belong to no image, and no error would say so."""
    path, line = write_csv(tmp_path, root), "n00000001/ILSVRC2012_val_00000002.JPEG,3"
    path.write_text(path.read_text().replace(f"val/{line}", prefix + line))
    assert sorted(len(annotation.boxes) for annotation in read(path, root).annotations) == [1, 1, 2]


def test_hidden_files_of_other_systems_are_skipped(root, tmp_path):
    folder = write_xml(tmp_path / "annotations", root)
    for name in NAMES:
        (folder / f"._{name}.xml").write_bytes(b"\0\5\x16\7")
    assert len(read(folder, root).annotations) == 3
    for path in folder.glob("[!.]*"):
        path.unlink()
    with pytest.raises(ValueError, match="none of the known formats"):
        read(folder, root)


def test_images_without_a_box_are_named(root, tmp_path):
    path = write_csv(tmp_path, root)
    images = by_name(read(path, root))
    path.write_text("\n".join(line for line in path.read_text().splitlines() if NAMES[2] not in line))
    with pytest.raises(ValueError, match=r"1 of 3 images have no box, the first .*00000003.JPEG"):
        read(path, root)
    assert read(path, root, [images[NAMES[0]], images[NAMES[1]]]).original(images[NAMES[0]])[0].shape == (1, 4)


def test_boxes_of_other_images_are_passed_over_when_asked(root, tmp_path):
    path = broken(tmp_path, root, "wsol", "00000002", "00000009")
    chosen = [index for index, file in enumerate(sorted(root.glob("val/*/*"))) if NAMES[1] not in file.name]
    read(path, root, chosen, allow_subset=True)


def test_boxes_of_other_images_alone_are_not_passed_over(root, tmp_path):
    path = write_csv(tmp_path, root)
    path.write_text(path.read_text().replace("ILSVRC2012_val_0000", "ILSVRC2012_val_0009"))
    with pytest.raises(ValueError, match=r"boxes of other images, such as val/n0000000./ILSVRC2012_val_0009"):
        read(path, root, allow_subset=True)


def test_the_folder_of_a_table_stands_for_it(root, tmp_path):
    path = write_csv(tmp_path, root)
    for place in (path, path.parent):
        assert len(read(place, root).annotations) == 3


def test_names_without_folders_must_tell_images_apart(root, tmp_path):
    shutil.copy(root / path_in(root, NAMES[0]), root / "val" / "n00000001")
    with pytest.raises(ValueError, match="two images are called ILSVRC2012_val_00000001"):
        read(write_wsol(tmp_path / "annotations", root), root)


def test_sizes_of_images_may_be_called_width_and_height(root, tmp_path):
    path = broken(tmp_path, root, "csv elsewhere", ",w,h,", ",width,height,")
    assert read(path, root).annotations[0].size == (80, 40)


def test_paths_may_be_absolute(root, tmp_path):
    path = broken(tmp_path / "elsewhere", root, "csv", "val/", f"{root}/val/")
    assert read(path, root).annotations[0].boxes


def test_tables_of_spreadsheets_are_read(root, tmp_path):
    path = write_csv(tmp_path, root)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path, root).original(0)[1] == (WIDTH, HEIGHT)


def test_there_must_be_a_source(root, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.csv: no such file or folder"):
        read(tmp_path / "nowhere.csv", root)
    with pytest.raises(ValueError, match="images of this data set are not files"):
        read_boxes(write_csv(tmp_path, root), None, [], root, [])


def test_demo_writes_what_is_read(tmp_path):
    generate(tmp_path / "demo", 10, 10, workers=1)
    boxes = read(tmp_path / "demo" / "boxes.csv", tmp_path / "demo", range(10))
    for index in range(10):
        found, size = boxes.original(index)
        assert found.shape == (1, 4) and size == (72, 72)
    # boxes of the training images belong to files that are there
    next((tmp_path / "demo" / "train").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="1 images with boxes do not exist"):
        read(tmp_path / "demo" / "boxes.csv", tmp_path / "demo", range(10))


@pytest.mark.skipif(not (SHARED / "imagenet_val_boxes").is_dir(), reason="no published boxes of ImageNet here")
def test_published_boxes_of_imagenet_are_read_whole():
    found = _annotations(BOX_SOURCES["wsol"].rows(SHARED / "imagenet_val_boxes"))
    assert len(found) == 50_000 and sum(len(one.boxes) for one in found.values()) == 80_477
    assert found[NAMES[0]].boxes == [(111, 108, 441, 193)] and found[NAMES[0]].size == (500, 375)
