"""Test the trained probes of a run on other images of its classes: python scripts/evaluate_probe.py RUN --dataset NAME

RUN is the --output_dir of main_linprobe.py. Any data set whose classes are among those of the run will do; imagenet_v2,
imagenet_a, imagenet_r, imagenet_sketch, imagenet_c and objectnet are ImageNet's. Nothing is trained.

top-1 and calibration are among the classes of the data set, all others masked: ECE is the expected calibration error
over 15 bins of equal width, NLL the mean negative log-likelihood in nats. Where a run chose among rates, the chosen
probes alone are tested. For imagenet_c, --data_path holds the 15 corruptions; errors are averaged over severities, and
mCE is their mean relative to AlexNet's.

--perturb tests the same images filtered, noisy or shuffled, too. Of images named FILE-CLASS.png whose texture is of
CLASS and whose shape is of their folder's class (make_demo_data.py --cues conflict), "texture" is the share of answers
that name the texture's class, and "shape bias" the share of the shape's among both.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.arguments import add_groups, data_options, loading
from cli.console import Parser, positive_int, run_main
from cli.encoder_arguments import build_oracle, frozen_encoder, precision
from cli.linprobe import finished_run
from data_sets.imagenet import ALEXNET_ERRORS, corruptions
from data_sets.images import Images
from data_sets.loader import KeyedDataset, Watched, build_loader
from data_sets.order import EvaluationBatches
from data_sets.perturb import PERTURBATIONS, Perturbation, read_perturbation
from data_sets.table import build_dataset
from data_sets.views import eval_transform
from encoders.load import save_encoder
from paper.runs import markdown
from probing.frozen import FiniteCheck, FrozenTokens
from util.files import reading, require, write_json
from util.progress import log, setup_logging

BINS = 15  # Guo et al., "On calibration of modern neural networks", 2017


def known_classes(run_classes: list[str], images: Images, name: str) -> dict[int, Tensor]:
    """{label of the data set: positions of its classes in the run}, of classes that the run knows.

    ValueError if there is none.
    """
    position = {wnid: index for index, wnid in enumerate(run_classes)}
    members = [[position[wnid] for wnid in names.split("+") if wnid in position] for names in images.classes]
    known = {label: torch.tensor(positions) for label, positions in enumerate(members) if positions}
    if not known:
        raise ValueError(f"--dataset {name}: none of its classes, such as {images.classes[0]}, is a class of the run")
    if unknown := len(members) - len(known):
        log.info("%d of %d classes are not the run's: their images are left out", unknown, len(members))
    return known


def textures_of(images: Images, indices: list[int]) -> list[int] | None:
    """Labels of the classes that end the images' names; None unless all end in a class that is not their label."""
    labels = {name: label for label, name in enumerate(images.classes)}
    textures = [labels.get(Path(images.names[index]).stem.rpartition("-")[2]) for index in indices]
    other = all(texture not in (None, images.targets[index]) for texture, index in zip(textures, indices, strict=True))
    return textures if other else None


def scores_of(logits: Tensor, labels: Tensor, groups: list[Tensor], textures: Tensor | None = None) -> dict[str, float]:
    """Logits (n,K) of the run's classes, labels (n,) that number groups of them -> scores among the groups.

    The probability of a group is the sum of its classes'; the answer is the group of the highest logit. textures: (n,)
    groups of another cue.
    """
    answers = torch.stack([logits[:, group].amax(1) for group in groups], dim=1).argmax(1)
    log_shares = torch.stack([logits[:, group].logsumexp(1) for group in groups], dim=1).log_softmax(1)
    confidence, guesses = log_shares.exp().max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, (guesses == labels).double() - confidence)
    scores = {
        "top-1": 100 * (answers == labels).double().mean().item(),
        "NLL": F.nll_loss(log_shares, labels).item(),
        "ECE": 100 * gaps.abs().sum().item() / len(labels),
    }
    if textures is not None:
        scores["texture"] = 100 * (answers == textures).double().mean().item()
        either = scores["top-1"] + scores["texture"]
        scores["shape bias"] = 100 * scores["top-1"] / either if either else float("nan")
    return scores


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each probe, a column for each score."""
    columns = list(next(iter(results.values())))
    return markdown("probe", columns, {n: [f"{scores[c]:.2f}" for c in columns] for n, scores in results.items()})


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished main_linprobe.py")
    add_groups(parser, {"data": {"include": "data", "omit": ["val_split"], "nb_classes": {"help": ""}}})
    parser.add_argument("--batch_size", default=64, type=positive_int, help="images per forward pass")
    perturb = f"also test perturbed images: {', '.join(PERTURBATIONS)}; as in lowpass:0.25 shuffle:4"
    parser.add_argument("--perturb", nargs="+", default=[], metavar="NAME:NUMBER", help=perturb)
    output = "write the scores there, and the logits to FILE.safetensors"
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=output)
    return parser


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    setup_logging()
    perturbations = list({str(each): each for each in map(read_perturbation, args.perturb)}.values())
    for other, value in (("--dataset", "imagenet_c"), ("--loader", "gpu")):
        if perturbations and getattr(args, other[2:]) == value:
            raise ValueError(f"--perturb does not work with {other} {value}: omit one of them")
    run = finished_run(args.run)
    with reading(args.run / "results.json", "of this version: train the probes again"):
        require(run.results, {"class_names": [str], "headline": str})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, size = frozen_encoder(run.args)
    for step in perturbations:  # mistakes end the program before any image is read
        step(torch.zeros(3, size, size, dtype=torch.uint8))
    backbone = encoder.backbone.to(device)
    bank = run.bank(encoder, backbone.grid_of(size, size)).to(device)
    amp = precision(run.args.amp)
    oracle = build_oracle(run.args, encoder, size, amp).to(device) if bank.needs.oracle else None
    tokens = FrozenTokens(backbone, bank.blocks, amp, run.args.final_norm, bank.needs, oracle)
    finite, saved = FiniteCheck(tokens, device), {}
    chosen = [i for i, spec in enumerate(bank.specs) if run.results["probes"][spec.name].get("chosen", True)]
    specs = [bank.specs[i] for i in chosen]

    def scores(folder: Path, name: str = "", steps: Sequence[Perturbation] = ()) -> dict[str, dict[str, float]]:
        """{probe: scores} on the images of a folder. name: of the part of the data set, for the saved logits."""
        view = eval_transform(size, **encoder.pixels, loader=args.loader, steps=steps)
        images = build_dataset(args.dataset, folder, "val", **data_options(args))
        if np.ndim(images.targets) > 1 or run.results["headline"] not in ("top1", "per_class"):
            raise ValueError("calibration and masked classes need one label per image")
        known = known_classes(run.results["class_names"], images, args.dataset)
        indices = [index for index, label in enumerate(images.targets) if label in known]
        batches = EvaluationBatches(len(images), args.batch_size, indices)
        keyed = KeyedDataset(images, view, 0, on_bad_image=args.on_bad_image)
        logits, seen, numbers = [], [], {label: number for number, label in enumerate(known)}
        for sample in Watched(build_loader(keyed, batches, **loading(args, device)), name or args.dataset):
            logits.append(bank(finite.see(tokens(sample.image.to(device)))).cpu())
            seen += sample.index.tolist()
        finite.check()
        joined = torch.cat(logits, dim=1)[chosen].double()
        answers = torch.tensor([numbers[images.targets[i]] for i in seen])
        saved.update({f"labels{name}": answers, f"logits{name}": joined.float()})
        textures = textures_of(images, seen)
        textures = textures and torch.tensor([numbers.get(label, -1) for label in textures])
        parts = zip(specs, joined, strict=True)
        return {spec.name: scores_of(each, answers, list(known.values()), textures) for spec, each in parts}

    if args.dataset == "imagenet_c":
        parts = {
            name: [scores(folder, f"/{name}/{folder.name}") for folder in folders]
            for name, folders in corruptions(args.data_path).items()
        }
        results = {}
        for spec in specs:
            errors = {name: 100 - mean(part[spec.name]["top-1"] for part in each) for name, each in parts.items()}
            results[spec.name] = {"mCE": mean(errors[name] / ALEXNET_ERRORS[name] for name in errors), **errors}
    else:
        results = scores(args.data_path)
    print(table(results))
    perturbed = {str(step): scores(args.data_path, f"/{step}", [step]) for step in perturbations}
    if perturbed:
        parts = {"unperturbed": results, **perturbed}
        print(table({probe: {part: each[probe]["top-1"] for part, each in parts.items()} for probe in results}))
    for name, probe in run.results["probes"].items():
        if probe.get("learned_nothing"):
            log.warning("no conclusion about %s: %s", name, probe["learned_nothing"])
    if args.output is not None:
        save_encoder(args.output.with_suffix(".safetensors"), saved, {"kind": "logits", "probes": ", ".join(results)})
        more = {"perturbed": perturbed} if perturbed else {}
        write_json(args.output, {"run": str(args.run), "dataset": args.dataset, "probes": results, **more})


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
