"""Load untrusted torch files without executing them.

A pickle is a program. `torch.load(weights_only=True)` runs a harmless part of it and refuses files that use more, such
as those with their authors' configuration objects beside the weights. For those, this module has Python's own
unpickler with every opcode replaced that calls or changes what a file names: a class or function stays a name, is not
imported or called, and its result becomes an inert `Foreign`.

An `Unpickler` given to torch.load would not do: torch.load hands TorchScript archives to torch.jit, unpacks old tar
files on the disk, writes patch files of classes whose source changed, and lets a pickle set attributes of classes.
"""

import argparse
import io
import pathlib
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from util.progress import log


def load_plain(path: Path) -> Any:
    """The content of a torch file: tensors and plain containers. Nothing in it is executed.

    Objects of other classes (configurations, loggers, NumPy scalars) become `Foreign`. ValueError for a file that is
    damaged, of another kind, or references the operating system or the execution of code.
    """
    sharded = path if (path / ".metadata").is_file() else path.parent if path.suffix == ".distcp" else None
    if sharded is not None:
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {sharded} weights.pth"
        raise ValueError(f"{path} is a distributed checkpoint: convert it with: {command}")
    if (path / "zero_to_fp32.py").is_file():
        command = f"python {path}/zero_to_fp32.py {path} OUT"
        raise ValueError(f"{path} is a checkpoint of DeepSpeed: convert it with: {command} (and name the file in OUT)")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name a file in it" if path.is_dir() else f"there is no file {path}")
    try:
        read = _read_zip if _is_zip(path) else _read_legacy
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # more than tensors
                content, foreign = read(path)
    except Exception as error:
        is_read = isinstance(error, ValueError | RuntimeError | OSError)  # others are of bytes that are no pickle
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = reason if is_read else "it is not a torch file, or damaged"
        raise ValueError(f"{path} cannot be read as a file of tensors: {reason}") from error
    if isinstance(content, Foreign):
        raise ValueError(f"{path} holds a whole object of {content.name}, not tensors by name: save its state_dict()")
    if foreign:
        log.info("%s: objects of %s are left as inert names", path, ", ".join(sorted(foreign)))
    return content


# ---- pickles as data


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle."""

    name: str


@dataclass(eq=False)
class Foreign:
    """Stands for an object that a pickle would make by calling a class or function: the name and the arguments."""

    name: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name}>"


# A file that names these is probably an attack. The refusal tells the user; the protection is that nothing named in a
# file is ever called.
REFUSED = re.compile(
    r"(commands|ctypes|importlib|nt|os|pickle|posix|pty|runpy|shutil|socket|subprocess|sys|webbrowser)\..*"
    r"|(builtins|io|_io)\.(__import__|breakpoint|compile|eval|exec|execfile|input|open)",
    re.DOTALL,
)
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # refuses what lies outside of the storage


def _tensor_v3(storage: Tensor, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, dtype: Any, *_: Any):
    known = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(known, torch.dtype):
        raise ValueError(f"a tensor of type {dtype}")
    return _tensor(storage.view(known), offset, size, stride)


def _bytes(text: str, *_: Any) -> bytes:
    return text.encode("latin1")  # how pickle writes bytes; a codec that the file names would be imported


# the only functions that a pickle can call; they take and return plain data
PLAIN: dict[str, Callable] = {
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "collections.defaultdict": lambda factory=None, *pairs: dict(*pairs),
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, set, frozenset, complex)},
    "builtins.bytearray": lambda text=b"", *_: bytearray(text if isinstance(text, bytes) else _bytes(text)),
    "_codecs.encode": _bytes,
    "argparse.Namespace": lambda: argparse.Namespace(),
    **dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.PurePosixPath"), pathlib.PurePosixPath),
    **dict.fromkeys(("pathlib.WindowsPath", "pathlib.PureWindowsPath"), pathlib.PureWindowsPath),
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _tensor),
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}


class PlainUnpickler(pickle._Unpickler):
    """Reads one pickle as data. persistent: persistent id -> tensor. foreign: receives the names of other classes.

    The unpickler in Python, because its opcodes can be replaced and its memo is a dictionary: a few bytes make the one
    in C allocate gigabytes.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)
    for opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[opcode[0]]

    def __init__(self, file: BinaryIO, persistent: Callable[[Any], Any], foreign: set[str]):
        super().__init__(file, encoding="latin1")
        self.persistent_load, self.foreign = persistent, foreign

    def find_class(self, module: str, name: str) -> Global:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2
        if REFUSED.fullmatch(f"{module}.{name}"):
            raise ValueError(f"refused: it references {module}.{name}")
        return Global(f"{module}.{name}")

    def make(self, maker: Any, arguments: tuple) -> Any:
        """The plain object, tensor or Foreign that a call of `maker` stands for."""
        name = maker.name if isinstance(maker, Global | Foreign) else type(maker).__name__
        if isinstance(maker, Global) and name in PLAIN:
            return PLAIN[name](*arguments)
        if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes: function, class, arguments
            return self.make(arguments[0], arguments[2])
        if name == "copyreg._reconstructor" and isinstance(arguments[0], Global):
            name = arguments[0].name
        self.foreign.add(name)
        return Foreign(name, arguments)

    def call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], arguments)

    def call_with_keywords(self) -> None:
        self.stack.pop()
        self.call()

    def _instantiate(self, maker: Any, arguments: list) -> None:  # of the opcodes INST and OBJ
        self.append(self.make(maker, tuple(arguments)))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            vars(target).update(state)
        elif not isinstance(target, dict):  # an OrderedDict's attributes: a state dict's versions
            raise ValueError(f"the pickle sets the state of {type(target).__name__}")

    def add(self, values: list, allowed: type | UnionType) -> None:
        """Add values, or pairs of key and value, to the container on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, allowed | Foreign):
            raise ValueError(f"the pickle adds items to {type(target).__name__}")
        target = target.items if isinstance(target, Foreign) else target
        (target.extend if isinstance(target, list) else target.update)(values)

    def extend(self, values: list) -> None:
        self.add(values, list | set)

    def set_items(self, values: list) -> None:
        self.add(list(zip(values[::2], values[1::2], strict=True)), dict)

    def byte_array(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # no more than the file has

    dispatch |= {
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.NEWOBJ_EX[0]: call_with_keywords,
        pickle.BUILD[0]: build,
        pickle.APPEND[0]: lambda self: self.extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.extend(self.pop_mark()),
        pickle.ADDITEMS[0]: lambda self: self.extend(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.BYTEARRAY8[0]: byte_array,
    }


# ---- torch's two file formats


NUMPY = (
    "it is NumPy's: convert it to a state dict of PyTorch; for JAX's ViTs, timm does: "
    "torch.save(timm.create_model(NAME, checkpoint_path=FILE).state_dict(), 'weights.pth')"
)


def _is_zip(path: Path) -> bool:
    """Whether it is a zip file. ValueError for an empty file, tar, NumPy, TorchScript, and zips that unpack to more."""
    size = path.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise ValueError(NUMPY)
    if not magic.startswith(b"PK\x03\x04"):
        if tarfile.is_tarfile(path):
            raise ValueError("it is a tar archive: unpack it and name a file in it")
        return False
    with zipfile.ZipFile(path) as archive:  # torch stores its records as they are: whatever expands is no torch file
        if any(name.endswith(".npy") for name in archive.namelist()):
            raise ValueError(NUMPY)
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError(
                "it is a TorchScript archive: if you trust it, save its tensors: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
        if sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError("its records are larger than the file")
    return True


def _storage_type(kind: Any) -> torch.dtype:
    name = kind.name.split(".")[-1] if isinstance(kind, Global) else ""
    if name not in STORAGES:
        raise ValueError(f"a storage of type {name or kind}")
    return STORAGES[name]


def _read_zip(path: Path) -> tuple[Any, set[str]]:
    """The content of torch >= 1.6's format: data.pkl, and a record per storage."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file, but not torch's")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, Tensor] = {}

        def storage(identifier: Any) -> Tensor:
            _, kind, key, _, numel = identifier
            if key not in storages:
                dtype, data = _storage_type(kind), bytearray(archive.read(f"{folder}data/{key}"))
                if len(data) != numel * dtype.itemsize:
                    raise ValueError(f"record {key} has {len(data)} bytes, wanted {numel * dtype.itemsize}")
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return storages[key]

        foreign: set[str] = set()
        return PlainUnpickler(io.BytesIO(archive.read(pickles[0])), storage, foreign).load(), foreign


def _read_legacy(path: Path) -> tuple[Any, set[str]]:
    """The content of the format before torch 1.6: five pickles, then the storages one after the other."""
    storages: dict[str, Tensor] = {}
    size = left = path.stat().st_size

    def storage(identifier: Any) -> Any:
        nonlocal left
        if identifier[0] == "module":  # a class with its source code
            return identifier[1]
        _, kind, key, _, numel, view = identifier
        if view is not None:
            raise ValueError("its storages are parts of others, as before torch 0.4")
        if key not in storages:
            dtype = _storage_type(kind)
            left -= numel * dtype.itemsize
            if numel < 0 or left < 0:
                raise ValueError(f"its storages are larger than its {size} bytes")
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    foreign: set[str] = set()
    with open(path, "rb") as file:

        def read() -> Any:
            return PlainUnpickler(file, storage, foreign).load()

        magic, version, _ = (read() for _ in range(3))
        if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
            raise ValueError("not a torch file")
        content = read()
        for key in read():
            (numel,) = struct.unpack("<q", file.read(8))
            memory = memoryview(storages[key].view(torch.uint8).numpy())
            if numel != storages[key].numel() or file.readinto(memory) != len(memory):
                raise ValueError(f"storage {key} is cut short")
    return content, foreign
