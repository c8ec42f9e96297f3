"""Examples of an aggregation analysis: maps of the rules over a few images (Fig. 9), and the boxes that come of them
(Fig. 8)."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from aggregation.boxes import ImageBoxes
from aggregation.figures import BOXES, Found, draw_boxes, draw_maps
from aggregation.localization import TOP, boxes_at, overlaps, score_map
from aggregation.rules import Rule, vectors_of
from data_sets.images import DamagedImage, read_rgb
from data_sets.views import View
from engine_linprobe import FrozenTokens
from util.plotting import visible
from util.progress import log
from util.seeding import stable_seed

LEARNED = ("abmilp", "ap", "ep")  # which rule stands beside [cls], the first that there is


class Example(NamedTuple):
    path: str
    index: int | None  # in the data set; None for another file
    image: Image.Image | Tensor


def choose_examples(args: argparse.Namespace, images: Dataset, chosen: Sequence[int]) -> list[Example]:
    """The files of --images, or some of the analysed images that are a function of the seed. ValueError for a file that
    is none; damaged images of the data set are passed over."""
    samples = getattr(images, "samples", None)
    if args.images:
        known = {os.path.abspath(path): number for number, (path, _) in enumerate(samples or [])}
        found = []
        for path in args.images:
            try:
                found.append(Example(path, known.get(os.path.abspath(path)), read_rgb(path)))
            except Exception as error:  # decoders raise anything
                raise ValueError(f"--images {path}: cannot read image: {error}") from error
        return found
    generator = torch.Generator().manual_seed(stable_seed("examples", args.seed))
    found = []
    for place in torch.randperm(len(chosen), generator=generator).tolist():
        if len(found) == args.num_examples:
            break
        index = chosen[place]
        try:
            found.append(Example(samples[index][0] if samples else f"number {index}", index, images[index][0]))
        except (DamagedImage, OSError, SyntaxError, ValueError):  # it was counted, if it was asked to be passed over
            continue
    return found


@torch.no_grad()
def maps_of(
    rules: Sequence[Rule], tokens: FrozenTokens, images: Tensor, device: torch.device
) -> dict[str, np.ndarray]:  # fmt: skip
    """Images (B,3,h,w) -> {rule: (B,rows,columns)} in multiples of uniform weights."""
    vectors, grid = vectors_of(rules, tokens(images.to(device))).cpu(), tokens.backbone.grid_of(*images.shape[-2:])
    maps = (vectors * vectors.shape[2]).unflatten(2, grid).numpy()
    return {rule.name: maps[:, number] for number, rule in enumerate(rules)}


def shown_rules(rules: Sequence[Rule]) -> list[Rule]:
    """One rule of each kind: of the seeds of a probe, the first; uniform weights show nothing."""
    kinds: dict[str, Rule] = {}
    for rule in rules:
        kinds.setdefault(rule.name.removesuffix(f"/seed{rule.seed}"), rule)
    return [rule for rule in kinds.values() if rule.head != "pos"]


def compared_rules(rules: Sequence[Rule]) -> list[Rule]:
    """The two rules whose boxes are drawn: mean [cls] attention, and what was learned; else the first of the others."""
    cls = [rule for rule in rules if rule.head == "attn-mn"][:1]
    learned = [rule for kind in LEARNED for rule in rules if rule.probe is not None and rule.head.startswith(kind)]
    return [*cls, *(learned or [rule for rule in rules if rule not in cls])[: len(BOXES) - len(cls)]]


def draw_examples(
    args: argparse.Namespace, result: dict, rules: Sequence[Rule], tokens: FrozenTokens, examples: Sequence[Example],
    pixels: dict[str, View], boxes: ImageBoxes | None, folder: Path, device: torch.device,
) -> None:  # fmt: skip
    """maps.png, and boxes.png where there are boxes."""
    if not examples:
        return
    log.info("examples: %s", ", ".join(example.path for example in examples))
    shown = shown_rules(rules)
    if shown and not args.boxes_only:
        batch = torch.stack([pixels["crop"](example.image) for example in examples])
        draw_maps(visible(batch, pixels["crop"]), maps_of(shown, tokens, batch, device), folder / "maps.png")
    compared = compared_rules(shown)
    if boxes is None or not compared:
        return
    view = args.loc_transform
    batch = torch.stack([pixels[view](example.image) for example in examples])
    size = tuple(batch.shape[-2:])
    truths = [true_boxes(boxes, example.index, size[0], view == "crop") for example in examples]
    thresholds = {rule.name: threshold_of(result, rule.name, args.draw_threshold) for rule in compared}
    found = {
        name: [largest_box(one, truth, size, thresholds[name]) for one, truth in zip(maps, truths, strict=True)]
        for name, maps in maps_of(compared, tokens, batch, device).items()
    }
    draw_boxes(visible(batch, pixels[view]), truths, found, thresholds, folder / "boxes.png")


def true_boxes(boxes: ImageBoxes, index: int | None, size: int, crop: bool) -> np.ndarray:
    """(m,4); none for an image that is not of the data set, or has no box there."""
    if index is None or boxes.annotations[index] is None:
        return np.zeros((0, 4), np.int64)
    return boxes.cropped(index, size) if crop else boxes.resized(index, size)


def threshold_of(result: dict, rule: str, asked: float | None) -> float:
    """Decision D25 of the reproduction: the threshold that is best for all images at IoU 0.5."""
    accuracies = result["localization"]["maps"][rule]["boxaccv2"]
    return asked if asked is not None else next(one["threshold"] for one in accuracies if one["iou"] == 0.5)


def largest_box(weights: np.ndarray, truth: np.ndarray, size: tuple[int, int], threshold: float) -> Found:
    """The box of the largest contour of a map (rows,columns) at a threshold, in an image of `size` (h,w)."""
    # thresholds that are a level's are that level, whatever the division has left of it
    boxes, largest = boxes_at(score_map(weights, size), int(threshold * TOP + 1e-9))
    overlap = float(overlaps(boxes[largest : largest + 1], truth).max()) if len(truth) else None
    return Found(weights, boxes[largest], overlap)
