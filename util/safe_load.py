"""Reading strangers' torch files: tensors and plain data come out of them, and nothing in them is executed.

A pickle is a program. `torch.load(weights_only=True)` runs a harmless part of it and refuses files that use more, such
as those that carry their authors' configuration objects beside the weights. Those are read here: an interpreter of the
opcodes that can build containers, numbers, text and tensors. A class or function that a file names is a name to it;
it is not looked up, imported or called, and what was to be made with it becomes an inert `Foreign`.
"""

import argparse
import io
import pathlib
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from util.progress import log


def load_plain(path: Path) -> Any:
    """A torch file of tensors and plain containers; nothing else in it is executed. ValueError names the trouble.

    Objects of other classes (configurations, loggers, numpy scalars) come back as `Foreign`. A file that calls for the
    operating system or for code to run is refused.
    """
    sharded = path if (path / ".metadata").is_file() else path.parent if path.suffix == ".distcp" else None
    if sharded is not None:
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {sharded} weights.pth"
        raise ValueError(f"{path} is a distributed checkpoint: convert it with: {command}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name a file in it" if path.is_dir() else f"there is no file {path}")
    try:
        is_zip = _is_zip(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # more than tensors: read below
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        content, foreign = _read_zip(path) if is_zip else _read_legacy(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(content, Foreign):
        raise ValueError(f"{path} holds a whole object of {content.name}, not tensors by name: save its state_dict()")
    if foreign:
        log.info("%s: left as inert names, objects of %s", path, ", ".join(sorted(foreign)))
    return content


def _unreadable(path: Path, error: Exception) -> ValueError:
    is_read = isinstance(error, ValueError | RuntimeError | OSError)  # others tell of bytes that are no pickle
    reason = (
        (str(error) or type(error).__name__).splitlines()[0] if is_read else "it is no torch file, or a damaged one"
    )
    return ValueError(f"{path} cannot be read as a file of tensors: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# pickles as data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Global:
    """The name of a class or function, as a pickle mentions it."""

    name: str


@dataclass(eq=False)
class Foreign:
    """What a pickle would have made with a class or function of its authors: the recipe, never the object."""

    name: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name}>"


# A file that mentions these is an attack or as good as one. Being refused is a courtesy to the user, not what
# protects them: nothing named in a file is ever called.
REFUSED_MODULES = {"commands", "ctypes", "importlib", "nt", "os", "pickle", "posix", "pty", "runpy", "shutil", "socket",
                   "subprocess", "sys", "webbrowser"}  # fmt: skip
REFUSED_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "input", "open"}

STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # refuses what lies outside of the storage


def _tensor_v3(storage: Tensor, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, dtype: Any, *_: Any):
    known = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(known, torch.dtype):
        raise ValueError(f"a tensor of type {dtype}")
    return _tensor(storage.view(known), offset, size, stride)


def _bytes(text: str, *_: Any) -> bytes:
    return text.encode("latin1")  # how pickle writes bytes; a codec that the file names would be imported


# the only functions that reading a pickle calls: what they get is plain data, and so is what they return
PLAIN: dict[str, Callable] = {
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "collections.defaultdict": lambda factory=None, *pairs: dict(*pairs),
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": lambda text=b"", *_: bytearray(text if isinstance(text, bytes) else _bytes(text)),
    "builtins.complex": complex,
    "_codecs.encode": _bytes,
    "argparse.Namespace": lambda: argparse.Namespace(),
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib._local.PosixPath": pathlib.PurePosixPath,
    "pathlib.WindowsPath": pathlib.PureWindowsPath,
    "pathlib.PureWindowsPath": pathlib.PureWindowsPath,
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
MARK = Global("mark")  # compared by identity


class PickleReader:
    """Reads one pickle as data. persistent: the tensor behind a persistent id. `foreign`: the classes left out."""

    def __init__(self, persistent: Callable[[Any], Any]):
        self.persistent = persistent
        self.foreign: set[str] = set()
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def read(self, file: BinaryIO) -> Any:
        """The content of the pickle that starts here; the file is left just behind it."""
        self.stack, self.memo = [], {}
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case _ if opcode in LITERALS:
                stack.append(argument)
            case _ if opcode in CONSTANTS:
                stack.append(CONSTANTS[opcode])
            case _ if opcode in CONTAINERS:
                stack.append(CONTAINERS[opcode]())
            case "MARK":
                stack.append(MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(opcode[-1]))])))
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "LIST":
                stack.append(self.above_mark())
            case "FROZENSET":
                stack.append(frozenset(self.above_mark()))
            case "DICT":
                values = self.above_mark()
                stack.append(dict(zip(values[::2], values[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self.extend([stack.pop()] if opcode == "APPEND" else self.above_mark())
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(), stack.pop()][::-1] if opcode == "SETITEM" else self.above_mark()
                self.set_items(list(zip(values[::2], values[1::2], strict=True)))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.named(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = stack.pop(), stack.pop()
                stack.append(self.make(maker, arguments))
            case "NEWOBJ_EX":
                _, arguments, maker = stack.pop(), stack.pop(), stack.pop()
                stack.append(self.make(maker, arguments))
            case "OBJ":
                maker, *arguments = self.above_mark()
                stack.append(self.make(maker, tuple(arguments)))
            case "INST":
                stack.append(self.make(self.named(*argument.split(" ", 1)), tuple(self.above_mark())))
            case "BUILD":
                self.build(stack.pop())
            case "PERSID" | "BINPERSID":
                stack.append(self.persistent(argument if opcode == "PERSID" else stack.pop()))
            case _:
                raise ValueError(f"the pickle uses {opcode}")

    def above_mark(self) -> list:
        values = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def named(self, module: str, name: str) -> Global:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2
        builtin = module in ("builtins", "io", "_io")
        if module.split(".")[0] in REFUSED_MODULES or (builtin and name in REFUSED_BUILTINS):
            raise ValueError(f"it wants {module}.{name} to be called, which was not done")
        return Global(f"{module}.{name}")

    def make(self, maker: Any, arguments: tuple) -> Any:
        name = maker.name if isinstance(maker, Global | Foreign) else type(maker).__name__
        if isinstance(maker, Global) and name in PLAIN:
            return PLAIN[name](*arguments)
        if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes: how to make it, of which class
            return self.make(arguments[0], arguments[2])
        if name == "copyreg._reconstructor" and isinstance(arguments[0], Global):
            name = arguments[0].name
        self.foreign.add(name)
        return Foreign(name, arguments)

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            vars(target).update(state)
        elif not isinstance(target, dict):  # an OrderedDict's attributes: a state dict's versions
            raise ValueError(f"the pickle sets the state of {type(target).__name__}")

    def extend(self, values: list) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(values)
        elif isinstance(target, Foreign):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise ValueError(f"the pickle appends to {type(target).__name__}")

    def set_items(self, pairs: list[tuple]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Foreign):
            target.items.extend(pairs)
        else:
            raise ValueError(f"the pickle sets items of {type(target).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# torch's two file formats
# ---------------------------------------------------------------------------------------------------------------------


NUMPY = (
    "it is NumPy's: convert it to a state dict of PyTorch; for JAX's ViTs, timm does: "
    "torch.save(timm.create_model(NAME, checkpoint_path=FILE).state_dict(), 'weights.pth')"
)


def _is_zip(path: Path) -> bool:
    """Whether it is a zip file. ValueError for an empty file, NumPy's, or a zip larger unpacked than packed."""
    size = path.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise ValueError(NUMPY)
    if not magic.startswith(b"PK\x03\x04"):
        return False
    with zipfile.ZipFile(path) as archive:  # torch stores its records as they are: whatever expands is no torch file
        if any(name.endswith(".npy") for name in archive.namelist()):
            raise ValueError(NUMPY)
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

        reader = PickleReader(storage)
        return reader.read(io.BytesIO(archive.read(pickles[0]))), reader.foreign


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

    reader = PickleReader(storage)
    with open(path, "rb") as file:
        magic, version, _ = (reader.read(file) for _ in range(3))
        if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
            raise ValueError("not a torch file")
        content = reader.read(file)
        for key in reader.read(file):
            (numel,) = struct.unpack("<q", file.read(8))
            memory = memoryview(storages[key].view(torch.uint8).numpy())
            if numel != storages[key].numel() or file.readinto(memory) != len(memory):
                raise ValueError(f"storage {key} is cut short")
    return content, reader.foreign
