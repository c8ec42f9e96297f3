"""How encoders are traced that their own library runs: python scripts/list_traced.py [--write PAGE]

Each is a small model with random weights, of list_traced.toml; nothing is downloaded. "difference" is that of the last
block's tokens, traced, from what the library returns. Needs requirements-encoders.txt.
"""

import json
import sys
import tempfile
import tomllib
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from cli.console import Parser, run_main
from encoders.load import load_encoder
from encoders.traced import TracedEncoder
from util.files import keep_table

COMMAND = "python scripts/list_traced.py --write"
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
MODELS = TABLE["models"]


def randomised(model: nn.Module) -> nn.Module:
    """Without a tensor of zeros or ones, which would hide that it is left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def options_of(name: str) -> dict:
    prefix, _, *own = MODELS[name]
    options = TABLE[prefix] | (own[0] if own else {})
    return {option: value for option, value in options.items() if value is not False}


def save_model(name: str, folder: Path) -> str:
    """Save a model of MODELS with random weights, as its library does. Returns what --finetune takes."""
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
    """Largest difference of the last block's tokens, or of these after the norm, from the library's own output."""
    *_, step = backbone.trace(images)
    model = backbone.model
    own = model.forward_features(images) if hasattr(model, "forward_features") else backbone.run(model, images)
    own = getattr(own, "last_hidden_state", own)
    if own.ndim == 2:  # open_clip: the projected [cls]
        return (backbone.norm(step.out[:, 0]) @ model.proj - own).abs().max().item()
    return min((tokens - own).abs().max().item() for tokens in (step.out, backbone.norm(step.out)))


def row(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        start = f"| {name} | `{MODELS[name][0]}:` |"
        try:
            encoder = load_encoder(save_model(name, Path(folder)), "file", size=options_of(name).get("img_size", 32))
        except ValueError as error:
            return f"{start} refused | {str(error).partition('traced: ')[2]} | |"
    backbone, tokens = encoder.backbone, encoder.record["tokens"]
    images = torch.randn(2, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1))
    parts = ["[cls]"] * tokens["cls"] + [f"{tokens['registers']} registers"] * bool(tokens["registers"])
    parts.append(f"{tokens['patches']} x {tokens['patches']}")
    largest = difference(backbone, images)
    shown = "0" if largest == 0 else "< 1e-5" if largest < 1e-5 else f"{largest:.0e}"
    traced = f"{encoder.record['model']}: `{backbone.traced.partition(' ')[0]}`"
    return f"{start} {', '.join(parts)} | {traced} | {shown} |"


def main(args: Namespace) -> None:
    header = ["| model | prefix | tokens | class: first attention | difference |", "|---|---|---|---|---|"]
    table = "\n".join([*header, *map(row, MODELS)]) + "\n"
    if path := args.write or args.check:
        keep_table(path, "traced", COMMAND, table, write=args.write is not None)
    else:
        print(table, end="")


if __name__ == "__main__":
    parser = Parser(__doc__)
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's table is another")
    run_main(main, parser.parse_args())
