"""Small models of three libraries with random weights (traced_models.toml), and the table of docs/encoders.md.

python tests/traced_models.py docs/encoders.md writes the table. "difference" compares the tokens of the last block with
the library's own output.
"""

import json
import sys
import tempfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from encoders.load import load_encoder
from encoders.traced import TracedEncoder
from scripts.list import table
from util.files import keep_table

TRACED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
MODELS = TRACED["models"]


def randomised(model: nn.Module) -> nn.Module:
    """Add noise to all parameters: a tensor of zeros or ones would hide that it is not used."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def options_of(name: str) -> dict:
    prefix, _, *own = MODELS[name]
    options = TRACED[prefix] | (own[0] if own else {})
    return {option: value for option, value in options.items() if value is not False}


def save_model(name: str, folder: Path) -> str:
    """Save a model of MODELS with random weights, as its library does. Returns the name for --finetune."""
    (prefix, kind), options = MODELS[name][:2], options_of(name)
    if prefix == "hf":
        import transformers

        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**options))
        randomised(model).save_pretrained(folder)
    elif prefix == "timm":
        import timm

        model = randomised(timm.create_model(kind, num_classes=0, **options))
        timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
    else:
        import open_clip
        import safetensors.torch

        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": options}))
        model = randomised(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    return f"{prefix}:{folder}"


@torch.no_grad()
def difference(backbone: TracedEncoder, images: Tensor) -> float:
    """Largest difference between the last block's tokens, with or without the norm, and the library's own output."""
    *_, step = backbone.trace(images)
    model = backbone.model
    own = model.forward_features(images) if hasattr(model, "forward_features") else backbone.run(model, images)
    own = getattr(own, "last_hidden_state", own)
    if own.ndim == 2:  # open_clip: the projected [cls]
        return (backbone.norm(step.out[:, 0]) @ model.proj - own).abs().max().item()
    return min((tokens - own).abs().max().item() for tokens in (step.out, backbone.norm(step.out)))


def traced() -> str:
    rows = [("model", "prefix", "tokens", "class: first attention", "difference")]
    for name, (prefix, *_) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                size = options_of(name).get("img_size", 32)
                encoder = load_encoder(save_model(name, Path(folder)), size=size)
            except ValueError as error:
                rows.append((name, f"`{prefix}:`", "refused", str(error).partition("traced: ")[2], ""))
                continue
        backbone, tokens = encoder.backbone, encoder.record["tokens"]
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        parts = ["[cls]"] * tokens["cls"] + [f"{tokens['registers']} registers"] * bool(tokens["registers"])
        parts.append(f"{tokens['patches']} x {tokens['patches']}")
        largest = difference(backbone, images)
        shown = "0" if largest == 0 else "< 1e-5" if largest < 1e-5 else f"{largest:.0e}"
        attention = f"{encoder.record['model']}: `{backbone.traced.partition(' ')[0]}`"
        rows.append((name, f"`{prefix}:`", ", ".join(parts), attention, shown))
    return table(*rows)


def keep(page: Path, write: bool) -> None:
    keep_table(page, "traced", "python tests/traced_models.py", traced(), write)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), write=True)
