"""The copy of the code that a job runs, so that editing the checkout does not change what waits in the queue."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from util.files import to_json
from util.run_folder import ROOT, SNAPSHOT_RECORD, code_version, git


def code_files() -> list[Path]:
    """The modules that programs are made of, relative to the root: those that git knows, and new ones beside them."""
    # not whatever git does not know: run folders, with older copies, may lie here too
    new = {path.relative_to(ROOT) for pattern in ("*.py", "util/*.py") for path in ROOT.glob(pattern)}
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
