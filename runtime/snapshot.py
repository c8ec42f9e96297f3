"""The copy of the code that a job runs, so that editing the checkout does not change what waits in the queue."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from runtime.folder import ROOT, SNAPSHOT_RECORD, code_version, git
from util.files import to_json


def code_files() -> list[Path]:
    """The modules that programs are made of, relative to the root: those that git knows, and new ones beside them."""
    # not every file that git ignores: run folders, which hold older copies, may be here too
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    patterns = ["*.py", *(f"{package}/*.py" for package in packages if package != "tests")]
    new = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    known = git("ls-files", "-z", "*.py", ":!tests") or ""
    return sorted(new | {Path(name) for name in known.split("\0") if name and (ROOT / name).is_file()})


def take_snapshot(folder: Path, write: bool = True) -> Path:
    """Copy the code that runs now into folder/<digest of its content>, where it is not there yet; that path.

    Committed modules and what was changed in them since; no data, no results, no history.
    """
    contents = {str(path): (ROOT / path).read_bytes() for path in code_files()}
    contents[SNAPSHOT_RECORD] = to_json(code_version()).encode()
    digest = hashlib.sha256(json.dumps([(n, hashlib.sha256(c).hexdigest()) for n, c in contents.items()]).encode())
    target = folder / digest.hexdigest()[:12]
    if write and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for name, content in contents.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:  # another submission was faster
            shutil.rmtree(temporary)
    return target
