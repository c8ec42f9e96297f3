"""Where encoders look: python scripts/show_attention.py IMAGE ... --finetune WEIGHTS ... --output_dir DIR

One PNG per image, a row per encoder: the image as the encoder sees it, the [cls] attention of one block averaged over
heads, and each head's. Maps are normalised over the patches and drawn over the image on one scale, in multiples of the
uniform weight 1/M. Captions: H, the entropy over the patches in nats (at most ln M); self, the token's attention to
itself.
With --query ROW COLUMN the maps are those of a patch; encoders without [cls] have no others.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from attention.metrics import entropy
from cli.analyze_attention import encoder_labels
from cli.arguments import add_groups
from cli.console import Parser, run_main
from cli.encoder_arguments import choose_precision, frozen_encoder, one_encoder_each, precision
from data_sets.images import read_image
from data_sets.table import build_dataset
from data_sets.views import eval_transform
from models_vit import VisionTransformer, attention_row
from util.plotting import STYLE, WIDTH, add_scale, bare, draw_map, outline, save_figure, visible


class Maps(NamedTuple):
    """What one encoder makes of one image."""

    label: str
    picture: np.ndarray  # (h,w,3) in [0,1]
    heads: Tensor  # (H,rows,columns), each of sum 1, float64
    to_self: Tensor  # (H,) attention of the query to itself, softmax over all N keys


def check_wanted(label: str, backbone: VisionTransformer, size: int, block: int, query: Sequence[int] | None) -> None:
    """ValueError for a block or patch that an encoder has not, and for [cls] where there is none."""
    if not -backbone.depth <= block < backbone.depth:
        raise ValueError(f"--block {block}: {label} has blocks 0 to {backbone.depth - 1} (-1 is the last)")
    if query is None and not backbone.has_cls:
        raise ValueError(f"{label} has no [cls] token: --query ROW COLUMN shows the attention of one of its patches")
    side = size // backbone.patch_size
    if query is not None and not all(0 <= index < side for index in query):
        raise ValueError(f"--query {query[0]} {query[1]}: {label} has {side} x {side} patches, counted from 0")


@torch.no_grad()
def attention_of(
    backbone: VisionTransformer, image: Tensor, block: int, query: Sequence[int] | None, amp: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(3,h,w) -> maps (H,rows,columns) of sum 1 and (H,) self-attention, float64, of [cls] or of the query patch.

    One row of the attention is computed. For what check_wanted accepts.
    """
    grid = backbone.grid_of(*image.shape[1:])
    prefix = backbone.num_prefix_tokens
    token = 0 if query is None else prefix + query[0] * grid[1] + query[1]
    with torch.autocast("cpu", dtype=amp, enabled=amp != torch.float32):
        for step in backbone.trace(image[None]):
            if step.index == block % backbone.depth:
                break
    # in float32, large logits lose digits, and small probabilities vanish
    exact = step._replace(q=step.q.double(), k=step.k.double())
    row = attention_row(exact, token, num_prefix=0)[0]
    patches = row[:, prefix:]
    return (patches / patches.sum(1, keepdim=True)).unflatten(1, grid), row[:, token]


@rc_context(STYLE)
def draw(rows: Sequence[Maps], query: Sequence[int] | None, heading: str, target: Path) -> None:
    """One image: two lines of cells per encoder. Heads are counted from 0."""
    per_line = max(math.ceil(len(maps.heads) / 2) for maps in rows)
    columns = 4 + per_line
    cell = min(0.95, max(0.6, (WIDTH - 0.7) / columns))  # inches; the image and the mean map take two by two
    figure = Figure(figsize=(cell * columns + 0.7, (2 * cell + 0.65) * len(rows) + 0.4), layout="constrained")
    grid = figure.add_gridspec(2 * len(rows), columns)
    # what is brighter than nearly everything has the brightest colour, lest one patch darken all others
    relative = [maps.heads * maps.heads[0].numel() for maps in rows]
    top = max(2.0, *(float(values.flatten().quantile(0.995)) for values in relative))
    for number, (maps, values) in enumerate(zip(rows, relative, strict=True)):
        line = 2 * number
        first, mean = (figure.add_subplot(grid[line : line + 2, start : start + 2]) for start in (0, 2))
        first.imshow(maps.picture)
        first.set_title(maps.label)
        mean.set_xlabel(f"ln M = {math.log(values[0].numel()):.2f}", fontsize=6)
        places = [grid[line + head // per_line, 4 + head % per_line] for head in range(len(values))]
        axes = [mean, *map(figure.add_subplot, places)]
        # the entropy of the mean map, and the mean of self-attention
        shown = torch.cat([values.mean(0, keepdim=True), values])
        to_self = torch.cat([maps.to_self.mean()[None], maps.to_self])
        for index, (axis, weights, own) in enumerate(zip(axes, shown, to_self, strict=True)):
            draw_map(axis, maps.picture, weights.numpy(), top)
            H = float(entropy(weights.flatten()))
            text = (
                f"head {index - 1}\nH {H:.2f}\nself {own:.2f}"
                if index
                else f"mean over heads\nH {H:.2f}, self {own:.2f}"
            )
            axis.set_title(text, fontsize=5.5 if index else 7, linespacing=1.1)
        for axis in (first, *axes):
            bare(axis)
            if query is not None:
                side = maps.picture.shape[0] / values.shape[1]
                outline(axis, (query[1] * side, query[0] * side), side, side, "#00E5FF", "black")
    add_scale(figure, top, more=any(float(values.max()) > top for values in relative))
    figure.suptitle(heading, fontsize=8)
    save_figure(figure, target)


def main(args: argparse.Namespace) -> None:
    folders = {
        path: build_dataset("image_folder", path, "val", labels=False).names for path in args.images if path.is_dir()
    }
    paths = [Path(name) for path in args.images for name in folders.get(path, [path])]
    images = {path: read_image(path) for path in paths}  # before any encoder is loaded
    names = [path.stem for path in images]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"several images are called {twice[0]}: show them in different --output_dir")
    labels = encoder_labels(args)
    encoders = [frozen_encoder(encoder_args) for encoder_args in one_encoder_each(args)]
    for label, (encoder, size) in zip(labels, encoders, strict=True):
        check_wanted(label, encoder.backbone, size, args.block, args.query)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    what = "[cls]" if args.query is None else f"the patch in row {args.query[0]}, column {args.query[1]} (from 0)"
    block = f"block {args.block} (from 0)" if args.block >= 0 else f"block {-args.block} from the end"
    heading = f"Attention of {what}, {'last block' if args.block == -1 else block}"
    choose_precision(args, torch.device("cpu"))
    for path, image in images.items():
        rows = []
        for label, (encoder, size) in zip(labels, encoders, strict=True):
            transform = eval_transform(size, **encoder.pixels)
            seen = transform(image)
            heads, to_self = attention_of(encoder.backbone, seen, args.block, args.query, precision(args.amp))
            rows.append(Maps(label, visible(seen, transform), heads, to_self))
        draw(rows, args.query, f"{heading}: {path.name}", args.output_dir / f"{path.stem}.png")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images")
    add_groups(parser, {"encoders": {"include": "encoder", "several": True}})
    add, pair = parser.add_argument, {"nargs": 2, "type": int, "metavar": ("ROW", "COLUMN")}
    add("--label", nargs="+", help="names of the encoders (default: the names of their files)")
    add("--block", type=int, default=-1, help="counted from 0; negative: from the end")
    add("--query", **pair, help="a patch, counted from 0 from the upper left; without it, [cls]")
    add("--output_dir", required=True, type=Path, help="of IMAGE_NAME.png")
    add("--seed", type=int, default=0, help="of random weights, where --finetune is empty")
    run_main(main, parser.parse_args())
