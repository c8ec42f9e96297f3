"""Cells of the paper's tables, measured by the results of main_linprobe, main_analyze_attention and _aggregation.

A cell is (dataset, model, arch, quantity, head) in the vocabulary of results/paper_numbers.json. A measurement lists
the obstacles to a comparison with the paper: other images, sizes or training.
"""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_sets.table import DATASETS
from encoders.catalogue import CATALOGUE
from models_vit import architecture, default_input_size
from util.files import reading
from util.progress import log

NAMED = [name for name in DATASETS if name != "image_folder"]  # data sets whose images are known
PAPER = tomllib.loads(Path(__file__).with_name("protocol.toml").read_text("utf-8"))
COMMON = PAPER["common"]
ENCODER = {**PAPER["encoder"], **dict.fromkeys(("num_heads", "mean", "std", "grid", "timm_name"))}
BATCH = ("effective_batch", "bn_group")
NATS = ("aggregation_entropy", "aggregation_entropy_block_mean")  # quantities in nats; all others are percentages
ORIGIN = ("commit", "dirty", "versions", "test_images", "n_test")  # of every result


class Cell(NamedTuple):
    dataset: str
    model: str
    arch: str
    quantity: str
    head: str

    @property
    def encoder(self) -> str:
        return f"{self.model}.{self.arch}"

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True)
class Measurement:
    """The values of a cell, one per seed (None: nothing depends on the seed), and what a reader must know of them."""

    cell: Cell
    values: list[float]
    seeds: list[int | None]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # the file's content
    path: Path = Path()

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


# ---- names


def cell_of(result: dict, quantity: str, head: str, block: int | None = None) -> Cell:
    """head: as --cls_features spells it; block: None for the last block."""
    suffix, encoder = "" if block is None else f"-block{block}", result["encoder"]
    return Cell(result["args"]["dataset"], model_of(encoder), encoder["model"], quantity, short_head(head) + suffix)


def model_of(encoder: dict) -> str:
    """The family; for published weights other than the paper's of a family, also what tells them apart; for weights of
    a library, their name."""
    family, source, arch = encoder["family"], encoder["source"], encoder["model"]
    if family is None:
        return "random"
    if source in CATALOGUE:
        return source.replace(f"_{arch}", "", 1)
    if family == "timm" or re.match(r"(hf|timm|open_clip):", source):
        return re.sub(r"\W", "_", source if ":" in source else f"timm_{source}")
    return family.removesuffix("_full")  # a file that holds more than the encoder


def short_head(head: str) -> str:
    """abmilp:depth=2 -> abmilp-d2-relu, abmilp:sa=both -> abmilp-sa, ap12 -> ap12."""
    name, _, text = head.partition(":")
    options = dict(option.split("=", 1) for option in text.split(",")) if text else {}
    parts = [name]
    if name == "abmilp" and "depth" in options:
        parts += [f"d{options.pop('depth')}", options.pop("act", "relu")]
    if name == "abmilp" and options.get("sa") == "both":
        del options["sa"]
        parts.append("sa")
    return "-".join([*parts, *(f"{key}={value}" for key, value in options.items())])


def sizes_of(model: str) -> tuple[int | None, int | None]:
    """Depth and usual input size of an architecture; None for sizes that --model file read from the weights."""
    try:
        return architecture(model)["depth"], default_input_size(model)
    except ValueError:
        return None, None


# ---- obstacles to a comparison with the paper, and notes


def obstacles(result: dict, head: str, size: int | None, images: int, n_train: int | None = None) -> list[str]:
    """size: of the images in pixels; images: those of the test images that were measured; n_train: if it trained."""
    args, n_test, oracle = result["args"], result["n_test"], (result.get("oracle") or {}).get("source")
    entry, reasons = DATASETS[args["dataset"]], []
    if result["encoder"]["source"] is None:
        reasons.append("random weights")
    for verb, split, count in (("trained", "train", n_train), ("tested", "val", n_test)):
        if entry.images and count not in (None, entry.images[split]):
            reasons.append(f"{verb} on {count:,} images, the data set has {entry.images[split]:,}")
    if images != n_test:
        reasons.append(f"measured on {images:,} of {n_test:,} images")
    if not entry.protocol:
        return reasons
    if size != 224:
        reasons.append(f"images of {size or 'unknown'} pixels, the paper's have 224")
    for name, value in ENCODER.items():
        given = args.get(name, value)
        if given != value and set(given if isinstance(given, list) else [given]) != {None}:  # a list: per encoder
            reasons.append(f"{name} {given}, the paper's {value}")
    if head.partition(":")[0] == "dino" and oracle != PAPER["oracle"]:
        reasons.append(f"the oracle is {oracle}, the paper's is {PAPER['oracle']}")
    return reasons


def training_obstacles(run: dict, family: str | None, probe: dict, chosen: bool) -> list[str]:
    """run: results.json, or what an analysis records of it; chosen: held-out images chose the probe's rate."""
    args = run["args"]
    if not (protocol := DATASETS[args["dataset"]].protocol):
        return []
    epochs = next((n for size, n in PAPER["shorter"].items() if f"_{size}_" in args["model"]), PAPER["epochs"])
    paper = {**COMMON, **PAPER[protocol], "epochs": epochs, "final_norm": family in PAPER["normed"]}
    if "sa=" in probe["head"]:
        paper["optimizer"] = "sgd"  # the paper could not train it with LARS
    if not chosen:
        paper["blr"] = PAPER["blr"]
    if args.get("momentum") is not None:
        paper["momentum"] = PAPER["momentum"][probe["optimizer"]]
    ours = {**args, **{name: run[name] for name in BATCH}, "optimizer": probe["optimizer"], "blr": probe["blr"]}
    return [f"{name} {ours[name]}, the paper's {value}" for name, value in paper.items() if ours[name] != value]


def weights_notes(result: dict) -> list[str]:
    encoder, notes = result["encoder"], []
    if encoder.get("assumed"):
        notes.append(f"assumed of the weights: {', '.join(encoder['assumed'])}")
    if DATASETS[result["args"]["dataset"]].protocol and encoder["source"] not in (None, *CATALOGUE):
        notes.append(f"weights from {encoder['source']}; nothing shows that they are those of the paper")
    return notes


# ---- what each program measures


def by_head(items: Iterable[dict]) -> Iterator[tuple[str, int, list[dict]]]:
    """Probes or rules of each head and block."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for item in items:
        groups.setdefault((item["head"], item["block"]), []).append(item)
    return ((head, block, group) for (head, block), group in groups.items())


def comparable(head: str, probes: Sequence[dict]) -> bool:
    """Whether no probe of a head diverged. ValueError where only test scores could choose among their rates."""
    if len(settings := {(probe["optimizer"], probe["blr"], probe.get("lr")) for probe in probes}) > 1:
        rates = ", ".join(f"{optimizer} {blr:g}" for optimizer, blr, _ in sorted(settings, key=str))
        raise ValueError(
            f"{head} has several settings ({rates}), and choosing one by its test scores flatters it: "
            "run main_linprobe.py with one of them, or with --val_fraction, which chooses on held-out images"
        )
    if diverged := sum(probe["diverged_at"] is not None for probe in probes):
        log.warning("%s: %d of %d probes diverged: not measured", head, diverged, len(probes))
    return diverged == 0


def probes_by_head(run: dict) -> Iterator[tuple[str, int, list[dict]]]:
    """Head, block and the probes of its seeds, from results.json: chosen ones where held-out images chose; without
    heads of which a probe diverged. ValueError as in `comparable`."""
    chosen = by_head(probe for probe in run["probes"].values() if probe.get("chosen", True))
    return ((head, block, probes) for head, block, probes in chosen if comparable(head, probes))


def probe_cells(run: dict) -> Iterator[Measurement]:
    """results.json: the accuracy of each head, over its seeds, at the last epoch."""
    args, encoder, quantity = run["args"], run["encoder"], run["headline"]
    depth, size = sizes_of(encoder["model"])
    size, total = args["input_size"] or size, run["n_train"] + run["n_val"]
    held_out = any("chosen" in probe for probe in run["probes"].values())
    for head, block, probes in probes_by_head(run):
        first, scored = probes[0], min(probe["last"]["n"] for probe in probes)
        reasons = obstacles(run, head, size, scored, total)
        reasons += training_obstacles(run, encoder["family"], first, held_out)
        notes = weights_notes(run)
        if held_out:
            rate = f"rate {first['blr']:g} chosen on the others"
            notes.append(f"trained on {run['n_train']:,} of {total:,} images, {rate}")
        settings = {name: args[name] for name in ("epochs", "amp", *COMMON)} | {name: run[name] for name in BATCH}
        settings |= {"optimizer": first["optimizer"], "blr": first["blr"], "input_size": size, "chosen": held_out}
        settings["seeds_vary"] = run.get("seeds_vary")
        is_last = args["return_block"] is None if depth is None else block == depth - 1
        cell = cell_of(run, quantity, head, None if is_last else block)
        values, seeds = [probe["last"][quantity] for probe in probes], [probe["seed"] for probe in probes]
        yield Measurement(cell, values, seeds, settings, notes, reasons)


def attention_cells(result: dict) -> Iterator[Measurement]:
    """attention.json: the entropy of [cls] over the patches, mean over blocks; uniform weights without [cls]."""
    model, metric = result["encoder"]["model"], "cls_patch_entropy"
    has_cls = result["tokens"] - result["patches"] - result["registers"] > 0
    notes, (depth, _) = weights_notes(result), sizes_of(model)
    if not has_cls:
        value = math.log(result["patches"])
        notes.append(f"no [cls] token, hence uniform weights: ln {result['patches']} of its own patches")
    elif metric not in result["metrics"]:
        raise ValueError(f"{metric} was not measured: run main_analyze_attention.py with --metrics flow")
    else:
        blocks = result["metrics"][metric]["blocks"]
        if [block["block"] for block in blocks] != list(range(depth or len(blocks))):
            raise ValueError(f"{metric} of {len(blocks)} blocks, {model} has {depth}")
        value = statistics.fmean(block["mean"] for block in blocks)
    cell = cell_of(result, "aggregation_entropy_block_mean", "cls" if has_cls else "pos")
    reasons = obstacles(result, cell.head, result["input_size"], result["images"])
    settings = {name: result[name] for name in ("amp", "input_size")}
    yield Measurement(cell, [value], [None], settings, notes, reasons)


def aggregation_cells(result: dict) -> Iterator[Measurement]:
    """aggregation.json: entropies of the rules' vectors, and MaxBoxAccV2; not the accuracies of their probes."""
    encoder, boxes, trained = result["encoder"], result.get("localization"), result["probes"]
    protocol, (depth, _) = DATASETS[result["args"]["dataset"]].protocol, sizes_of(encoder["model"])
    last_block = max(rule["block"] for rule in result["rules"]) if depth is None else depth - 1
    how, of_boxes = {name: boxes[name] for name in ("transform", "step")} if boxes else {}, []
    if boxes and protocol and boxes["transform"] != "resize":
        of_boxes.append("central crops, the paper's reference takes the whole image")
    if boxes and protocol and boxes["step"] > PAPER["step"]:
        of_boxes.append(f"thresholds in steps of {boxes['step']}, the paper's reference has {PAPER['step']}")
    for head, block, rules in by_head(result["rules"]):
        scores = [score for rule in rules if rule["probe"] is not None for score in rule["scores"].values()]
        if not comparable(head, scores):
            continue
        settings = {"amp": result["args"]["amp"], "input_size": result["input_size"]}
        settings["oracle"], of_training = result["oracle"] and result["oracle"]["source"], []
        if scores:
            n_train = trained["n_train"] + (trained["n_val"] or 0)
            if n_train != (DATASETS[trained["args"]["dataset"]].images or {"train": n_train})["train"]:
                of_training.append(f"probes trained on {n_train:,} images")
            chosen = bool(trained["n_val"])
            of_training += training_obstacles(trained, encoder["family"], {"head": head, **scores[0]}, chosen)
            settings["seeds_vary"] = trained.get("seeds_vary")
        notes = dict.fromkeys([*weights_notes(result), *(note for rule in rules for note in rule["notes"])])
        seeds, at = [rule["seed"] for rule in rules], None if block == last_block else block
        size = result["input_size"]
        if entropies := [rule["entropy"]["mean"] for rule in rules if "entropy" in rule]:
            cell = cell_of(result, "aggregation_entropy", head, at)
            reasons = obstacles(result, head, size, result["images"]) + of_training
            yield Measurement(cell, entropies, seeds, settings, list(notes), reasons)
        if boxes:
            # the paper calls the mean [cls] attention simply [cls]
            cell = cell_of(result, "maxboxaccv2", "cls" if head == "attn-mn" else head, at)
            values = [boxes["maps"][rule["name"]]["maxboxaccv2"] for rule in rules]
            reasons = obstacles(result, head, size, boxes["images"]) + of_training + of_boxes
            yield Measurement(cell, values, seeds, settings | how, list(notes), reasons)


# ---- files


def cells_of(path: Path) -> list[Measurement]:
    """What the result of a program measures. ValueError names a file that is no such result, or is of unnamed data."""
    with reading(path, "a result of this version's programs"):
        result = json.loads(Path(path).read_text())
        if (dataset := result["args"]["dataset"]) not in NAMED:
            names = ", ".join(NAMED)
            raise ValueError(f"--dataset {dataset} can be any images: repeat the run with --dataset and one of {names}")
        if missing := [name for name in ORIGIN if name not in result]:
            raise ValueError(f"it has no {', '.join(missing)}")
        measure = aggregation_cells if "rules" in result else probe_cells if "probes" in result else attention_cells
        cells = [replace(cell, result=result, path=Path(path)) for cell in measure(result)]
        for measured in cells:
            bound = math.inf if measured.cell.quantity in NATS else 100
            if not all(type(v) in (int, float) and 0 <= v <= bound and math.isfinite(v) for v in measured.values):
                raise ValueError(f"{measured.cell} has the values {measured.values}")
        return cells


def by_cell(measurements: Iterable[Measurement]) -> dict[Cell, Measurement]:
    """ValueError names two results that measured the same cell."""
    cells: dict[Cell, Measurement] = {}
    for measured in measurements:
        if (other := cells.setdefault(measured.cell, measured)) is not measured:
            raise ValueError(f"{other.path} and {measured.path} both measured {measured.cell}: remove one of them")
    return cells


def recorded(results: Path, datasets: Iterable[str]) -> dict[Cell, Measurement]:
    """Cells of the records in results/<dataset>/*.json. ValueError names a file that is not a record."""
    paths = [path for name in datasets for path in sorted((Path(results) / name).glob("*.json"))]
    return by_cell(measured for path in paths for measured in cells_of(path))
