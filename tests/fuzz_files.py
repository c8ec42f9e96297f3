"""Damaged and hostile files: never a traceback, never code executed, nothing written over.

    OMP_NUM_THREADS=1 python tests/fuzz_files.py --checkpoints 500 --images 500 --lists 500

Checkpoints go to main_linprobe itself, by --resume FILE and, beside a good older one, by --resume auto. Images are one
of the training images: of main_linprobe for one in ten, of what reads them for the others. Lists are what data sets
come with, annotations and binary records too (LISTS); each goes to its reader. A program, not a test: it takes minutes.
Exit code 1 where something is wrong.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from interruptions import ROOT, differences, finish, launch, outcome
from miniatures import ARRAYS, CLASSES, MINIATURES
from PIL import Image
from test_boxes import make_images, write_csv, write_kaggle, write_wsol, write_xml
from test_safe_loading import RAW, attacks

from aggregation.boxes import read_boxes
from data_sets.demo import generate
from data_sets.loader import KeyedDataset
from data_sets.table import DATASETS, build_dataset
from data_sets.views import eval_transform
from runtime.folder import load_checkpoint, sealed

Mutation = Callable[[bytes, random.Random, Path], bytes]  # (file, draw, marker that an attack would leave) -> file


# ---- mutations


def flip(data: bytes, draw: random.Random, marker: Path) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random, marker: Path) -> bytes:
    return data[: draw.randrange(len(data))]


def zero(data: bytes, draw: random.Random, marker: Path) -> bytes:
    start = draw.randrange(len(data))
    length = min(draw.choice((1, 16, 512, 4096)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def insert(data: bytes, draw: random.Random, marker: Path) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + draw.randbytes(draw.choice((1, 8, 100))) + data[start:]


def swap_blocks(data: bytes, draw: random.Random, marker: Path) -> bytes:
    if len(data) < 8:
        return data[::-1]
    size = min(draw.choice((64, 1024)), len(data) // 4)
    a, b = sorted(draw.sample(range(0, len(data) - size, size), 2))
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def swap_records(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """Two records of the zip change their names: tensors in each other's place."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    a, b = draw.sample(list(records), 2)
    records[a], records[b] = records[b], records[a]
    return zipped(records)


def hostile_opcodes(data: bytes, draw: random.Random, marker: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in records if name.endswith("/data.pkl"))
    records[name] = draw.choice(list(RAW.values())).replace(b"%s", str(marker).encode())
    return zipped(records)


def zipped(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def rewritten(change: Callable[[dict, random.Random, Path], dict]) -> Mutation:
    def mutate(data: bytes, draw: random.Random, marker: Path) -> bytes:
        state, buffer = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
        torch.save(change(state, draw, marker), buffer)
        return buffer.getvalue()

    return mutate


def attack(state: dict, draw: random.Random, marker: Path) -> dict:
    evil = draw.choice(list(attacks(marker).values()))
    return {**state, draw.choice(list(state)): evil} if draw.random() < 0.5 else {**state, "evil": evil}


def swap_entries(state: dict, draw: random.Random, marker: Path) -> dict:
    a, b = draw.sample(list(state), 2)
    return {**state, a: state[b], b: state[a]}


def drop_entry(state: dict, draw: random.Random, marker: Path) -> dict:
    dropped = draw.choice(list(state))
    return {key: value for key, value in state.items() if key != dropped}


def wrong_entry(state: dict, draw: random.Random, marker: Path) -> dict:
    """A file of another kind, with a seal in order."""
    state.pop("sha256")
    wrong = draw.choice([None, -1, "x", [], {}, torch.zeros(0), torch.full((3, 2), torch.nan), {"a": {"b": 1}}])
    return sealed({**state, draw.choice(list(state)): wrong})


def lines(change: Callable[[list[bytes], random.Random], None]) -> Mutation:
    def mutate(data: bytes, draw: random.Random, marker: Path) -> bytes:
        parts = data.splitlines(keepends=True)
        change(parts, draw)
        return b"".join(parts)

    return mutate


def drop_line(parts: list[bytes], draw: random.Random) -> None:
    parts.pop(draw.randrange(len(parts)))


def repeat_line(parts: list[bytes], draw: random.Random) -> None:
    parts.insert(draw.randrange(len(parts)), draw.choice(parts))


WORDS = ("", "-1", "0", "1.5", "9" * 20, "nan", "x", "é", "\0", "../..", "/", "[]", "{}", "null", "a" * 5000)


def change_word(data: bytes, draw: random.Random, marker: Path) -> bytes:
    found = draw.choice(list(re.finditer(rb"[\w.]+", data)) or [re.match(b"", data)])
    return data[: found.start()] + draw.choice(WORDS).encode() + data[found.end() :]


def change_node(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """One value, somewhere in a JSON file, becomes another kind of value; in other files, a word another word."""
    try:
        place = content = [json.loads(data)]
    except ValueError:
        return change_word(data, draw, marker)
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or (place is not content and draw.random() < 0.3):
            break
        place = place[key]
    place[key] = draw.choice([None, True, -1, 10**30, 1e999, "x", "a\0b", "../x", "a" * 5000, [], {}, [[]], {"id": []}])
    return json.dumps(content[0]).encode()


CHECKPOINTS = {
    "bits flipped": flip, "cut off": cut, "block of zeros": zero, "bytes inserted": insert,
    "blocks swapped": swap_blocks,
    "records swapped": swap_records, "entries swapped": rewritten(swap_entries), "entry missing": rewritten(drop_entry),
    "entry of another kind, sealed": rewritten(wrong_entry), "pickled attack": rewritten(attack),
    "hostile opcodes": hostile_opcodes,
}  # fmt: skip
PICTURES = (".jpg", ".jpeg", ".png")
IMAGES = {
    "bits flipped": flip, "cut off": cut, "block of zeros": zero, "bytes inserted": insert,
    "blocks swapped": swap_blocks,
    "noise": lambda data, draw, marker: data[: draw.choice((0, 4, 16))] + draw.randbytes(draw.choice((1, 100, 5000))),
}  # fmt: skip
LIST_MUTATIONS = {
    "bits flipped": flip, "cut off": cut, "block of zeros": zero, "bytes inserted": insert,
    "blocks swapped": swap_blocks, "line missing": lines(drop_line), "line repeated": lines(repeat_line),
    "word changed": change_word, "value of another kind": change_node,
    "nested": lambda data, draw, marker: b"[" * draw.choice((10, 100_000)) + data, "emptied": lambda *_: b"",
}  # fmt: skip


def read_data_set(name: str, root: Path) -> None:
    for split in ("train", "val"):
        images = KeyedDataset(build_dataset(name, root, split, allow_subset=True), eval_transform(32), 0)
        for index in range(len(images)):
            images[0, index]


# what makes a small one in a folder, and what reads it from there: a ValueError is a clear answer, all else is a fault
LISTS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    name: (make, functools.partial(read_data_set, name))
    for name, make in {**MINIATURES, **{name: make for name, (make, _) in ARRAYS.items()}}.items()
    if name != "imagenet1k"  # which has lists only where its validation images lie in one folder
}
for flat in ("kaggle", "devkit"):
    make = functools.partial(MINIATURES["imagenet1k"], flat=flat)
    LISTS[f"imagenet1k, {flat}"] = (make, functools.partial(read_data_set, "imagenet1k"))


def make_boxes(write: Callable[[Path, Path], object], folder: Path) -> None:
    """Three images, and their boxes as `write` writes them."""
    make_images(folder)
    write(folder / "boxes", folder)


def read_boxes_of(kind: str, place: str, folder: Path) -> None:
    images = build_dataset("image_folder", folder, "val")
    found = read_boxes(folder / place, kind, images, folder, range(len(images)))
    for index in range(len(images)):
        found.resized(index, 224)


for kind, (write, place) in {
    "imagenet-xml": (write_xml, "boxes"), "imagenet-csv": (write_kaggle, "boxes/LOC_val_solution.csv"),
    "wsol": (write_wsol, "boxes"), "csv": (write_csv, "boxes.csv"),
}.items():  # fmt: skip
    LISTS[f"boxes, {kind}"] = (functools.partial(make_boxes, write), functools.partial(read_boxes_of, kind, place))


# ---- what must hold


class Program:
    """main_linprobe on a small data set: two epochs of two steps."""

    def __init__(self, work: Path):
        self.work, self.output = work, work / "output"
        self.common = [
            "--model", "vit_demo_patch8", "--finetune", str(ROOT / "demo" / "mae.safetensors"), "--final_norm",
            "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "8", "--amp", "float32", "--device", "cpu",
            "--num_workers", "0",
        ]  # fmt: skip

    def __call__(self, data: Path, folder: Path, *more: str) -> tuple[int, str]:
        """Exit code and what it printed. AssertionError where it is ended by a signal, or prints a traceback."""
        self.output.unlink(missing_ok=True)
        argv = [*self.common, "--data_path", str(data), "--output_dir", str(folder), *more]
        code = finish(launch("main_linprobe", argv, self.output))
        text = self.output.read_text(errors="replace")
        assert code in (0, 2), f"exit code {code}: {text}"
        assert "Traceback" not in text, text
        errors = [line for line in text.splitlines() if line.startswith(Path(sys.argv[0]).name + ": ")]
        assert len(errors) == (code != 0), text
        return code, text


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fuzz_checkpoint(program: Program, kind: str, good: Path, whole: dict, draw: random.Random, work: Path) -> str:
    """A damaged newest checkpoint beside a good older one. How it went; AssertionError where it went wrong."""
    folder, other, marker = work / "run", work / "other", work / "marker"
    for path in (folder, other):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, folder)
    newest = folder / "checkpoint-1.pth"
    newest.write_bytes(CHECKPOINTS[kind](newest.read_bytes(), draw, marker))
    try:
        same = not differences(load_checkpoint(newest), load_checkpoint(good / newest.name))
    except ValueError:
        same = False
    trusted = same or kind.endswith("sealed")  # nothing tells a sealed file from ours if it fits
    before = fingerprint(folder)
    code, text = program(work / "data", other, "--resume", str(newest))
    assert fingerprint(folder) == before, "the folder of the checkpoint was changed"
    assert code == 2 or trusted, f"a damaged checkpoint was used: {text}"
    assert code == 0 or (str(newest) in text and not other.exists()), text
    again, text = program(work / "data", folder, "--resume", "auto")
    assert again == 0, text
    assert code == 0 or (f"{newest}" in text and "trying the checkpoint before it" in text), text
    assert (kind.endswith("sealed") and code == 0) or not (wrong := differences(outcome(folder), whole)), wrong
    assert not list(work.glob("marker*")), "code of the file was executed"
    return "refused, older one used" if code else "read: nothing that counts was changed" if same else "read: it fits"


def fuzz_image(program: Program, kind: str, encoded: dict[str, bytes], draw: random.Random, work: Path) -> str:
    folder, other = work / "images", work / "other"
    shutil.rmtree(other, ignore_errors=True)
    suffix = draw.choice(list(encoded))
    victim = draw.choice(sorted((folder / "train").rglob("*.png")))
    kept, damaged = victim.read_bytes(), victim.with_suffix(suffix)
    victim.unlink()
    damaged.write_bytes(IMAGES[kind](encoded[suffix], draw, work / "marker"))
    before = fingerprint(folder)
    if draw.random() < 0.1:
        code, text = program(folder, other, "--epochs", "1")
    else:  # a hundred times as fast
        code = finish(read_in_child(functools.partial(read_data_set, "image_folder"), folder, work / "output"))
        text = (work / "output").read_text()
    assert code in (0, 2), f"exit code {code}: {text}"
    assert fingerprint(folder) == before, "an image was changed"
    damaged.unlink()
    victim.write_bytes(kept)
    assert code == 0 or f"cannot read image {damaged}" in text, text
    return "refused by name" if code else "decoded"


def fuzz_list(kind: str, name: str, good: Path, draw: random.Random, work: Path) -> str:
    """One damaged file of those beside the images."""
    folder, output = work / "list", work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    output.unlink(missing_ok=True)
    shutil.copytree(good, folder)
    chosen = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in PICTURES]
    victim = draw.choice(chosen)
    victim.write_bytes(LIST_MUTATIONS[kind](victim.read_bytes(), draw, work / "marker"))
    before = fingerprint(folder)
    code = finish(read_in_child(LISTS[name][1], folder, output))
    text = output.read_text()
    told = f"{victim.relative_to(work)}, exit code {code}: {text[-2000:]}"
    assert fingerprint(folder) == before, f"a file was changed: {told}"
    assert code in (0, 2), told
    assert code == 0 or str(folder) in text, f"the path is not named: {told}"
    assert not list(work.glob("marker*")), "code of the file was executed"
    return "refused by name" if code else "read"


def read_in_child(read: Callable[[Path], object], folder: Path, output: Path) -> int:
    """Process id of a child that exits with 0, with 2 at a ValueError, and with 1 at anything else, saying why."""
    if child := os.fork():
        return child
    code = 1
    signal.alarm(60)
    try:
        with open(output, "w") as told:
            try:
                read(folder)
                code = 0
            except ValueError as error:
                told.write(f"{error}\n")
                code = 2
            except BaseException:
                traceback.print_exc(file=told)
    finally:
        os._exit(code)


def encodings() -> dict[str, bytes]:
    """The same picture in every format that an image folder may hold."""
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3)).astype(np.uint8)
    found = {}
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff", ".ppm"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=Image.registered_extensions()[suffix])
        found[suffix] = buffer.getvalue()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--lists", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate(work / "data", 16, 10, workers=1)
        program = Program(work)
        good = work / "good"
        assert program(work / "data", good)[0] == 0
        whole = outcome(good)
        shutil.copytree(work / "data", work / "images")
        encoded = encodings()
        arrays = {name: classes for name, (_, classes) in ARRAYS.items()}
        for name, classes in {**dict.fromkeys(MINIATURES, 2), **CLASSES, **arrays}.items():
            DATASETS[name] = DATASETS[name]._replace(classes=classes)  # the miniature's stand for the official ones
        for name, (make, _) in LISTS.items() if args.lists else ():
            make(work / name)
            assert finish(read_in_child(LISTS[name][1], work / name, work / "output")) == 0, name
        plan = (
            ("checkpoint", CHECKPOINTS, args.checkpoints), ("image", IMAGES, args.images),
            ("list", LIST_MUTATIONS, args.lists),
        )  # fmt: skip
        cases = [(what, list(kinds)[i % len(kinds)], i) for what, kinds, number in plan for i in range(number)]
        counts: Counter = Counter()
        for what, kind, index in cases:
            draw = random.Random(f"{args.seed} {what} {kind} {index}")
            try:
                if what == "checkpoint":
                    result = fuzz_checkpoint(program, kind, good, whole, draw, work)
                elif what == "image":
                    result = fuzz_image(program, kind, encoded, draw, work)
                else:
                    name = list(LISTS)[index % len(LISTS)]
                    result = fuzz_list(kind, name, work / name, draw, work)
            except AssertionError as error:
                failures += 1
                result = "WRONG"
                print(f"{what} {index}, {kind}: {error}", flush=True)
            counts[what, kind, result] += 1
    print(f"| {'file':10} | {'mutation':30} | {'outcome':40} | number |\n|---|---|---|---|")
    for (what, kind, result), number in sorted(counts.items()):
        print(f"| {what:10} | {kind:30} | {result:40} | {number:6} |")
    print(f"{len(cases)} files, {failures} wrong")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
