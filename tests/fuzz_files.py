"""Damaged and hostile files: never a traceback, never code executed, nothing written over.

    OMP_NUM_THREADS=1 python tests/fuzz_files.py --each 300

Checkpoints go to main_linprobe itself, by --resume FILE and, beside a good older one, by --resume auto. Images are one
of the training images: of main_linprobe for one in ten, of what reads them for the others. All other files go to their
reader, in a process with bounds on time and memory (READERS): what data sets come with, and what programs have written.
A program, not a test: it takes an hour. Exit code 1 where something is wrong.
"""

import argparse
import contextlib
import fnmatch
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
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
from make_shards import write_webdataset
from miniatures import ARRAYS, CLASSES, MINIATURES, write
from PIL import Image
from safetensors.torch import save_file
from test_boxes import make_images, write_csv, write_kaggle, write_wsol, write_xml
from test_cells import probing
from test_safe_loading import RAW, attacks

import main_linprobe
from aggregation.boxes import read_boxes
from cli.console import parse
from data_sets.demo import generate
from data_sets.loader import KeyedDataset
from data_sets.shards import write_packed
from data_sets.table import DATASETS, build_dataset, build_splits
from data_sets.views import eval_transform
from encoders.load import load_encoder
from probing.finished_run import export, read_exported, read_trained
from runtime.folder import RunFolder, load_checkpoint, sealed
from scripts import (
    benchmark,
    compare_probes,
    leaderboard,
    make_report,
    make_tables,
    plot_attention,
    record,
)  # fmt: skip
from util.tensor_files import save_encoder, seal

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


def change_header(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """One value in the header of a safetensors file becomes another; sealed again where that is possible."""
    size = int.from_bytes(data[:8], "little")
    header = change_node(data[8 : 8 + size], draw, marker)
    target = marker.with_name("header")
    target.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    if draw.random() < 0.5:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, AssertionError):
            seal(target)
    return target.read_bytes()


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


WEIGHT_MUTATIONS = {kind: change for kind, change in CHECKPOINTS.items() if not kind.endswith("sealed")}
TENSOR_MUTATIONS = {
    "bits flipped": flip, "cut off": cut, "block of zeros": zero, "bytes inserted": insert, "emptied": lambda *_: b"",
    "blocks swapped": swap_blocks, "header changed": change_header,
}  # fmt: skip


def read_data_set(name: str, root: Path) -> None:
    for split in ("train", "val"):
        images = KeyedDataset(build_dataset(name, root, split, allow_subset=True), eval_transform(32), 0)
        for index in range(len(images)):
            images[0, index]


# what makes a small one in a folder, what reads it from there (a ValueError is a clear answer, all else is a fault),
# and which of its files are damaged
READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    name: (make, functools.partial(read_data_set, name), "*")
    for name, make in {**MINIATURES, **{name: make for name, (make, _) in ARRAYS.items()}}.items()
    if name != "imagenet1k"  # which has lists only where its validation images lie in one folder
}
for flat in ("kaggle", "devkit"):
    make = functools.partial(MINIATURES["imagenet1k"], flat=flat)
    READERS[f"imagenet1k, {flat}"] = (make, functools.partial(read_data_set, "imagenet1k"), "*")


def make_boxes(write: Callable[[Path, Path], object], folder: Path) -> None:
    """Three images, and their boxes as `write` writes them."""
    make_images(folder)
    write(folder / "boxes", folder)


def read_boxes_of(kind: str, place: str, folder: Path) -> None:
    images = build_dataset("image_folder", folder, "val")
    found = read_boxes(folder / place, kind, images, folder, range(len(images)))
    for index in range(len(images)):
        found.resized(index, 224)


for kind, (write_boxes, place) in {
    "imagenet-xml": (write_xml, "boxes"), "imagenet-csv": (write_kaggle, "boxes/LOC_val_solution.csv"),
    "wsol": (write_wsol, "boxes"), "csv": (write_csv, "boxes.csv"),
}.items():  # fmt: skip
    read = functools.partial(read_boxes_of, kind, place)
    READERS[f"boxes, {kind}"] = (functools.partial(make_boxes, write_boxes), read, "*")


def make_container(kind: str, folder: Path) -> None:
    """The demo's images as users bring their own."""
    if not folder.with_name("photos").exists():
        generate(folder.with_name("photos"), 10, 10, workers=1)
    splits = dict(zip(("train", "val"), build_splits("image_folder", folder.with_name("photos"), 10), strict=False))
    if kind in ("original", "jpeg", "pixels"):
        return write_packed(folder, "image_folder", splits, kind, 64, 1)
    folder.mkdir()
    for split, images in splits.items():
        rows = [(str(path), images.classes[label]) for path, label in images.samples]
        if kind == "webdataset":
            write_webdataset(folder, images, split)
        elif kind == "jsonl":
            write(folder / f"{split}.jsonl", *(json.dumps({"path": path, "label": label}) for path, label in rows))
        else:
            comma = {"csv": ",", "tsv": "\t"}[kind]
            write(folder / f"{split}.{kind}", comma.join(("path", "label")), *map(comma.join, rows))


for kind in ("csv", "tsv", "jsonl", "webdataset", "original", "jpeg", "pixels"):
    name = "list" if kind in ("csv", "tsv", "jsonl") else kind if kind == "webdataset" else "image_folder"
    READERS[f"own data, {kind}"] = (
        functools.partial(make_container, kind),
        functools.partial(read_data_set, name),
        "*",
    )


# what programs have written

RUN = [
    "--model", "vit_demo_patch8", "--amp", "float32", "--device", "cpu", "--num_workers", "0", "--batch_size", "8",
]  # fmt: skip
MADE: dict[str, Path] = {}  # folders of finished runs, by program


def finished(program: str, folder: Path, *flags: str) -> None:
    """Copy what a program writes; it runs once."""
    if program not in MADE:
        data, MADE[program] = folder.with_name("data"), folder.with_name(f"made-{program}")
        weights = ["--finetune", str(ROOT / "demo" / "mae.safetensors")]
        argv = [*RUN, *weights, "--data_path", str(data), "--output_dir", str(MADE[program]), *flags]
        output = folder.with_name("output")
        assert finish(launch(program, argv, output)) == 0, output.read_text()
    shutil.copytree(MADE[program], folder)


TRAIN = ("--epochs", "1", "--warmup_epochs", "0")
BANK = (*TRAIN, "--cls_features", "cls", "abmilp", "--seeds", "0", "1", "--save_predictions")


def run(module: object, *argv: object) -> None:
    """A script of the project."""
    module.main(module.get_args_parser().parse_args(list(map(str, argv))))


def read_results(folder: Path) -> None:
    run(make_tables, "--runs", folder, "--output", folder.with_name("table.md"))
    run(make_report, folder, "--output", folder.with_name("report.html"))
    read_trained(folder, "cls", seed=0)


def read_arguments(folder: Path) -> None:
    run(make_report, folder, "--output", folder.with_name("report.html"))
    parse(main_linprobe.get_args_parser(), ["--args_from", str(folder / "args.json"), "--data_path", "x"])


def read_attention(folder: Path) -> None:
    run(make_report, folder, "--output", folder.with_name("report.html"))
    run(plot_attention, *sorted(folder.glob("*/attention.json")), "--output", folder.with_name("figure.png"))


def read_aggregation(folder: Path) -> None:
    run(make_report, folder, "--output", folder.with_name("report.html"))
    run(make_tables, "--rules", folder / "aggregation.json")


def read_log(folder: Path) -> None:
    run(make_report, folder, "--output", folder.with_name("report.html"))
    RunFolder(folder, track=[]).log_line({"epoch": 1})
    RunFolder(folder, track=[]).last_line()


def read_cache(folder: Path) -> None:
    shutil.rmtree(folder.with_name("cached-run"), ignore_errors=True)
    argv = [*RUN, "--finetune", str(ROOT / "demo" / "mae.safetensors"), "--data_path", str(folder.with_name("data"))]
    argv += [
        *TRAIN,
        "--output_dir",
        str(folder.with_name("cached-run")),
        "--cache_views",
        "1",
        "--cache_dir",
        str(folder),
    ]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))


def make_records(folder: Path) -> None:
    (folder / "imagenet1k").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "quickstart" / "MAE.results.json", folder)
    for head in ("cls", "abmilp"):
        (folder / "imagenet1k" / f"{head}.json").write_text(json.dumps(probing(head=head)))


def read_records(folder: Path) -> None:
    run(leaderboard, folder, "--output", folder.with_name("board.html"))
    run(
        make_tables,
        "--results",
        folder,
        "--dataset",
        "imagenet1k",
        "--table",
        "1",
        "--output",
        folder.with_name("t.md"),
    )


def make_recorded(folder: Path) -> None:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(probing()))


def read_recorded(folder: Path) -> None:
    run(record, folder, "--results", folder.with_name("new-records"), "--replace")


def make_weights(suffix: str, folder: Path) -> None:
    folder.mkdir()
    state = load_encoder(str(ROOT / "demo" / "mae.safetensors")).backbone.state_dict()
    small = {name: value for name, value in state.items() if not re.match(r"blocks\.[^0]", name)}
    if suffix == "pth":
        torch.save({"model": small, "args": {"epochs": 3}, "epoch": 2}, folder / "weights.pth")
    else:
        save_file(small, folder / "weights.safetensors", metadata={"format": "pt", "family": "mae"})
    if suffix == "ours":
        (folder / "weights.safetensors").unlink()
        save_encoder(folder / "weights.safetensors", small, {"family": "mae", "model": "vit_demo_patch8"})


def read_weights(folder: Path) -> None:
    (path,) = folder.iterdir()
    load_encoder(str(path))


def made(program: str, *flags: str) -> Callable[[Path], None]:
    return lambda folder: finished(program, folder, *flags)


def make_aggregation(folder: Path) -> None:
    """With a result that has probes and boxes, as tables of rules need them."""
    made("main_analyze_aggregation", "--loc_workers", "0")(folder)
    shutil.copy(ROOT / "results" / "aggregation" / "demo.aggregation.json", folder / "aggregation.json")


def make_export(folder: Path) -> None:
    finished("main_linprobe", folder.with_name("exported-run"), *BANK)
    export(read_trained(folder.with_name("exported-run"), "cls", seed=0), folder)


def make_benchmark(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(ROOT / "results" / "benchmark.csv", folder)


def read_benchmark(folder: Path) -> None:
    run(benchmark, "plot", "--output", folder / "benchmark.csv", "--figure", folder.with_name("figure.png"))


READERS |= {
    "weights of ours": (functools.partial(make_weights, "ours"), read_weights, "*"),
    "weights, safetensors": (functools.partial(make_weights, "safetensors"), read_weights, "*"),
    "weights, torch": (functools.partial(make_weights, "pth"), read_weights, "*"),
    "checkpoint alone": (made("main_linprobe", *BANK), lambda folder: load_checkpoint(folder / "checkpoint-0.pth"),
                         "*.pth"),
    "results": (made("main_linprobe", *BANK), read_results, "results.json"),
    "args.json": (made("main_linprobe", *BANK), read_arguments, "args.json"),
    "log": (made("main_linprobe", *BANK), read_log, "log.txt"),
    "predictions": (made("main_linprobe", *BANK), functools.partial(run, compare_probes),
                    "predictions.safetensors"),
    "exported probe": (make_export, read_exported, "*"),
    "attention": (made("main_analyze_attention"), read_attention, "attention.json"),
    "examples": (made("main_analyze_attention"), read_attention, "examples.safetensors"),
    "aggregation": (make_aggregation, read_aggregation, "aggregation.json"),
    "cached features": (read_cache, read_cache, "*"),
    "records": (make_records, read_records, "*"),
    "results to record": (make_recorded, read_recorded, "*"),
    "benchmark": (make_benchmark, read_benchmark, "*"),
}  # fmt: skip


def mutations_of(path: Path) -> dict[str, Mutation]:
    kinds = {".pth": WEIGHT_MUTATIONS, ".safetensors": TENSOR_MUTATIONS}
    return kinds.get(path.suffix, LIST_MUTATIONS)


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


def fuzz_reader(name: str, good: Path, index: int, draw: random.Random, work: Path) -> tuple[str, str]:
    """One damaged file of a folder: the kind of damage, and how it went. AssertionError where it went wrong."""
    folder, output = work / "list", work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    output.unlink(missing_ok=True)
    shutil.copytree(good, folder)
    _, read, pattern = READERS[name]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in PICTURES]
    victim = draw.choice([path for path in files if fnmatch.fnmatch(path.name, pattern)])
    kinds = mutations_of(victim)
    kind = list(kinds)[index % len(kinds)]
    victim.write_bytes(kinds[kind](victim.read_bytes(), draw, work / "marker"))
    before = fingerprint(folder)
    code = finish(read_in_child(read, folder, output))
    text = output.read_text(errors="replace")
    message = f"{victim.relative_to(work)}, {kind}, exit code {code}: {text[-2000:]}"
    if name not in ("log", "cached features", "own data, webdataset"):  # an index is made anew
        assert fingerprint(folder) == before, f"a file was changed: {message}"
    assert code in (0, 2), message
    assert code == 0 or str(folder) in text, f"the path is not named: {message}"
    assert not list(work.glob("marker*")), "code of the file was executed"
    return kind, "refused by name" if code else "read"


def read_in_child(read: Callable[[Path], object], folder: Path, output: Path) -> int:
    """Process id of a child that exits with 0, with 2 at a ValueError, and with 1 at anything else, saying why."""
    if child := os.fork():
        return child
    code = 1
    signal.alarm(300)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
    try:
        with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                read(folder)
                code = 0
            except (ValueError, FloatingPointError) as error:
                file.write(f"{error}\n")
                code = 2
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc(file=file)
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
    parser.add_argument("--checkpoints", type=int, default=300, help="given to main_linprobe")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--each", type=int, default=300, help="files for each of the readers")
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=READERS, metavar="READER")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures, counts = 0, Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate(work / "data", 16, 10, workers=1)
        arrays = {name: classes for name, (_, classes) in ARRAYS.items()}
        for name, classes in {**dict.fromkeys(MINIATURES, 2), **CLASSES, **arrays}.items():
            DATASETS[name] = DATASETS[name]._replace(classes=classes)  # the miniature's stand for the official ones

        def count(what: str, index: int, fuzz: Callable[[random.Random], tuple[str, str]]) -> None:
            nonlocal failures
            try:
                kind, result = fuzz(random.Random(f"{args.seed} {what} {index}"))
            except AssertionError as error:
                failures += 1
                kind, result = "", "WRONG"
                print(f"{what} {index}: {error}", flush=True)
            counts[what, kind, result] += 1

        if args.checkpoints or args.images:
            program, good = Program(work), work / "good"
            assert program(work / "data", good)[0] == 0
            whole, encoded = outcome(good), encodings()
            shutil.copytree(work / "data", work / "images")
        for index in range(args.checkpoints):
            kind = list(CHECKPOINTS)[index % len(CHECKPOINTS)]
            fuzz = functools.partial(fuzz_checkpoint, program, kind, good, whole, work=work)
            count("checkpoint", index, lambda draw, kind=kind, fuzz=fuzz: (kind, fuzz(draw)))
        for index in range(args.images):
            kind = list(IMAGES)[index % len(IMAGES)]
            fuzz = functools.partial(fuzz_image, program, kind, encoded, work=work)
            count("image", index, lambda draw, kind=kind, fuzz=fuzz: (kind, fuzz(draw)))
        for name in args.readers:
            good = work / name
            READERS[name][0](good)
            code = finish(read_in_child(READERS[name][1], good, work / "output"))
            assert code == 0, f"{name}: {(work / 'output').read_text()}"
            for index in range(args.each):
                count(name, index, functools.partial(fuzz_reader, name, good, index, work=work))
            print(name, sum(counts[key] for key in counts if key[0] == name), "files", flush=True)
    print(table(counts))
    print(f"{counts.total()} files, {failures} wrong")
    sys.exit(1 if failures else 0)


def table(counts: Counter) -> str:
    """A row for each kind of file, a column for each outcome."""
    outcomes = sorted({result for _, _, result in counts})
    lines = ["| file | kinds of damage | " + " | ".join(outcomes) + " |", "|---" * (2 + len(outcomes)) + "|"]
    for what in dict.fromkeys(what for what, _, _ in counts):
        kinds = {kind for name, kind, _ in counts if name == what}
        sums = [
            sum(n for (name, _, result), n in counts.items() if (name, result) == (what, column)) for column in outcomes
        ]
        lines.append("| " + " | ".join([what, str(len(kinds)), *map(str, sums)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
