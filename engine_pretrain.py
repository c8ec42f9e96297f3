"""What a micro-step of masked-autoencoder pretraining computes."""

import torch
from torch import Tensor

from data_sets.loader import Sample
from models_mae import MaskedAutoencoder
from runtime.training import OneNetwork


class Pretraining(OneNetwork):
    """A masked autoencoder and its optimizer, as a runtime.training.Method; the masks come with the samples."""

    program = "main_pretrain.py"

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimizer: torch.optim.Optimizer,
        mask_ratio: float,
        device: torch.device,
        amp: torch.dtype,
    ):
        super().__init__(model, optimizer, device, amp)
        self.mask_ratio = mask_ratio

    def losses(self, sample: Sample, words: tuple) -> Tensor:
        images = sample.image.to(self.device, non_blocking=True)
        noise = sample.noise.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            return self.model(images, noise, self.mask_ratio).loss[None]
