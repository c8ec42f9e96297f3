"""Attention of another frozen encoder, with which a probe weights its own encoder's patches (the paper's Table 6).

Letters: B images, M patches.
"""

import torch
from torch import Tensor

from encoders.load import Encoder


class Oracle:
    """Images, normalised for the probed encoder, -> [cls] attention (B,M) of the oracle's last block, mean over heads.

    The M values sum to less than 1, because [cls] also attends to itself. Images are normalised again if the two
    encoders differ in mean or std. ValueError if the oracle has no [cls] token or another patch size.
    """

    def __init__(self, oracle: Encoder, probed: Encoder, size: int, amp: torch.dtype = torch.float32):
        self.backbone, self.amp, self.record = oracle.backbone.eval().requires_grad_(False), amp, oracle.record
        self.facts = oracle.facts(size, "oracle")
        if not self.backbone.has_cls:
            raise ValueError("this encoder has no [cls] token, hence no [cls] attention")
        own, other = self.backbone.patch_size, probed.backbone.patch_size
        if own != other:
            raise ValueError(
                f"its patches have {own} pixels, the probed encoder's {other}: name an oracle with equal ones"
            )
        (mean, probed_mean), (std, probed_std) = (
            [torch.tensor(values)[:, None, None] for values in pair]
            for pair in ((oracle.mean, probed.mean), (oracle.std, probed.std))
        )
        self.factor, self.offset = probed_std / std, (probed_mean - mean) / std
        self.same = (oracle.mean, oracle.std) == (probed.mean, probed.std)

    def to(self, device: torch.device) -> "Oracle":
        self.backbone.to(device)
        self.factor, self.offset = self.factor.to(device), self.offset.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            normalised = images if self.same else images * self.factor + self.offset
            (features,) = self.backbone(normalised, cls_attention=True).values()
        return features.cls_attention.mean(1)
