"""Compare maps of [cls] and AbMILP: python scripts/show_maps.py LABEL=RUN ... --output maps.png

Rows are images of the runs' validation set. Each run (an --output_dir of main_linprobe.py with abmilp probes) adds
the [cls] attention of its encoder's last block, averaged over heads, and the AbMILP weights, averaged over seeds. Maps
are in multiples of the uniform weight 1/M, on one colour scale.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from aggregation.examples import maps_of
from aggregation.figures import display_name, draw_maps
from aggregation.rules import fixed_rules, needs_of, probe_rules
from cli.arguments import run_test_images
from cli.console import Parser, positive_int, run_main
from cli.encoder_arguments import frozen_encoder
from cli.linprobe import finished_run
from data_sets.images import fingerprint
from data_sets.loader import KeyedDataset
from data_sets.views import eval_transform
from encoders.load import Encoder
from engine_linprobe import FrozenTokens
from probing.finished_run import ProbeRun
from probing.pooling import Tokens
from util.plotting import visible
from util.seeding import stable_seed


def cls_and_abmilp(run: ProbeRun, encoder: Encoder, images: Tensor) -> dict[str, np.ndarray]:
    """{title: (B,rows,columns)} of images (B,3,h,w), in multiples of uniform weights: [cls], if the encoder has it, and
    every AbMILP probe, averaged over its seeds. ValueError if the run has none."""
    backbone = encoder.backbone
    grid = backbone.grid_of(*images.shape[-2:])
    cls = fixed_rules(["attn-mn"] if backbone.has_cls else [], backbone, Tokens.of(backbone, grid), has_oracle=False)
    rules = probe_rules(run.bank(encoder, grid), backbone.depth - 1, run.scores())
    abmilp = [rule for rule in rules if rule.head.startswith("abmilp")]
    if not abmilp:
        raise ValueError(f"{run.folder} has no abmilp probe: its --cls_features must name abmilp")
    rules = [*cls, *abmilp]
    blocks = tuple(sorted({rule.block for rule in rules}))
    maps = maps_of(rules, FrozenTokens(backbone, blocks, torch.float32, run.args.final_norm, needs_of(rules)), images)
    columns: dict[str, list[np.ndarray]] = {}
    for rule in rules:  # rates, blocks and options are not averaged
        title = "[cls]" if rule in cls else display_name(rule.name.removesuffix(f"/seed{rule.seed}"))
        columns.setdefault(title, []).append(maps[rule.name])
    return {title: np.mean(seeds, axis=0) for title, seeds in columns.items()}


def main(args: argparse.Namespace) -> None:
    columns, pictures, common = {}, None, None
    for argument in args.runs:
        label, _, folder = argument.rpartition("=")
        run, name = finished_run(Path(folder)), label or Path(folder).name
        encoder, size = frozen_encoder(run.args)
        images = run_test_images(run.args)
        if common not in (None, shown := fingerprint(images)):
            raise ValueError(f"{folder} was tested on other images than the runs before it: draw one figure for each")
        if any(title.startswith(f"{name}: ") for title in columns):
            raise ValueError(f"two runs are called {name}: write LABEL=RUN with two labels")
        common, view = shown, eval_transform(size, **encoder.pixels, loader=run.args.loader)
        generator = torch.Generator().manual_seed(stable_seed("maps", args.seed))
        chosen = torch.randperm(len(images), generator=generator)[: args.images].tolist()
        batch = torch.stack([KeyedDataset(images, view, 0)[0, index].image for index in chosen])
        columns |= {f"{name}: {title}": maps for title, maps in cls_and_abmilp(run, encoder, batch).items()}
        pictures = visible(batch, view)
    draw_maps(pictures, columns, args.output)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="run folders of main_linprobe.py")
    parser.add_argument("--output", type=Path, default=Path("maps.png"), help="file of the figure")
    parser.add_argument("--images", type=positive_int, default=5, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images")
    run_main(main, parser.parse_args())
