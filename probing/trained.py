"""One trained probe of a run: chosen, written as safetensors and JSON, and read again."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from encoders.load import load_plain_or_safetensors, save_encoder
from probing.bank import ProbeSpec
from probing.finished_run import ENCODER_ARGUMENTS, SPEC, ProbeRun, read_run
from util.files import write_json

FACTS, WEIGHTS = "probe.json", "probe.safetensors"  # files of an exported probe


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
    probes = {name: probe for name, probe in run.results["probes"].items() if probe.get("chosen", True)}
    names = [name for name in probes if block in (None, probes[name]["block"]) and seed in (None, probes[name]["seed"])]
    for key in ("head", "aggregation"):
        fitting = [name for name in names if head in (None, name, probes[name][key])]
        fitting = [name for name in fitting if probes[name]["seed"] == probes[fitting[0]]["seed"]]
        if len(fitting) == 1:
            return of_run(run, fitting[0])
    known = ", ".join(fitting or probes)
    raise ValueError(f"{folder}: {len(fitting)} probes fit; name one by head, block and seed, or as one of: {known}")


def read_exported(folder: Path) -> Trained:
    try:
        facts = json.loads((folder / FACTS).read_text())
        ProbeSpec(**facts["spec"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / FACTS} is damaged, or not of scripts/export_probe.py: {error!r}") from error
    return Trained(facts, load_plain_or_safetensors(folder / WEIGHTS))


def of_run(run: ProbeRun, name: str) -> Trained:
    """A probe of a run, by its name."""
    results, args, probe = run.results, vars(run.args), run.results["probes"][name]
    training = ("command", "commit", "dirty", "versions", "n_train", "effective_batch", "seeds_vary", "train_images")
    facts = {
        "spec": {key: probe[key] for key in SPEC},
        "classes": results["classes"],
        "encoder": {key: args[key] for key in ENCODER_ARGUMENTS if key in args},
        "encoder_record": results["encoder"],
        "encoder_weights": run.state["identity"]["weights"],
        "final_norm": args["final_norm"],
        "scores": {**probe["last"], "headline": results["headline"], "diverged_at": probe["diverged_at"]},
        "training": {"dataset": args["dataset"], **{key: results.get(key) for key in training}},
    }
    return Trained(facts, run.state["probes"][name])


def export(trained: Trained, folder: Path) -> None:
    """Write probe.json and probe.safetensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / WEIGHTS, trained.state, {"kind": "probe", "head": trained.spec.head})
    write_json(folder / FACTS, trained.facts)
