"""What a micro-step of masked-autoencoder pretraining computes."""

from typing import Any

import torch
from torch import Tensor

from models_mae import MaskedAutoencoder
from util.datasets import Sample


class Pretraining:
    """A masked autoencoder and its optimizer, as a util.training.Method; the masks come with the samples."""

    program, state_name, names = "main_pretrain.py", "model", ("",)

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float,
        device: torch.device,
        amp: torch.dtype,
    ):
        self.model, self.optimizer, self.mask_ratio, self.device, self.amp = model, optimizer, mask_ratio, device, amp
        self.groups = [[p for p in model.parameters() if p.requires_grad]]

    def train(self) -> None:
        self.model.train()

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        noise = sample.noise.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            return self.model(images, noise, self.mask_ratio).loss[None]

    def step(self, alive: Tensor) -> Tensor:
        self.optimizer.step()
        return alive

    def state(self) -> dict[str, Any]:
        return self.model.published_state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_published_state_dict(state)
