"""The analysis of aggregation vectors: the numbers of its definitions however the work is split; what it refuses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import in_processes
from PIL import Image
from test_run_folder import claimed_by_another_process

import aggregation.rules
import main_analyze_aggregation
import main_linprobe
import models_vit
from aggregation.boxes import read_boxes
from aggregation.divergence import entropies, normalised
from aggregation.figures import display_name
from aggregation.localization import found_boxes, levels_of, score_map
from aggregation.results import table as table_of
from cli.console import parse, run_main
from cli.encoder_arguments import frozen_encoder
from data_sets.demo import generate
from data_sets.table import build_dataset
from data_sets.views import eval_transform
from encoders.load import save_encoder
from main_analyze_aggregation import get_args_parser
from models_vit import build_vit
from probing.finished_run import read_run

TEST_IMAGES = 11  # no batch size and no number of processes divides it
FLAGS = ["--amp", "float32", "--device", "cpu", "--num_workers", "0", "--loc_workers", "0", "--loc_step", "0.02"]
FLAGS += ["--num_examples", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    generate(folder, 20, TEST_IMAGES, workers=1)
    return folder


def probe(data: Path, folder: Path, *flags: object) -> Path:
    argv = ["--model", "vit_demo_patch8", "--data_path", data, "--amp", "float32", "--num_workers", "0", "--seed", "3",
            "--batch_size", "10", "--epochs", "1", "--warmup_epochs", "0", "--device", "cpu", "--blr", "30",
            "--output_dir", folder, *flags]  # fmt: skip
    main_linprobe.main(parse(main_linprobe.get_args_parser(), list(map(str, argv))))
    return folder


@pytest.fixture(scope="module")
def probes(data, tmp_path_factory) -> Path:
    """A finished run with probes of all kinds, on random weights."""
    heads = ["cls", "abmilp", "ap2", "abmilp:content=all", "attn-mn"]
    return probe(data, tmp_path_factory.mktemp("probes") / "run", "--cls_features", *heads, "--seeds", "0", "1")


def analyse(output: Path, *flags: object) -> dict:
    argv = ["--output_dir", output, *FLAGS, *flags]
    main_analyze_aggregation.main(parse(get_args_parser(), list(map(str, argv))))
    return json.loads((output / "aggregation.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "tfevents" not in path.name}


def inputs(data: Path, probes: Path) -> list[object]:
    return ["--data_path", data, "--probes", probes, "--boxes", data / "boxes.csv"]


@pytest.fixture(scope="module")
def result(data, probes, tmp_path_factory) -> dict:
    return analyse(tmp_path_factory.mktemp("out"), *inputs(data, probes), "--batch_size", 4)


NAMES = ["attn-mn", "attn-lcte", "ca1", "pos", "abmilp/seed0", "abmilp/seed1", "ap2/seed0", "ap2/seed1",
         "abmilp:content=all/seed0", "abmilp:content=all/seed1"]  # fmt: skip


def assert_same_numbers(found: dict, expected: dict) -> None:
    assert [rule["name"] for rule in found["rules"]] == [rule["name"] for rule in expected["rules"]]
    for one, other in zip(found["rules"], expected["rules"], strict=True):
        assert one["entropy"] == pytest.approx(other["entropy"], rel=1e-6, abs=1e-6)
    for name, matrix in expected["matrices"].items():
        for key in ("mean", "std", "images", "infinite"):
            left, right = (np.array(one[key], dtype=float) for one in (found["matrices"][name], matrix))
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6, err_msg=name)
    if "localization" in expected:
        assert found["localization"]["maps"] == expected["localization"]["maps"]
        assert found["localization"]["images"] == expected["localization"]["images"]


@pytest.fixture(scope="module")
def vectors(data, probes):
    """Of single images, by hand: the rules' vectors {name: (M,)} of the view that a transform makes."""
    run = read_run(probes)
    asked = run.with_encoder(parse(get_args_parser(), ["--data_path", str(data)]))
    encoder, _ = frozen_encoder(asked)
    bank = run.bank(encoder, (8, 8))

    def of(image: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            (features,) = encoder.backbone(image[None], cls_attention=True, patch_attention=[27]).values()
        attention, found = features.cls_attention, {}
        found["attn-mn"] = attention.mean(1)
        shares = attention / attention.sum(-1, keepdim=True)
        lowest = torch.special.entr(shares).sum(-1).argmin(1)
        found["attn-lcte"] = attention[:, int(lowest)]
        found["ca1"] = features.patch_attention[27].mean(1)
        found["pos"] = torch.ones(1, 64)
        for spec, probe in zip(bank.specs, bank.probes, strict=True):
            if spec.aggregation in ("abmilp", "ap"):
                found[f"{spec.head}/seed{spec.seed}"] = probe.aggregation(features).weights
        return {name: normalised(weights, 64)[0] for name, weights in found.items()}

    return of


def test_every_image_counts_once_with_the_numbers_of_the_definitions(data, vectors, result):
    assert [rule["name"] for rule in result["rules"]] == NAMES
    images, crop = build_dataset("image_folder", data, "val"), eval_transform(64)
    each = [vectors(crop(image)) for image, _ in images]
    stacked = torch.stack([torch.stack([one[name] for name in NAMES]) for one in each])  # (B,R,M)
    for number, rule in enumerate(result["rules"]):
        values = entropies(stacked)[:, number]
        assert rule["entropy"]["images"] == TEST_IMAGES
        assert rule["entropy"]["mean"] == pytest.approx(values.mean().item(), rel=1e-6)
        assert rule["entropy"]["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4, abs=1e-7)
    raised = stacked.clamp(min=1e-8)
    raised = raised / raised.sum(-1, keepdim=True)
    kl = (raised[:, :, None] * (raised[:, :, None] / raised[:, None]).log()).sum(-1).mean(0)
    np.testing.assert_allclose(result["matrices"]["kl"]["mean"], kl, rtol=1e-4, atol=1e-7)
    assert result["rules"][3]["entropy"]["mean"] == pytest.approx(math.log(64))


def test_boxes_are_those_of_the_stretched_image(data, vectors, result):
    images = build_dataset("image_folder", data, "val")
    boxes, levels = read_boxes(data / "boxes.csv", None, images, data, range(TEST_IMAGES)), levels_of(0.02)
    stretch = eval_transform(64, interpolation="bilinear", crop_pct=None)
    found = {name: np.zeros((len(levels), 3), int) for name in NAMES}
    for index, (image, _) in enumerate(images):
        assert stretch(image).shape == (3, 64, 64)
        for name, vector in vectors(stretch(image)).items():
            found[name] += found_boxes(
                score_map(vector.view(8, 8).numpy(), (64, 64)), boxes.resized(index, 64), levels
            )[0]
    for name in NAMES:
        differing = np.abs(np.array(result["localization"]["maps"][name]["found"]) - found[name])
        assert differing.max() <= 1, name  # a pixel on the edge of a level, where batches round otherwise
    assert result["localization"]["maps"]["pos"]["maxboxaccv2"] == 0


def test_probes_come_with_their_scores_and_seeds_are_averaged(probes, result):
    scores = json.loads((probes / "results.json").read_text())["probes"]
    top1 = [scores[f"abmilp/block5/blr30.0/seed{seed}"]["last"]["top1"] for seed in (0, 1)]
    assert result["over_seeds"]["abmilp"]["top1"] == {
        "mean": pytest.approx(np.mean(top1)), "n": 2, "std": pytest.approx(np.std(top1, ddof=1))
    }  # fmt: skip
    fixed = [scores[f"attn-mn/block5/blr30.0/seed{seed}"]["last"]["top1"] for seed in (0, 1)]
    assert result["over_seeds"]["attn-mn"]["top1"]["mean"] == pytest.approx(np.mean(fixed))
    assert result["over_seeds"]["attn-mn"]["maxboxaccv2"]["n"] == 1 and "top1" not in result["over_seeds"]["ca1"]
    notes = {rule["name"]: " ".join(rule["notes"]) for rule in result["rules"]}
    assert "mean of 2 heads" in notes["ap2/seed0"] and "and the rest renormalised" in notes[NAMES[-1]]
    assert not notes["abmilp/seed0"]


@pytest.mark.parametrize(
    "flags", [("--batch_size", 1), ("--batch_size", 32, "--loc_workers", 2, "--num_examples", 2)], ids=str
)
def test_numbers_do_not_depend_on_how_the_work_is_done(data, probes, tmp_path, result, flags):
    found = analyse(tmp_path, *inputs(data, probes), *flags)
    assert flags[1] == 1 or files(tmp_path) == {
        "aggregation.json", "args.json", "kl.png", "kl.pdf", "maps.png", "boxes.png", "checkpoint-1.pth",
        "examples.safetensors"
    }  # fmt: skip
    found["localization"]["maps"], other = {}, {**result, "localization": {**result["localization"], "maps": {}}}
    assert_same_numbers(found, other)


def test_two_processes_give_the_numbers_of_one(data, probes, tmp_path, result):
    folder, output = tmp_path / "run", tmp_path / "output"
    flags = list(map(str, ["--output_dir", folder, *FLAGS, *inputs(data, probes), "--batch_size", 2]))
    assert in_processes(2, "main_analyze_aggregation", flags, output) == [0, 0], output.read_text()
    found = json.loads((folder / "aggregation.json").read_text())
    assert found["processes"] == 2 and found["images"] == TEST_IMAGES
    found["localization"]["maps"], other = {}, {**result, "localization": {**result["localization"], "maps": {}}}
    assert_same_numbers(found, other)


def test_one_image_is_enough(data, probes, tmp_path):
    found = analyse(tmp_path, *inputs(data, probes), "--num_images", 1)
    assert found["images"] == 1 == found["localization"]["images"]
    assert {rule["entropy"]["std"] for rule in found["rules"]} == {0.0}


def test_crop_clips_boxes_and_leaves_the_other_numbers_as_they_are(data, probes, tmp_path, result):
    found = analyse(tmp_path, *inputs(data, probes), "--loc_transform", "crop", "--loc_map_heads", "best")
    assert found["localization"]["images"] + found["localization"]["images_left_out"] == 11
    heads = [name for name in found["localization"]["maps"] if name.startswith("attn-head")]
    assert heads == [f"attn-head{head}" for head in range(4)] and found["localization"]["best_head"] in heads
    assert_same_numbers({**found, "localization": 0}, {k: v for k, v in result.items() if k != "localization"})


def test_probes_are_chosen_by_their_heads(data, probes, tmp_path):
    flags = ["--data_path", data, "--probes", probes, "--num_images", 2]
    found = analyse(tmp_path / "out", *flags, "--probe_heads", "abmilp", "--rules", "pos")
    assert [rule["name"] for rule in found["rules"]] == ["pos", "abmilp/seed0", "abmilp/seed1"]
    for head in ("cls", "ap3"):
        with pytest.raises(ValueError, match=f"--probe_heads {head}: .*the run has abmilp, ap2, "):
            analyse(tmp_path / head, *flags, "--probe_heads", head)


def test_boxes_alone(data, probes, tmp_path):
    found = analyse(tmp_path, *inputs(data, probes), "--boxes_only", "--rules", "attn-mn", "--num_examples", 2)
    assert "matrices" not in found and "entropy" not in found["rules"][0] and found["localization"]["images"] == 11
    assert files(tmp_path) == {"aggregation.json", "args.json", "boxes.png", "checkpoint-0.pth"}


def test_encoder_without_cls_follows_the_other_rules(data, tmp_path):
    flags = ["--data_path", data, "--model", "vit_demo_patch8", "--no_cls_token", "--boxes", data / "boxes.csv",
             "--num_examples", 2]  # fmt: skip
    found = analyse(tmp_path / "out", *flags)
    assert [rule["name"] for rule in found["rules"]] == ["ca1", "pos"] and (tmp_path / "out" / "boxes.png").exists()
    with pytest.raises(ValueError, match=r"attn-mn: this encoder has no \[cls\] token"):
        analyse(tmp_path / "other", *flags, "--rules", "attn-mn", "pos")


def test_registers_are_no_patches(data, tmp_path, monkeypatch):
    arch = {**models_vit.ARCHITECTURES["vit_demo_patch8"], "reg_tokens": 3, "depth": 2}
    monkeypatch.setitem(models_vit.ARCHITECTURES, "vit_registers_test", arch)
    found = analyse(tmp_path, "--data_path", data, "--model", "vit_registers_test", "--num_images", 3)
    assert found["patches"] == 64 and found["rules"][0]["entropy"]["images"] == 3


def test_oracle_is_another_encoder(data, tmp_path):
    save_encoder(tmp_path / "oracle.safetensors", build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    flags = ["--data_path", data, "--model", "vit_demo_patch8", "--num_images", 4, "--oracle_model", "vit_demo_patch8"]
    found = analyse(tmp_path / "out", *flags, "--oracle", tmp_path / "oracle.safetensors")
    assert [rule["name"] for rule in found["rules"]] == ["attn-mn", "attn-lcte", "ca1", "dino", "pos"]
    assert found["oracle"]["source"] == "oracle.safetensors"


def test_damaged_images_are_left_out_when_asked(data, probes, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data" / "val").rglob("*.png")).write_text("no image")
    flags = [*inputs(tmp_path / "data", probes), "--batch_size", 1]
    with pytest.raises(ValueError, match="cannot read image"):
        analyse(tmp_path / "stopped", *flags)
    found = analyse(tmp_path / "out", *flags, "--on_bad_image", "skip", "--num_examples", 11)
    assert found["images"] == 10 == found["localization"]["images"]


@pytest.mark.usefixtures("rendered")
def test_images_to_show_may_be_any(data, probes, tmp_path):
    Image.new("RGB", (100, 70)).save(tmp_path / "other.png")
    one = next((data / "val").rglob("*.png"))
    analyse(tmp_path / "out", *inputs(data, probes), "--num_images", 3, "--images", one, tmp_path / "other.png",
            "--draw_threshold", 0.3)  # fmt: skip
    with Image.open(tmp_path / "out" / "boxes.png") as figure:
        assert figure.size[0] > 300


def test_overflow_stops_the_analysis(data, tmp_path):
    model = build_vit("vit_demo_patch8")
    model.blocks[0].mlp.fc2.bias.data[0] = 3e38
    model.blocks[1].mlp.fc2.bias.data[0] = 3e38
    save_encoder(tmp_path / "big.safetensors", model.state_dict(), {"family": "mae"})
    with pytest.raises(FloatingPointError, match="activations are not finite"):
        flags = ["--data_path", data, "--model", "vit_demo_patch8", "--finetune", tmp_path / "big.safetensors"]
        analyse(tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--boxes", "/nowhere"], "--boxes /nowhere: no such file or folder"),
        (["--probe_heads", "abmilp"], "--probe_heads selects probes of a run: name it with --probes"),
        (["--boxes_only"], "--boxes_only needs true boxes: name them with --boxes"),
        (["--loc_map_heads", "best"], "--loc_map_heads best needs true boxes"),
        (["--rules", "cls"], "--rules cls weighs no patches"),
        (["--rules", "abmilp"], "--rules abmilp is learned: name the run that trained it with --probes"),
        (["--rules", "dino"], "--rules dino needs the attention of another encoder: name it with --oracle"),
        (["--rules", "pos", "pos"], "--rules pos pos names a rule twice"),
        (["--rules", "mean"], "unknown head 'mean'"),
        (["--probes", "/nowhere"], "/nowhere holds no results.json"),
        (["--kl_eps", "-1"], "--kl_eps: must be in [0, 1), got '-1'"),
        (["--loc_step", "2"], "--loc_step: must be in (0, 1), got '2'"),
        (["--batch_size", "0"], "--batch_size: must be an integer >= 1, got '0'"),
        (["--num_images", "99"], "choose from 1 to 11"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line_before_any_work(data, tmp_path, capsys, flags, message):
    argv = ["--data_path", str(data), "--model", "vit_demo_patch8", "--output_dir", str(tmp_path), *FLAGS, *flags]
    with pytest.raises(SystemExit) as stopped:
        run_main(main_analyze_aggregation.main, parse(get_args_parser(), argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_probes_of_another_encoder_are_refused(data, probes, tmp_path):
    save_encoder(tmp_path / "other.safetensors", build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    flags = ["--model", "vit_demo_patch8", "--finetune", tmp_path / "other.safetensors"]
    with pytest.raises(ValueError, match="were trained on another encoder, random weights"):
        analyse(tmp_path / "out", *inputs(data, probes), *flags)


def test_probes_of_an_encoder_that_reads_its_images_otherwise_are_refused(data, tmp_path):
    """The digest of the weights is the same."""
    weights = tmp_path / "mae.safetensors"
    save_encoder(weights, build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    encoder = ["--model", "vit_demo_patch8", "--finetune", weights]
    probes = probe(data, tmp_path / "probes", *encoder, "--cls_features", "abmilp")
    assert analyse(tmp_path / "same", *inputs(data, probes), *encoder, "--num_images", 1)["images"] == 1
    for flags, message in (
        (["--num_heads", "2"], "encoder: num_heads 4, not 2"),
        (["--input_size", "32"], "encoder: input size 64, not 32"),
        (["--family", "timm"], "encoder: family mae, not timm"),
    ):
        with pytest.raises(ValueError, match=f"probes of .* were trained with .*{message}.*: drop --finetune"):
            analyse(tmp_path / "other", *inputs(data, probes), *encoder, *flags)


def test_the_oracle_must_be_that_of_the_probes(data, tmp_path):
    for name in ("one", "two"):
        save_encoder(tmp_path / f"{name}.safetensors", build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "copy.safetensors")
    oracle = ["--oracle_model", "vit_demo_patch8", "--oracle"]
    probes = probe(data, tmp_path / "probes", *oracle, tmp_path / "one.safetensors", "--cls_features", "dino")
    flags = ["--data_path", data, "--probes", probes, "--num_images", 1, *oracle]
    assert analyse(tmp_path / "copied", *flags, tmp_path / "copy.safetensors")["images"] == 1
    for more in (["two.safetensors"], ["one.safetensors", "--oracle_family", "timm"]):
        with pytest.raises(ValueError, match=r"trained with oracle.*: name the --oracle that they were trained with"):
            analyse(tmp_path / "other", *flags, tmp_path / more[0], *more[1:])


def test_scores_of_other_images_and_missing_maps_are_said_under_the_table(data, probes, tmp_path, result, monkeypatch):
    assert table_of(result).splitlines()[-1].startswith("  the whole image as the box ")
    few = analyse(tmp_path / "few", *inputs(data, probes), "--num_images", 2)
    assert f"top-1 is of the 11 test images of {probes}, not of these images" in table_of(few)
    other = {**result, "probes": {**result["probes"], "test_images": "another digest"}}
    assert "top-1 is of the 11 test images" in table_of(other)
    vectors_of = aggregation.rules.vectors_of

    def with_nan(*parts):
        vectors = vectors_of(*parts)
        vectors[0, 1, 3] = torch.nan
        return vectors

    monkeypatch.setattr(aggregation.rules, "vectors_of", with_nan)
    found = analyse(tmp_path / "nan", *inputs(data, probes), "--batch_size", 4)
    assert [one["images_without_map"] for one in found["localization"]["maps"].values()] == [0, 3] + [0] * 8
    assert "attn-lcte: no finite weights in 3 images, left out" in table_of(found)
    assert "attn-lcte: no finite map in 3 images, counted as not found" in table_of(found)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", "is not a results.json of main_linprobe.py"),
        ("results.json", "a probe less", "are of different probes"),
        ("checkpoint-0.pth", "", "no checkpoint of .* can be read"),
        ("args.json", None, "holds no args.json"),
        ("checkpoint-0.pth", None, "holds no checkpoint of its probes"),
    ],
)
def test_damaged_runs_are_refused(data, probes, tmp_path, name, text, message):
    shutil.copytree(probes, tmp_path / "run")
    if text == "a probe less":
        results = json.loads((tmp_path / "run" / name).read_text())
        results["probes"].popitem()
        text = json.dumps(results)
    (tmp_path / "run" / name).unlink()
    if text is not None:
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


def test_results_are_not_written_over(data, tmp_path):
    flags = ["--data_path", data, "--model", "vit_demo_patch8", "--num_images", 2]
    analyse(tmp_path, *flags)
    with pytest.raises(ValueError, match="already holds results"):
        analyse(tmp_path, *flags)


def test_a_folder_is_its_own_while_it_is_written_to(data, tmp_path, monkeypatch):
    def look(*_: object) -> None:
        raise FloatingPointError(claimed_by_another_process(tmp_path / "out"))

    monkeypatch.setattr(main_analyze_aggregation, "run_pass", look)
    with pytest.raises(FloatingPointError, match="another process writes there"):
        analyse(tmp_path / "out", "--data_path", data, "--model", "vit_demo_patch8", "--rules", "pos")


def test_figures_call_rules_by_plain_names():
    names = {
        "abmilp:depth=2,act=tanh/seed1": "AbMILP, depth=2, act=tanh, seed 1",
        "ca2:scale=release": "central 2 × 2, scale=release",
        "cp2": "mean of central 2 × 2", "ep8/block3": "EP, 8 queries, block 3",
        "ap12:content=all": "AP, 12 heads, content=all",
    }  # fmt: skip
    assert {name: display_name(name).replace("\N{NO-BREAK SPACE}", " ") for name in names} == names
