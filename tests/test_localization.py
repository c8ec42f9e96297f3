"""MaxBoxAccV2 against a slow transcription of its definition, at every threshold; and over processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from aggregation.localization import (
    IOUS,
    Localizer,
    boxes_at,
    found_boxes,
    intersections,
    levels_of,
    score_map,
    summary,
    tally,
)
from util.workers import DeadWorker

SIZE = (224, 224)
LEVELS = levels_of(0.001)
TAUS = np.arange(0, 1, 0.001)


def defined(weights: np.ndarray, truth: np.ndarray, taus: np.ndarray, every: bool, size=SIZE) -> np.ndarray:
    """The best IoU at each threshold, word by word from the definition. every: all contours, or the largest alone."""
    found = np.zeros(len(taus))
    large = cv2.resize(weights.astype(np.float64), (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    if not np.isfinite(large).all() or large.min() == large.max():
        large = np.zeros(size)
    else:
        large = large - large.min()
        large = large / large.max()
    grey = (large * 255).astype(np.uint8)
    for number, tau in enumerate(taus):
        _, binary = cv2.threshold(grey, int(tau * grey.max()), 255, cv2.THRESH_BINARY)
        contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        if not every and contours:
            contours = [max(contours, key=cv2.contourArea)]
        predicted = [(0, 0, 0, 0)] if not contours else []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            predicted.append((x, y, min(x + w, size[1] - 1), min(y + h, size[0] - 1)))
        for a in predicted:
            for b in truth:
                width = min(a[2], b[2]) - max(a[0], b[0]) + 1
                height = min(a[3], b[3]) - max(a[1], b[1]) + 1
                shared = max(0, width) * max(0, height)
                both = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)) - shared
                found[number] = max(found[number], shared / both)
    return found


def random_truth(rng: np.random.Generator, boxes: int, size=SIZE) -> np.ndarray:
    corners = np.sort(rng.integers(0, min(size), (boxes, 2, 2)), axis=1)
    return corners.reshape(boxes, 4)


def ring() -> np.ndarray:
    weights = np.zeros((14, 14))
    weights[3:11, 3:11], weights[5:9, 5:9] = 1, 0
    return weights


def smooth(rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(rng.gamma(1, size=(14, 14)), (0, 0), 1.5)


MAPS = {
    "smooth": smooth,
    "rough": lambda rng: rng.gamma(0.3, size=(14, 14)),
    "coarse": lambda rng: rng.random((4, 6)),
    "one patch": lambda rng: np.eye(196)[rng.integers(196)].reshape(14, 14),
    "hole": lambda rng: ring() + 0.1 * rng.random((14, 14)),
    "constant": lambda rng: np.full((14, 14), 1 / 196),
    "nan": lambda rng: np.where(rng.random((14, 14)) < 0.1, np.nan, rng.random((14, 14))),
    "infinite": lambda rng: np.where(rng.random((14, 14)) < 0.1, np.inf, rng.random((14, 14))),
}


@pytest.mark.parametrize("boxes", [1, 4])
@pytest.mark.parametrize("kind", MAPS)
def test_every_threshold_is_the_definitions(kind, boxes):
    rng = np.random.default_rng(len(kind) + boxes)
    weights, truth = MAPS[kind](rng), random_truth(rng, boxes)
    place = np.searchsorted(LEVELS, (TAUS * 255).astype(int))
    some = slice(None) if kind in ("smooth", "hole") else slice(None, None, 37)
    for found, every in zip(found_boxes(score_map(weights, SIZE), truth, LEVELS), (True, False), strict=True):
        np.testing.assert_array_equal(found[place][some], defined(weights, truth, TAUS[some], every)[:, None] >= IOUS)


def test_images_that_are_not_square_are_the_definitions_too():
    rng, size = np.random.default_rng(5), (60, 100)
    weights, truth = rng.random((6, 10)), random_truth(rng, 2, size)
    found, _ = found_boxes(score_map(weights, size), truth, levels_of(0.01))
    place = np.searchsorted(levels_of(0.01), (np.arange(0, 1, 0.01) * 255).astype(int))
    expected = defined(weights, truth, np.arange(0, 1, 0.01), True, size)
    np.testing.assert_array_equal(found[place], expected[:, None] >= IOUS)


def test_accuracies_over_images_are_the_definitions():
    rng, taus, levels = np.random.default_rng(7), np.arange(0, 1, 0.02), levels_of(0.02)
    maps = np.stack([[smooth(rng), rng.random((14, 14))] for _ in range(12)])
    truths = [random_truth(rng, 1 + index % 3) for index in range(12)]
    total = tally(maps, truths, SIZE, levels)
    for number in range(2):
        each = np.stack([defined(maps[i, number], truths[i], taus, True) for i in range(12)])
        best = [100 * (each >= iou).mean(0).max() for iou in IOUS]
        found = summary(total, number, levels)
        assert [one["max"] for one in found["boxaccv2"]] == pytest.approx(best, abs=1e-12)
        assert found["maxboxaccv2"] == pytest.approx(np.mean(best), abs=1e-12)
        largest = np.stack([defined(maps[i, number], truths[i], taus, False) for i in range(12)])
        assert found["maxboxacc"] == pytest.approx(100 * (largest >= 0.5).mean(0).max(), abs=1e-12)


def test_perfect_maps_give_100_and_their_threshold():
    boxes = [np.array([[20, 30, 90, 120]]), np.array([[100, 5, 180, 200], [0, 0, 3, 3]])]
    maps = np.zeros((2, 1, *SIZE))
    for one, truth in zip(maps, boxes, strict=True):
        x0, y0, x1, y1 = truth[0]
        one[0, y0 : y1 + 1, x0 : x1 + 1] = 1
    found = summary(tally(maps, boxes, SIZE, LEVELS), 0, LEVELS)
    assert found["maxboxaccv2"] == found["maxboxacc"] == 100
    assert {one["threshold"] for one in found["boxaccv2"]} == {0.0}


def test_holes_are_boxes_of_their_own():
    scores = score_map(np.kron(ring(), np.ones((16, 16))), SIZE)
    boxes, largest = boxes_at(scores, 128)
    assert len(boxes) == 2 and boxes[largest].tolist() == [48, 48, 176, 176]
    inner = np.array([[80, 80, 143, 143]])
    assert found_boxes(scores, inner, np.array([128]))[:, 0].tolist() == [[True] * 3, [False] * 3]


def test_border_pixels_count():
    truth = np.array([[0, 0, 9, 9], [9, 9, 18, 18], [10, 0, 19, 9]])
    overlaps, shares = intersections(truth[:1], truth)
    assert overlaps.tolist() == [[1.0, pytest.approx(1 / 199), 0.0]] and shares.tolist() == [[1.0, 0.01, 0.0]]


def test_255_levels_are_all_thresholds_of_step_a_thousandth():
    assert LEVELS.tolist() == list(range(255)) == sorted({int(tau * 255) for tau in TAUS})
    assert len(levels_of(0.01)) == 100
    for step in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="--loc_step"):
            levels_of(step)


def test_processes_count_as_one_does():
    rng = np.random.default_rng(3)
    maps, truths = rng.random((11, 2, 5, 5)), [random_truth(rng, 1 + index % 2, (40, 40)) for index in range(11)]
    totals = []
    for workers, batch in ((0, 11), (2, 3)):
        with Localizer(2, (40, 40), LEVELS, workers) as localizer:
            for start in range(0, 11, batch):
                localizer.add(maps[start : start + batch], truths[start : start + batch])
            totals.append(localizer.result())
    for one, other in zip(*totals, strict=True):
        assert np.array_equal(one, other)
    assert totals[0].images == 11


def test_killed_worker_is_an_error_that_says_so():
    truth = np.array([[0, 0, 5, 5]])
    with pytest.raises(DeadWorker, match="was killed"), Localizer(1, (40, 40), LEVELS, 1) as localizer:
        localizer.add(np.ones((1, 1, 5, 5)), [truth])
        localizer.result()
        for process in localizer.pool._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        for _ in range(50):
            localizer.add(np.random.rand(8, 1, 5, 5), [truth] * 8)
        localizer.result()


PROGRAM = """
import time
import numpy as np
from aggregation.localization import Localizer
if __name__ == "__main__":
    localizer = Localizer(1, (40, 40), np.arange(255), 2)
    localizer.add(np.ones((8, 1, 4, 4)), [np.array([[0, 0, 9, 9]])] * 8)
    print(*localizer.pool._processes, flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_killed_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).resolve().parent.parent
    command, environment = [sys.executable, tmp_path / "program.py"], {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        workers = program.stdout.readline().split()
        program.kill()
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)
