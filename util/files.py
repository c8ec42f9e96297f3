"""Files that are whole or absent: written beside the target, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from util.lazy import lazy

torch = lazy("torch")


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: renamed to it when the block ends well, removed when it does not.

    An OSError that names no file, as of a full disk, names the target."""
    target = Path(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are for the group
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # a renamed file survives a power cut only when its name does
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that flush no folders
                raise
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno and error.filename in (None, name):
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(error: BaseException) -> OSError | None:
    """The trouble with a file behind an error: torch's writer reports a full disk as a position that it expected."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def no_link(path: str, flags: int) -> int:
    """An opener for files that are written in place: OSError for a link, which would write to another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(target: Path, data: bytes) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def without_credentials(text: str) -> str:
    """The text with http(s) URLs cut to host and path: users, passwords and query strings may be secret."""
    return re.sub(r"(https?://)(?:[^/\s@?#'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON in which NaN and infinities, which other readers of JSON do not accept, are null, without credentials."""

    def plain(item: object) -> object:
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        if isinstance(item, str):
            return without_credentials(item)
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(target: Path, value: object) -> None:
    write_atomically(target, (to_json(value, indent=2) + "\n").encode())


def save(path: Path, content: str) -> None:
    """Write a text and the folders above it. ValueError for a disk error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """ValueError with the path if the block cannot read the file, or finds in it other content than `what`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
        reason = error if type(error) is ValueError else repr(error)[:200]
        raise ValueError(f"{path} is not {what}: {reason}") from error


def require(content: object, shape: object, place: str = "its content") -> None:
    """ValueError where plain data have not this shape: types; a range or set of values; [shape of each item]; or
    {key: shape}, where str stands for any key, and "key?" may be missing or null. Integers have at most 64 bits."""
    kind = {range: int, set: str}.get(type(shape)) or (shape if isinstance(shape, type | tuple) else type(shape))
    fits = isinstance(content, kind) and (type(content) is not bool or kind is bool)
    if isinstance(content, int) or isinstance(shape, set):
        fits = fits and (content in shape if isinstance(shape, range | set) else abs(content) < 2**63)
    if not fits:
        raise ValueError(f"{place} is {repr(content)[:40]}")
    if isinstance(shape, list):
        for index, item in enumerate(content):
            require(item, *shape, f"{place}/{index}")
    for name, inner in shape.items() if isinstance(shape, dict) else ():
        key = name if name is str else name.removesuffix("?")
        if key == name and name is not str and key not in content:
            raise ValueError(f"{place} has no {key}")
        for item in content if key is str else content.keys() & {key}:
            if key == name or content[item] is not None:
                require(content[item], inner, f"{place}/{item}")


def digest(value: object) -> str:
    """sha256 of nested dicts, lists, tuples, numbers, strings and tensors: of their content, wherever it lies.

    Lists and tuples are alike, and so are the kinds of dict. TypeError for anything else, and for what is larger than
    the file that it may come from: tensors without storage of their size, and containers that are within themselves,
    shared without end or 100 deep.
    """
    total, visits = hashlib.sha256(), Counter()

    def feed(item: object, depth: int) -> None:
        if isinstance(item, torch.Tensor):
            size = item.numel() * item.element_size()
            if item.layout != torch.strided or item.is_meta or item.untyped_storage().nbytes() < size:
                raise TypeError("no digest of a tensor without storage of its size")
            data = item.detach().cpu().contiguous().reshape(-1)
            total.update(f"tensor {item.dtype} {tuple(item.shape)};".encode())
            total.update(data.view(torch.uint8).numpy().data)
        elif isinstance(item, dict | list | tuple):
            visits[id(item)] += bool(item)  # empty tuples are all one object
            if visits[id(item)] > 100_000 or depth > 100:
                raise TypeError("no digest of containers that hold or share themselves")
            total.update(f"{'dict' if isinstance(item, dict) else 'list'} {len(item)};".encode())
            for inner in itertools.chain.from_iterable(item.items()) if isinstance(item, dict) else item:
                feed(inner, depth + 1)
        elif item is None or type(item) in (bool, int, float, str):
            # names of files may be no text, and are the same bytes in any locale
            if type(item) is str:
                item = item.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
            total.update(f"{type(item).__name__} {item!r};".encode())
        else:
            raise TypeError(f"no digest of a {type(item).__name__}")

    feed(value, 0)
    return total.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CONTENT = "content"  # of our safetensors' metadata: a digest of everything else in the file


def content_digest(header: dict, data: IO[bytes]) -> str:
    """sha256 of a safetensors file: its header, but for this digest, and the rest of the open file."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != CONTENT}
    total = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    while chunk := data.read(1 << 24):
        total.update(chunk)
    return total.hexdigest()


def require_content(path: Path) -> None:
    """ValueError where a safetensors file of ours, which safetensors can read, has changed since it was written."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        stated = header.get("__metadata__", {}).get(CONTENT)
        if stated is not None and stated != content_digest(header, file):
            raise ValueError(f"{path} is damaged: its content is not what was saved")


def keep_table(page: Path, name: str, command: str, table: str, write: bool) -> None:
    """Write a generated table into a Markdown page, or (write=False) raise ValueError where the page has another.

    Its place is between the lines `<!-- name: command PAGE -->` and `<!-- end of name -->`.
    """
    begin, end = f"<!-- {name}: {command} {page.name} -->\n", f"<!-- end of {name} -->\n"
    text = page.read_text("utf-8")
    before, _, rest = text.partition(begin)
    if end not in rest:
        raise ValueError(f"{page} has no lines {begin.strip()} and {end.strip()}: put them where the table goes")
    new = before + begin + table + rest[rest.index(end) :]
    if write:
        write_atomically(page, new.encode())
    elif new != text:
        raise ValueError(f"{page}: the table of {name} is out of date: {command} {page}")
