"""What resumable programs share."""

from typing import Any

from runtime.folder import AnotherRun


def check_identity(now: dict[str, Any], before: dict[str, Any], advice: str = "name another --output_dir") -> None:
    """Compare what makes a run this run with what its checkpoint has. AnotherRun names every difference.

    A name that only one of the two has is not compared: flags come and go between versions.
    """
    changed = [
        f"{name} was {before[name]}, is {now[name]}" for name in now if name in before and before[name] != now[name]
    ]
    if changed:
        raise AnotherRun(f"--resume: this is another run ({'; '.join(changed)}): {advice}")
