"""Where a number comes from: the code that runs, versions of libraries, hardware, command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from util import distributed
from util.files import digest
from util.lazy import lazy

torch = lazy("torch")

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT_RECORD = "snapshot.json"  # code_version() of a copy of the code that runtime.snapshot made


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
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    patterns = [
        "*.py",
        *(f"{package}/*.{kind}" for package in packages if package != "tests" for kind in ("py", "toml")),
    ]
    new = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    known = git("ls-files", "-z", "*.py", "*/*.toml", ":!tests") or ""
    return sorted(new | {Path(name) for name in known.split("\0") if name and (ROOT / name).is_file()})


def code_digest() -> str:
    """sha256 of the modules as they are now."""
    return digest([(str(path), hashlib.sha256((ROOT / path).read_bytes()).hexdigest()) for path in code_files()])


def utc_now() -> str:
    """2025-01-31T12:00:00+00:00"""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    import numpy
    import PIL
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # of a class of its own
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads()}


def provenance(device: torch.device) -> dict[str, Any]:
    """What a record of results says about its origin."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **code_version(),
        "versions": versions(),
        "device": hardware(device)["device"],
        "processes": distributed.world_size(),
        "threads": hardware(device)["threads"],
    }
