"""ARCHITECTURES: the named sizes of the Vision Transformer. Importable without torch."""

from collections.abc import Sequence

from util.choices import instead_of

FROM_FILE = "file"  # --model file: width, depth, patch, MLP and grid are read from the tensors


def sizes(embed_dim: int, depth: int, num_heads: int, patch_size: int) -> dict:
    return {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}


ARCHITECTURES = {
    "vit_demo_patch8": {"img_size": 64, **sizes(128, 6, 4, 8)},
    "vit_tiny_patch16": sizes(192, 12, 3, 16),
    **{f"vit_small_patch{patch}": sizes(384, 12, 6, patch) for patch in (16, 14, 8)},
    **{f"vit_base_patch{patch}": sizes(768, 12, 12, patch) for patch in (16, 14, 8, 4)},
    **{f"vit_large_patch{patch}": sizes(1024, 24, 16, patch) for patch in (16, 14, 7)},
    "vit_huge_patch14": sizes(1280, 32, 16, 14),
    "vit_2b_patch14": sizes(2560, 24, 32, 14),
}


def architecture(name: str) -> dict:
    """Options of models_vit.VisionTransformer by name; ValueError for an unknown name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: {instead_of(name, [*ARCHITECTURES, FROM_FILE])}")
    return ARCHITECTURES[name]


def default_input_size(name: str) -> int:
    return architecture(name).get("img_size", 224)


def known_depth(name: str) -> int | None:
    """The number of blocks; None for FROM_FILE, whose blocks are counted when the file is read."""
    return None if name == FROM_FILE else architecture(name)["depth"]


def check_blocks(blocks: Sequence[int], depth: int | None) -> None:
    """ValueError for a block that an encoder of this depth does not have. depth: None if not known yet."""
    for block in blocks:
        if block < 0 or (depth is not None and block >= depth):
            raise ValueError(f"block {block} does not exist: this encoder has blocks 0 to {depth and depth - 1}")
