"""The content of a weight file under plain, dotted names; an encoder is all that is below one name."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encoders.families import ENTRIES, Family, State
from util.safe_load import Foreign
from util.tensor_files import load_plain_or_safetensors

# names that torch.compile, activation checkpointing, FSDP and DistributedDataParallel put into keys
WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
AVERAGED = "n_averaged"  # the counter of torch.optim.swa_utils.AveragedModel, beside the weights in "module."
CHUNK = re.compile(r"((?:.*?\.)?)blocks\.(\d+)\.(\d+)\.(.+)")  # DINOv2's chunks of blocks
STEM = re.compile(r"(?:(.*)\.)?patch_embed\.(?:proj\.)?weight")
NESTING = 5  # levels of dictionaries that are searched for encoders


class Content(NamedTuple):
    """leaves: {dotted name: tensor or other value}. entries: the dotted names of dictionaries; "" is the file."""

    leaves: dict[str, Any]
    entries: list[str]

    def below(self, name: str) -> dict[str, Any]:
        start = f"{name}." if name else ""
        return {key.removeprefix(start): value for key, value in self.leaves.items() if key.startswith(start)}

    def state(self, name: str) -> State | None:
        """The tensors below a name; None if there are none, or other values among them."""
        values = self.below(name)
        return None if not values or any(map(not_a_tensor, values.values())) else values

    def entry(self, name: str) -> State | None:
        """The tensors of an entry; None if it holds anything else, entries included."""
        start = f"{name}." if name else ""
        nested = any(entry and entry.startswith(start) for entry in self.entries)
        return self.state(name) if name in self.entries and not nested else None

    def identities(self, name: str) -> set[int]:
        """The ids of the values below a name."""
        return set(map(id, self.below(name).values()))

    def encoders(self) -> list[str]:
        """The names with a patch embedding below them."""
        stems = (STEM.fullmatch(key) for key, value in self.leaves.items() if not isinstance(value, tuple))
        return list(dict.fromkeys(stem[1] or "" for stem in stems if stem))


def read_content(path: Path) -> Content:
    """A weight file's content. ValueError if two of its tensors have the same dotted name."""
    try:
        return flattened(load_plain_or_safetensors(path))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def flattened(content: dict) -> Content:
    """Wrapper names are removed, chunked blocks numbered in one sequence.

    Lists of dictionaries become entries by index; lists of tensors, as averages keep them, get the names of an encoder
    with tensors of these shapes. An encoder in one dictionary with others becomes the entry "model".
    """
    flat = Content({}, [])

    def visit(items: dict, entry: str, level: int) -> None:
        flat.entries.append(entry)
        names = plain_names([key for key in items if isinstance(key, str)])
        stems = {stem[1] or "" for name in names.values() if (stem := STEM.fullmatch(name))}
        others = tuple(f"{stem}." for stem in stems if stem)
        if "" in stems and others and "model" not in items:
            names = {key: name if name.startswith(others) else f"model.{name}" for key, name in names.items()}
            flat.entries.extend(f"{entry}.{other}".strip(".") for other in ("model", *others))
        for key, value in items.items():
            name = f"{entry}.{names.get(key, key)}".removeprefix(".")
            if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
                value = {str(index): item for index, item in enumerate(value) if isinstance(item, dict)}
            if isinstance(value, dict) and level < NESTING:
                visit(value, name, level + 1)
            elif key != AVERAGED or not any(str(other).startswith("module.") for other in items):
                if name in flat.leaves and isinstance(value, Tensor):
                    raise ValueError(f"two tensors are called {name}; save the encoder's state dict alone")
                flat.leaves[name] = value

    visit(content, "", 0)
    states = [state for name in flat.encoders() if (state := flat.state(name))]
    for name, value in list(flat.leaves.items()):
        if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(item, Tensor) for item in value):
            shapes = [item.shape for item in value]
            if state := next((state for state in states if [item.shape for item in state.values()] == shapes), None):
                del flat.leaves[name]
                flat.leaves.update({f"{name}.{key}": item for key, item in zip(state, value, strict=True)})
                flat.entries.append(name)
    return flat


def plain_names(keys: list[str]) -> dict[str, str]:
    """{key: name without wrappers, blocks numbered in one sequence}; {key: key} where two names would be equal."""
    names = {key: WRAPPER.sub("", key) for key in keys}
    chunked = {key: match for key, name in names.items() if (match := CHUNK.fullmatch(name))}
    blocks = sorted({(match[1], int(match[2]), int(match[3])) for match in chunked.values()})
    restarted = len({(stem, index) for stem, _, index in blocks}) < len(blocks)
    for key, match in chunked.items():
        stem, chunk, index = match[1], int(match[2]), int(match[3])
        if restarted:  # unless chunks are padded, so that the index counts all blocks
            index = [block for block in blocks if block[0] == stem].index((stem, chunk, index))
        names[key] = f"{stem}blocks.{index}.{match[4]}"
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


def not_a_tensor(value: object) -> str:
    """The type of an entry of a state dict; "" for a tensor."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return ""
    if isinstance(value, Foreign):
        if value.name.startswith("numpy"):
            return "a NumPy array"
        return "a DTensor" if value.name.endswith("_rebuild_wrapper_subclass") else f"a {value.name}"
    return "None" if value is None else f"a {type(value).__name__}"


def weights_of(content: Content, family: Family, checkpoint_key: str | None = None, flat: bool = True) -> State | None:
    """The tensors of a file of this family, or None if the file is built differently.

    A family of flat files may be in one of the ENTRIES. flat: accept a file of nothing but tensors for any family
    (safetensors have no entries).
    """
    if checkpoint_key is None:
        names = ["", *ENTRIES]
        if family.key is not None:
            key = family.key if family.key in content.entries else ""
            names = [key, f"{key}.model".removeprefix(".")] if key or flat else []  # "model": see flattened
        return next((state for name in names if (state := content.entry(name))), None)
    key = checkpoint_key.removesuffix(".")
    if key in content.entries:
        return content.entry(key) or content.entry(f"{key}.model")
    name = WRAPPER.sub("", f"{key}.").removesuffix(".")
    weights = weights_of(content, family, flat=flat) if family.prefix else None
    chosen = {
        family.prefix + k.removeprefix(f"{name}."): v for k, v in (weights or {}).items() if k.startswith(f"{name}.")
    }
    return chosen or content.state(key) or content.state(name)


def fits(content: Content, family: Family, checkpoint_key: str | None, flat: bool) -> bool:
    """Whether the names of tensors and entries are those of a family."""
    weights = weights_of(content, family, checkpoint_key, flat)
    if weights is None or not weights.keys() >= set(family.needs):
        return False
    shown = {*content.entries, *content.leaves}.issuperset(family.beside)
    return shown and not any(fnmatchcase(key, pattern) for key in weights for pattern in family.lacks)
