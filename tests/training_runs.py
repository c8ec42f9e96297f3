"""Short runs of main_pretrain.py and main_finetune.py in this process, and what they leave."""

import importlib
import json
from pathlib import Path

import pytest

from cli.console import parse, run_main

COMMON = [
    "--model", "vit_demo_patch8", "--input_size", "32", "--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1",
    "--lr", "2e-3", "--amp", "float32", "--device", "cpu", "--num_workers", "0",
]  # fmt: skip
# without the randomness of fine-tuning's recipe
PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop_path", "0", "--aa", "", "--reprob", "0", "--smoothing", "0"]


class Program:
    """A main by name, with the flags of a short run: 3 epochs of 3 steps on 4 x 4 patches."""

    def __init__(self, name: str, flags: list[str]):
        self.module, self.flags = importlib.import_module(name), flags

    def parse(self, *flags: object):
        return parse(self.module.get_args_parser(), [*self.flags, *map(str, flags)])

    def run(self, folder: Path | str, *flags: object) -> Path:
        self.module.main(self.parse("--output_dir", folder, *flags))
        return folder

    def mistake(self, capsys: pytest.CaptureFixture, *flags: object) -> str:
        """The one-line error of a run that refuses its arguments or files."""
        with pytest.raises(SystemExit) as stopped:
            run_main(self.module.main, self.parse(*flags))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1, error
        return error


def weights(folder: Path) -> bytes:
    return (folder / "encoder.safetensors").read_bytes()


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def log_lines(folder: Path) -> list[dict]:
    """The lines of log.txt without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0 and 0 <= line.pop("data_wait") <= 1 and line.pop("memory_gib") > 0
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def out_of_range(*arguments: str) -> dict[str, tuple[list[str], str]]:
    """{name: flags and the message that refuses them} of arguments such as "--lr nan"."""
    return {text: (text.split(), f", got {text.split()[1]!r}") for text in arguments}
