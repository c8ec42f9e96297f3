"""Where a [cls] token and an AbMILP probe look: python scripts/show_maps.py LABEL=RUN ... --output maps.png

For images of the runs' validation set: the image, and for each run (the --output_dir of main_linprobe.py with an abmilp
probe) the [cls] attention of the last block, averaged over heads, and the AbMILP weights, averaged over seeds. Maps are
normalised to sum 1 over the patches and drawn over the image on one scale: a multiple of the uniform weight 1/M.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from aggregation.examples import maps_of
from aggregation.figures import draw_maps
from aggregation.rules import fixed_rules, needs_of, probe_rules
from cli.arguments import frozen_encoder
from cli.console import Parser, run_main
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset, build_dataset, eval_transform
from encoders.load import Encoder
from engine_linprobe import FrozenTokens
from probing.finished_run import ProbeRun, read_run
from probing.pooling import Tokens
from util.plotting import visible
from util.seeding import stable_seed


def cls_and_abmilp(run: ProbeRun, encoder: Encoder, images: Tensor) -> dict[str, np.ndarray]:
    """{"[cls]", where the encoder has it, and "AbMILP": (B,rows,columns)} of images (B,3,h,w), in multiples of uniform
    weights. ValueError where the run has no abmilp probe."""
    backbone = encoder.backbone
    grid = backbone.grid_of(*images.shape[-2:])
    given = Tokens(backbone.embed_dim, grid, backbone.num_prefix_tokens)
    cls = fixed_rules(["attn-mn"] if backbone.has_cls else [], backbone, given, has_oracle=False)
    rules = probe_rules(run.bank(encoder, grid), backbone.depth - 1, run.scores())
    abmilp = [rule for rule in rules if rule.head.startswith("abmilp")]
    if not abmilp:
        raise ValueError(f"{run.folder} has no abmilp probe: its --cls_features must name abmilp")
    rules = [*cls, *abmilp]
    blocks = tuple(sorted({rule.block for rule in rules}))
    tokens = FrozenTokens(backbone, blocks, torch.float32, run.args.final_norm, needs_of(rules))
    maps = maps_of(rules, tokens, images)
    found = {"[cls]": maps["attn-mn"]} if cls else {}
    return {**found, "AbMILP": np.mean([maps[rule.name] for rule in abmilp], axis=0)}


def main(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise ValueError(f"--images {args.images}: it takes at least one")
    columns, pictures, shown = {}, None, None
    for word in args.runs:
        label, _, folder = word.rpartition("=")
        run = read_run(Path(folder))
        encoder, size = frozen_encoder(run.args)
        images = build_dataset(run.args.dataset, run.args.data_path, "val", run.args.allow_subset)
        if shown not in (None, fingerprint(images)):
            raise ValueError(f"{folder} was tested on other images than the runs before it: make a figure of each")
        shown = fingerprint(images)
        view = eval_transform(size, encoder.mean, encoder.std, run.args.loader)
        generator = torch.Generator().manual_seed(stable_seed("maps", args.seed))
        chosen = torch.randperm(len(images), generator=generator)[: args.images].tolist()
        batch = torch.stack([KeyedDataset(images, view, 0)[0, index].image for index in chosen])
        for name, maps in cls_and_abmilp(run, encoder, batch).items():
            columns[f"{label or Path(folder).name}: {name}"] = maps
        pictures = visible(batch, view)
    draw_maps(pictures, columns, args.output)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="folders of main_linprobe.py")
    parser.add_argument("--output", type=Path, default=Path("maps.png"), help="the figure")
    parser.add_argument("--images", type=int, default=5, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="which images")
    run_main(main, parser.parse_args())
