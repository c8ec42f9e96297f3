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
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import main_linprobe
from models_vit import VisionTransformer
from probes import ProbeBank
from util.arguments import Parser, build_encoder, parse, run_main
from util.datasets import KeyedDataset, build_splits, eval_transform
from util.plotting import STYLE, add_scale, draw_map, save_figure, visible
from util.run_folder import RunFolder
from util.seeding import stable_seed


def load_run(folder: Path) -> tuple[argparse.Namespace, VisionTransformer, ProbeBank, KeyedDataset]:
    """Arguments, encoder, trained probes and test images of a probing run. ValueError for an unfinished one."""
    args = parse(main_linprobe.get_args_parser(), ["--args_from", str(folder / "args.json")])
    state = RunFolder(folder).find_checkpoint("auto")
    if state is None:
        raise ValueError(f"{folder} holds no checkpoint: is it the --output_dir of main_linprobe.py?")
    _, images, num_classes = build_splits(args.dataset, args.data_path, args.nb_classes, args.allow_subset)
    encoder, size = build_encoder(args)
    backbone = encoder.backbone
    specs = main_linprobe.probe_specs(args, backbone)
    bank = ProbeBank(specs, backbone, (size // backbone.patch_size,) * 2, num_classes)
    bank.load_probe_states(state["probes"])
    return args, backbone, bank.eval(), KeyedDataset(images, eval_transform(size, encoder.mean, encoder.std), 0)


@torch.no_grad()
def maps_of(backbone: VisionTransformer, bank: ProbeBank, images: Tensor) -> dict[str, Tensor]:
    """{"[cls]": (B,M), "AbMILP": (B,M)}: weights over the patches, each summing to 1. ValueError without the heads."""
    found = {}
    features = backbone(images, bank.blocks, cls_attention=backbone.has_cls)
    if backbone.has_cls:
        attention = features[max(bank.blocks)].cls_attention.mean(1)
        found["[cls]"] = attention / attention.sum(1, keepdim=True)
    probes = [(s, p) for s, p in zip(bank.specs, bank.probes, strict=True) if s.aggregation == "abmilp"]
    if not probes:
        raise ValueError("the run has no abmilp probe: its --cls_features must name abmilp")
    M = features[max(bank.blocks)].patches.shape[1]
    weights = torch.stack([  # of several branches, the mean
        probe.aggregation(features[spec.block]).weights[..., -M:].reshape(len(images), -1, M).mean(1)
        for spec, probe in probes
    ]).mean(0)  # fmt: skip
    found["AbMILP"] = weights / weights.sum(1, keepdim=True)
    return found


@rc_context(STYLE)
def draw(pictures: np.ndarray, columns: dict[str, Tensor], target: Path) -> None:
    """pictures (B,h,w,3); columns {title: (B,rows,columns) maps in multiples of uniform}; one row per image."""
    top = max(float(column.quantile(0.995)) for column in columns.values())
    rows, count = len(pictures), 1 + len(columns)
    figure = Figure(figsize=(1.3 * count + 0.6, 1.3 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False)
    for row in range(rows):
        axes[row, 0].imshow(pictures[row])
        for axis, column in zip(axes[row, 1:], columns.values(), strict=True):
            draw_map(axis, pictures[row], column[row].numpy(), top)
    for axis, title in zip(axes[0], ["image", *columns], strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    add_scale(figure, top, more=any(float(column.max()) > top for column in columns.values()))
    save_figure(figure, target)


def main(args: argparse.Namespace) -> None:
    columns, pictures = {}, None
    for word in args.runs:
        label, _, folder = word.rpartition("=")
        _, backbone, bank, images = load_run(Path(folder))
        generator = torch.Generator().manual_seed(stable_seed("maps", args.seed))
        chosen = torch.randperm(len(images), generator=generator)[: args.images].tolist()
        batch = torch.stack([images[0, index].image for index in chosen])
        grid = [side // backbone.patch_size for side in batch.shape[-2:]]
        for name, weights in maps_of(backbone, bank, batch).items():
            columns[f"{label or Path(folder).name}: {name}"] = (weights * weights.shape[1]).unflatten(1, grid)
        pictures = visible(batch, images.transform)
    draw(pictures, columns, args.output)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="folders of main_linprobe.py")
    parser.add_argument("--output", type=Path, default=Path("maps.png"), help="the figure")
    parser.add_argument("--images", type=int, default=5, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="which images")
    run_main(main, parser.parse_args())
