"""Import a slow module at its first use, so that --help and mistakes in the arguments answer at once."""

import importlib
from typing import Any


class Lazy:
    """Stands for a module that is imported when one of its attributes is first read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def lazy(name: str) -> Any:
    """`torch = lazy("torch")` in place of `import torch`, in modules that parsers import.

    Not for what runs at import: base classes, decorators, defaults of arguments. Annotations need
    `from __future__ import annotations`, and what only they name is imported under `typing.TYPE_CHECKING`.
    """
    return Lazy(name)
