"""Predictions of classifiers for every test image: collect, write to predictions.safetensors, read, score, compare with
guessing.

Letters: n images, K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import entr
from torch import Tensor

from encoders.load import load_plain_or_safetensors, safetensors_metadata
from probing.results import metric_label
from util.distributed import gather_rows
from util.files import reading, to_json
from util.intervals import best_guess
from util.progress import log
from util.scores import average_precision

FILE = "predictions.safetensors"
MARGIN = 0.05  # of the loss of a classifier that knows the class frequencies only


class Predictions(NamedTuple):
    """Predictions of one run, in the order of `index`."""

    index: Tensor  # (n,) positions in the test set, ascending
    labels: Tensor  # (n,) classes, or (n,K) zeros and ones
    # {classifier: (n,5) classes from the most likely on (fewer if K < 5); with several labels per image, (n,K) logits}
    outputs: dict[str, Tensor]
    losses: dict[str, Tensor]  # {classifier: (n,) cross-entropy, or mean binary cross-entropy, nats}
    facts: dict  # of the run: data set, weights, command


class PredictionKeeper:
    """Collects the predictions for this rank's batches."""

    def __init__(self, names: Sequence[str], classes: int, multi_label: bool, device: torch.device):
        self.names, self.multi_label, self.device = tuple(names), multi_label, device
        index, kept = torch.empty(0, dtype=torch.int64), min(5, classes)
        labels = torch.empty(0, classes, dtype=torch.uint8) if multi_label else index
        output = torch.empty(0, classes) if multi_label else torch.empty(0, kept, dtype=torch.int32)
        self.parts = {"index": [index], "labels": [labels]}  # a rank may have no images
        self.parts |= {f"output/{name}": [output] for name in names} | {
            f"loss/{name}": [torch.empty(0)] for name in names
        }

    def update(self, logits: list[Tensor], labels: Tensor, index: Tensor) -> None:
        """Add the logits (B,K) of each classifier, the labels, and the positions (B,) of the images."""
        batch = {"index": index, "labels": labels}
        for name, scores in zip(self.names, logits, strict=True):
            if self.multi_label:
                output = scores.float()
                loss = F.binary_cross_entropy_with_logits(output, labels.float(), reduction="none").mean(1)
            else:
                output = scores.topk(min(5, scores.shape[1])).indices.to(torch.int32)
                loss = F.cross_entropy(scores.float(), labels, reduction="none")
            batch |= {f"output/{name}": output, f"loss/{name}": loss}
        for key, values in batch.items():
            self.parts[key].append(values.cpu())

    def gather(self, facts: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of the file: the images of all ranks in the order of the data set.

        facts: of the run, plain data. Each rank must call it.
        """
        tensors = {key: gather_rows(torch.cat(parts).to(self.device)).cpu() for key, parts in self.parts.items()}
        order = tensors["index"].argsort()
        return {key: values[order].contiguous() for key, values in tensors.items()}, {"facts": to_json(facts)}


def read_predictions(path: Path) -> Predictions:
    """Read a run's folder, or the file in it. ValueError if there is no such file, or a damaged or different one."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder; give the --output_dir of a finished run")
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; main_linprobe.py --save_predictions writes it")
    tensors, metadata = load_plain_or_safetensors(path), safetensors_metadata(path)
    with reading(path, "a file of main_linprobe.py --save_predictions"):
        facts = json.loads(metadata["facts"])
        outputs, losses = ({name: tensors[f"{kind}/{name}"] for name in facts["probes"]} for kind in ("output", "loss"))
        return Predictions(tensors["index"], tensors["labels"], outputs, losses, facts)


# ---- scores in [0, 1], from the `outputs` and labels of Predictions


def per_class(outputs: Tensor, labels: Tensor) -> float:
    """The mean of the classes' top-1, over classes that have an image."""
    counts = torch.bincount(labels)
    hits = torch.bincount(labels, weights=BY_IMAGE["top1"](outputs, labels))
    return (hits / counts)[counts > 0].mean().item()


def mean_average_precision(outputs: Tensor, labels: Tensor) -> float:
    return average_precision(outputs, labels)[(labels > 0).any(0)].mean().item()


BY_IMAGE = {  # means over images: functions (outputs, labels) -> (n,)
    "top1": lambda outputs, labels: (outputs[:, 0] == labels).double(),
    "any_match": lambda outputs, labels: labels.gather(1, outputs.argmax(1, keepdim=True))[:, 0].double(),
    "label_accuracy": lambda outputs, labels: ((outputs > 0) == (labels > 0)).double().mean(1),
}
OF_ALL = {"map": mean_average_precision, "per_class": per_class}


def score(outputs: Tensor, labels: Tensor, headline: str) -> float:
    """The score of that name, in percent."""
    if headline in BY_IMAGE:
        return 100 * BY_IMAGE[headline](outputs, labels).mean().item()
    return 100 * OF_ALL[headline](outputs, labels)


# ---- probes that learned nothing: their training loss or their test score is what guessing reaches


def prior_loss(labels: np.ndarray) -> float:
    """Loss in nats of the class frequencies as predictions: ln K for balanced labels (n,); of labels (n,K), the mean
    binary cross-entropy."""
    if labels.ndim == 1:
        return float(entr(np.bincount(labels) / len(labels)).sum())
    return float((entr(labels.mean(0)) + entr(1 - labels.mean(0))).mean())


def guessing(score: float, labels: np.ndarray, headline: str) -> str | None:
    """The reason if a test score in percent is that of guessing; None if it is not, or if several labels exist."""
    if headline not in ("top1", "per_class"):
        return None
    chance, high = best_guess(labels, headline == "per_class")
    if score > high:
        return None
    interval = f"the 95 % interval of guessing, {chance:.2f} to {high:.2f}"
    return f"test {metric_label(headline)} {score:.2f} is not above {interval}"


def mark_untrained(
    results: dict[str, dict], losses: dict[str, float], train: np.ndarray, test: np.ndarray, headline: str
) -> None:
    """Give each probe of `results` the entry learned_nothing, None or the reason, and log the reasons.

    losses: of training in the last epoch. train, test: labels.
    """
    prior = prior_loss(train)
    for name, result in results.items():
        reason = guessing(result["last"][headline], test, headline)
        if losses.get(name, 0) >= (1 - MARGIN) * prior:
            reason = f"training loss {losses[name]:.3f} is not 5 % below {prior:.3f}, that of the class frequencies"
        result["learned_nothing"] = reason
        if reason:
            log.warning("%s learned nothing: %s", name, reason)
