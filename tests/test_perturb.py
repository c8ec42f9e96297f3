"""Perturbed test images: against NumPy and closed forms, by image, in the scores of a probe and a figure."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cli.console import parse
from data_sets import demo
from data_sets.images import Images
from data_sets.loader import KeyedDataset, build_loader
from data_sets.order import EvaluationBatches
from data_sets.perturb import add_noise, read_perturbation
from data_sets.views import eval_transform
from scripts import evaluate_probe, plot_perturbed
from util.seeding import seeded


def drawn(height=24, width=24, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def radius_of(height, width):
    return np.hypot(*np.meshgrid(2 * np.fft.fftfreq(height), 2 * np.fft.fftfreq(width), indexing="ij"))


@pytest.mark.parametrize("size", [(24, 24), (15, 22)])
@pytest.mark.parametrize("radius", [0, 0.25, 0.6, 1.5])
def test_filters_equal_numpys(size, radius):
    image, distance = drawn(*size), radius_of(*size)
    for kind, kept in (
        ("lowpass", distance <= radius + 1e-9),
        ("highpass", (distance > radius + 1e-9) | (distance == 0)),
    ):
        expected = np.fft.ifft2(np.fft.fft2(image.numpy() / 255) * kept).real.clip(0, 1) * 255
        ours = read_perturbation(f"{kind}:{radius}")(image)
        assert ours.dtype == torch.uint8 and np.abs(ours.numpy() - expected).max() <= 0.5 + 1e-9
    assert (read_perturbation("lowpass:1.5")(image) == image).all() and (
        read_perturbation("highpass:0")(image) == image
    ).all()


def test_a_wave_passes_or_not_by_its_frequency():
    x = torch.arange(32, dtype=torch.float64)
    wave = (128 + 100 * torch.cos(2 * torch.pi * 4 * x / 32)).round().to(torch.uint8).expand(3, 32, 32)  # radius 0.25
    image = wave.permute(0, 2, 1)
    for kind, radius, passes in (
        ("lowpass", 0.25, True),
        ("lowpass", 0.2, False),
        ("highpass", 0.2, True),
        ("highpass", 0.25, False),
    ):
        result = read_perturbation(f"{kind}:{radius}")(image).double()
        assert (result - (image if passes else 128.0)).abs().max() <= 1, (kind, radius)


@pytest.mark.parametrize(("radius", "std"), [(0.1, 0.05), (0.5, 0.1), (1.2, 0.3)])
def test_noise_has_its_power_in_the_ring_alone(radius, std):
    torch.manual_seed(1)
    noise = add_noise(torch.zeros(3, 32, 30, dtype=torch.float64), radius, std)
    assert noise.square().mean().sqrt().item() == pytest.approx(std, rel=1e-12)
    power = np.abs(np.fft.fft2(noise.numpy())) ** 2
    ring = np.abs(radius_of(32, 30) - radius) <= 0.05 + 1e-9
    assert power[:, ~ring].sum() < 1e-20 * power.sum()
    torch.manual_seed(1)
    spectrum = np.fft.fft2(torch.randn(3, 32, 30, dtype=torch.float64).numpy()) * ring
    expected = np.fft.ifft2(spectrum).real
    np.testing.assert_allclose(noise, expected * std / np.sqrt((expected**2).mean()), atol=1e-12)


def test_shuffled_cells_keep_their_content():
    image, cells = drawn(24, 36), 4
    torch.manual_seed(3)
    result = read_perturbation("shuffle:4")(image)
    torch.manual_seed(3)
    order = torch.randperm(cells * cells)
    cut = lambda pixels: [part for row in pixels.chunk(cells, 1) for part in row.chunk(cells, 2)]  # noqa: E731
    for part, source in zip(cut(result), order, strict=True):
        assert (part == cut(image)[source]).all()
    assert (read_perturbation("shuffle:1")(image) == image).all()


@pytest.fixture
def images():
    pictures = [drawn(40, 50, seed).permute(1, 2, 0).numpy() for seed in range(6)]

    class Pixels(list):
        names = tuple(f"{number}.png" for number in range(6))

        def read(self, index):
            return self[index]

    return Images(Pixels(pictures), [0, 1] * 3, ["a", "b"])


@pytest.mark.parametrize("text", ["noise:0.5", "shuffle:4", "lowpass:0.5"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_perturbed_image_depends_on_its_index_alone(text, workers, images):
    step = read_perturbation(text)
    keyed = KeyedDataset(images, eval_transform(32, steps=[step]), 0)
    plain = eval_transform(32)
    seen = {}
    for order, size in ((range(6), 4), ((5, 3, 1, 0, 2, 4), 1)):
        for sample in build_loader(keyed, EvaluationBatches(6, size, list(order)), workers):
            for index, image in zip(sample.index.tolist(), sample.image, strict=True):
                assert (seen.setdefault(index, image) == image).all()
    for index, image in seen.items():
        with seeded("sample", 0, 0, index):
            expected = plain.normalise(step(plain.pixels(images[index][0])))
        assert (image == expected).all()
    if text != "lowpass:0.5":  # two images get different draws
        assert (step(drawn()) != step(drawn())).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lowpas:0.2", "did you mean lowpass"),
        ("lowpass", "'lowpass': write lowpass:R, R from 0 to 1.5"),
        ("lowpass:x", "write lowpass:R"),
        ("highpass:nan", "write highpass:R"),
        ("noise:0.5,2", "STD to 1"),
        ("shuffle:2.5", "N a whole number"),
        ("shuffle:0", "N a whole number >= 1"),
        ("lowpass:0.1,0.2", "write lowpass:R"),
    ],
)
def test_mistakes_name_the_value_and_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_perturbation(text)
    for bad in ("shuffle:5", "noise:1.48"):
        with pytest.raises(ValueError, match="24 x 24"):
            read_perturbation(bad)(drawn())


def test_names_are_canonical():
    names = [
        str(read_perturbation(text)) for text in ("noise:.50,0.1", "noise:0.5,0.20", "shuffle:8.0", "lowpass:0.125")
    ]
    assert names == ["noise:0.5,0.1", "noise:0.5,0.2", "shuffle:8", "lowpass:0.125"]


# ---- images whose cues conflict


def test_conflicting_images_differ_from_agreeing_ones_in_their_texture_alone():
    for index in range(40):
        agree, conflict = (demo.render(0, "val", index, cues) for cues in ("agree", "conflict"))
        assert agree.label == conflict.label == agree.texture == index % 10 != conflict.texture
        assert agree.box == conflict.box
        x0, y0, x1, y1 = agree.box
        outside = np.ones(agree.pixels.shape[:2], dtype=bool)
        outside[max(y0 - 1, 0) : y1 + 2, max(x0 - 1, 0) : x1 + 2] = False
        assert (agree.pixels[outside] == conflict.pixels[outside]).all() and (agree.pixels != conflict.pixels).any()
    assert {demo.render(0, "val", 10 * k, "conflict").texture for k in range(60)} == set(range(1, 10))


def test_every_class_has_an_outline_of_its_own_with_the_area_of_a_disc():
    masks = [demo._lobed(36, 36, 12, *lobes) for lobes in demo.LOBES]
    assert len(masks) == len(demo.CLASSES)
    for number, mask in enumerate(masks):
        assert mask.sum() == pytest.approx(np.pi * 12**2, rel=0.02)
        np.testing.assert_allclose(mask[:, 1:], mask[:, 1:][:, ::-1], atol=1e-9)  # flips keep the class
        assert all(np.abs(mask - other).sum() > 20 for other in masks[:number])


def test_names_tell_the_texture_and_answers_are_counted_by_cue(tmp_path):
    demo.generate(tmp_path / "conflict", 10, 20, workers=1, cues="conflict")
    for path in (tmp_path / "conflict" / "val").rglob("*.png"):
        number, texture = path.stem.split("-")
        label = demo.CLASSES.index(path.parent.name)
        assert (
            demo.CLASSES[demo.render(0, "val", int(number), "conflict").texture] == texture
            and int(number) % 10 == label
        )
    with pytest.raises(ValueError, match="other settings"):
        demo.generate(tmp_path / "conflict", 10, 20, workers=1, cues="agree")
    labels, textures = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, -1])
    logits = torch.eye(3, dtype=torch.float64)[[0, 2, 0, 1]]  # shape, texture, texture, neither
    scores = evaluate_probe.scores_of(logits, labels, [torch.tensor([k]) for k in range(3)], textures)
    assert (scores["top-1"], scores["texture"], scores["shape bias"]) == (25, 50, pytest.approx(100 / 3))


# ---- scores and figure


@pytest.mark.usefixtures("rendered")
def test_a_probe_is_tested_on_perturbed_images(tmp_path, capsys):
    import main_linprobe

    for cues in ("agree", "conflict"):
        demo.generate(tmp_path / cues, 40, 20, workers=1, cues=cues)
    flags = "--preset small --l2 0.1 --model vit_demo_patch8 --amp float32 --cls_features pos abmilp --num_workers 0"
    argv = [*flags.split(), "--data_path", str(tmp_path / "agree"), "--output_dir", str(tmp_path / "run")]
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))

    def evaluated(cues, *more):
        argv = [
            tmp_path / "run",
            "--data_path",
            tmp_path / cues,
            "--num_workers",
            0,
            "--output",
            tmp_path / f"{cues}.json",
        ]
        evaluate_probe.main(evaluate_probe.get_args_parser().parse_args([*map(str, argv), *more]))
        return json.loads((tmp_path / f"{cues}.json").read_text())

    perturb = ["--perturb", "highpass:0", "lowpass:0.2", "lowpass:0.4", "lowpass:.4", "noise:0.6,0.3", "shuffle:8"]
    scores = evaluated("agree", *perturb)
    assert list(scores["perturbed"]) == ["highpass:0", "lowpass:0.2", "lowpass:0.4", "noise:0.6,0.3", "shuffle:8"]
    assert scores["perturbed"]["highpass:0"] == scores["probes"] != scores["perturbed"]["lowpass:0.2"]
    assert evaluated("agree", *perturb) == scores
    assert "| noise:0.6,0.3 |" in capsys.readouterr().out
    conflict = next(iter(evaluated("conflict")["probes"].values()))
    assert {"texture", "shape bias"} < conflict.keys() and "texture" not in next(iter(scores["probes"].values()))
    for wrong, message in (
        (["--loader", "gpu"], "--loader gpu"),
        (["--perturb", "shuffle:5"], "cannot be cut into 5 x 5"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated("agree", *perturb, *wrong)

    pair = f"A={tmp_path / 'agree.json'}"
    curves = plot_perturbed.curves_of([pair])
    line = next(iter(scores["probes"])).rpartition("/seed")[0]
    assert curves[f"A: {line}"]["shuffle:8"] == [scores["perturbed"]["shuffle:8"][f"{line}/seed0"]["top-1"]]
    plot_perturbed.main(plot_perturbed.get_args_parser().parse_args([pair, "--output", str(tmp_path / "figure.png")]))
    assert min(Image.open(tmp_path / "figure.png").size) > 300
    assert len(plot_perturbed.curves_of([pair, pair])[f"A: {line}"]["shuffle:8"]) == 2  # files of a label pool seeds
    with pytest.raises(ValueError, match=r"is not of evaluate_probe\.py --perturb"):
        plot_perturbed.curves_of([str(tmp_path / "conflict.json")])
