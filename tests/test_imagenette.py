"""The quickstart's real data set, downloaded from an archive made here."""

import hashlib
import io
import tarfile

import pytest
from PIL import Image

from data_sets.table import ARCHIVES, DATASETS, IMAGENETTE, build_splits


@pytest.fixture
def archive(tmp_path, monkeypatch, serve):
    """An archive of two images per class and split, in the published layout, served on this machine."""
    path = tmp_path / "server" / "imagenette2-320.tgz"
    path.parent.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (32, 24)).save(picture, "JPEG")
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "val"):
            for wnid in IMAGENETTE:
                for number in range(2):
                    member = tarfile.TarInfo(f"imagenette2-320/{split}/{wnid}/{wnid}_{number}.JPEG")
                    member.size = len(picture.getvalue())
                    tar.addfile(member, io.BytesIO(picture.getvalue()))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    address = f"{serve(path.parent)}/{path.name}"
    monkeypatch.setitem(ARCHIVES, "imagenette", (address, md5))
    entry = DATASETS["imagenette"]._replace(images={"train": 20, "val": 20})
    monkeypatch.setitem(DATASETS, "imagenette", entry)
    return path


def test_imagenette_is_downloaded_once(archive, tmp_path):
    train, val, classes = build_splits("imagenette", tmp_path / "data", None)
    archive.unlink()
    again, _, _ = build_splits("imagenette", tmp_path / "data", 10)
    assert (len(train), len(val), classes, len(again)) == (20, 20, 10, 20)
    assert train[0][0].size == (32, 24)


def test_interrupted_extraction_is_refused(archive, tmp_path):
    build_splits("imagenette", tmp_path / "data", None)
    next((tmp_path / "data").rglob("*_1.JPEG")).unlink()
    with pytest.raises(ValueError, match="19 train images instead of 20: 1 are missing"):
        build_splits("imagenette", tmp_path / "data", None)


def test_missing_network_is_one_line(archive, tmp_path):
    archive.unlink()
    with pytest.raises(ValueError, match="imagenette2-320/train is not there, and http") as error:
        build_splits("imagenette", tmp_path / "data", None)
    assert "\n" not in str(error.value)
