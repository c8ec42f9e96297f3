"""The copy of the code that a job runs, so that editing the checkout does not change what waits in the queue."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from runtime.provenance import ROOT, SNAPSHOT_RECORD, code_files, code_version
from util.files import digest, to_json


def take_snapshot(folder: Path, write: bool = True) -> Path:
    """Copy the code that runs now into folder/<digest of its content>, where it is not there yet; that path.

    Committed modules and what was changed in them since; no data, no results, no history.
    """
    contents = {str(path): (ROOT / path).read_bytes() for path in code_files()}
    contents[SNAPSHOT_RECORD] = to_json(code_version()).encode()
    name = digest([(name, hashlib.sha256(content).hexdigest()) for name, content in contents.items()])[:12]
    target = folder / name
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
