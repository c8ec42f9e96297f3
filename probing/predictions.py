"""What classifiers said of every test image: kept, written to predictions.safetensors, and read again.

Letters: n images, K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.load import load_plain_or_safetensors, safetensors_metadata
from util.distributed import gather_rows
from util.files import digest, to_json

FILE = "predictions.safetensors"


class Predictions(NamedTuple):
    """Of one run, in the order of `index`."""

    index: Tensor  # (n,) positions in the test set, ascending
    labels: Tensor  # (n,) classes, or (n,K) zeros and ones
    # {classifier: (n,5) classes from the best guess on (fewer where K < 5); where images have several labels, (n,K)
    # logits}
    said: dict[str, Tensor]
    losses: dict[str, Tensor]  # {classifier: (n,) cross-entropy, or mean binary cross-entropy, nats}
    facts: dict  # of the run: data set, weights, command


class PredictionKeeper:
    """Collects what classifiers say of the batches of this rank, perhaps of none."""

    def __init__(self, names: Sequence[str], classes: int, multi_label: bool, device: torch.device):
        self.names, self.multi_label, self.device = tuple(names), multi_label, device
        self.index = [torch.empty(0, dtype=torch.int64)]
        self.labels = [torch.empty(0, classes, dtype=torch.uint8) if multi_label else self.index[0]]
        said = torch.empty(0, classes) if multi_label else torch.empty(0, min(5, classes), dtype=torch.int32)
        self.said, self.losses = [[said] for _ in names], [[torch.empty(0)] for _ in names]

    def update(self, logits: list[Tensor], labels: Tensor, index: Tensor) -> None:
        """Logits (B,K) of each classifier, the labels and the positions (B,) of their images."""
        self.index.append(index.cpu())
        self.labels.append(labels.cpu())
        for said, losses, one in zip(self.said, self.losses, logits, strict=True):
            if self.multi_label:
                said.append(one.float().cpu())
                each = F.binary_cross_entropy_with_logits(one.float(), labels.float(), reduction="none").mean(1)
            else:
                said.append(one.topk(min(5, one.shape[1])).indices.to(torch.int32).cpu())
                each = F.cross_entropy(one.float(), labels, reduction="none")
            losses.append(each.cpu())

    def gather(self, facts: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of the file, of all ranks' images in the order of the data set; each rank must call it.

        facts: of the run, plain data. ValueError where there is no image.
        """
        index = self._everywhere(self.index)
        order = index.argsort()
        found = {"index": index[order], "labels": self._everywhere(self.labels)[order]}
        for name, said, losses in zip(self.names, self.said, self.losses, strict=True):
            found[f"said/{name}"] = self._everywhere(said)[order].contiguous()
            found[f"loss/{name}"] = self._everywhere(losses)[order].contiguous()
        return found, {"sha256": digest(dict(sorted(found.items()))), "facts": to_json(facts)}

    def _everywhere(self, parts: list[Tensor]) -> Tensor:
        return gather_rows(torch.cat(parts).to(self.device)).cpu()


def read_predictions(path: Path) -> Predictions:
    """Those of a run: its folder, or the file in it. ValueError for what is not such a file, and for a damaged one."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; main_linprobe.py --save_predictions writes it")
    tensors, metadata = load_plain_or_safetensors(path), safetensors_metadata(path)
    if metadata.get("sha256") != digest(dict(sorted(tensors.items()))):
        raise ValueError(f"{path} holds no predictions of main_linprobe.py, or damaged ones")
    facts = json.loads(metadata["facts"])
    said, losses = ({name: tensors[f"{kind}/{name}"] for name in facts["probes"]} for kind in ("said", "loss"))
    return Predictions(tensors["index"], tensors["labels"], said, losses, facts)
