"""k-nearest neighbours: scikit-learn's, DINO's protocol in a loop, and alike on any number of processes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from probing import knn
from probing.knn import knn_scores
from probing.results import log_neighbours


def blobs(n, classes=7, width=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(n, width, generator=random), labels


def test_votes_are_sklearns():
    (train, labels), (test, answers) = blobs(300), blobs(90, seed=1)
    found = knn_scores(train, labels, test, answers, [1, 10, 40], 7)
    for k, scores in found.items():
        judge = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: torch.exp((1 - torch.from_numpy(distance)) / 0.07).numpy()
        )
        judge.fit(train.numpy(), labels.numpy())
        assert scores["top1"] == pytest.approx(100 * judge.score(test.numpy(), answers.numpy()), abs=1e-9)


def test_blocks_of_images_and_groups_of_similarities_change_no_vote(monkeypatch):
    (train, labels), (test, answers) = blobs(311), blobs(90, seed=1)
    expected = knn_scores(train, labels, test, answers, [1, 9, 40], 7)
    for block, group in ((311, 4), (64, 3), (50, 2), (7, 16)):
        monkeypatch.setattr(knn, "BLOCK", block)
        monkeypatch.setattr(knn, "GROUP", group)
        assert knn_scores(train, labels, test, answers, [1, 9, 40], 7) == expected


def test_votes_are_those_of_the_protocol_in_a_loop():
    (train, labels), (test, answers) = blobs(60), blobs(25, seed=1)
    hits, near = 0, 0
    for image, answer in zip(F.normalize(test), answers, strict=True):
        similarity = F.normalize(train) @ image
        votes = [0.0] * 7
        for index in similarity.argsort(descending=True)[:20].tolist():
            votes[labels[index]] += math.exp(similarity[index] / 0.07)
        order = sorted(range(7), key=lambda label: -votes[label])
        hits, near = hits + (order[0] == answer), near + (answer in order[:5])
    assert knn_scores(train, labels, test, answers, [20], 7)[20] == pytest.approx({
        "top1": 100 * int(hits) / 25, "top5": 100 * int(near) / 25
    })  # fmt: skip


def test_more_neighbours_than_images_are_refused():
    train, labels = blobs(9)
    with pytest.raises(ValueError, match="--knn 10: must be <= 9"):
        knn_scores(train, labels, train, labels, [1, 10], 7)


PROGRAM = """
import json
import sys

import torch

sys.path.insert(0, "tests")
from probing.knn import knn_scores
from test_knn import blobs
from util.distributed import distributed

with distributed("cpu") as world:
    (train, labels), (test, answers) = blobs(41), blobs(17, seed=1)
    mine = slice(world.rank, None, world.size)
    few = slice(0, 38) if world.rank == 0 else slice(38, None)  # a rank with fewer images than neighbours
    none = slice(0, 41 * (world.rank == 0))
    few = few if world.size > 1 else slice(None)
    scores = [knn_scores(train[own], labels[own], test[mine], answers[mine], [3, 9], 7) for own in (mine, few, none)]
    if world.rank == 0:
        print(json.dumps(scores))
"""


def test_two_ranks_find_the_neighbours_of_one(tmp_path, run_ranks):
    (tmp_path / "program.py").write_text(PROGRAM)
    runs = [run_ranks(tmp_path / "program.py", ranks=ranks) for ranks in (1, 2)]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    one, two = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert one == two == 3 * [one[0]]


def test_the_log_has_one_line_for_each_k(caplog):
    found = {"cls/block5": {"3": {"top1": 50.0}, "10": {"top1": 60.0}}} | {
        f"abmilp/block5/blr{rate}/seed0": {"3": {"top1": rate}, "10": {"top1": rate + 1}} for rate in (40.0, 45.0)
    }
    with caplog.at_level("INFO", "beyond_cls"):
        log_neighbours(found)
    assert caplog.messages == [
        "k-NN, k = 3: top-1 cls/block5 50.00, abmilp/block5 40.00 to 45.00 (2 probes)",
        "k-NN, k = 10: top-1 cls/block5 60.00, abmilp/block5 41.00 to 46.00 (2 probes)",
    ]
