"""What to write instead of a name that does not exist, alike in every message."""

import difflib
import re
from collections.abc import Iterable


def nearest(word: str, names: Iterable[str]) -> str:
    """ "did you mean abmilp? " for a word like one of the names, or of which every part is in some; else nothing."""
    known = {name.lower(): name for name in names}
    parts = [part for part in re.split("[_-]", word.lower()) if part]
    having = [name for name in known if parts and all(part in name for part in parts)]
    having.sort(key=lambda name: not name.startswith(word.lower()))
    near = [known[name] for name in having[:4] or difflib.get_close_matches(word.lower(), known, 1)]
    return f"did you mean {' or '.join(filter(None, [', '.join(near[:-1]), near[-1]]))}? " if near else ""


def instead_of(word: str, names: Iterable[str]) -> str:
    """The nearest of the names, and all there are."""
    names = list(names)
    near = nearest(word, names)
    return f"{near}{'There are' if near else 'choose one of'} {', '.join(names)}"
