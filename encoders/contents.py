"""The encoders in the content of a weight file: where their tensors are and what prevents reading them."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from encoders.families import ENTRIES, Family, State
from util.safe_load import Foreign

# names that torch.compile, activation checkpointing, FSDP and DistributedDataParallel put into keys
WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
AVERAGED = "n_averaged"  # the counter of torch.optim.swa_utils.AveragedModel, beside the weights in "module."
CHUNK = re.compile(r"(?<![^.])blocks\.(\d+)\.(\d+)\.")  # DINOv2's chunks of blocks
STEM = re.compile(r"(^|.*\.)patch_embed\.(proj\.)?weight")
NESTING = 4  # levels of dictionaries that are searched for encoders


def without_wrappers(content: dict) -> dict:
    """The content of a file with plain names: wrapper names removed from keys, chunked blocks numbered in one sequence,
    lists as dictionaries, an average's unnamed tensors under the names of the model, and each of several encoders in
    one dictionary as an entry of its own."""
    content = {
        key: without_wrappers(value) if isinstance(value, dict) else listed(value) for key, value in content.items()
    }
    if any(isinstance(key, str) and key.startswith("module.") for key in content):
        content = {key: value for key, value in content.items() if key != AVERAGED}
    states = [entries for _, entries in dictionaries(content) if is_state(entries)]
    content = {key: with_names(value, states) for key, value in content.items()}
    return (
        separated(plainly_named(content)) if any(isinstance(value, Tensor) for value in content.values()) else content
    )


def listed(value: Any) -> Any:
    """A list of dictionaries as a dictionary by index; anything else as it is."""
    if not (isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value)):
        return value
    return {str(index): without_wrappers(item) for index, item in enumerate(value) if isinstance(item, dict)}


def with_names(value: Any, states: list[State]) -> Any:
    """A list of tensors, as averages keep them, under the names of a model whose tensors have these shapes."""
    if isinstance(value, dict):
        return {key: with_names(item, states) for key, item in value.items()}
    if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(item, Tensor) for item in value):
        shapes = [item.shape for item in value]
        for state in states:
            if [item.shape for item in state.values()] == shapes:
                return dict(zip(state, value, strict=True))
    return value


def plainly_named(content: dict) -> dict:
    """The dictionary without wrapper names, blocks numbered in one sequence."""
    names = {key: WRAPPER.sub("", key) if isinstance(key, str) else key for key in content}
    chunked = {key: match for key, name in names.items() if isinstance(name, str) and (match := CHUNK.search(name))}
    positions = {(names[key][: match.start()], *map(int, match.groups())) for key, match in chunked.items()}
    if len({(stem, index) for stem, _, index in positions}) == len(
        positions
    ):  # padded chunks: the index counts all blocks
        numbers = {position: position[2] for position in positions}
    else:
        numbers = {
            position: sorted(p for p in positions if p[0] == position[0]).index(position) for position in positions
        }
    for key, match in chunked.items():
        name = names[key]
        number = numbers[name[: match.start()], *map(int, match.groups())]
        names[key] = f"{name[: match.start()]}blocks.{number}.{name[match.end() :]}"
    if len(set(names.values())) < len(names):  # two tensors of one name: the loader will name what is left over
        return content
    return {names[key]: value for key, value in content.items()}


def separated(content: dict) -> dict:
    """A flat dictionary of an encoder, and of others behind prefixes, as {"model": the encoder, prefix: another}."""
    prefixes = {stem[1] for key in content if isinstance(key, str) and (stem := STEM.fullmatch(key))}
    if "" not in prefixes or len(prefixes) == 1 or "model" in content:
        return content
    parts: dict = {"model": {}}
    for key, value in content.items():
        prefix = next((p for p in prefixes if p and str(key).startswith(p)), "")
        parts.setdefault(prefix.removesuffix(".") or "model", {})[key[len(prefix) :]] = value
    return parts


def is_state(value: object) -> bool:
    """Whether it is a non-empty dictionary of tensors by name."""
    pairs = value.items() if isinstance(value, dict) else ()
    return bool(pairs) and all(isinstance(key, str) and not not_a_tensor(item) for key, item in pairs)


def not_a_tensor(value: object) -> str:
    """What an entry of a state dict is, if not a tensor; "" for a tensor."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return ""
    if isinstance(value, Foreign):
        if value.name.startswith("numpy"):
            return "a NumPy array"
        return "a DTensor" if value.name.endswith("_rebuild_wrapper_subclass") else f"a {value.name}"
    return "None" if value is None else f"a {type(value).__name__}"


def part_of(content: dict, name: str) -> State | None:
    """The tensors under a name: an entry, a prefix of keys, or both ("state_dict.encoder_q")."""
    if is_state(content.get(name)):
        return content[name]
    parts = name.split(".")
    for count in range(1, len(parts)):
        entry = content.get(".".join(parts[:count]))
        if isinstance(entry, dict):
            return part_of(entry, ".".join(parts[count:]))
    chosen = {key.removeprefix(f"{name}."): value for key, value in content.items() if str(key).startswith(f"{name}.")}
    return chosen if is_state(chosen) else None


def dictionaries(content: dict, name: str = "") -> Iterator[tuple[str, dict]]:
    """The content and all dictionaries in it, with their dotted names."""
    yield name, content
    for key, value in content.items() if name.count(".") < NESTING else ():
        if isinstance(value, dict):
            yield from dictionaries(value, f"{name}.{key}".removeprefix("."))


def encoders_in(content: dict, tensors_only: bool = True) -> list[str]:
    """The names, for part_of, of everything below the top of a file that looks like a Vision Transformer.

    tensors_only: leave out those with entries that are not tensors, which part_of does not give.
    """
    names = []
    for name, entries in dictionaries(content):
        keys = [key for key, value in entries.items() if isinstance(key, str) and not isinstance(value, tuple)]
        for stem in filter(None, map(STEM.fullmatch, keys)):
            part = ".".join(filter(None, [name, *stem[1].split(".")]))
            wanted = part and part not in names and not (tensors_only and part_of(content, part) is None)
            names += [part] if wanted else []
    return names


def obstacles_in(content: dict) -> list[str]:
    """Entries among the tensors of an encoder that are not tensors, by name and type."""
    obstacles = []
    for name, entries in dictionaries(content):
        if any(isinstance(key, str) and STEM.fullmatch(key) for key in entries):
            odd = [(key, kind) for key, value in entries.items() if (kind := not_a_tensor(value))]
            label = f"{name}: " if name else ""
            obstacles += [f"{label}{key} is {kind}" for key, kind in odd[:3] if kind != "a dict"]
            obstacles += [f"{label}{len(odd) - 3} more"] * (len(odd) > 3)
    return obstacles


def weights_of(content: dict, family: Family, checkpoint_key: str | None = None, flat: bool = True) -> State | None:
    """The tensors of a file of this family, or None where the file is built differently.

    A family of flat files may be in one of the entries that trainers put weights in. flat: accept a file of nothing
    but tensors for any family (safetensors have no entries).
    """
    if checkpoint_key is None:
        entries = [content, *map(content.get, ENTRIES)]
        if family.key is not None:
            entry = content.get(family.key, content if flat else None)
            entries = [entry, entry.get("model") if isinstance(entry, dict) else None]  # beside others: see separated
        return next((entry for entry in entries if is_state(entry)), None)
    if checkpoint_key in content:
        return content[checkpoint_key] if is_state(content[checkpoint_key]) else None
    name = WRAPPER.sub("", f"{checkpoint_key.removesuffix('.')}.").removesuffix(".")
    weights = weights_of(content, family, flat=flat) if family.prefix else None
    chosen = {key: value for key, value in (weights or {}).items() if key.startswith(f"{name}.")}
    if chosen:
        return {family.prefix + key.removeprefix(f"{name}."): value for key, value in chosen.items()}
    return part_of(content, checkpoint_key.removesuffix(".")) or part_of(content, name)


def fits(content: dict, family: Family, checkpoint_key: str | None, flat: bool) -> bool:
    """Whether the structure of a file is that of a family: names of tensors and the entries beside them."""
    weights = weights_of(content, family, checkpoint_key, flat)
    if weights is None or any(key not in weights for key in family.needs):
        return False
    if any(entry not in content for entry in family.beside):
        return False
    return not any(fnmatchcase(key, pattern) for key in weights for pattern in family.lacks)
