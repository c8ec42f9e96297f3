import argparse
import collections
import functools
import io
import logging
import os
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from util import safe_load
from util.safe_load import Foreign, load_plain

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and left[key].equal(right[key]) for key in right
    )


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.fixture
def authors(monkeypatch):
    """A module of the file's authors, present when the file is written and gone when it is read."""
    module = types.ModuleType("authors_code")
    source = """
class Config(dict):  # yacs' CfgNode and many like it
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        self.__dict__["frozen"] = True
class DictConfig:  # omegaconf's
    def __init__(self): self.content = {"lr": 0.1}
    def __getstate__(self): return {"_content": self.content, "flags": {"readonly": True}}
    def __setstate__(self, state): raise AssertionError("run")
class Meter(list):
    pass
class Slots:
    __slots__ = ("x",)
class Arguments(tuple):
    def __getnewargs_ex__(self): return ((1, 2),), {"key": 3}
    def __new__(cls, *a, **k): return tuple.__new__(cls, *a)
def helper(): raise AssertionError("run")
"""
    exec(source, module.__dict__)
    for thing in vars(module).values():
        if hasattr(thing, "__module__"):
            thing.__module__ = "authors_code"
    monkeypatch.setitem(sys.modules, "authors_code", module)
    return module


PLAIN_EXTRAS = {
    "namespace": lambda: argparse.Namespace(lr=0.1, device=torch.device("cpu"), path=pathlib.Path("x/y")),
    "numpy scalar": lambda: np.float64(81.5),
    "numpy array": lambda: np.arange(3),
    "numpy dtype": lambda: np.dtype("float32"),
    "ordered dict": lambda: collections.OrderedDict(a=1),
    "default dict": lambda: collections.defaultdict(list, a=[1]),
    "counter": lambda: collections.Counter("aab"),
    "optimizer": lambda: {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "random states": lambda: {
        "torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(),
        "generator": np.random.default_rng(0),
    },
    "path": lambda: pathlib.Path("a/b"),
    "logger": lambda: logging.getLogger("authors"),
    "partial": lambda: functools.partial(nn.LayerNorm, eps=1e-6),
    "class": lambda: nn.GELU,
    "containers": lambda: [{1}, frozenset({2}), (3,), b"bytes", bytearray(b"more"), 1 + 2j, 10**30, -1.5, None, True],
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("extra", PLAIN_EXTRAS)
def test_the_weights_load_whatever_is_beside_them(extra, protocol, tmp_path):
    path = saved(tmp_path / "f.pth", {"model": WEIGHTS, "extra": PLAIN_EXTRAS[extra]()}, pickle_protocol=protocol)
    assert same(load_plain(path)["model"], WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_things_keep_their_values_beside_foreign_ones(authors, protocol, tmp_path):
    path = pathlib.Path("a/b")
    things = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=1)), "path": path, "set": {1, 2}, "long": 10**30,
        "frozen": frozenset({1}), "bytes": b"\x00\xff", "more": bytearray(b"ab"), "complex": 1 + 2j, "default":
        collections.defaultdict(list, a=[1]), "ordered": collections.OrderedDict(b=1, a=2), "text": "é", "size":
        torch.Size([2, 3]), "five": (1, 2, 3, 4, 5), "count": collections.Counter("aab"), "none": None, "f": -0.5,
    }  # fmt: skip
    file = saved(tmp_path / "f.pth", {**things, "foreign": authors.Meter([1])}, pickle_protocol=protocol)
    content = load_plain(file)
    foreign = content.pop("foreign")
    assert content == {**things, "path": pathlib.PurePosixPath(path)}
    assert isinstance(foreign, Foreign) and foreign.items == [1] and repr(foreign) == "<authors_code.Meter>"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["Config", "DictConfig", "Meter", "Slots", "Arguments", "helper"])
def test_objects_of_unknown_classes_become_inert_names(authors, kind, legacy, tmp_path, monkeypatch, caplog):
    made = getattr(authors, kind)
    thing = made if kind == "helper" else made()
    if kind == "Config":
        thing["lr"] = 0.1
    if kind == "Slots":
        thing.x = 1
    content = {"cfg": thing, "again": thing, "model": WEIGHTS}
    options = {"_use_new_zipfile_serialization": not legacy}
    path = saved(tmp_path / "f.pth", content, pickle_protocol=4 if kind == "Arguments" else 2, **options)
    monkeypatch.delitem(sys.modules, "authors_code")
    with caplog.at_level(logging.INFO, "beyond_cls"):
        content = load_plain(path)
    assert same(content["model"], WEIGHTS)
    assert content["cfg"] is content["again"]
    assert content["cfg"].name == f"authors_code.{kind}"
    assert "authors_code" not in sys.modules
    if kind == "Config":
        assert content["cfg"].items == [("lr", 0.1)] and content["cfg"].state == {"frozen": True}
        assert "objects of authors_code.Config are left as inert names" in caplog.text
    if kind == "DictConfig":
        assert content["cfg"].state["_content"] == {"lr": 0.1}


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind_are_read_as_torch_reads_them(authors, legacy, tmp_path):
    base = torch.arange(24.0)
    tensors = {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in set(safe_load.STORAGES.values())}
    tensors |= {
        "shared": base[4:10].view(2, 3), "strided": base.view(4, 6).t(), "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3), "parameter": nn.Parameter(torch.ones(2)), "base": base,
    }  # fmt: skip
    if not legacy:
        tensors["uint16"] = torch.tensor([1, 2], dtype=torch.uint16)
    options = {"_use_new_zipfile_serialization": not legacy}
    plain = saved(tmp_path / "plain.pth", tensors, **options)
    foreign = load_plain(saved(tmp_path / "f.pth", {"m": tensors, "x": authors.Meter()}, **options))["m"]
    assert same(foreign, torch.load(plain, weights_only=True))
    assert foreign["shared"].data_ptr() == foreign["base"].data_ptr() + 16


def test_files_of_older_and_newer_numpy_load(tmp_path):
    """A scalar's pickle names numpy.core.multiarray, or numpy._core.multiarray since numpy 2."""
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        content = {"acc": np.float64(81.5), "model": WEIGHTS}
        rewrite(saved(tmp_path / "f.pth", content), b"numpy._core.multiarray", module.encode())
        assert same(load_plain(tmp_path / "f.pth")["model"], WEIGHTS)


def rewrite(path, old: bytes, new: bytes, record: str = "data.pkl") -> None:
    """Replace bytes in one record of a torch file."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(old, new) if name.endswith(record) else data)


# ---- attacks


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.recipe = function, arguments

    def __reduce__(self):
        return self.recipe


class WithState:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return (argparse.Namespace, (), self.state)


def attacks(marker):
    """Every way to make a marker file while a pickle is read."""
    write = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, str(marker), "w"),
        "nested": {"deep": [({"x": Call(os.system, f"touch {marker}")},)]},
        "partial": Call(functools.partial(os.mkdir, str(marker))),
        "defaultdict": collections.defaultdict(functools.partial(os.mkdir, str(marker))),
        "path": Call(pathlib.Path.touch, pathlib.Path(marker)),
        "state": WithState({"a": Call(os.mkdir, str(marker))}),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
        "import": Call(__import__, "os"),
        "codec": Call(pathlib.Path.write_text, pathlib.Path(marker), "x"),
        "hook": Call(torch._utils._rebuild_tensor_v2, Call(os.mkdir, str(marker)), 0, (1,), (1,), False, {}),
        "torch": Call(torch.load, str(marker)),
        "hub": Call(torch.hub.download_url_to_file, pathlib.Path(__file__).as_uri(), str(marker)),
        "numpy": Call(np.save, str(marker), 1),
        "logging": Call(logging.FileHandler, str(marker)),
        "map": Call(list, Call(map, os.mkdir, [str(marker)])),
    }


INERT = ("path", "codec", "torch", "hub", "numpy", "logging")  # of names that honest files may hold: read, never called


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", attacks("x"))
def test_an_attack_is_never_executed(name, protocol, legacy, tmp_path, authors):
    marker = tmp_path / "harm"
    content = {"model": WEIGHTS, "foreign": authors.Meter(), "evil": attacks(marker)[name]}
    options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    path = saved(tmp_path / "evil.pth", content, **options)
    modules = set(sys.modules)
    if name in INERT:
        content = load_plain(path)
        assert same(content["model"], WEIGHTS) and isinstance(content["evil"], Foreign)
    else:
        with pytest.raises(ValueError, match=r"evil.pth cannot .*: refused: it references .*"):
            load_plain(path)
    assert not list(tmp_path.glob("harm*"))
    assert set(sys.modules) == modules


def test_the_attacks_would_work_without_the_defence(tmp_path):
    worked = []
    for name in ("os.system", "os.mkdir", "eval", "exec", "open", "path", "codec", "hub", "numpy", "logging"):
        marker = tmp_path / name
        pickle.loads(pickle.dumps(attacks(marker)[name]))
        worked += [name] * bool(list(tmp_path.glob(f"{name}*")))
    assert len(worked) == 10


RAW = {
    "an instruction of old Python": b"(S'touch %s'\nios\nsystem\n.",
    "a call of an object made before": b"cauthors\nX\n)R(S'touch %s'\ntR.",
    "an extension code": b"\x82\x01.",
    "a buffer out of band": b"\x80\x05\x97.",
    "state of a class": b"cauthors\nX\n}S'__setstate__'\ncos\nsystem\nsb.",
    "state of a tensor": b"ctorch\nTensor\n)\x81(S'touch %s'\ntb.",
    "an unknown opcode": b"\xff.",
    "an end too early": b"(]",
    "nothing on the stack": b".",
    "another memo": b"h\x07.",
    "a memo of gigabytes": b"Nr\xff\xff\xff\x7f\xff.",
    "a byte array of terabytes": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a frame of exabytes": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x10.",
    "attributes of a class": b"cauthors\nX\n(NN}S'dump_patches'\nI1\nstb.",
    "attributes of a plain class": b"cargparse\nNamespace\n(N}S'__eq__'\nI1\nstb.",
    "items of a function": b"cargparse\nNamespace\nI1\nI2\ns.",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_opcodes_cannot_do_more(name, tmp_path):
    marker = tmp_path / "harm"
    code = RAW[name].replace(b"%s", str(marker).encode())
    path = tmp_path / "f.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", code)
        archive.writestr("f/version", "3\n")
    with pytest.raises(ValueError) as error:
        load_plain(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_torchscript_and_tar_archives_are_refused_with_what_to_do(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"a TorchScript archive: .*torch\.jit\.load\(FILE\)\.state_dict"):
        load_plain(tmp_path / "f.pt")
    with tarfile.open(tmp_path / "f.tar", "w") as archive:
        archive.add(tmp_path / "f.pt")
    with pytest.raises(ValueError, match="a tar archive: unpack it"):
        load_plain(tmp_path / "f.tar")


def test_a_module_saved_whole_is_refused_with_what_to_do(authors, tmp_path):
    path = saved(tmp_path / "f.pth", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a whole object of torch.nn.modules.linear.Linear, not tensors by name"):
        load_plain(path)


# ---- damage


def whole(path, foreign=True, legacy=False) -> bytes:
    content = {"model": {"a": torch.randn(64, 64)}, "x": np.float64(1) if foreign else 1}
    return saved(path, content, _use_new_zipfile_serialization=not legacy).read_bytes()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_file_cut_short_is_one_line_wherever_it_ends(foreign, legacy, tmp_path):
    data = whole(tmp_path / "f.pth", foreign, legacy)
    for length in [0, 1, 4, 100, *range(500, len(data), 997), len(data) - 1]:
        (tmp_path / "f.pth").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"f.pth cannot be read as a file of tensors: .") as error:
            load_plain(tmp_path / "f.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_changed_bytes_raise_nothing_but_one_line(legacy, tmp_path):
    data = whole(tmp_path / "f.pth", legacy=legacy)
    generator = random.Random(0)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(3):
            changed[generator.randrange(min(len(data), 1500))] = generator.randrange(256)
        (tmp_path / "f.pth").write_bytes(changed)
        try:
            load_plain(tmp_path / "f.pth")
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"<html><body>Not found</body></html>", b"\x80\x02."])
def test_what_is_no_torch_file_is_one_line(content, tmp_path):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        load_plain(tmp_path / "f.pth")


def test_a_zip_that_unpacks_to_more_than_itself_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
        archive.writestr("bomb/data/0", bytes(10**7))
    with pytest.raises(ValueError, match="its records are larger than the file"):
        load_plain(path)


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path, authors):
    """Else a few bytes would make torch allocate terabytes."""
    path = saved(tmp_path / "f.pth", {"x": authors.Meter(), "a": torch.zeros(7, 5)})
    rewrite(path, b"K\x07K\x05\x86", b"K\x07\x8a\x06\x00\x00\x00\x00\x00\x01\x86")
    with pytest.raises(ValueError, match="out of bounds for storage"):
        load_plain(path)


def test_legacy_storages_cannot_be_larger_than_the_file(tmp_path):
    numel = struct.pack("<I", 10**9)
    pickled = (
        b"\x80\x02}(U\x01xcauthors\nX\n)RU\x01ac\ntorch._utils\n_rebuild_tensor_v2\n"  # never reached
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ" + numel + b"NtQ0u."
    )
    pickled = pickled.replace(b"c\ntorch._utils\n_rebuild_tensor_v2\n", b"")
    file = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, file, protocol=2)
    (tmp_path / "f.pth").write_bytes(file.getvalue() + pickled)
    with pytest.raises(ValueError, match="its storages are larger than its"):
        load_plain(tmp_path / "f.pth")


def test_numpys_files_are_called_so(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    np.savez_compressed(tmp_path / "small.npz", a=np.ones(3000))
    np.save(tmp_path / "w.npy", np.ones(3))
    for name in ("w.npz", "small.npz", "w.npy"):
        with pytest.raises(ValueError, match="it is NumPy's: convert it to a state dict of PyTorch"):
            load_plain(tmp_path / name)
