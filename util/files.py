"""Files that are whole or absent: written beside the target, flushed to the disk, then renamed."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: renamed to it when the block ends well, removed when it does not."""
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
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(target: Path, data: bytes) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON in which NaN and infinities, which other readers of JSON do not accept, are null."""

    def finite(item: object) -> object:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(target: Path, value: object) -> None:
    write_atomically(target, (to_json(value, indent=2) + "\n").encode())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_table(page: Path, name: str, command: str, table: str, write: bool) -> None:
    """Write a generated table into a Markdown page, or (write=False) raise ValueError where the page has another.

    Its place is between the lines `<!-- name: command PAGE -->` and `<!-- end of name -->`.
    """
    begin, end = f"<!-- {name}: {command} {page.name} -->\n", f"<!-- end of {name} -->\n"
    text = page.read_text()
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{page} has no lines {begin.strip()} and {end.strip()}: put them where the table goes")
    new = before + begin + table + end + after
    if write:
        write_atomically(page, new.encode())
    elif new != text:
        raise ValueError(f"{page}: the table of {name} is out of date: {command} {page}")
