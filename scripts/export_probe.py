"""Write one trained probe as a folder that can be shared: probe.safetensors, probe.json and a model card, README.md.

python scripts/export_probe.py runs/mae_b --head abmilp --output exported/mae_b_abmilp
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, non_negative_int, run_main
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from probing.trained import Trained, export, read_trained
from util.files import to_json, write_atomically

CARD = """\
---
library_name: beyond-cls
tags: [image-classification, linear-probe, vision-transformer]
datasets: [{dataset}]
metrics: [accuracy]
---

# Probe `{head}` on {encoder}

A linear probe on the frozen tokens of block {blocks} (counted from 0): {classes} classes of `{dataset}`. The encoder is
not part of this folder: {source}. Its licence: {licence}.

## Scores

{scores}, on {n} test images; one seed ({seed}). Scores of other seeds, and intervals, are in the results of the run.

## Training

`{command}`

{n_train} training images; effective batch {effective_batch}; {optimizer} at {rate}. Commit {commit}{dirty}, {versions}.

## Use

```python
import torch

probe = torch.hub.load("PATH/TO/beyond-cls", "probe", "PATH/TO/THIS/FOLDER", source="local")
images = torch.stack([probe.transform(photo) for photo in photos])  # PIL images
logits, weights = probe(images)  # (B,{classes}); weight of each patch, where the head weighs patches
```

For images like those of `{dataset}`. The probe knows no other classes and has not been tested on other images; weights
of patches say what was averaged, not why a class was chosen.
"""


def card(trained: Trained) -> str:
    """The model card, in Hugging Face's form."""
    facts, spec, training = trained.facts, trained.spec, trained.facts["training"]
    entry = CATALOGUE.get(facts["encoder"]["finetune"])
    scores = facts["scores"]
    return CARD.format(
        head=spec.head,
        encoder=facts["encoder_record"].get("source") or "a random encoder",
        blocks=" and ".join(map(str, spec.blocks)),
        classes=facts["classes"],
        source=f"`{to_json(facts['encoder_record'])}`",
        licence=PUBLICATIONS[entry.publication].licence if entry else "that of its authors",
        scores=", ".join(f"{key} {scores[key]:.2f}" for key in ("top1", "top5", "map") if key in scores),
        n=scores["n"],
        seed=spec.seed,
        optimizer=spec.optimizer.upper(),
        rate=f"base rate {spec.blr:g}" if spec.lr is None else f"rate {spec.lr:g}",
        dirty=" with uncommitted changes" if training["dirty"] else "",
        **{key: training[key] for key in ("dataset", "command", "n_train", "effective_batch", "commit")},
        versions=", ".join(f"{name} {version}" for name, version in training["versions"].items()),
    )


def main(args: Namespace) -> None:
    trained = read_trained(args.run, args.head, args.block, args.seed)
    try:
        export(trained, args.output)
        write_atomically(args.output / "README.md", card(trained).encode())
    except OSError as error:
        raise ValueError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"{trained.spec.name}: {args.output}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of main_linprobe.py")
    parser.add_argument("--head", help="as in --cls_features, or the whole name of a probe (default: the only one)")
    parser.add_argument("--block", type=non_negative_int, help="block, counted from 0 (default: the only one)")
    parser.add_argument("--seed", type=int, help="seed (default: the first)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    run_main(main, parser.parse_args())
