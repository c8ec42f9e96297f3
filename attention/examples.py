"""Attention maps and patch tokens of example images, which scripts/make_report.py shows: examples.safetensors.

Letters: n images, L blocks, H heads, M patches, D width.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from data_sets.images import Example
from data_sets.views import View
from models_vit import VisionTransformer, attention_row
from util.plotting import visible

FILE = "examples.safetensors"


@torch.no_grad()
def example_maps(
    label: str, backbone: VisionTransformer, examples: Sequence[Example], view: View
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file: `pictures` (n,h,w,3) uint8; `patches` (n,M,D) float16, after the last norm and
    divided by their mean length; with a [cls] token, `attention` (n,L,H,M) float16, its attention over the patches in
    multiples of uniform attention. In float32."""
    images = torch.stack([view(example.image) for example in examples])
    prefix, rows = backbone.num_prefix_tokens, []
    for step in backbone.trace(images.to(next(backbone.parameters()).device)):
        if backbone.has_cls:
            row = attention_row(step, 0, prefix)
            rows.append(row / row.mean(-1, keepdim=True))
    patches = backbone.norm_after(step.index)(step.out)[:, prefix:]
    tensors = {
        "pictures": torch.from_numpy((255 * visible(images, view)).round()).to(torch.uint8),
        "patches": (patches / patches.norm(dim=-1).mean()).half().cpu(),
    }
    if rows:
        tensors["attention"] = torch.stack(rows, dim=1).half().cpu()
    grid, names = backbone.grid_of(*images.shape[-2:]), [example.path for example in examples]
    return tensors, {"label": label, "grid": json.dumps(grid), "images": json.dumps(names)}
