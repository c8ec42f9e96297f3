"""Scores of one label and of several, against definitions in loops, sklearn and torchmetrics."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from util.scores import MultiLabelTally, Tally, average_precision, multilabel_scores

RNG = np.random.default_rng(0)


def random_labels(n, classes, share=0.2):
    return torch.from_numpy((RNG.random((n, classes)) < share).astype(np.uint8))


def random_logits(n, classes, levels=None):
    """levels: so few distinct values that images tie."""
    values = RNG.normal(size=(n, classes)) if levels is None else RNG.integers(-levels, levels + 1, (n, classes))
    return torch.from_numpy(values.astype(np.float32))


def precision_by_definition(scores, targets):
    """sum over distinct thresholds of (recall gained) x (precision there)."""
    result, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [target for score, target in zip(scores, targets, strict=True) if score >= threshold]
        result += (sum(taken) / sum(targets) - recall) * sum(taken) / len(taken)
        recall = sum(taken) / sum(targets)
    return result


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize(("n", "share"), [(2, 0.9), (60, 0.2), (150, 0.03)])
def test_average_precision_is_sklearns_and_the_definitions(n, share, levels):
    scores, targets = random_logits(n, 12, levels), random_labels(n, 12, share)
    targets[0] = 1  # a positive in each class
    found = average_precision(scores, targets)
    sklearns = [average_precision_score(targets[:, k].numpy(), scores[:, k].numpy()) for k in range(12)]
    defined = [precision_by_definition(scores[:, k].tolist(), targets[:, k].tolist()) for k in range(12)]
    np.testing.assert_allclose(found, sklearns, rtol=1e-12)
    np.testing.assert_allclose(found, defined, rtol=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_scores_are_torchmetrics(levels):
    classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    logits, labels = random_logits(300, 10, levels), random_labels(300, 10)
    probabilities = logits.sigmoid()
    found = multilabel_scores(logits, labels)
    precision = classification.MultilabelAveragePrecision(10, average=None)(probabilities, labels.long())
    np.testing.assert_allclose(average_precision(probabilities, labels), precision, atol=1e-6)
    macro = classification.MultilabelAveragePrecision(10)(probabilities, labels.long())
    assert found.map == pytest.approx(100 * macro.item(), abs=1e-4)
    accuracy = classification.MultilabelAccuracy(10, average="micro")(probabilities, labels.long())
    assert found.label_accuracy == pytest.approx(100 * accuracy.item(), abs=1e-4)


def test_class_without_a_positive_image_is_left_out_of_the_mean():
    logits, labels = random_logits(50, 4), random_labels(50, 4)
    labels[:, 2] = 0
    assert average_precision(logits, labels).isnan().tolist() == [False, False, True, False]
    kept = [0, 1, 3]
    found, without = multilabel_scores(logits, labels), multilabel_scores(logits[:, kept], labels[:, kept])
    assert found.map == without.map and found.classes == without.classes == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn says 0 and warns
        assert average_precision_score(labels[:, 2].numpy(), logits[:, 2].numpy()) == 0


def test_labels_of_no_image_have_no_mean():
    assert math.isnan(multilabel_scores(random_logits(5, 3), torch.zeros(5, 3, dtype=torch.uint8)).map)


def test_best_possible_and_constant_scores_are_known():
    labels = random_labels(200, 5)
    assert multilabel_scores(labels.float() - 0.5, labels)[:3] == (100, 100 * labels.any(1).double().mean(), 100)
    constant = average_precision(torch.zeros(200, 5), labels)
    torch.testing.assert_close(constant, labels.double().mean(0))  # all images enter at once: the share of positives


def test_other_scores_are_their_definitions():
    logits, labels = random_logits(70, 6), random_labels(70, 6)
    found = multilabel_scores(logits, labels)
    matches = [labels[i, max(range(6), key=lambda k, i=i: logits[i, k])].item() for i in range(70)]
    right = [(logits[i, k] > 0) == bool(labels[i, k]) for i in range(70) for k in range(6)]
    assert found.any_match == pytest.approx(100 * np.mean(matches))
    assert found.label_accuracy == pytest.approx(100 * np.mean(right))
    assert found.loss == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels.float()).item(), rel=1e-6)
    assert (found.n, found.classes) == (70, 6)


def test_batches_and_their_order_do_not_matter():
    logits, labels = [random_logits(90, 4, levels) for levels in (None, 2)], random_labels(90, 4)
    expected = [multilabel_scores(one, labels) for one in logits]
    for sizes in ([90], [1] * 90, [40, 0, 50]):
        tally, order = MultiLabelTally(2, 4), torch.randperm(90, generator=torch.Generator().manual_seed(1))
        for part in order.split(sizes):
            tally.update([one[part] for one in logits], labels[part])
        assert tally.compute() == expected


def test_diverged_classifier_has_no_scores_and_leaves_its_neighbour_alone():
    logits, labels = random_logits(30, 4), random_labels(30, 4)
    labels[0] = 1
    broken = logits.clone()
    broken[3, 1] = torch.nan
    tally = MultiLabelTally(2, 4)
    tally.update([broken, logits], labels)
    first, second = tally.compute()
    assert all(map(math.isnan, (first.map, first.any_match, first.label_accuracy, first.loss)))
    assert second == multilabel_scores(logits, labels)


def test_no_image_at_all_is_refused():
    with pytest.raises(ValueError, match="no image to evaluate on"):
        MultiLabelTally(1, 4).compute()
    with pytest.raises(ValueError, match="no image to evaluate on"):
        Tally(2, 4).compute()


def test_labels_of_several_classes_cannot_be_taken_for_probabilities():
    """Labels are uint8: as float32 of the right shape, cross_entropy would accept them in silence."""
    labels = random_labels(4, 3)
    for loss in (F.cross_entropy, F.binary_cross_entropy_with_logits):
        with pytest.raises(RuntimeError):
            loss(random_logits(4, 3), labels)


PROGRAM = """
import json
import torch
from util.distributed import distributed
from util.scores import MultiLabelTally

with distributed("cpu") as world:
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(41, 5, generator=random), torch.randint(-2, 3, (41, 5), generator=random).float()]
    labels = (torch.rand(41, 5, generator=random) < 0.3).to(torch.uint8)
    tallies = MultiLabelTally(2, 5), MultiLabelTally(2, 5)
    for tally, mine in zip(tallies, (slice(world.rank, None, world.size), slice(world.rank * 41, None))):
        if len(labels[mine]):  # the second leaves a rank without a batch
            tally.update([one[mine] for one in logits], labels[mine])
    scores = [tally.compute() for tally in tallies]
    if world.rank == 0:
        print(json.dumps(scores))
"""


def test_two_ranks_score_to_the_same_bits_as_one(tmp_path, run_ranks):
    (tmp_path / "program.py").write_text(PROGRAM)
    runs = [run_ranks(tmp_path / "program.py", ranks=ranks) for ranks in (1, 2)]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    (one, same), (shared, lonely) = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert one == same == shared == lonely


def test_single_label_scores_are_the_definitions():
    logits, labels = random_logits(40, 7), torch.from_numpy(RNG.integers(0, 6, 40))  # the last class has no image
    tally = Tally(2, 7)
    for part in torch.randperm(40).split(9):
        tally.update(torch.stack([logits[part], -logits[part]]), labels[part])
    found, reverse = tally.compute()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.top1 == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert found.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6) and found.n == 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guesses of a class without images
        assert found.per_class == pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1)))
    assert reverse.top1 == pytest.approx(100 * (ranks == 6).double().mean().item())
