"""Encoders and trained probes for torch.hub; docs/api.md shows them.

encoder = torch.hub.load(".", "encoder", "demo/mae.safetensors", source="local")
features = encoder.features(images, blocks=[-1])  # {block: Features}: tokens by name
flow = encoder.attention(images)                  # {metric: (L,B,K)}: each block, image and head
probe = torch.hub.load(".", "probe", "runs/mae_b", head="abmilp", source="local")
logits, weights = probe(images)                   # (B,K) and (B,M)
"""

from api import encoder, probe

__all__ = ["encoder", "probe"]
dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]
