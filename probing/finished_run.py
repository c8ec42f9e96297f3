"""A finished run of main_linprobe.py, read by other programs: its arguments, its scores and its trained probes."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import main_linprobe
from cli.console import parse
from encoders.load import Encoder
from models_vit import VisionTransformer
from probing.bank import ProbeBank
from runtime.folder import RunFolder
from util.files import digest

ENCODER_ARGUMENTS = (
    "model", "finetune", "family", "checkpoint_key", "timm_name", "num_heads", "mean", "std", "grid", "no_cls_token",
    "input_size", "seed",
)  # fmt: skip
MISREAD = (KeyError, TypeError, AttributeError, IndexError)  # of JSON and checkpoints that something else has written


class ProbeRun(NamedTuple):
    folder: Path
    args: argparse.Namespace  # of main_linprobe.py
    results: dict  # its results.json
    state: dict  # its newest checkpoint

    def with_encoder(self, args: argparse.Namespace) -> argparse.Namespace:
        """The arguments with the run's encoder in place of theirs; random weights are a function of its seed."""
        return argparse.Namespace(**{**vars(args), **{name: vars(self.args)[name] for name in ENCODER_ARGUMENTS}})

    def bank(self, encoder: Encoder, grid: tuple[int, int]) -> ProbeBank:
        """The trained probes, in evaluation mode. ValueError where they were trained on other weights or sizes."""
        backbone: VisionTransformer = encoder.backbone
        if self.state["identity"].get("weights") != digest(backbone.state_dict()):
            raise ValueError(
                f"--probes {self.folder} was trained on another encoder, {self.args.finetune or 'random weights'}: "
                "name that one with --finetune, or leave --finetune out"
            )
        try:
            classes = {len(probe["classifier.bias"]) for probe in self.state["probes"].values()}
            bank = ProbeBank(main_linprobe.probe_specs(self.args, backbone), backbone, grid, *classes)
            bank.load_probe_states(self.state["probes"])
        except MISREAD as error:
            raise ValueError(f"--probes {self.folder}: its checkpoint holds no probes: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"--probes {self.folder}: {error}") from error
        return bank.eval().requires_grad_(False)

    def scores(self) -> dict[str, dict]:
        """{probe: its scores at the last epoch}, with its rate and with where it diverged, if it did.

        Where held-out images have chosen rate and optimizer of each head and block, the chosen probes alone.
        """
        return {
            name: {**probe["last"], "blr": probe["blr"], "optimizer": probe.get("optimizer", "lars"),
                   "diverged_at": probe.get("diverged_at")}
            for name, probe in self.results["probes"].items() if probe.get("chosen", True)
        }  # fmt: skip


def read_run(folder: Path) -> ProbeRun:
    """ValueError for a folder that holds no finished run, or a damaged one."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(
            f"--probes {folder} holds no results.json: is it the --output_dir of a finished main_linprobe.py?"
        )
    try:
        results = json.loads(path.read_text())
        probes = {name: probe["last"]["epoch"] for name, probe in results["probes"].items()}
    except (OSError, ValueError, *MISREAD) as error:
        raise ValueError(f"--probes {folder}: {path.name} is not that of main_linprobe.py") from error
    if not (Path(folder) / "args.json").is_file():
        raise ValueError(f"--probes {folder} holds no args.json, which says what its probes are")
    args = parse(main_linprobe.get_args_parser(), ["--args_from", str(Path(folder) / "args.json")])
    state = RunFolder(folder).find_checkpoint("auto", evaluate_only=True)
    if state is None:
        raise ValueError(f"--probes {folder} holds no checkpoint of its probes")
    if {"probes", "identity"} - state.keys() or state["probes"].keys() != probes.keys():
        raise ValueError(f"--probes {folder}: its checkpoint and its results.json are of different probes")
    if set(probes.values()) != {state["epoch"]}:
        raise ValueError(
            f"--probes {folder}: its checkpoint is of epoch {state['epoch']}, its results of {max(probes.values())}"
        )
    return ProbeRun(Path(folder), args, results, state)
