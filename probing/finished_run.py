"""Read a finished run of main_linprobe.py: its arguments, scores and trained probes, one of which can be exported."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from encoders.load import Encoder, load_plain_or_safetensors, save_encoder
from probing.bank import ProbeBank, ProbeSpec
from probing.results import read_results
from runtime.folder import RunFolder
from util.files import digest, reading, write_json

ENCODER_ARGUMENTS = (
    *("model", "finetune", "family", "checkpoint_key", "num_heads", "no_cls_token", "input_size", "seed"),
    *("timm_name", "mean", "std", "grid", "decoder"),
)
SPEC = ("head", "block", "blr", "seed", "optimizer", "lr")  # of a ProbeSpec, in results.json
FACTS, WEIGHTS = "probe.json", "probe.safetensors"  # files of an exported probe
TRAINING = ("command", "commit", "dirty", "versions", "n_train", "effective_batch", "seeds_vary", "train_images")


class ProbeRun(NamedTuple):
    folder: Path
    args: argparse.Namespace  # saved arguments of main_linprobe.py; cli.linprobe.finished_run adds newer ones
    results: dict  # results.json
    state: dict  # the newest checkpoint

    def with_encoder(self, args: argparse.Namespace) -> argparse.Namespace:
        """`args` with the run's encoder; if its weights are random, its seed determines them."""
        saved = vars(self.args)
        return argparse.Namespace(**vars(args) | {name: saved[name] for name in ENCODER_ARGUMENTS if name in saved})

    def bank(self, encoder: Encoder, grid: tuple[int, int]) -> ProbeBank:
        """The trained probes, in evaluation mode. ValueError if they were trained on other weights or sizes."""
        if self.state["identity"].get("weights") != digest(encoder.backbone.state_dict()):
            raise ValueError(
                f"{self.folder}: its probes were trained on another encoder, {self.args.finetune or 'random weights'}: "
                "name that one with --finetune, or leave --finetune out"
            )
        with reading(self.folder, "a run with the same probes in its checkpoint and in results.json"):
            specs = [ProbeSpec(**{key: probe[key] for key in SPEC}) for probe in self.results["probes"].values()]
            classes = {len(probe["classifier.bias"]) for probe in self.state["probes"].values()}
            bank = ProbeBank(specs, encoder.backbone, grid, *classes)
            bank.load_probe_states(self.state["probes"])
        return bank.eval().requires_grad_(False)

    @property
    def chosen(self) -> dict[str, dict]:
        """Probes of results.json, without those whose rate or optimizer held-out images did not choose."""
        return {name: probe for name, probe in self.results["probes"].items() if probe.get("chosen", True)}

    def scores(self) -> dict[str, dict]:
        """{chosen probe: scores at the last epoch, with its rate, optimizer and where it diverged, if it did}"""
        settings = ("blr", "optimizer", "diverged_at")
        return {n: {**probe["last"], **{key: probe[key] for key in settings}} for n, probe in self.chosen.items()}


def read_run(folder: Path) -> ProbeRun:
    """ValueError for a folder without a finished run, or with a damaged one."""
    folder, files = Path(folder), ("results.json", "args.json")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{folder} holds no {missing[0]}: it must be the --output_dir of a finished main_linprobe.py")
    results = read_results(folder / files[0])
    with reading(folder / files[1], "the args.json of a run of main_linprobe.py"):
        args = argparse.Namespace(**json.loads((folder / files[1]).read_text("utf-8"))["args"])
    epochs = {name: probe["last"]["epoch"] for name, probe in results["probes"].items()}
    state = RunFolder(folder).find_checkpoint("auto", evaluate_only=True)
    if state is None:
        raise ValueError(f"{folder} holds no checkpoint of its probes")
    if {"probes", "identity"} - state.keys() or state["probes"].keys() != epochs.keys():
        raise ValueError(f"{folder}: its checkpoint and its results.json are of different probes")
    if (last := max(epochs.values())) != state["epoch"] or min(epochs.values()) != last:
        raise ValueError(f"{folder}: its checkpoint is of epoch {state['epoch']}, its results of {last}")
    return ProbeRun(folder, args, results, state)


# ---- one trained probe, as an exported folder


class Trained(NamedTuple):
    """A trained probe without its encoder."""

    facts: dict  # spec, classes, encoder, encoder_weights (a digest), final_norm, scores, training
    state: dict[str, Tensor]  # of probing.bank.Probe

    @property
    def spec(self) -> ProbeSpec:
        return ProbeSpec(**self.facts["spec"])


def read_trained(folder: Path, head: str | None = None, block: int | None = None, seed: int | None = None) -> Trained:
    """The probe of an exported folder, or one of a run of main_linprobe.py.

    head, block, seed: of the probe; head may be its whole name, or without options and blocks. Without a seed, the
    first. Where held-out images chose rates, those probes only. ValueError where none or several fit, or files are
    missing or damaged.
    """
    folder = Path(folder)
    if (folder / FACTS).is_file():
        return read_exported(folder)
    run = read_run(folder)
    probes = run.chosen
    names = [name for name in probes if block in (None, probes[name]["block"]) and seed in (None, probes[name]["seed"])]
    for key in ("head", "aggregation"):
        fitting = [name for name in names if head in (None, name, probes[name][key])]
        fitting = [name for name in fitting if probes[name]["seed"] == probes[fitting[0]]["seed"]]
        if len(fitting) == 1:
            return of_run(run, fitting[0])
    known = ", ".join(fitting or probes)
    raise ValueError(f"{folder}: {len(fitting)} probes fit; name one by head, block and seed, or as one of: {known}")


def read_exported(folder: Path) -> Trained:
    with reading(folder / FACTS, "a probe of scripts/export_probe.py"):
        facts = json.loads((folder / FACTS).read_text())
        ProbeSpec(**facts["spec"])
    return Trained(facts, load_plain_or_safetensors(folder / WEIGHTS))


def of_run(run: ProbeRun, name: str) -> Trained:
    """A probe of a run, by its name."""
    results, args, probe = run.results, vars(run.args), run.results["probes"][name]
    with reading(run.folder, "a complete run, by its results.json and args.json"):
        facts = {
            "spec": {key: probe[key] for key in SPEC},
            "classes": results["classes"],
            "encoder": {key: args[key] for key in ENCODER_ARGUMENTS if key in args},
            "encoder_record": results["encoder"],
            "encoder_weights": run.state["identity"]["weights"],
            "final_norm": args["final_norm"],
            "scores": {**probe["last"], "headline": results["headline"], "diverged_at": probe["diverged_at"]},
            "training": {"dataset": args["dataset"], **{key: results.get(key) for key in TRAINING}},
        }
    return Trained(facts, run.state["probes"][name])


def export(trained: Trained, folder: Path) -> None:
    """Write probe.json and probe.safetensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / WEIGHTS, trained.state, {"kind": "probe", "head": trained.spec.head})
    write_json(folder / FACTS, trained.facts)
