"""The recipe as a whole: 200 steps of main_linprobe against a plain loop, on one process and two, and with other splits
of the same batches."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interruptions import in_processes
from PIL import Image
from torch import nn

import main_linprobe
from cli.console import parse
from data_sets.loader import KeyedDataset
from data_sets.table import build_dataset
from data_sets.views import train_transform
from encoders.load import save_encoder
from models_vit import build_vit
from probing.bank import ProbeBank, ProbeSpec
from util.seeding import stable_seed

EPOCHS, EFFECTIVE, GROUP, WARMUP, BLR = 20, 16, 8, 2, 60.0
IMAGES = 166  # ten optimizer steps an epoch, six images left over
MODEL = "vit_demo_patch8"
HEADS = ("cls", "pos", "abmilp")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five classes told by their colour."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 10)):
        for index in range(count):
            path = folder / split / f"class{index % 5}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.uniform(0, 150, (20, 24, 3)) + 60 * np.array([index % 5 // 3, index % 3 // 2, index % 5 % 2])
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def command(data, tmp_path):
    """Without what splits the batches."""
    torch.manual_seed(0)
    save_encoder(tmp_path / "encoder.safetensors", build_vit(MODEL, img_size=16).state_dict(), {"family": "mae"})
    return [
        "--model", MODEL, "--finetune", str(tmp_path / "encoder.safetensors"), "--data_path", str(data), "--seed", "3",
        "--input_size", "16", "--amp", "float32", "--device", "cpu", "--num_workers", "0", "--epochs", str(EPOCHS),
        "--warmup_epochs", str(WARMUP), "--blr", str(BLR), "--eval_every", "100", "--cls_features", *HEADS,
    ]  # fmt: skip


def trained(command, folder, *words):
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, *words, "--output_dir", str(folder)]))
    return last_states(folder)


def last_states(folder):
    probes = torch.load(folder / f"checkpoint-{EPOCHS - 1}.pth", weights_only=True)["probes"]
    return {name.partition("/")[0]: state for name, state in probes.items()}


def plain_loop(data, weights):
    """The recipe (paper, B.2) in torch alone; what it shares with the engine: images, order, initial weights."""
    encoder = build_vit(MODEL, img_size=16).eval()
    encoder.load_state_dict(weights)
    images = KeyedDataset(build_dataset("image_folder", data, "train"), train_transform(16), seed=3)
    specs = [ProbeSpec(head, encoder.depth - 1, BLR, 3) for head in HEADS]
    start = ProbeBank(specs, encoder, (2, 2), 5).probe_states()
    models, starts = {}, {}
    for spec in specs:
        linear, norm, query = nn.Linear(128, 5), nn.BatchNorm1d(128, eps=1e-6, affine=False), nn.Linear(128, 1)
        state = start[spec.name]
        linear.load_state_dict({"weight": state["classifier.weight"], "bias": state["classifier.bias"]})
        if spec.head == "abmilp":
            query.load_state_dict({key.rpartition(".")[2]: v for key, v in state.items() if "score" in key})
        parameters = [*linear.parameters(), *(query.parameters() if spec.head == "abmilp" else ())]
        models[spec.head] = linear, norm, query, parameters, [torch.zeros_like(p) for p in parameters]
        starts[spec.head] = linear.weight.detach().clone()
    steps = IMAGES // EFFECTIVE
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(stable_seed("order", 3, epoch))
        order = torch.randperm(IMAGES, generator=generator)[: steps * EFFECTIVE].view(steps, EFFECTIVE // GROUP, GROUP)
        for step, groups in enumerate(order.tolist()):
            t = epoch + step / steps
            warm = t / WARMUP if t < WARMUP else 0.5 * (1 + math.cos(math.pi * (t - WARMUP) / (EPOCHS - WARMUP)))
            lr = BLR * EFFECTIVE / 256 * warm
            batches = [[images[epoch, index] for index in group] for group in groups]
            with torch.no_grad():
                read = [next(iter(encoder(torch.stack([one.image for one in batch])).values())) for batch in batches]
            for head, (linear, norm, query, parameters, momenta) in models.items():
                for batch, tokens in zip(batches, read, strict=True):
                    weights = query(tokens.patches).softmax(1) if head == "abmilp" else torch.full((GROUP, 4, 1), 0.25)
                    vector = tokens.cls if head == "cls" else (weights * tokens.patches).sum(1)
                    loss = F.cross_entropy(linear(norm(vector)), torch.tensor([sample.label for sample in batch]))
                    (loss / len(batches)).backward()
                for p, u in zip(parameters, momenta, strict=True):
                    g = p.grad
                    if p.ndim > 1 and p.norm() > 0 and g.norm() > 0:
                        g = g * (0.001 * p.detach().norm() / g.norm())
                    u.mul_(0.9).add_(g)
                    p.data -= lr * u
                    p.grad = None
    return {head: (linear, norm, query, starts[head]) for head, (linear, norm, query, *_) in models.items()}


def same(state, other, tolerance):
    for key in state:
        if "score.0.bias" not in key:  # of no effect: it follows the rounding of a gradient that is zero
            torch.testing.assert_close(state[key], other[key], rtol=tolerance, atol=tolerance)


def test_200_steps_end_with_the_weights_of_a_plain_loop_however_batches_are_split(command, data, tmp_path):
    ours = trained(command, tmp_path / "run", "--batch_size", "8", "--accum_iter", "2")
    torch.manual_seed(0)
    for head, (linear, norm, query, start) in plain_loop(data, build_vit(MODEL, img_size=16).state_dict()).items():
        assert (linear.weight - start).norm() > 0.5 * start.norm()  # it went somewhere
        theirs = {"classifier.weight": linear.weight, "classifier.bias": linear.bias,
                  "norm.running_mean": norm.running_mean, "norm.running_var": norm.running_var}  # fmt: skip
        if head == "abmilp":
            theirs["aggregation.pool.score.0.weight"] = query.weight
        same({key: value.detach() for key, value in theirs.items()}, ours[head], 1e-3)

    # groups of 8 in one micro-step of 16; of two micro-steps of 4, on two processes
    splits: dict[str, list] = {
        "large": ["--batch_size", "16", "--bn_group", "8"],
        "shared": ["--batch_size", "4", "--bn_group", "8", "--accum_iter", "2", "--output_dir", tmp_path / "shared"],
    }
    words, output = list(map(str, [*command, *splits["shared"]])), tmp_path / "output"
    assert in_processes(2, "main_linprobe", words, output) == [0, 0], output.read_text()
    for name, words in splits.items():
        if name != "shared":
            trained(command, tmp_path / name, *words)
        other = last_states(tmp_path / name)
        assert json.loads((tmp_path / name / "args.json").read_text())["bn_group"] == 8
        for head in HEADS:
            same(ours[head], other[head], 1e-5)
