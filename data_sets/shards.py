"""Images in slices of larger files, which an index lists: uncompressed tar files, and packs of scripts/pack_images.py.

Of each split of a pack, <split>.json is the index, with a sha256 of every image; <split>-00000.bin, ... hold the
images. Kinds: "pixels" are (h,w,3) uint8, mapped, so that a loader reads only the window that it crops; "jpeg" has
quality 95; "original" are the files as they are. The first two are resized as data_sets.views.eval_transform does
(bicubic, with antialiasing), so that the shorter side is at most `side`; a smaller image keeps its pixels, and as JPEG
its file.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_sets.demo import new_folder
from data_sets.images import Images, UnreadableImage, decode, fingerprint
from data_sets.readers import images_by_class, is_image, reading
from util import distributed
from util.files import write_atomically
from util.progress import log, progress

KINDS = ("pixels", "jpeg", "original")
SHARD = 2**30  # bytes, or one larger image


class Entry(NamedTuple):
    """An encoded image, or one stored as pixels, in a file."""

    name: str
    labels: list
    shard: int  # number of the file
    start: int  # first byte
    size: int  # bytes
    shape: list[int] | None = None  # height and width of pixels
    sha256: str | None = None


def save_index(path: Path, entries: Sequence[Entry], facts: dict) -> None:
    """Write entries, whole or not at all, with other plain data."""
    text = json.dumps({"facts": facts, "entries": entries})
    write_atomically(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())


def load_index(path: Path) -> tuple[dict, list[Entry]]:
    """(facts, entries); ValueError for a file that `save_index` did not write."""
    with reading(path):
        digest, text = path.read_text().split("\n", 1)
        if digest != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError("its content has changed")
        content = json.loads(text)
        return content["facts"], [Entry(*entry) for entry in content["entries"]]


class Slices:
    """The images of an index. Pixels are mapped from the file, so that only what a crop needs is read."""

    def __init__(self, files: Sequence[Path], entries: Sequence[Entry]):
        self.files, self.entries = files, entries
        self.names = [f"{files[entry.shard]}:{entry.name}" for entry in entries]

    def read(self, index: int) -> bytes | np.ndarray:
        entry = self.entries[index]
        path, end = self.files[entry.shard], entry.start + entry.size
        if entry.shape:
            return _mapped(path)[entry.start : end].reshape(*entry.shape, 3)
        with open(path, "rb") as file:
            file.seek(entry.start)
            content = file.read(entry.size)
        changed = entry.sha256 and entry.sha256 != hashlib.sha256(content).hexdigest()
        if len(content) < entry.size or changed:
            raise UnreadableImage(f"cannot read image {self.names[index]}: it is cut off or has changed")
        return content

    def stats(self) -> np.ndarray:
        modified = [os.stat(path).st_mtime_ns for path in self.files]
        return np.array([(entry.size, modified[entry.shard]) for entry in self.entries])

    def part(self, indices: Sequence[int]) -> Slices:
        return Slices(self.files, [self.entries[index] for index in indices])


@functools.cache
def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="c")  # copied on write: torch takes no read-only arrays


def tar_members(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of the files in an uncompressed tar file that begins at a byte of `path`; files of tar
    files in it included. ValueError if it is damaged."""
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and member.name.endswith(".tar"):
                    yield from tar_members(path, member.offset_data)
                elif member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # an archive ends with blocks of zeros
                raise ValueError(f"damaged or cut off at byte {archive.offset:,}")


def read_tars(shards: Sequence[Path], kinds: Sequence[str] = ()) -> Slices:
    """The images of tar files, sorted by name. kinds: suffixes of members to take besides, with their content as label.

    Rank 0 keeps the index in a file while the others wait; where it cannot be written, each process scans the shards.
    """
    facts = {"format": 2, "shards": [[path.name, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in shards]}
    key = hashlib.sha256(json.dumps([shards[0].name, *kinds]).encode()).hexdigest()
    path = shards[0].parent / f".index-{key[:8]}.json"
    with distributed.main_process_first():
        try:
            known, entries = load_index(path)
        except ValueError:
            known = None
        if known != facts:
            entries = [entry for number, shard in enumerate(shards) for entry in _scan(shard, number, kinds)]
            try:
                save_index(path, entries, facts)
            except OSError as error:
                log.info("%s: the index cannot be kept (%s) and will be made again", path.parent, error.strerror)
    return Slices(shards, sorted(entries, key=lambda entry: entry.name))


def _scan(shard: Path, number: int, kinds: Sequence[str]) -> Iterator[Entry]:
    with open(shard, "rb") as file:
        for name, start, size in tar_members(shard):
            if os.path.splitext(name)[1] in kinds:
                file.seek(start)
                yield Entry(name, [file.read(size).decode("utf-8", "backslashreplace")], number, start, size)
            elif is_image(name):
                yield Entry(name, [], number, start, size)


# ---- packs


def is_packed(root: Path) -> bool:
    return any((Path(root) / f"{split}-00000.bin").is_file() for split in ("train", "val"))


def _pack(index: int) -> tuple[bytes, tuple[int, int] | None]:
    """The packed content of an image of _pack.job, images, kind and side; height and width of pixels."""
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    images, kind, side = _pack.job
    content = images.content.read(index)
    if isinstance(content, bytes) and kind == "original":
        return content, None
    image = decode(content, images.names[index])
    if is_larger := min(image.size) > side and kind != "original":
        image = resize(image, [side], InterpolationMode.BICUBIC)
    if kind != "jpeg":
        return image.tobytes(), (image.height, image.width)
    if isinstance(content, bytes) and not is_larger:
        return content, None
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), None


def write_packed(target: Path, name: str, splits: dict[str, Images], kind: str, side: int, workers: int) -> None:
    """Pack the splits of a data set of a name in DATASETS in a new folder, completely or not at all."""
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder")
    with new_folder(target) as new:
        for split, images in splits.items():
            entries, shard, end, several = [], 0, 0, isinstance(images.targets, np.ndarray)
            with multiprocessing.Pool(workers, setattr, (_pack, "job", (images, kind, side))) as pool:
                contents = progress(pool.imap(_pack, range(len(images)), 16), split, len(images), "image")
                for number, (content, shape) in enumerate(contents):
                    if end and end + len(content) > SHARD:
                        shard, end = shard + 1, 0
                    with open(new / f"{split}-{shard:05d}.bin", "ab") as file:
                        file.write(content)
                    digest = hashlib.sha256(content).hexdigest()
                    labels = np.flatnonzero(images.targets[number]).tolist() if several else [images.targets[number]]
                    entries.append(Entry(images.names[number], labels, shard, end, len(content), shape, digest))
                    end += len(content)
            facts = {"dataset": name, "kind": kind, "side": side, "classes": images.classes}
            facts |= {"multi_label": several, "source": fingerprint(images)}
            save_index(new / f"{split}.json", entries, facts)


def read_packed(root: Path, name: str, split: str) -> Images:
    """ValueError for a pack of another data set, without the split, cut off or with a damaged index."""
    facts, entries = load_index(root / f"{split}.json")
    if facts["dataset"] != name:
        raise ValueError(f"it is packed from --dataset {facts['dataset']}, not {name}")
    ends = {entry.shard: entry.start + entry.size for entry in entries}
    files = [root / f"{split}-{shard:05d}.bin" for shard in range(len(ends))]
    for shard, file in enumerate(files):
        if not file.is_file() or file.stat().st_size != ends[shard]:
            raise ValueError(f"{file} is missing or cut off: pack again")
    labels, numbers = [entry.labels for entry in entries], range(len(facts["classes"]))
    images = images_by_class(Slices(files, entries), labels, numbers, facts["multi_label"])
    images.classes = facts["classes"]
    return images


def verify(images: Images) -> None:
    """UnreadableImage for the first image of a pack that is not the one that was packed."""
    digests = progress(images.sha256(range(len(images))), "verify", len(images), "image")
    for name, entry, digest in zip(images.names, images.content.entries, digests, strict=True):
        if digest.hex() != entry.sha256:
            raise UnreadableImage(f"cannot read image {name}: it has changed: pack again")
