"""Maps of example images, from the examples.safetensors of the analyses, as bytes for page.js.

Letters: n images, L blocks, H heads, M patches, D width, R rules.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from util.files import require_content

IMAGES = 8  # shown per run
MOST_PATCHES = 400  # that similarities are shown of: a byte for each pair


def read_maps(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """For each file its label, grid and images; and a line for each file that cannot be read."""
    sources, trouble = [], []
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            require_content(path)
            (rows, columns), names, rules = (json.loads(facts.get(name, "[]")) for name in ("grid", "images", "rules"))
            images = [
                {"name": str(name), **encode(rows * columns, len(rules), {key: t[i] for key, t in tensors.items()})}
                for i, name in enumerate(names[:IMAGES])
            ]
            label = str(facts.get("label", path.parent.name))
            sources.append({"label": label, "grid": [rows, columns], "rules": list(map(str, rules)), "images": images})
        except (
            OSError,
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            trouble.append(f"{path} cannot be shown: {' '.join(str(error).split())}")
    return sources, trouble


def encode(patches: int, rules: int, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """One image: its picture as JPEG; maps as bytes, the square roots of the weights; principal components as colours;
    and the cosine similarity of all pairs of patches. ValueError for other shapes."""
    picture = io.BytesIO()
    Image.fromarray(tensors["pictures"]).save(picture, "JPEG", quality=88)
    shown: dict[str, Any] = {"picture": base64.b64encode(picture.getvalue()).decode()}
    heads = tensors["attention"].shape[1] if "attention" in tensors else 0
    for name, shape in {"attention": (-1, heads, patches), "weights": (1, rules, patches)}.items():
        if name in tensors:
            weights = np.nan_to_num(tensors[name].astype(np.float64)).reshape(shape).clip(0)
            top = max(float(weights.max()), 1e-6)
            shown[name] = {"top": top, "shape": weights.shape, "data": to_text((weights / top) ** 0.5)}
    if "patches" in tensors:
        features = np.nan_to_num(tensors["patches"].astype(np.float64)).reshape(patches, -1)
        shown["colours"] = to_text(principal_components(features))
        if patches <= MOST_PATCHES:
            unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            shown["similarity"] = to_text((unit @ unit.T + 1) / 2)
    return shown


def principal_components(features: np.ndarray) -> np.ndarray:
    """(M,D) -> (M,3) colours in [0,1]: the first components, whitened, through a sigmoid, as DINOv3's notebooks do."""
    vectors, sizes, axes = np.linalg.svd(features - features.mean(0), full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # of the largest entry: otherwise arbitrary
    scores = (vectors * signs * (len(features) - 1) ** 0.5 * (sizes > 1e-9 * sizes[0]))[:, :3]
    return 1 / (1 + np.exp(-2 * np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))))


def to_text(values: np.ndarray) -> str:
    """Numbers in [0,1] as bytes, in base 64."""
    return base64.b64encode((255 * values).round().astype(np.uint8).tobytes()).decode()
