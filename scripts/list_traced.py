"""How encoders are traced that their own library runs: python scripts/list_traced.py [--write PAGE]

Each is a small model with random weights in its library's own configuration; nothing is downloaded. "difference" is
that of the last block's tokens, traced, from what the library returns. Needs requirements-encoders.txt.
"""

import json
import sys
import tempfile
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
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
HF = {**SIZES, "image_size": 32}
VIDEO = {"crop_size": 32, "pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}

# name -> (prefix of --finetune, class of the configuration or name of the model, its options)
MODELS = {
    "ViT": ("hf", "ViTConfig", HF),
    "ViTMAE": ("hf", "ViTMAEConfig", HF),
    "ViTMSN": ("hf", "ViTMSNConfig", HF),
    "BEiT": ("hf", "BeitConfig", {**HF, "use_relative_position_bias": True}),
    "Data2VecVision": ("hf", "Data2VecVisionConfig", {**HF, "use_relative_position_bias": True}),
    "DINOv2": ("hf", "Dinov2Config", HF),
    "DINOv2 with registers": ("hf", "Dinov2WithRegistersConfig", HF),
    "DINOv3": ("hf", "DINOv3ViTConfig", {**HF, "num_register_tokens": 4}),
    "I-JEPA": ("hf", "IJepaConfig", HF),
    "SigLIP": ("hf", "SiglipVisionConfig", HF),
    "SigLIP 2": ("hf", "Siglip2VisionConfig", {**SIZES, "num_patches": 16}),
    "CLIP": ("hf", "CLIPVisionConfig", HF),
    "AIMv2": ("hf", "Aimv2VisionConfig", HF),
    "V-JEPA 2": ("hf", "VJEPA2Config", {**SIZES, **VIDEO}),
    "ViT, timm": ("timm", "vit_base_patch16_224", TIMM),
    "residual post-norm ViT": ("timm", "vit_base_patch16_rpn_224", TIMM),
    "ViT with relative positions": ("timm", "vit_relpos_base_patch16_224", TIMM),
    "BEiT, timm": ("timm", "beit_base_patch16_224", TIMM),
    "DeiT III": ("timm", "deit3_base_patch16_224", TIMM),
    "EVA-02": ("timm", "eva02_base_patch14_224", TIMM),
    "Perception Encoder": ("timm", "vit_pe_core_tiny_patch16_384", TIMM),
    "DINOv3, timm": ("timm", "vit_small_patch16_dinov3", TIMM),
    "SigLIP, timm": ("timm", "vit_base_patch16_siglip_224", TIMM),
    "AIMv2, timm": ("timm", "aimv2_large_patch14_224", TIMM),
    "RoPE-ViT": ("timm", "vit_base_patch16_rope_mixed_224", TIMM),
    "Franca (as DINOv2)": ("timm", "vit_base_patch14_dinov2", TIMM),
    "CLIP, open_clip": ("open_clip", "ViT", OPEN_CLIP),
    "Hiera": ("timm", "hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "Swin": ("timm", "swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 16, "depths": (1, 1, 2, 1)}),
}


def randomised(model: nn.Module) -> nn.Module:
    """Without a tensor of zeros or ones, which would hide that it is left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def save_model(name: str, folder: Path) -> str:
    """Save a model of MODELS with random weights, as its library does. Returns what --finetune takes."""
    prefix, kind, options = MODELS[name]
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
    if hasattr(own, "last_hidden_state"):
        own = own.last_hidden_state
    elif own.ndim == 2:  # open_clip: the projected [cls]
        return (backbone.norm(step.out[:, 0]) @ model.proj - own).abs().max().item()
    return min((tokens - own).abs().max().item() for tokens in (step.out, backbone.norm(step.out)))


def row(name: str) -> str:
    prefix, _, options = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        finetune = save_model(name, Path(folder))
        try:
            encoder = load_encoder(finetune, "file", size=options.get("img_size", 32))
        except ValueError as error:
            return f"| {name} | `{prefix}:` | refused | {str(error).partition('traced: ')[2]} | |"
    backbone, tokens = encoder.backbone, encoder.record["tokens"]
    images = torch.randn(2, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1))
    prefix_tokens = [f"{tokens['registers']} registers"] * bool(tokens["registers"])
    parts = ["[cls]"] * tokens["cls"] + prefix_tokens + [f"{tokens['patches']} x {tokens['patches']}"]
    traced = f"{encoder.record['model']}: `{backbone.traced.partition(' ')[0]}`"
    largest = difference(backbone, images)
    shown = "0" if largest == 0 else "< 1e-5" if largest < 1e-5 else f"{largest:.0e}"
    return f"| {name} | `{prefix}:` | {', '.join(parts)} | {traced} | {shown} |"


def main(args: Namespace) -> None:
    header = ["| model | prefix | tokens | class: first attention | difference |", "|---|---|---|---|---|"]
    table = "\n".join([*header, *map(row, MODELS)]) + "\n"
    path = args.write or args.check
    if path is None:
        print(table, end="")
    else:
        keep_table(path, "traced", COMMAND, table, write=args.write is not None)


if __name__ == "__main__":
    parser = Parser(__doc__)
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's table is another")
    run_main(main, parser.parse_args())
