"""Write one trained probe as a folder that can be shared: probe.safetensors, probe.json and a model card, README.md.

python scripts/export_probe.py runs/mae_b --head abmilp --output exported/mae_b_abmilp
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, non_negative_int, run_main
from encoders.catalogue import CATALOGUE, PUBLICATIONS
from probing.finished_run import Trained, export, read_trained
from util.files import reading, save, to_json

CARD = Path(__file__).with_name("probe_card.md")


def card(trained: Trained) -> str:
    """The model card, in Hugging Face's form."""
    facts, spec, training, scores = trained.facts, trained.spec, trained.facts["training"], trained.facts["scores"]
    entry = CATALOGUE.get(facts["encoder"]["finetune"])
    values = {
        **vars(spec),
        **facts,
        **training,
        "blocks": " and ".join(map(str, spec.blocks)),
        "source": facts["encoder_record"].get("source") or "a random encoder",
        "record": to_json(facts["encoder_record"]),
        "licence": PUBLICATIONS[entry.publication].licence if entry else "that of its authors",
        "scores": ", ".join(f"{key} {scores[key]:.2f}" for key in ("top1", "top5", "map") if key in scores),
        "n": scores["n"],
        "rate": f"base rate {spec.blr:g}" if spec.lr is None else f"rate {spec.lr:g}",
        "state": "with uncommitted changes" if training["dirty"] else "clean",
    }
    return CARD.read_text().format(**values)


def main(args: Namespace) -> None:
    trained = read_trained(args.run, args.head, args.block, args.seed)
    with reading(args.run, "complete enough for a model card"):
        text = card(trained)
    export(trained, args.output)
    save(args.output / "README.md", text)
    print(f"{trained.spec.name}: {args.output}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of main_linprobe.py")
    parser.add_argument("--head", help="as in --cls_features, or the whole name of a probe")
    parser.add_argument("--block", type=non_negative_int, help="block, counted from 0")
    parser.add_argument("--seed", type=int, help="seed (default: the first)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    run_main(main, parser.parse_args())
