"""What several tests share: a tiny encoder and image folder, and the programs started as their users start them."""

import functools
import http.server
import io
import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import models_mae
import models_vit
from encoders.load import save_encoder

ROOT = Path(__file__).resolve().parent.parent
SAVEFIG = Figure.savefig
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}

torch.set_num_threads(1)  # tiny tensors only wait for more


@pytest.fixture(autouse=True)
def logs_end_with_their_test():
    """Programs log to standard output as it was when they started: pytest's, which it closes after the test."""
    yield
    logging.root.handlers = [one for one in logging.root.handlers if type(one) is not logging.StreamHandler]


@pytest.fixture(autouse=True, scope="session")
def figures_are_empty_files():
    """Rendering takes most of the time of a tiny analysis; tests that look at figures use the fixture `rendered`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
        yield


@pytest.fixture
def rendered(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture
def tiny(monkeypatch):
    """The name of an architecture small enough for tests."""
    monkeypatch.setitem(models_vit.ARCHITECTURES, "vit_tiny_test", TINY)
    decoder = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
    monkeypatch.setitem(models_mae.DECODERS, "vit_tiny_test", decoder)
    return "vit_tiny_test"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes told by their colour, 40 x 36 pixels: 24 training images and 7 test images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        for index in range(count):
            path = folder / split / ("red", "green", "blue")[index % 3] / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (40, 36, 3))
            pixels[..., index % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The file of a random encoder of 4 x 4 patches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_encoder(path, models_vit.build_vit("vit_demo_patch8", img_size=32).state_dict(), {"family": "mae"})
    return path


@pytest.fixture
def probe_command(image_folder, tiny, tmp_path):
    """Flags of main_linprobe.py for a tiny MAE encoder on the image folder; epochs and output folder are the test's."""
    torch.manual_seed(0)
    save_encoder(tmp_path / "encoder.safetensors", models_vit.build_vit(tiny).state_dict(), {"family": "mae"})
    return [
        "--model", tiny, "--finetune", str(tmp_path / "encoder.safetensors"), "--data_path", str(image_folder),
        "--amp", "float32", "--device", "cpu", "--num_workers", "0",
    ]  # fmt: skip


@pytest.fixture
def run_program():
    """Start a program in a process of its own, or in several as torchrun starts them, on the CPU."""
    from interruptions import free_port  # slow, and needed by few

    def run(*command: object, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        words = [sys.executable, *map(str, command)]
        common = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if processes > 1:
            common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

        def start(rank: int) -> subprocess.CompletedProcess:
            environment = common | ({"RANK": str(rank)} if processes > 1 else {})
            options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
            return subprocess.run(words, cwd=cwd, env=environment, **options)

        with ThreadPoolExecutor(processes) as pool:
            first, *others = pool.map(start, range(processes))
        for done in others:  # what the first process says comes last
            first.returncode = first.returncode or done.returncode
            first.stdout, first.stderr = done.stdout + first.stdout, done.stderr + first.stderr
        return first

    return run


@pytest.fixture
def run_ranks(tmp_path):
    """Run a program in forks of this process, which has imported everything: ranks of one run on the CPU."""

    def run(program: str | Path, *flags: object, ranks: int = 2) -> subprocess.CompletedProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        outputs = [[tmp_path / f"rank{rank}.{kind}" for kind in ("out", "err")] for rank in range(ranks)]
        environments = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks} for rank in range(ranks)]
        context = multiprocessing.get_context("fork")
        children = [
            context.Process(target=become_rank, args=([program, *flags], {**environment, "MASTER_PORT": port}, *paths))
            for environment, paths in zip(environments, outputs, strict=True)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=300)
            child.kill()
            child.join()
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
        code = next((child.exitcode for child in children if child.exitcode), 0)
        return subprocess.CompletedProcess([program, *flags], code, out, err)

    return run


def become_rank(command: list, environment: dict, out: Path, err: Path) -> None:
    """Run a program in this process, with the environment of a rank and its output in files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), line_buffering=True) for number in (1, 2))
    os.environ |= {name: str(value) for name, value in {**environment, "MASTER_ADDR": "127.0.0.1"}.items()}
    os.chdir(ROOT)
    sys.argv = list(map(str, command))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script("plot_attention.py", word, ...) -> exit code, standard output and error, in this process."""

    def run(name: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def serve(monkeypatch):
    """Serve a folder over HTTP on this machine: serve(folder) -> address."""
    servers = []
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *words: None)

    def start(folder: Path) -> str:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
