"""Add results to the ledger: python scripts/record.py RUN ... [--results FOLDER]

RUN is the --output_dir of main_linprobe.py, main_analyze_attention.py or main_analyze_aggregation.py. Each table cell
that the run measured becomes a file in FOLDER (paper/ledger.py), from which scripts/make_tables.py makes the tables.
Runs that differ in their --seed alone, such as those of a sweep, become one record. A record lists the obstacles to a
comparison with the paper: other images, sizes or training.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.arguments import RESUMABLE_FLAGS
from cli.console import Parser, run_main
from data_sets.table import DATASETS
from encoders.catalogue import CATALOGUE
from models_vit import architecture, default_input_size
from paper.ledger import Cell, cell_in, cell_of, join, make_record, write_record
from util.files import sha256
from util.progress import log, setup_logging

RESULTS = Path(__file__).resolve().parent.parent / "results"
MALFORMED = (KeyError, TypeError, AttributeError, IndexError)  # from JSON that another program wrote
PAPER_ORACLE = "dino_vit_base_patch16"
PAPER_STEP = 0.01  # of thresholds: the coarser of the reference's two
# how the paper trains probes (B.2, and the published code where the text is silent)
PROTOCOLS = {
    "P-LP": {"effective_batch": 16_384, "bn_group": 2048, "optimizer": "lars"},
    "P-SGD": {"effective_batch": 1024, "optimizer": "sgd"},
}
COMMON = {"warmup_epochs": 10, "start_epoch": 0, "min_lr": 0.0, "weight_decay": 0.0, "crop": "mae", "no_hflip": False}
COMMON |= {"final_norm": False, "init": "default", "cache_views": 0}
BLR = 0.1
MOMENTUM = {"lars": 0.9, "sgd": 0.0}
NORMED = ("capi",)  # families whose public models return tokens after the last norm: D12 in REPRODUCTION.md
SHORTER = ("large", "huge")  # ViTs whose probes have 50 epochs instead of 90
# arguments that change a published encoder, or what it sees
ENCODER = {"num_heads": None, "no_cls_token": False, "loader": "pil", "mean": None, "std": None}
ENCODER |= {"grid": None, "timm_name": None}


def obstacles(args: dict, encoder: dict, size: int, n_train: int | None, n_test: int, images: int) -> list[str]:
    """n_train: None where nothing was trained; images: those of the n_test that were measured."""
    reasons = ["random weights"] if encoder["source"] is None else []
    reasons += other_counts(args["dataset"], train=n_train, val=n_test)
    if images != n_test:
        reasons.append(f"measured on {images:,} of {n_test:,} images")
    if DATASETS[args["dataset"]].protocol:
        if size != 224:
            reasons.append(f"images of {size or 'unknown'} pixels, the paper's have 224")
        for name, value in ENCODER.items():
            given = args.get(name, value)
            if given != value and set(given if isinstance(given, list) else [given]) != {None}:  # a list: per encoder
                reasons.append(f"{name} {given}, the paper's {value}")
    return reasons


def other_counts(dataset: str, **counts: int | None) -> list[str]:
    """Obstacles to a comparison: splits (train, val) of a data set that were not used completely."""
    official, verbs = DATASETS[dataset].images, {"train": "trained", "val": "tested"}
    return [
        f"{verbs[split]} on {count:,} images, the data set has {official[split]:,}"
        for split, count in counts.items()
        if official and count not in (None, official[split])
    ]


def training_obstacles(run: dict, family: str | None, head: str, optimizer: str, blr: float, chosen: bool) -> list[str]:
    """run: results.json, or what an analysis records of it; chosen: held-out images chose optimizer and rate."""
    args = run["args"]
    if not (protocol := DATASETS[args["dataset"]].protocol):
        return []
    epochs = 50 if any(f"_{size}_" in args["model"] for size in SHORTER) else 90
    paper = {**COMMON, **PROTOCOLS[protocol], "epochs": epochs, "final_norm": family in NORMED}
    if "sa=" in head:
        paper["optimizer"] = "sgd"  # the paper could not train it with LARS
    if not chosen:
        paper["blr"] = BLR
    if args.get("momentum") is not None:
        paper["momentum"] = MOMENTUM[optimizer]
    sizes = {name: run[name] for name in ("effective_batch", "bn_group")}
    return differences({**args, **sizes, "optimizer": optimizer, "blr": blr}, paper)


def differences(ours: dict, paper: dict) -> list[str]:
    """A run without an argument is older than it, and had its default."""
    return [f"{k} {ours[k]}, the paper's {v}" for k, v in paper.items() if ours.get(k, v) != v]


def oracle_obstacles(args: dict, head: str, oracle: dict | None) -> list[str]:
    source = (oracle or {}).get("source")
    if head.partition(":")[0] != "dino" or source == PAPER_ORACLE or not DATASETS[args["dataset"]].protocol:
        return []
    return [f"the oracle is {source}, the paper's is {PAPER_ORACLE}"]


def weights_notes(args: dict, encoder: dict) -> list[str]:
    notes = [f"assumed of the weights: {', '.join(encoder['assumed'])}"] if encoder.get("assumed") else []
    if DATASETS[args["dataset"]].protocol and encoder["source"] not in (None, *CATALOGUE):
        notes.append(f"weights from {encoder['source']}; nothing shows that they are those of the paper")
    return notes


def sizes_of(model: str) -> tuple[int | None, int | None]:
    """Depth and usual input size of an architecture; None for sizes that --model file read from the weights."""
    try:
        return architecture(model)["depth"], default_input_size(model)
    except ValueError:
        return None, None


def origin(path: Path, result: dict, trained: dict | None) -> dict[str, Any]:
    """What all records of a run share. trained: the run that trained its probes, if any."""
    log_file = path.parent / "log.txt"
    source = {
        **{name: result[name] for name in ("command", "seconds", "finished")},
        "seed": result["args"]["seed"],
        "hardware": {name: result[name] for name in ("device", "processes", "threads")},
        "result_sha256": sha256(path),
        "log_sha256": sha256(log_file) if log_file.is_file() else None,  # analyses have none
    }
    if trained not in (None, result):
        source["probes"] = {name: trained[name] for name in ("command", "commit")}
    data = {"classes": result["classes"], "n_test": result["n_test"], "fingerprint": result["test_images"]}
    data |= {"n_train": trained and trained["n_train"], "train_fingerprint": trained and trained["train_images"]}
    weights = {name: result["encoder"][name] for name in ("family", "source", "sha256")}
    code = {name: result[name] for name in ("commit", "dirty", "versions")}
    return {**code, "weights": weights, "data": data, "sources": [source]}


def probe_records(path: Path, run: dict) -> Iterable[dict]:
    """results.json: the accuracy of each head, over its seeds, at the last epoch."""
    args, encoder, quantity = run["args"], run["encoder"], run["headline"]
    depth, size = sizes_of(encoder["model"])
    size = args["input_size"] or size
    common, n_train, n_val = origin(path, run, run), run["n_train"], run["n_val"]
    held_out = any("chosen" in probe for probe in run["probes"].values())
    groups: dict[tuple, dict[str, dict]] = {}
    for name, probe in run["probes"].items():
        if probe.get("chosen", True):
            groups.setdefault((probe["head"], probe["block"]), {})[name] = probe
    for (head, block), named in groups.items():
        probes = list(named.values())
        check_one_rate(path, head, probes)
        if diverged(path, head, probes):
            continue
        first = probes[0]
        is_last = args["return_block"] is None if depth is None else block == depth - 1
        cell = cell_of(args["dataset"], encoder, quantity, head, None if is_last else block)
        counted = min(probe["last"]["n"] for probe in probes)
        reasons = obstacles(args, encoder, size, n_train + n_val, run["n_test"], counted)
        reasons += training_obstacles(run, encoder["family"], head, first["optimizer"], first["blr"], held_out)
        reasons += oracle_obstacles(args, head, run["oracle"])
        settings = {
            **{"program": "main_linprobe.py", "block": block, "lr": run["lr"][next(iter(named))], "input_size": size},
            **{name: first[name] for name in ("optimizer", "blr", "parameters")},
            **{name: run[name] for name in ("n_val", "effective_batch", "bn_group")},
            **{"rate_chosen_on_held_out_images": held_out, "seeds_vary": run.get("seeds_vary", ["weights"])},
            **{name: args[name] for name in ("epochs", "amp", *COMMON)},
        }
        notes = weights_notes(args, encoder)
        if held_out:
            notes.append(
                f"trained on {n_train:,} of {n_train + n_val:,} images, rate {first['blr']:g} chosen on the others"
            )
        values, seeds = [probe["last"][quantity] for probe in probes], [probe["seed"] for probe in probes]
        yield make_record(cell, values, seeds, notes=notes, obstacles=reasons, settings=settings, **common)


def check_one_rate(path: Path, head: str, probes: Sequence[dict]) -> None:
    """ValueError where only test scores could choose."""
    if len(settings := {(probe["optimizer"], probe["blr"], probe.get("lr")) for probe in probes}) > 1:
        rates = ", ".join(f"{optimizer} {blr:g}" for optimizer, blr, _ in sorted(settings, key=str))
        raise ValueError(
            f"{path.parent}: {head} has several settings ({rates}), and choosing one by its test scores flatters it: "
            "run main_linprobe.py with one of them, or with --val_fraction, which chooses on held-out images"
        )


def diverged(path: Path, head: str, probes: Sequence[dict]) -> bool:
    count = sum(probe["diverged_at"] is not None for probe in probes)
    if count:
        log.warning("%s: %s: %d of %d probes diverged: no record", path.parent, head, count, len(probes))
    return count > 0


def attention_records(path: Path, result: dict) -> Iterable[dict]:
    """attention.json: the entropy of [cls] over the patches, mean over blocks; uniform weights without [cls]."""
    args, encoder, metric = result["args"], result["encoder"], "cls_patch_entropy"
    has_cls = result["tokens"] - result["patches"] - result["registers"] > 0
    notes, (depth, _) = weights_notes(args, encoder), sizes_of(encoder["model"])
    if not has_cls:
        value = math.log(result["patches"])
        notes.append(f"no [cls] token, hence uniform weights: ln {result['patches']} of its own patches")
    elif metric not in result["metrics"]:
        raise ValueError(f"{path}: {metric} was not measured: run main_analyze_attention.py with --metrics flow")
    else:
        blocks = result["metrics"][metric]["blocks"]
        if [block["block"] for block in blocks] != list(range(depth or len(blocks))):
            raise ValueError(f"{path}: {metric} of {len(blocks)} blocks, {encoder['model']} has {depth}")
        value = sum(block["mean"] for block in blocks) / len(blocks)
    cell = cell_of(args["dataset"], encoder, "aggregation_entropy_block_mean", "cls" if has_cls else "pos")
    reasons = obstacles(args, encoder, result["input_size"], None, result["n_test"], result["images"])
    settings = {name: result[name] for name in ("amp", "reduction", "input_size", "images", "patches")}
    settings["program"] = "main_analyze_attention.py"
    common = origin(path, result, None)
    yield make_record(cell, [value], [None], notes=notes, obstacles=reasons, settings=settings, **common)


def aggregation_records(path: Path, result: dict) -> Iterable[dict]:
    """aggregation.json: entropies of the rules' vectors, and MaxBoxAccV2; not the accuracies of their probes."""
    args, encoder, boxes, trained = result["args"], result["encoder"], result.get("localization"), result["probes"]
    depth, _ = sizes_of(encoder["model"])
    last_block = max(rule["block"] for rule in result["rules"]) if depth is None else depth - 1
    common = origin(path, result, trained)
    groups: dict[tuple, list[dict]] = {}
    for rule in result["rules"]:
        groups.setdefault((rule["head"], rule["block"]), []).append(rule)
    for (head, block), rules in groups.items():
        learned = rules[0]["probe"] is not None
        scores = [score for rule in rules if rule["probe"] is not None for score in rule["scores"].values()]
        if learned:
            check_one_rate(path, head, scores)
        if diverged(path, head, scores):
            continue
        measured = {"aggregation_entropy": [rule["entropy"]["mean"] for rule in rules if "entropy" in rule]}
        counted = {"aggregation_entropy": result["images"]}
        if boxes:
            measured["maxboxaccv2"] = [boxes["maps"][rule["name"]]["maxboxaccv2"] for rule in rules]
            counted["maxboxaccv2"] = boxes["images"]
        for quantity in [name for name, values in measured.items() if values]:
            of_boxes = quantity == "maxboxaccv2"
            # for localisation, the paper calls the mean [cls] attention simply [cls]
            name = "cls" if of_boxes and head == "attn-mn" else head
            cell = cell_of(args["dataset"], encoder, quantity, name, None if block == last_block else block)
            reasons = obstacles(args, encoder, result["input_size"], None, result["n_test"], counted[quantity])
            reasons += oracle_obstacles(args, head, result["oracle"])
            if learned:
                reasons += probe_obstacles(trained, encoder["family"], head, scores[0])
            if of_boxes and DATASETS[args["dataset"]].protocol:
                if boxes["transform"] != "resize":
                    reasons.append("central crops, the paper's reference takes the whole image")
                if boxes["step"] > PAPER_STEP:
                    reasons.append(f"thresholds in steps of {boxes['step']}, the paper's reference has {PAPER_STEP}")
            settings = {"program": "main_analyze_aggregation.py", "block": block, "images": counted[quantity]}
            settings |= {"amp": args["amp"], "input_size": result["input_size"]}
            settings |= {"oracle": result["oracle"] and result["oracle"]["source"]}
            if of_boxes:
                settings |= {"transform": boxes["transform"], "step": boxes["step"]}
            if learned:
                settings["seeds_vary"] = trained.get("seeds_vary") or ["weights"]
            notes = dict.fromkeys([*weights_notes(args, encoder), *(note for rule in rules for note in rule["notes"])])
            fields = {"notes": list(notes), "obstacles": reasons, "settings": settings, **common}
            yield make_record(cell, measured[quantity], [rule["seed"] for rule in rules], **fields)


def probe_obstacles(run: dict, family: str | None, head: str, score: dict) -> list[str]:
    """Obstacles of the run that trained the probes of a rule."""
    official, n_train = DATASETS[run["args"]["dataset"]].images, run["n_train"] + (run["n_val"] or 0)
    few = [f"probes trained on {n_train:,} images"] if official and n_train != official["train"] else []
    return few + training_obstacles(run, family, head, score["optimizer"], score["blr"], bool(run["n_val"]))


PROGRAMS: dict[str, Callable[[Path, dict], Iterable[dict]]] = {
    "results.json": probe_records,
    "attention.json": attention_records,
    "aggregation.json": aggregation_records,
}


def records(path: Path) -> list[dict]:
    """The records of a run's results. ValueError for other files, and for data sets without a name."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, UnicodeDecodeError) else error  # it quotes the file
        raise ValueError(f"{path} cannot be read as JSON: {reason}") from error
    try:
        if "last" in result:
            raise ValueError("it is of the training of an encoder, of which no table has a cell: probe or analyse it")
        if (dataset := result["args"]["dataset"]) not in DATASETS or dataset == "image_folder":
            names = ", ".join(name for name in DATASETS if name != "image_folder")
            raise ValueError(f"--dataset {dataset} can be any images: repeat the run with --dataset and one of {names}")
        return list(PROGRAMS[path.name](path, result))
    except ValueError as error:
        raise ValueError(str(error) if str(path.parent) in str(error) else f"{path}: {error}") from error
    except MALFORMED as error:
        raise ValueError(
            f"{path} is not the result of {path.stem}'s program at this version ({error!r}): repeat the run"
        ) from error


def results_of(run: Path) -> list[Path]:
    """The results in a run folder: one file per encoder of an analysis of several."""
    paths = [path for name in PROGRAMS for path in (run / name, *sorted(run.glob(f"*/{name}"))) if path.is_file()]
    if not paths:
        raise ValueError(f"{run} has none of {', '.join(PROGRAMS)}: give the --output_dir of a finished run")
    return paths


def settings_of(path: Path, record: dict) -> dict[str, Any]:
    """All that runs of several seeds must share, including the runs that trained an analysis's probes."""
    result, settings = json.loads(path.read_text()), {}
    trained = result["probes"] if "rules" in result else None
    for prefix, run in (("probes' ", trained), ("", result)):
        for name, value in ({**run["args"], "commit": run["commit"]} if run else {}).items():
            if name not in {*RESUMABLE_FLAGS, "seed", "seeds", "probes"}:
                settings[f"{prefix}{name}"] = value
    for field in ("settings", "weights", "data", "versions"):
        settings |= record[field]
    return settings | {name: record[name] for name in ("dirty", "obstacles", "notes")}


def join_runs(cell: Cell, runs: Sequence[tuple[Path, dict]]) -> dict:
    """One record of all runs that measured a cell. ValueError where they differ in anything but the seed."""
    (first, expected), *others = [(path, settings_of(path, record)) for path, record in runs]
    for path, settings in others:
        if names := [name for name in expected | settings if expected.get(name) != settings.get(name)]:
            examples = "; ".join(f"{name} {expected.get(name)} and {settings.get(name)}" for name in names[:3])
            raise ValueError(
                f"{first.parent} and {path.parent} measured {cell} and differ in more than the seed ({examples}): "
                "give one of them"
            )
    return join(cell, [record for _, record in runs])


def main(args: argparse.Namespace) -> None:
    setup_logging()
    runs: dict[Cell, list[tuple[Path, dict]]] = {}
    for path in {path.resolve(): path for run in args.runs for path in results_of(run)}.values():
        for record in records(path):
            runs.setdefault(cell_in(record), []).append((path, record))
    if not runs:
        raise ValueError(f"{', '.join(map(str, args.runs))}: nothing to record: no table has a cell of these results")
    joined = [join_runs(cell, several) if len(several) > 1 else several[0][1] for cell, several in runs.items()]
    for record in joined:
        path = write_record(args.results, record, args.replace)
        spread = f" ± {record['std']:.3g}, {record['n']} seeds" if record["std"] is not None else ""
        log.info("%s: %.4g %s%s", path, record["value"], record["unit"], spread)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a program")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--replace", action="store_true", help="replace other measurements of the same cells")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
