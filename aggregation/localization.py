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
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np

from util import signals
from util.workers import DeadWorker

IOUS = (0.3, 0.5, 0.7)
TOP = 255  # largest value of an 8-bit map
IMAGES_PER_JOB = 4


# ---------------------------------------------------------------------------------------------------------------------
# one map
# ---------------------------------------------------------------------------------------------------------------------


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
    if not np.isfinite(weights).all():
        return np.zeros(size, np.uint8)
    enlarged = enlarge(weights, size)
    if enlarged.min() == enlarged.max():
        return np.zeros(size, np.uint8)
    enlarged -= enlarged.min()
    enlarged /= enlarged.max()
    return (enlarged * TOP).astype(np.uint8)


def boxes_at(scores: np.ndarray, level: int) -> tuple[np.ndarray, int]:
    """Boxes (n,4) of the pixels above a level in a map (h,w) uint8, and the index of the largest contour's box.

    Contours of holes count too. If no pixel is above the level, the only box is the first pixel.
    """
    contours, _ = cv2.findContours((scores > level).view(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return np.zeros((1, 4), np.int64), 0
    boxes = np.array([cv2.boundingRect(contour) for contour in contours], np.int64)
    boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], (scores.shape[1] - 1, scores.shape[0] - 1))
    largest = 0 if len(contours) == 1 else int(np.argmax([cv2.contourArea(contour) for contour in contours]))
    return boxes, largest


def overlaps(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union (n,m) of boxes (n,4) and (m,4), border pixels included."""

    def area(box: np.ndarray) -> np.ndarray:
        return (box[..., 2] - box[..., 0] + 1) * (box[..., 3] - box[..., 1] + 1)

    boxes, truth = boxes[:, None], truth[None]
    low, high = np.maximum(boxes[..., :2], truth[..., :2]), np.minimum(boxes[..., 2:], truth[..., 2:])
    shared = (high - low + 1).clip(min=0).prod(-1)
    return shared / (area(boxes) + area(truth) - shared)


def best_overlaps(scores: np.ndarray, truth: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best IoU with any true box at each level (T,): of all contours (V2), and of the largest one (V1)."""
    present = np.bincount(scores.ravel(), minlength=TOP + 1) > 0
    # levels with the same pixels above them are evaluated once
    _, first, of_level = np.unique(np.cumsum(present)[levels], return_index=True, return_inverse=True)
    cuts = [boxes_at(scores, int(levels[index])) for index in first]
    starts = np.cumsum([0, *(len(boxes) for boxes, _ in cuts)])[:-1]
    best = overlaps(np.concatenate([boxes for boxes, _ in cuts]), truth).max(1)
    largest = starts + [index for _, index in cuts]
    return np.maximum.reduceat(best, starts)[of_level], best[largest][of_level]


# ---------------------------------------------------------------------------------------------------------------------
# many images
# ---------------------------------------------------------------------------------------------------------------------


class Tally(NamedTuple):
    """Numbers of found images per map, level and IoU: integer sums, equal for any split of the images."""

    images: int
    found: np.ndarray  # (R,T,3) by any contour
    found_v1: np.ndarray  # (R,T,3) by the largest contour
    found_whole: np.ndarray  # (3,) by the whole image as a box, as a baseline

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def no_images(maps: int, levels: int) -> Tally:
    counts = np.zeros((maps, levels, len(IOUS)), np.int64)
    return Tally(0, counts, counts.copy(), np.zeros(len(IOUS), np.int64))


def tally(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray], size: tuple[int, int], levels: np.ndarray) -> Tally:
    """maps: (R,rows,columns) per image; truths: its boxes (m,4) in an image of `size` (h,w), at least one."""
    total = no_images(len(maps[0]) if len(maps) else 0, len(levels))
    whole = np.array([[0, 0, size[1] - 1, size[0] - 1]])
    for of_image, truth in zip(maps, truths, strict=True):
        best = [best_overlaps(score_map(weights, size), truth, levels) for weights in of_image]
        found, found_v1 = (np.stack(parts)[..., None] >= IOUS for parts in zip(*best, strict=True))
        total += Tally(1, found, found_v1, overlaps(whole, truth).max() >= IOUS)
    return total


def summary(total: Tally, number: int, levels: np.ndarray) -> dict:
    """Accuracies of map `number` in percent, with the thresholds (of a map scaled to 0..1) that give them."""
    accuracy, accuracy_v1 = (100 * counts[number] / total.images for counts in (total.found, total.found_v1))
    best, half = accuracy.argmax(0), IOUS.index(0.5)
    return {
        "maxboxaccv2": float(accuracy.max(0).mean()),
        "boxaccv2": [
            {"iou": iou, "max": float(accuracy[level, column]), "threshold": float(levels[level] / TOP)}
            for column, (iou, level) in enumerate(zip(IOUS, best, strict=True))
        ],
        "maxboxacc": float(accuracy_v1[:, half].max()),
        "threshold_v1": float(levels[accuracy_v1[:, half].argmax()] / TOP),
        "found": total.found[number].tolist(),
    }


@contextlib.contextmanager
def _watched_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DeadWorker("a process that evaluates boxes was killed, perhaps for lack of memory") from error


class Localizer:
    """Evaluates maps in worker processes while the next ones are computed; workers = 0: in this process.

    A context manager; leaving it by an error kills the workers. DeadWorker if a worker was killed.
    """

    def __init__(self, maps: int, size: tuple[int, int], levels: np.ndarray, workers: int):
        self.maps, self.size, self.levels, self.workers = maps, size, levels, workers
        self.total = self.empty()
        self.jobs: deque[Future] = deque()
        # not forked from this process, which has threads and perhaps a GPU
        context = get_context("forkserver")
        self.pool = ProcessPoolExecutor(workers, context, initializer=_start_worker) if workers else None

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
            if self.pool is None:
                self.total += tally(maps[part], truths[part], self.size, self.levels)
                continue
            with signals.blocked(), _watched_workers():  # workers that this call starts inherit the blocked signals
                self.jobs.append(self.pool.submit(tally, maps[part], truths[part], self.size, self.levels))
            while len(self.jobs) > 8 * self.workers:
                self._wait()

    def empty(self) -> Tally:
        return no_images(self.maps, len(self.levels))

    def result(self) -> Tally:
        """Tally of all maps added since the last call; waits for the workers."""
        while self.jobs:
            self._wait()
        total, self.total = self.total, self.empty()
        return total

    def _wait(self) -> None:
        with _watched_workers():
            self.total += self.jobs.popleft().result()


def _start_worker() -> None:
    cv2.setNumThreads(1)  # there is one worker per core
