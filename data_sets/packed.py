"""Packed data sets: the images of a data set in a few large files, made by scripts/pack_images.py.

Of each split, <split>.json is the index, with a sha256 of every image, and <split>-00000.bin, ... hold the images.
Kinds: "pixels" are (h,w,3) uint8, mapped, so that a loader reads only the window that it crops; "jpeg" has quality 95;
"original" are the files as they are. The first two are resized as data_sets.views.eval_transform does (bicubic, with
antialiasing), so that the shorter side is at most `side`; a smaller image keeps its pixels, and as JPEG its file.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from pathlib import Path

import numpy as np

from data_sets.demo import new_folder
from data_sets.images import Images, UnreadableImage, decode, fingerprint
from data_sets.readers import images_by_class
from data_sets.shards import Index, Slices
from util.progress import progress

KINDS = ("pixels", "jpeg", "original")
SHARD = 2**30  # bytes, or one larger image


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
            rows, shard, end, several = [], 0, 0, isinstance(images.targets, np.ndarray)
            with multiprocessing.Pool(workers, setattr, (_pack, "job", (images, kind, side))) as pool:
                contents = progress(pool.imap(_pack, range(len(images)), 16), split, len(images), "image")
                for number, (content, shape) in enumerate(contents):
                    if end and end + len(content) > SHARD:
                        shard, end = shard + 1, 0
                    with open(new / f"{split}-{shard:05d}.bin", "ab") as file:
                        file.write(content)
                    digest = hashlib.sha256(content).hexdigest()
                    labels = np.flatnonzero(images.targets[number]).tolist() if several else [images.targets[number]]
                    rows.append((images.names[number], labels, shard, end, len(content), shape, digest))
                    end += len(content)
            facts = {"dataset": name, "kind": kind, "side": side, "classes": images.classes}
            facts |= {"multi_label": several, "source": fingerprint(images)}
            Index.save(rows, new / f"{split}.json", facts)


def read_packed(root: Path, name: str, split: str) -> Images:
    """ValueError for a pack of another data set, without the split, cut off or with a damaged index."""
    facts, index = Index.load(root / f"{split}.json")
    if facts["dataset"] != name:
        raise ValueError(f"it is packed from --dataset {facts['dataset']}, not {name}")
    files = [root / f"{split}-{shard:05d}.bin" for shard in range(index.shard[-1] + 1)]
    ends = {shard: start + size for shard, start, size in zip(index.shard, index.start, index.size, strict=True)}
    for shard, file in enumerate(files):
        if not file.is_file() or file.stat().st_size != ends[shard]:
            raise ValueError(f"{file} is missing or cut off: pack again")
    images = images_by_class(Slices(files, index), index.labels, range(len(facts["classes"])), facts["multi_label"])
    return Images(images.content, images.targets, facts["classes"])


def verify(images: Images) -> None:
    """UnreadableImage for the first image of a pack that is not the one that was packed."""
    for number, digest in enumerate(progress(images.content.index.sha256, "verify", unit="image")):
        content = images.content.read(number)
        content = content if isinstance(content, bytes) else content.tobytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise UnreadableImage(f"cannot read image {images.names[number]}: it has changed: pack again")
