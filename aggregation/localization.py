"""Localisation by thresholded maps: MaxBoxAccV2, and MaxBoxAcc (V1), of Choe et al. 2020.

A map of patch weights is enlarged to the image's size and cut at every threshold; the bounding rectangles of the
contours are the predicted boxes. At a threshold and an IoU, an image counts as found if some predicted box (V1: that
of the largest contour) overlaps some true box by that IoU. MaxBoxAccV2 is the mean over the IoUs of the largest share
of found images over the thresholds, each threshold being chosen for all images at once.
Source: "Evaluating weakly supervised object localization methods right", CVPR 2020; conventions of their evaluation.

Boxes are x0, y0, x1, y1 in pixels, inclusive. Letters: R maps of an image, T levels, n predicted boxes, m true boxes.
This module is all that worker processes import, hence no PyTorch.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from util import signals
from util.workers import DeadWorker

IOUS = (0.3, 0.5, 0.7)
TOP = 255  # largest value of an 8-bit map
IMAGES_PER_JOB = 4
LEVELS_AT_ONCE = 10


# ---- one map


def levels_of(step: float) -> np.ndarray:
    """(T,) the distinct levels of thresholds 0, step, 2 step, ... below 1; a map is cut to the pixels above a level.

    Maps have 8 bits, so levels are integers from 0 to 254, and a step of 0.001 gives all of them.
    """
    if not 0 < step < 1:
        raise ValueError(f"--loc_step must be in (0, 1), got {step}")
    return np.unique((np.arange(0, 1, step) * TOP).astype(np.int64))


def enlarge(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Weights (rows,columns) of the patches -> (h,w) by cubic interpolation, unclipped; size: (h,w)."""
    return cv2.resize(np.ascontiguousarray(weights, np.float64), size[::-1], interpolation=cv2.INTER_CUBIC)


def score_map(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Weights (rows,columns) -> (h,w) uint8 from 0 to 255; zeros if they are constant or not all finite."""
    enlarged = enlarge(weights, size) if np.isfinite(weights).all() else np.zeros(size)
    enlarged -= enlarged.min()
    enlarged /= enlarged.max() or 1
    return (enlarged * TOP).astype(np.uint8)


def contours_above(scores: np.ndarray, level: int, mask: np.ndarray | None = None) -> Sequence[np.ndarray]:
    """Contours, those of holes too, of the pixels above a level in a map (h,w) uint8; none if the map is all zeros.

    mask: memory for the pixels above the level; new memory for each level takes as long as the contours.
    """
    _, mask = cv2.threshold(scores, level, 1, cv2.THRESH_BINARY, mask)
    return cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def bounding_boxes(contours: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Boxes (n,4) in an image of `size` (h,w), which end one pixel behind the contour, as in the published evaluation.

    Without contours, the box is the first pixel.
    """
    if not contours:
        return np.zeros((1, 4), np.int64)
    points, starts = np.concatenate(contours)[:, 0], np.cumsum([0, *map(len, contours)])[:-1]
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts) + 1
    return np.concatenate([low, np.minimum(high, (size[1] - 1, size[0] - 1))], axis=1).astype(np.int64)


def largest_of(contours: Sequence[np.ndarray]) -> int:
    return int(np.argmax([cv2.contourArea(contour) for contour in contours])) if len(contours) > 1 else 0


def boxes_at(scores: np.ndarray, level: int) -> tuple[np.ndarray, int]:
    """Boxes (n,4) of the pixels above a level in a map (h,w) uint8, and the index of the largest contour's box."""
    contours = contours_above(scores, level)
    return bounding_boxes(contours, scores.shape), largest_of(contours)


def intersections(boxes: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes (n,4) with (m,4), border pixels included: intersection over union (n,m), and the shares of `truth`."""

    def area(box: np.ndarray) -> np.ndarray:
        return (box[..., 2:] - box[..., :2] + 1).clip(min=0).prod(-1)

    boxes, truth = boxes[:, None], truth[None]
    low, high = np.maximum(boxes[..., :2], truth[..., :2]), np.minimum(boxes[..., 2:], truth[..., 2:])
    shared = area(np.concatenate([low, high], axis=-1))
    return shared / (area(boxes) + area(truth) - shared), shared / area(truth)


def found_boxes(scores: np.ndarray, truth: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Whether a true box is found (2,T,3) by the contours of a `score_map`: by any (V2) or the largest (V1), at each
    level and IoU.

    Boxes of a level lie within boxes of every lower level. So their IoUs are at most the shares of the true boxes that
    lower boxes cover: from the level on at which these are too small, nothing is found.
    """
    present = np.bincount(scores.ravel(), minlength=TOP + 1) > 0
    # levels with the same pixels above them are evaluated once
    _, first, of_level = np.unique(np.cumsum(present)[levels], return_index=True, return_inverse=True)
    found, mask = np.zeros((2, len(first), len(IOUS)), bool), np.empty_like(scores)
    for start in range(0, len(first), LEVELS_AT_ONCE):
        some = levels[first[start : start + LEVELS_AT_ONCE]].tolist()
        cuts = [contours_above(scores, level, mask) for level in some]
        starts = np.cumsum([0, *map(len, cuts)])[:-1]
        boxes = bounding_boxes([contour for contours in cuts for contour in contours], scores.shape)
        overlaps, shares = (part.max(1) for part in intersections(boxes, truth))
        best = np.maximum.reduceat(overlaps, starts), overlaps[starts + list(map(largest_of, cuts))]
        found[:, start : start + len(cuts)] = np.stack(best)[..., None] >= IOUS
        if shares[starts[-1] :].max() < IOUS[0]:
            break
    return found[:, of_level]


# ---- many images


class Tally(NamedTuple):
    """Numbers of found images per map, level and IoU: integer sums, equal for any split of the images."""

    images: int  # with a true box
    found: np.ndarray  # (R,T,3) by any contour
    found_v1: np.ndarray  # (R,T,3) by the largest contour
    found_whole: np.ndarray  # (3,) by the whole image as a box, as a baseline
    without_map: np.ndarray  # (R,) images whose map is not finite; nothing is found there
    images_left_out: int = 0  # without a true box
    boxes_left_out: int = 0  # outside of the crop

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def no_images(maps: int, levels: int) -> Tally:
    counts = np.zeros((2, maps, levels, len(IOUS)), np.int64)
    return Tally(0, *counts, np.zeros(len(IOUS), np.int64), np.zeros(maps, np.int64))


def tally(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray], size: tuple[int, int], levels: np.ndarray) -> Tally:
    """maps: (R,rows,columns) per image; truths: its boxes (m,4) in an image of `size` (h,w)."""
    total = no_images(len(maps[0]) if len(maps) else 0, len(levels))
    whole = np.array([[0, 0, size[1] - 1, size[0] - 1]])
    for of_image, truth in zip(maps, truths, strict=True):
        if not len(truth):
            total = total._replace(images_left_out=total.images_left_out + 1)
            continue
        found = np.stack([found_boxes(score_map(weights, size), truth, levels) for weights in of_image], axis=1)
        without_map = ~np.isfinite(of_image).all((1, 2))
        total += Tally(1, *found, intersections(whole, truth)[0].max() >= IOUS, without_map)
    return total


def summary(total: Tally, number: int, levels: np.ndarray) -> dict:
    """Accuracies of map `number` in percent, with the thresholds (of a map scaled to 0..1) that give them."""
    accuracy, v1 = (100 * counts[number] / total.images for counts in (total.found, total.found_v1))
    v1, thresholds = v1[:, IOUS.index(0.5)], levels / TOP
    best = accuracy.max(0).tolist(), thresholds[accuracy.argmax(0)].tolist()
    return {
        "maxboxaccv2": float(accuracy.max(0).mean()),
        "boxaccv2": [
            {"iou": iou, "max": most, "threshold": threshold} for iou, most, threshold in zip(IOUS, *best, strict=True)
        ],
        "maxboxacc": float(v1.max()),
        "threshold_v1": float(thresholds[v1.argmax()]),
        "found": total.found[number].tolist(),
        "images_without_map": int(total.without_map[number]),
    }


@contextlib.contextmanager
def _watched_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DeadWorker("a process that evaluates boxes was killed, perhaps for lack of memory") from error


def _begin_worker() -> None:
    """One thread, as there is one worker per core; and end with the program, even if that is killed."""
    cv2.setNumThreads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


class Localizer:
    """Evaluates maps in worker processes while the next ones are computed; workers = 0: in this process.

    A context manager; leaving it by an error kills the workers. DeadWorker if a worker was killed.
    """

    def __init__(self, maps: int, size: tuple[int, int], levels: np.ndarray, workers: int):
        self.size, self.levels, self.workers = size, levels, workers
        self.jobs: deque[Future] = deque()
        self.total = self.nothing = no_images(maps, len(levels))
        # not forked from this process, which has threads and perhaps a GPU
        start = get_context("forkserver"), _begin_worker
        self.pool = ProcessPoolExecutor(workers, *start) if workers else None

    def __enter__(self) -> "Localizer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pool is not None:
            processes = list((self.pool._processes or {}).values())
            self.pool.shutdown(wait=kind is None, cancel_futures=True)
            for process in processes if kind is not None else []:
                process.kill()

    def add(self, maps: np.ndarray, truths: Sequence[np.ndarray]) -> None:
        """Add a batch: maps (B,R,rows,columns) and each image's true boxes. Blocks while workers are far behind."""
        for start in range(0, len(maps), IMAGES_PER_JOB):
            part = slice(start, start + IMAGES_PER_JOB)
            job = maps[part], truths[part], self.size, self.levels
            if self.pool is None:
                self.total += tally(*job)
                continue
            with signals.blocked(), _watched_workers():  # workers that this call starts inherit the blocked signals
                self.jobs.append(self.pool.submit(tally, *job))
            self._collect(most=8 * self.workers)

    def result(self) -> Tally:
        """Tally of all maps added since the last call; waits for the workers."""
        self._collect(most=0)
        total, self.total = self.total, self.nothing
        return total

    def _collect(self, most: int) -> None:
        """Wait until at most that many jobs are left."""
        while len(self.jobs) > most:
            with _watched_workers():
                self.total += self.jobs.popleft().result()
