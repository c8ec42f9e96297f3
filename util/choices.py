"""What to write instead of a name that does not exist, alike in every message."""

import difflib
import re
from collections.abc import Iterable


def nearest(word: str, names: Iterable[str]) -> str:
    """ "did you mean abmilp? " for names that begin with a word or have all its parts, else for one much like it."""
    known, word = {name.lower(): name for name in names}, word.lower()
    parts = set(filter(None, re.split("[_-]", word)))
    begun = [name for name in known if word and name.startswith(word)]
    having = [name for name in known if parts and parts.issubset(re.split("[_-]", name))]
    near = [known[name] for name in (begun or having)[:4] or difflib.get_close_matches(word, known, 1)]
    return f"did you mean {' or '.join(filter(None, [', '.join(near[:-1]), near[-1]]))}? " if near else ""


def instead_of(word: str, names: Iterable[str]) -> str:
    """The nearest of the names, and all there are."""
    names = list(names)
    near = nearest(word, names)
    return f"{near}{'There are' if near else 'choose one of'} {', '.join(names)}"
