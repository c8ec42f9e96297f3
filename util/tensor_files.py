"""Files of tensors by name: torch's and safetensors."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from util.files import atomic_path
from util.safe_load import load_plain


def load_plain_or_safetensors(path: Path) -> dict:
    if path.suffix != ".safetensors":
        content = load_plain(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
        return content
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def save_encoder(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights as safetensors with metadata such as their family and model; whole or absent."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order, so that equal weights have equal hashes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))
