"""Example images of an aggregation analysis: maps of the rules (Fig. 9), and the boxes that they predict (Fig. 8)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aggregation.boxes import ImageBoxes
from aggregation.figures import BOXES, display_name, draw_boxes, draw_maps
from aggregation.localization import TOP, boxes_at, score_map
from aggregation.rules import Rule, vectors_of
from data_sets.images import Example, read_image
from data_sets.views import View
from engine_linprobe import FrozenTokens
from util.plotting import visible

LEARNED = ("abmilp", "ap", "ep")  # the first that exists is compared with [cls]


def examples_from_files(images: Dataset, files: Sequence[str]) -> list[Example]:
    """ValueError for a file that is not an image."""
    known = {os.path.abspath(path): number for number, (path, _) in enumerate(getattr(images, "samples", []))}
    return [Example(path, known.get(os.path.abspath(path)), read_image(path)) for path in files]


@torch.no_grad()
def maps_of(rules: Sequence[Rule], tokens: FrozenTokens, images: Tensor) -> dict[str, np.ndarray]:
    """Images (B,3,h,w) -> {rule: (B,rows,columns)} in multiples of uniform weights."""
    device = next(tokens.backbone.parameters()).device
    vectors, grid = vectors_of(rules, tokens(images.to(device))).cpu(), tokens.backbone.grid_of(*images.shape[-2:])
    maps = (vectors * vectors.shape[2]).unflatten(2, grid).numpy()
    return {rule.name: maps[:, number] for number, rule in enumerate(rules)}


def shown_rules(rules: Sequence[Rule]) -> list[Rule]:
    """The rules without further seeds of the same probe and without uniform weights."""
    kinds: dict[str, Rule] = {}
    for rule in rules:
        kinds.setdefault(rule.name.removesuffix(f"/seed{rule.seed}"), rule)
    return [rule for rule in kinds.values() if rule.head != "pos"]


def compared_rules(rules: Sequence[Rule]) -> list[Rule]:
    """The two rules whose boxes are drawn: mean [cls] attention and a learned one, or else the first others."""
    cls = [rule for rule in rules if rule.head == "attn-mn"][:1]
    learned = [rule for kind in LEARNED for rule in rules if rule.probe is not None and rule.head.startswith(kind)]
    return [*cls, *(learned or [rule for rule in rules if rule not in cls])[: len(BOXES) - len(cls)]]


def draw_example_maps(
    rules: Sequence[Rule], tokens: FrozenTokens, examples: Sequence[Example], view: View, target: Path
) -> dict[str, Tensor]:
    """Draw the figure. Returns what it shows: `pictures` (n,h,w,3) uint8, and `weights` (n,R,M) in multiples of uniform
    weights, in float16."""
    batch = torch.stack([view(example.image) for example in examples])
    maps, pictures = maps_of(rules, tokens, batch), visible(batch, view)
    draw_maps(pictures, {display_name(name): values for name, values in maps.items()}, target)
    weights = np.stack(list(maps.values()), axis=1).reshape(len(batch), len(maps), -1)
    shown = {"pictures": np.rint(pictures * 255).astype(np.uint8), "weights": weights.astype(np.float16)}
    return {name: torch.from_numpy(array) for name, array in shown.items()}


def draw_example_boxes(
    rules: Sequence[Rule],
    tokens: FrozenTokens,
    examples: Sequence[Example],
    view: View,
    boxes: ImageBoxes,
    crop: bool,
    thresholds: dict[str, float],
    target: Path,
) -> None:
    """crop: whether the view is the central crop, else the stretched image; thresholds: of each rule."""
    batch = torch.stack([view(example.image) for example in examples])
    size, transformed = tuple(batch.shape[-2:]), boxes.cropped if crop else boxes.resized
    truths = [
        transformed(example.index, size[0])
        if example.index is not None and boxes.annotations[example.index]
        else np.zeros((0, 4), np.int64)
        for example in examples
    ]
    predictions = {}
    for name, maps in maps_of(rules, tokens, batch).items():
        level = int(thresholds[name] * TOP + 1e-9)  # thresholds that equal a level give that level despite rounding
        boxes_and_largest = [boxes_at(score_map(weights, size), level) for weights in maps]
        legend = f"{display_name(name)}: threshold {thresholds[name]:.2f}"
        predictions[legend] = [boxes[largest] for boxes, largest in boxes_and_largest]
    draw_boxes(visible(batch, view), truths, predictions, target)


def best_threshold(result: dict, rule: str) -> float:
    """Decision D25 of the reproduction: the threshold that is best over all images at IoU 0.5."""
    accuracies = result["localization"]["maps"][rule]["boxaccv2"]
    return next(accuracy["threshold"] for accuracy in accuracies if accuracy["iou"] == 0.5)
