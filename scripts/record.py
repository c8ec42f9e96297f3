"""Records of results in the ledger: python scripts/record.py RUN ... [--results FOLDER]

RUN is the --output_dir of main_linprobe.py, main_analyze_attention.py or main_analyze_aggregation.py. Each cell of a
table that it has measured becomes a file below FOLDER, by data set (paper/ledger.py), for scripts/make_tables.py.
Runs that differ in nothing but their --seed, such as those of a sweep, become one record of all their seeds.
A record says what stands in the way of comparing it with the paper: other images, other sizes, another protocol.
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
from data_sets.loader import DATASETS
from encoders.catalogue import CATALOGUE
from models_vit import architecture, default_input_size
from paper.ledger import Cell, cell_in, cell_of, joined, make_record, other_counts, write_record
from util.files import sha256
from util.progress import log, setup_logging

RESULTS = Path(__file__).resolve().parent.parent / "results"
MISREAD = (KeyError, TypeError, AttributeError, IndexError)  # of JSON that something else has written
PAPER_ORACLE = "dino_vit_base_patch16"
SAME = 0.1  # points; predictions that are saved are of an evaluation of their own, which a GPU repeats to rounding
PAPER_STEP = 0.01  # of thresholds, the coarser one of the reference
# what the paper's probes were trained with (B.2, and the published code where the text is silent)
PROTOCOLS = {
    "P-LP": {"effective_batch": 16_384, "bn_group": 2048, "optimizer": "lars"},
    "P-SGD": {"effective_batch": 1024, "optimizer": "sgd"},
}
EVERYWHERE = {
    "warmup_epochs": 10, "start_epoch": 0, "blr": 0.1, "min_lr": 0.0, "weight_decay": 0.0, "crop": "mae",
    "no_hflip": False, "final_norm": False, "init": "default", "cache_views": 0,
}  # fmt: skip
NORMED = ("capi",)  # families whose public models return tokens after the last norm: D12 in REPRODUCTION.md
SHORTER = ("large", "huge")  # ViTs whose probes have 50 epochs instead of 90
# arguments that change a published encoder, or what it sees
ENCODER = {"num_heads": None, "no_cls_token": False, "loader": "pil"}


# ---------------------------------------------------------------------------------------------------------------------
# why a number is not the paper's
# ---------------------------------------------------------------------------------------------------------------------


def obstacles(args: dict, encoder: dict, size: int, n_train: int | None, n_test: int, images: int) -> list[str]:
    """What was measured otherwise than in the paper. n_train: None where nothing was trained; images: of the n_test
    of the data set that count."""
    entry, found = DATASETS[args["dataset"]], []
    if encoder["source"] is None:
        found.append("random weights")
    found += other_counts(args["dataset"], train=n_train, val=n_test)
    if images != n_test:
        found.append(f"measured on {images:,} of {n_test:,} images")
    if entry.protocol:
        if size != 224:
            found.append(f"images of {size} pixels, the paper's have 224")
        found += differences(args, ENCODER)
    return found


def departures(run: dict, family: str | None, head: str, optimizer: str, blr: float, chosen: bool) -> list[str]:
    """How the training of a probe differs from the paper's. run: what results.json says of the whole bank."""
    protocol = DATASETS[run["args"]["dataset"]].protocol
    if not protocol:
        return []
    epochs = 50 if any(f"_{size}_" in run["args"]["model"] for size in SHORTER) else 90
    asked = {**EVERYWHERE, **PROTOCOLS[protocol], "epochs": epochs, "final_norm": family in NORMED}
    if "sa=" in head:
        asked["optimizer"] = "sgd"  # the paper could not train it with LARS
    if chosen:
        del asked["blr"]  # held-out images have chosen it
    momentum = run["args"].get("momentum")
    usual = {"lars": 0.9, "sgd": 0.0}[optimizer]
    got = {**run["args"], "effective_batch": run["effective_batch"], "bn_group": run["bn_group"]}
    found = differences({**got, "optimizer": optimizer, "blr": blr}, asked)
    return found + ([f"momentum {momentum}, the paper's {usual}"] if momentum not in (None, usual) else [])


def differences(ours: dict, theirs: dict) -> list[str]:
    return [f"{name} {ours[name]}, the paper's {value}" for name, value in theirs.items() if ours[name] != value]


def notes_on(args: dict, encoder: dict) -> list[str]:
    """What has to be said of the weights."""
    if not DATASETS[args["dataset"]].protocol or encoder["source"] in (None, *CATALOGUE):
        return []
    return [f"weights from {encoder['source']}; nothing shows that they are those of the paper"]


# ---------------------------------------------------------------------------------------------------------------------
# the programs' results
# ---------------------------------------------------------------------------------------------------------------------


def facts(path: Path, result: dict, trained: dict | None) -> dict[str, Any]:
    """What all records of a run have alike. trained: the run that has trained its probes, if there are any."""
    encoder, log_file = result["encoder"], path.parent / "log.txt"
    source = {
        "command": result["command"], "seed": result["args"]["seed"],
        "hardware": {name: result[name] for name in ("device", "processes", "threads")},
        "seconds": result["seconds"], "finished": result["finished"], "result_sha256": sha256(path),
        "log_sha256": sha256(log_file) if log_file.is_file() else None,  # analyses have none
    }  # fmt: skip
    if trained not in (None, result):
        source["probes"] = {name: trained[name] for name in ("command", "commit")}
    return {
        **{name: result[name] for name in ("commit", "dirty", "versions")},
        "weights": {name: encoder[name] for name in ("family", "source", "sha256")},
        "data": {"classes": result["classes"], "n_train": trained and trained["n_train"], "n_test": result["n_test"],
                 "train_fingerprint": trained and trained["train_images"], "fingerprint": result["test_images"]},
        "sources": [source],
    }  # fmt: skip


def probe_records(path: Path, run: dict) -> Iterable[dict]:
    """results.json: the accuracy of each head, over its seeds."""
    args, encoder, probes, quantity = run["args"], run["encoder"], run["probes"], run["headline"]
    check_log(path, run)
    held_out = any("chosen" in probe for probe in probes.values())
    size, last_block = input_size(args), architecture(args["model"])["depth"] - 1
    common = facts(path, run, run)
    cells: dict[tuple, list[dict]] = {}
    for name, probe in probes.items():
        if probe.get("chosen", True):
            cells.setdefault((probe["head"], probe["block"]), []).append({**probe, "name": name})
    for (head, block), mine in cells.items():
        one_rate(path, head, mine)
        if lost := [probe for probe in mine if probe["diverged_at"] is not None]:
            log.warning("%s: %s: %d of %d probes diverged: left out", path.parent, head, len(lost), len(mine))
            continue
        first, counted = mine[0], {probe["last"]["n"] for probe in mine}
        cell = cell_of(args["dataset"], encoder, quantity, head, None if block == last_block else block)
        found = obstacles(args, encoder, size, run["n_train"] + run["n_val"], run["n_test"], min(counted))
        found += departures(run, encoder["family"], head, first["optimizer"], first["blr"], held_out)
        found += oracle_of(args, head, run["oracle"])
        settings = {
            "program": "main_linprobe.py", "block": block, "optimizer": first["optimizer"], "blr": first["blr"],
            "lr": run["lr"][first["name"]],
            "rate_chosen_on_held_out_images": held_out, "n_val": run["n_val"], "parameters": first["parameters"],
            "effective_batch": run["effective_batch"], "bn_group": run["bn_group"], "input_size": size,
            **{name: args[name] for name in ("epochs", "amp", *EVERYWHERE) if name != "blr"},
        }  # fmt: skip
        notes = notes_on(args, encoder) + [f"rate {first['blr']:g} chosen on held-out images"] * held_out
        values, seeds = [probe["last"][quantity] for probe in mine], [probe["seed"] for probe in mine]
        yield make_record(cell, values, seeds, notes=notes, obstacles=found, settings=settings, **common)


def check_log(path: Path, run: dict) -> None:
    """ValueError where log.txt, which the record is going to hash, does not end with the scores of results.json."""
    log_file = path.parent / "log.txt"
    if not log_file.is_file():
        return
    try:
        last = json.loads(log_file.read_text().splitlines()[-1])
        tested = last.get("test") or last["val"]
        ours = {
            name: (probe["last"] if "test" in last else probe["val"]["last"]) for name, probe in run["probes"].items()
        }
        alike = ours.keys() == tested.keys() and last["epoch"] + 1 == run["args"]["epochs"]
        pairs = [(ours[name][run["headline"]], tested[name][run["headline"]]) for name in ours] if alike else []
        if alike and all(a == b or abs(a - b) <= SAME for a, b in pairs):
            return
    except (*MISREAD, ValueError):
        pass
    raise ValueError(
        f"{log_file} does not end with the scores of {path.name}: one of them is not what the run wrote; run it again"
    )


def one_rate(path: Path, head: str, probes: list[dict]) -> None:
    """ValueError where test scores would have to choose."""
    if len(settings := {(probe["optimizer"], probe["blr"], probe["lr"]) for probe in probes}) > 1:
        rates = ", ".join(f"{optimizer} {blr:g}" for optimizer, blr, _ in sorted(settings, key=str))
        raise ValueError(
            f"{path.parent}: {head} has several settings ({rates}), and choosing one by its test scores flatters it: "
            "run main_linprobe.py with --val_fraction, which chooses on held-out images, or with one of them"
        )


def oracle_of(args: dict, head: str, oracle: dict | None) -> list[str]:
    source = (oracle or {}).get("source")
    if head.partition(":")[0] != "dino" or source == PAPER_ORACLE or not DATASETS[args["dataset"]].protocol:
        return []
    return [f"the oracle is {source}, the paper's is {PAPER_ORACLE}"]


def attention_records(path: Path, result: dict) -> Iterable[dict]:
    """attention.json: the entropy of [cls] over the patches, mean over blocks; uniform weights without [cls]."""
    args, encoder, metric = result["args"], result["encoder"], "cls_patch_entropy"
    has_cls = result["tokens"] - result["patches"] - result["registers"] > 0
    notes = notes_on(args, encoder)
    if not has_cls:
        value = math.log(result["patches"])
        notes.append(f"no [cls] token, hence uniform weights: ln {result['patches']} of its own patches")
    elif metric in result["metrics"]:
        means = [block["mean"] for block in result["metrics"][metric]["blocks"]]
        value = sum(means) / len(means)
    else:
        raise ValueError(f"{path}: {metric} was not measured: run main_analyze_attention.py with --metrics flow")
    cell = cell_of(args["dataset"], encoder, "aggregation_entropy_block_mean", "cls" if has_cls else "pos")
    found = obstacles(args, encoder, result["input_size"], None, result["n_test"], result["images"])
    settings = {
        "program": "main_analyze_attention.py", "amp": result["amp"], "reduction": result["reduction"],
        "input_size": result["input_size"], "images": result["images"],
        "patches": result["patches"],
    }  # fmt: skip
    common = facts(path, result, None)
    yield make_record(cell, [value], [None], notes=notes, obstacles=found, settings=settings, **common)


def aggregation_records(path: Path, result: dict) -> Iterable[dict]:
    """aggregation.json: entropies of the rules' vectors, and what they localise; not the accuracies of their probes."""
    args, encoder, boxes = result["args"], result["encoder"], result.get("localization")
    last_block, trained = architecture(encoder["model"])["depth"] - 1, result["probes"]
    common = facts(path, result, trained)
    groups: dict[tuple, list[dict]] = {}
    for rule in result["rules"]:
        groups.setdefault((rule["head"], rule["block"]), []).append(rule)
    for (head, block), rules in groups.items():
        learned = rules[0]["probe"] is not None
        scores = [score for rule in rules for score in rule["scores"].values() if rule["probe"] is not None]
        if learned:
            one_rate(path, head, [{**score, "lr": None} for score in scores])
        if any(score["diverged_at"] is not None for score in scores):
            log.warning("%s: %s: a probe of it diverged: left out", path.parent, head)
            continue
        measured = {"aggregation_entropy": [rule["entropy"]["mean"] for rule in rules if "entropy" in rule]}
        counted = {"aggregation_entropy": result["images"]}
        if boxes:
            measured["maxboxaccv2"] = [boxes["maps"][rule["name"]]["maxboxaccv2"] for rule in rules]
            counted["maxboxaccv2"] = boxes["images"]
        for quantity, values in measured.items():
            if not values:
                continue
            # of localisation, the paper calls the mean [cls] attention simply [cls]
            name = "cls" if quantity == "maxboxaccv2" and head == "attn-mn" else head
            cell = cell_of(args["dataset"], encoder, quantity, name, None if block == last_block else block)
            found = obstacles(args, encoder, result["input_size"], None, result["n_test"], counted[quantity])
            found += oracle_of(args, head, result["oracle"])
            if learned:
                found += of_probes(trained, encoder["family"], head, scores[0])
            if quantity == "maxboxaccv2" and DATASETS[args["dataset"]].protocol:
                if boxes["transform"] != "resize":
                    found.append("central crops, the paper's reference takes the whole image")
                if boxes["step"] > PAPER_STEP:
                    found.append(f"thresholds in steps of {boxes['step']}, the paper's reference has {PAPER_STEP}")
            settings = {
                "program": "main_analyze_aggregation.py", "block": block,
                "oracle": result["oracle"] and result["oracle"]["source"], "amp": args["amp"],
                "input_size": result["input_size"], "images": counted[quantity],
                **({"transform": boxes["transform"], "step": boxes["step"]} if quantity == "maxboxaccv2" else {}),
            }  # fmt: skip
            notes = list(dict.fromkeys([*notes_on(args, encoder), *(note for rule in rules for note in rule["notes"])]))
            seeds = [rule["seed"] for rule in rules]
            yield make_record(cell, values, seeds, notes=notes, obstacles=found, settings=settings, **common)


def of_probes(run: dict, family: str | None, head: str, score: dict) -> list[str]:
    """Obstacles of the run that has trained the probes of a rule."""
    official = DATASETS[run["args"]["dataset"]].images
    trained = run["n_train"] + (run["n_val"] or 0)
    few = [f"probes trained on {trained:,} images"] if official and trained != official["train"] else []
    return few + departures(run, family, head, score["optimizer"], score["blr"], bool(run["n_val"]))


def input_size(args: dict) -> int:
    return args["input_size"] or default_input_size(args["model"])


PROGRAMS: dict[str, Callable[[Path, dict], Iterable[dict]]] = {
    "results.json": probe_records,
    "attention.json": attention_records,
    "aggregation.json": aggregation_records,
}


def records(path: Path) -> list[dict]:
    """Of the results of a run. ValueError where they are none, or of a data set that has no name."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        told = type(error).__name__ if isinstance(error, UnicodeDecodeError) else error  # it quotes the file
        raise ValueError(f"{path} cannot be read as JSON: {told}") from error
    try:
        if "last" in result:
            raise ValueError(
                f"{path} is of the training of an encoder, of which no table has a cell: probe or analyse it"
            )
        dataset = result["args"]["dataset"]
        result["args"].setdefault("loader", "pil")  # of runs that had no choice
        if dataset not in DATASETS or dataset == "image_folder":
            names = ", ".join(name for name in DATASETS if name != "image_folder")
            raise ValueError(
                f"{path} is of --dataset {dataset}, which can be any images: a record needs to know them. Run it with "
                f"--dataset and one of {names}"
            )
        return list(PROGRAMS[path.name](path, result))
    except ValueError as error:
        raise ValueError(str(error) if str(path.parent) in str(error) else f"{path}: {error}") from error
    except MISREAD as error:
        raise ValueError(
            f"{path} is not what its program writes, or was written by an earlier version, which did not say all that "
            f"a record needs ({error!r}): run it again"
        ) from error


def results_of(run: Path) -> list[Path]:
    """The files that a run folder holds, one for each encoder of an analysis of several."""
    found = [path for name in PROGRAMS for path in (run / name, *sorted(run.glob(f"*/{name}"))) if path.is_file()]
    if not found:
        raise ValueError(f"{run} holds none of {', '.join(PROGRAMS)}: is it the --output_dir of a run that has ended?")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# runs of several seeds
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(path: Path, record: dict) -> dict[str, Any]:
    """Everything that has to be alike in runs of several seeds, those that have trained an analysis's probes too."""
    result = json.loads(path.read_text())
    of_probes = result["probes"] if "rules" in result else None  # the run that has trained them
    asked = {}
    for prefix, run in (("probes' ", of_probes), ("", result)):
        for name, value in ({**run["args"], "commit": run["commit"]} if run else {}).items():
            if name not in {*RESUMABLE_FLAGS, "seed", "seeds", "probes"}:
                asked[f"{prefix}{name}"] = value
    for field in ("settings", "weights", "data", "versions"):
        asked |= record[field]
    return asked | {name: record[name] for name in ("dirty", "obstacles", "notes")}


def join_seeds(cell: Cell, found: Sequence[tuple[Path, dict]]) -> dict:
    """One record of all runs that have measured a cell. ValueError where they differ in anything but the seed."""
    first, *others = [(path, settings_of(path, record)) for path, record in found]
    for path, asked in others:
        names = [name for name in first[1] | asked if first[1].get(name) != asked.get(name)]
        if names:
            told = "; ".join(f"{name} {first[1].get(name)} and {asked.get(name)}" for name in names[:3])
            raise ValueError(
                f"{first[0].parent} and {path.parent} have measured {cell} and differ in more than the seed ({told}): "
                "name one of them"
            )
    return joined(cell, [record for _, record in found])


def main(args: argparse.Namespace) -> None:
    setup_logging()
    found: dict[Cell, list[tuple[Path, dict]]] = {}
    paths = {path.resolve(): path for run in args.runs for path in results_of(run)}
    for path in paths.values():
        for record in records(path):
            found.setdefault(cell_in(record), []).append((path, record))
    made = [join_seeds(cell, several) if len(several) > 1 else several[0][1] for cell, several in found.items()]
    if not made:
        raise ValueError(f"{', '.join(map(str, args.runs))}: no probe or measurement that is good for a record")
    for record in made:
        path = write_record(args.results, record, args.replace)
        spread = f" ± {record['std']:.3g}" if record["std"] is not None else ""
        seeds = f", {record['n']} seeds" if record["std"] is not None else ""
        log.info("%s: %.4g%s %s%s", path, record["value"], spread, record["unit"], seeds)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a program")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--replace", action="store_true", help="in place of other measurements of the same cells")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
