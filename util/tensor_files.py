"""Files of tensors by name: torch's and safetensors."""

import errno
import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from util.files import CONTENT, atomic_path, content_digest, require_content
from util.safe_load import load_plain


def load_plain_or_safetensors(path: Path) -> dict:
    if path.suffix != ".safetensors":
        content = load_plain(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
        return content
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    require_content(path)
    return tensors


def safetensors_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: value for name, value in (file.metadata() or {}).items() if name != CONTENT}


def save_encoder(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights as safetensors with metadata such as their family and model, and a digest; whole or absent."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={**metadata, CONTENT: "0" * 64})
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
        seal(temporary)


def seal(path: Path) -> None:
    """Write the digest into the metadata, and sort these, which safetensors writes in random order: equal weights have
    equal hashes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"][CONTENT] = content_digest(header, file)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))
