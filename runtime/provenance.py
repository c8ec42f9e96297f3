"""Where a number comes from: the code that runs, versions of libraries, hardware, command; and copies of the code."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from util import distributed
from util.files import digest, to_json
from util.lazy import lazy

torch = lazy("torch")

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT_RECORD = "snapshot.json"  # code_version() of a copy of the code that take_snapshot made
LIBRARIES = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "numpy": "numpy", "pillow": "PIL"}


def git(*command: str) -> str | None:
    """Output of git in the folder of the code; None without git, or outside of a checkout."""
    try:
        result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def code_version() -> dict[str, Any]:
    """Commit of the code that runs, and whether programs differ from it; for a job's snapshot, when it was taken."""
    if (ROOT / SNAPSHOT_RECORD).exists():
        return json.loads((ROOT / SNAPSHOT_RECORD).read_text())
    status = git("status", "--porcelain", "--untracked-files=all", "--", "*.py", "*.sh", "*.toml")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def code_files() -> list[Path]:
    """The modules of the programs, relative to ROOT: those that git knows, and new ones beside them."""
    # not every file that git ignores: run folders, which hold older copies, may be here too
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    patterns = ["*.py", *(f"{package}/*.{kind}" for package in packages for kind in ("py", "toml"))]
    new = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    known = git("ls-files", "-z", "*.py", "*/*.toml", ":!tests") or ""
    return sorted(new | {Path(name) for name in known.split("\0") if name and (ROOT / name).is_file()})


def code_digest() -> str:
    """sha256 of the modules as they are now."""
    return digest([(str(path), hashlib.sha256((ROOT / path).read_bytes()).hexdigest()) for path in code_files()])


def take_snapshot(folder: Path, write: bool = True) -> Path:
    """Copy the modules as they are now into folder/<digest of their content>, unless it is there; that path.

    A job runs the copy, so that editing the checkout does not change what waits in the queue.
    """
    contents = {str(path): (ROOT / path).read_bytes() for path in code_files()}
    contents[SNAPSHOT_RECORD] = to_json(code_version()).encode()
    name = digest([(name, hashlib.sha256(content).hexdigest()) for name, content in contents.items()])[:12]
    target = folder / name
    if write and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for name, content in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:  # another submission was faster
            shutil.rmtree(temporary)
    return target


def utc_now() -> str:
    """2025-01-31T12:00:00+00:00"""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    known = {name: str(importlib.import_module(module).__version__) for name, module in LIBRARIES.items()}
    return {"python": platform.python_version(), **known}


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads()}


def provenance(device: torch.device) -> dict[str, Any]:
    """What a record of results says about its origin."""
    machine = hardware(device)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **code_version(),
        "versions": versions(),
        "device": machine["device"],
        "processes": distributed.world_size(),
        "threads": machine["threads"],
    }
