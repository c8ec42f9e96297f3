"""Read a finished run of main_linprobe.py: its arguments, scores and trained probes."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from encoders.load import Encoder
from probing.bank import ProbeBank, ProbeSpec
from runtime.folder import RunFolder
from util.files import digest

ENCODER_ARGUMENTS = (
    *("model", "finetune", "family", "checkpoint_key", "num_heads", "no_cls_token", "input_size", "seed"),
    *("timm_name", "mean", "std", "grid", "decoder"),
)
SPEC = ("head", "block", "blr", "seed", "optimizer", "lr")  # of a ProbeSpec, in results.json


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
        with _reading(self.folder, "does not hold the same probes in its checkpoint and in results.json"):
            specs = [ProbeSpec(**{key: probe[key] for key in SPEC}) for probe in self.results["probes"].values()]
            classes = {len(probe["classifier.bias"]) for probe in self.state["probes"].values()}
            bank = ProbeBank(specs, encoder.backbone, grid, *classes)
            bank.load_probe_states(self.state["probes"])
        return bank.eval().requires_grad_(False)

    def scores(self) -> dict[str, dict]:
        """{probe: scores at the last epoch, with its rate, optimizer and where it diverged, if it did}.

        If held-out images chose rate and optimizer of each head and block, the chosen probes only.
        """
        settings = ("blr", "optimizer", "diverged_at")
        return {
            name: {**probe["last"], **{key: probe[key] for key in settings}}
            for name, probe in self.results["probes"].items()
            if probe.get("chosen", True)
        }


@contextlib.contextmanager
def _reading(path: Path, problem: str) -> Iterator[None]:
    """ValueError with the path for what unexpected content raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} {problem}: {reason}") from error


def read_run(folder: Path) -> ProbeRun:
    """ValueError for a folder without a finished run, or with a damaged one."""
    folder = Path(folder)
    for name in ("results.json", "args.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: it must be the --output_dir of a finished main_linprobe.py")
        with _reading(folder / name, "is damaged, or not of main_linprobe.py"):
            content = json.loads((folder / name).read_text())
            if name == "args.json":
                args = argparse.Namespace(**content["args"])
            else:
                results = content
                epochs = {name: probe["last"]["epoch"] for name, probe in results["probes"].items()}
    state = RunFolder(folder).find_checkpoint("auto", evaluate_only=True)
    if state is None:
        raise ValueError(f"{folder} holds no checkpoint of its probes")
    if {"probes", "identity"} - state.keys() or state["probes"].keys() != epochs.keys():
        raise ValueError(f"{folder}: its checkpoint and its results.json are of different probes")
    if set(epochs.values()) != {state["epoch"]}:
        last = max(epochs.values())
        raise ValueError(f"{folder}: its checkpoint is of epoch {state['epoch']}, its results of {last}")
    return ProbeRun(folder, args, results, state)
