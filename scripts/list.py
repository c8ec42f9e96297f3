"""Print a table of this project in Markdown: python scripts/list.py encoders [WORD ...] [--write PAGE | --check PAGE]

encoders: the published files by name. heads: of probes. metrics: of the attention analysis. traced: small models with
random weights (list.toml) that their own library runs; "difference" is that of the traced tokens of the last block from
the library's output; needs requirements-encoders.txt.
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

from attention.metrics import GROUPS, METRICS
from cli.console import Parser, run_main
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from encoders.load import load_encoder
from encoders.traced import TracedEncoder
from probing.heads import AGGREGATIONS, build_head, canonical_head
from probing.pooling import Tokens
from util.files import keep_table

VIT_BASE, DEPTH = Tokens(768, (14, 14), 1, pooled={"map": 768, "projected": 512}), 12
TRACED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
MODELS = TRACED["models"]


def table(*rows: tuple) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def encoders() -> str:
    rows = [("name", "`--model`", "weights", "licence", "top-1, %")]
    for name, entry in CATALOGUE.items():
        paper = PUBLICATIONS[entry.publication]
        file = f"[file]({entry.url})" if entry.url else f"[by hand]({entry.page})"
        weights = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {file}"
        figures = "; ".join(map(str, entry.figures)) or "–"
        rows.append((f"`{name}`", f"`{entry.model}`", weights, paper.licence, figures))
    return table(*rows)


def heads() -> str:
    rows = [("head", "vector", "options", "parameters")]
    options: dict[tuple[str, str, str], list[str]] = {}
    for name, entry in AGGREGATIONS.items():
        pooling = build_head(canonical_head(name, {}, DEPTH), DEPTH - 1, VIT_BASE)
        parameters = sum(parameter.numel() for parameter in pooling.parameters())
        number = entry.options[entry.number].default if entry.number else ""
        keys = ", ".join(f"`{key}`" for key in entry.options)
        rows.append((f"`{name}{number}`", entry.description, keys, f"{parameters:,}"))
        for key, option in entry.options.items():
            whole = isinstance(option.allowed, int)
            values = f"{option.default}; whole numbers >= {option.allowed}" if whole else ", ".join(option.allowed)
            options.setdefault((key, option.help, values), []).append(f"`{name}`")
    meanings = [(f"`{key}`", ", ".join(names), text, values) for (key, text, values), names in options.items()]
    return table(*rows) + "\n" + table(("option", "of", "meaning", "values (default first)"), *meanings)


def metrics() -> str:
    rows = [("metric", "groups", "unit", "definition", "from, to; uniform", "per", "source")]
    for name, metric in METRICS.items():
        groups = ", ".join(group for group, names in GROUPS.items() if name in names and group != "all")
        bounds = f"{metric.lower or '–'}, {metric.upper or '–'}; {metric.uniform or '–'}"
        definition = metric.definition.replace("|", "\\|")
        rows.append((f"`{name}`", groups, metric.unit, definition, bounds, metric.axis or "–", metric.source))
    return table(*rows)


# ---------------------------------------------------------------------------------------------------------------------
# traced models
# ---------------------------------------------------------------------------------------------------------------------


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


TABLES = {"encoders": encoders, "heads": heads, "metrics": metrics, "traced": traced}


def main(args: Namespace) -> None:
    text = TABLES[args.table]()
    if page := args.write or args.check:
        keep_table(page, args.table, f"python scripts/list.py {args.table} --write", text, write=bool(args.write))
        return
    head, rows = text.splitlines()[:2], text.splitlines()[2:]
    rows = [row for row in rows if all(word in row.split(" | ")[0] for word in args.words)]
    if not rows:
        raise ValueError(f"no name in the table of {args.table} contains {' and '.join(args.words)}")
    print("\n".join([*head, *rows]))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES), help="the table to print")
    parser.add_argument("words", nargs="*", metavar="WORD", help="print only the rows whose names contain all words")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail if the page has another table")
    run_main(main, parser.parse_args())
