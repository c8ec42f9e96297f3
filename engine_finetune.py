"""What a micro-step of end-to-end fine-tuning computes, and the exact evaluation of a classifier."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sets.loader import Sample, Watched
from models_finetune import Classifier
from runtime.training import OneNetwork
from util.scores import Scores, Tally
from util.seeding import seeded, stable_seed


class FineTuning(OneNetwork):
    """A classifier and its optimizer, as a runtime.training.Method.

    mixup: timm's Mixup, which returns soft labels (label smoothing is then its business). Mixing and stochastic depth
    draw from (seed, epoch, chunk): a resumed run repeats them, and so does another split into processes and
    micro-steps.
    """

    program = "main_finetune.py"

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: torch.dtype,
        smoothing: float = 0.0,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        clip_grad: float | None = None,
    ):
        super().__init__(model, optimizer, device, amp)
        self.mixup, self.clip_grad = mixup, clip_grad
        self.smoothing = 0.0 if mixup else smoothing

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        labels = sample.label.to(self.device, non_blocking=True)
        with seeded("finetune", *words):
            if self.device.type == "cuda":
                torch.cuda.manual_seed(stable_seed("finetune", *words))
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
                logits = self.model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)[None]

    def step(self, alive: Tensor) -> Tensor:
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.groups[0], self.clip_grad)
        return super().step(alive)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device, amp: torch.dtype) -> Scores:
    """Scores of a classifier; each sample counts once, over all processes."""
    model.eval()
    tally = Tally(1, model.head.out_features, device)
    for sample in Watched(loader, "test", agree=True):
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            logits = model(sample.image.to(device, non_blocking=True))
        tally.update([logits], sample.label.to(device, non_blocking=True))
    return tally.compute()[0]
