"""The analysis program: the same numbers however the work is split, and what it leaves in its folder."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interruptions import in_processes
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_analyze_attention
from attention.measure import applicable, measure
from attention.metrics import GROUPS, METRICS, REFERENCES, Sizes, metric_names, reduce_attention
from attention.tokens import images_of_few_classes
from cli.analyze_attention import get_args_parser
from cli.console import parse, run_main
from data_sets.loader import Sample
from data_sets.table import build_dataset
from data_sets.views import eval_transform
from encoders.load import load_encoder, save_encoder
from models_vit import build_vit
from util.plotting import visible
from util.seeding import seeded

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 37  # odd, so that no batch size and no number of processes divides it
FLAGS = ["--model", "vit_demo_patch8", "--input_size", "32", "--amp", "float32", "--device", "cpu"]
FLAGS += ["--metrics", "all"]
SIZES = Sizes(tokens=17, patches=16, registers=0, grid=(4, 4), patch_size=8)
WITHOUT_REGISTERS = [name for name, metric in METRICS.items() if "registers" not in metric.needs]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        folder = root / "val" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def analyse(images: Path, output: Path, *flags: str) -> dict[str, dict]:
    """{folder: its attention.json}"""
    argv = ["--data_path", str(images), "--output_dir", str(output), *FLAGS, "--num_workers", "0", *flags]
    main_analyze_attention.main(parse(get_args_parser(), argv))
    return {path.parent.name: json.loads(path.read_text()) for path in output.glob("*/attention.json")}


@pytest.fixture(scope="module")
def result(images, tmp_path_factory) -> dict:
    return analyse(images, tmp_path_factory.mktemp("result"), "--batch_size", "7")["random_weights"]


def numbers(result: dict) -> dict[str, np.ndarray]:
    """{metric: (blocks, numbers of a block)}, of tokens also what enters the first block"""

    def flat(block: dict) -> list[float]:
        lists = (value if isinstance(value, list) else [value] for key, value in block.items() if key != "block")
        return [number for values in lists for number in values if number is not None]

    return {
        name: np.array(
            [flat(block) for block in [metric[key] for key in ("embedding",) if key in metric] + metric["blocks"]]
        )
        for name, metric in result["metrics"].items()
    }


def assert_same_numbers(result: dict, expected: dict) -> None:
    found, wanted = numbers(result), numbers(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch_size", "1"),
        ("--batch_size", "32"),
        ("--batch_size", "7", "--num_workers", "2"),
        ("--batch_size", "7", "--reduction", "explicit"),
    ],
    ids=" ".join,
)
def test_numbers_do_not_depend_on_how_the_work_is_done(images, tmp_path, result, flags):
    assert_same_numbers(analyse(images, tmp_path, *flags)["random_weights"], result)


def test_two_processes_give_the_numbers_of_one(images, tmp_path, result):
    words = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), *FLAGS, "--num_workers", "0"]
    output = tmp_path / "output"
    assert in_processes(2, "main_analyze_attention", [*words, "--batch_size", "5"], output) == [0, 0], (
        output.read_text()
    )
    found = json.loads((tmp_path / "run" / "random_weights" / "attention.json").read_text())
    assert found["processes"] == 2
    assert_same_numbers(found, result)


def test_numbers_are_means_and_deviations_over_the_images(images, result):
    with seeded("weights", 0):
        model = build_vit("vit_demo_patch8").eval()
    transform = eval_transform(32)
    names = [name for name in WITHOUT_REGISTERS if not METRICS[name].over_images]
    values = {name: [] for name in names}
    with torch.no_grad():
        for image, _ in build_dataset("image_folder", images, "val"):
            for step in model.trace(transform(image)[None]):
                reduced = reduce_attention(
                    step, 1, True, "explicit", {need for m in METRICS.values() for need in m.needs}, sizes=SIZES
                )
                patches = step.out[:, 1:].unflatten(1, (4, 4))
                for name in names:
                    metric = METRICS[name]
                    values[name].append(metric.record(patches if metric.of_tokens else reduced)[0].double().numpy())
    for name, found in values.items():
        record = np.array(found).reshape(IMAGES, model.depth, -1)
        axis = METRICS[name].axis
        for index, block in enumerate(result["metrics"][name]["blocks"]):
            assert (block["block"], block["count"]) == (index, IMAGES)
            mean, std = record[:, index].mean(0), record[:, index].std(0)
            np.testing.assert_allclose(block["mean"], mean[0], rtol=1e-5)
            np.testing.assert_allclose(block["std"], std[0], rtol=1e-3, atol=1e-6)
            assert (axis is None) == (not any(key.startswith("mean_per") for key in block))
            if axis is not None:
                np.testing.assert_allclose(block[f"mean_per_{axis}"], mean[1:], rtol=1e-5, atol=1e-9)


def test_image_level_spectrum_is_that_of_the_mean_tokens_of_all_images(images, result):
    with seeded("weights", 0):
        model = build_vit("vit_demo_patch8").eval()
    with torch.no_grad():
        batch = torch.stack([eval_transform(32)(image) for image, _ in build_dataset("image_folder", images, "val")])
        steps = list(model.trace(batch))
    metric = result["metrics"]["image_log_singular_values"]
    tokens = [steps[0].x, *(step.out for step in steps)]
    for block, stream in zip([metric["embedding"], *metric["blocks"]], tokens, strict=True):
        means = stream[:, 1:].double().mean(1).numpy()
        spectrum = np.log(np.linalg.svd(np.cov(means.T, bias=True), compute_uv=False)[: IMAGES - 1])
        np.testing.assert_allclose(block["mean_per_rank"], spectrum, atol=1e-4)
        assert block["count"] == IMAGES and block["std"] is None


def test_result_says_what_was_measured(result):
    assert (result["images"], result["patches"], result["tokens"], result["heads"]) == (IMAGES, 16, 17, 4)
    assert result["random_weights"] and result["encoder"]["sha256"] is None
    assert {"command", "commit", "versions", "legend", "amp", "reduction"} <= result.keys()
    assert list(result["metrics"]) == WITHOUT_REGISTERS
    for name, found in result["metrics"].items():
        metric = METRICS[name]
        assert (found["unit"], found["definition"], found["axis"]) == (metric.unit, metric.definition, metric.axis)
        for bound in ("lower", "upper", "uniform"):
            expected = getattr(metric, bound)
            assert found[bound] == (expected and {"name": expected, "value": REFERENCES[expected](SIZES)})


def test_default_is_the_attention_flow_and_metrics_can_be_chosen_by_name_or_group(images, tmp_path):
    argv = ["--data_path", str(images)]
    assert metric_names(parse(get_args_parser(), argv).metrics) == list(GROUPS["flow"])
    found = analyse(images, tmp_path, "--num_images", "2", "--metrics", "patch_patch_distance", "paper")
    assert list(found["random_weights"]["metrics"]) == [
        name for name in METRICS if name in (*GROUPS["paper"], "patch_patch_distance")
    ]


def test_token_map_holds_a_point_per_patch_of_eighteen_images(images, tmp_path):
    analyse(images, tmp_path, "--num_images", "2", "--metrics", "cls_patch_entropy", "--tsne_blocks", "0", "5")
    tsne = json.loads((tmp_path / "random_weights" / "tsne.json").read_text())
    assert [one["block"] for one in tsne["maps"]] == [0, 5]
    assert all(np.array(one["points"]).shape == (18, 16, 2) for one in tsne["maps"])
    assert sorted(tsne["classes"]) == ["class0"] * 6 + ["class1"] * 6 + ["class2"] * 6
    assert (tmp_path / "random_weights" / "tsne.png").exists()


def test_images_of_the_token_map_are_of_few_classes_and_a_function_of_the_seed():
    targets = [index % 5 for index in range(50)]
    chosen = images_of_few_classes(targets, seed=0)
    assert chosen == images_of_few_classes(targets, seed=0) != images_of_few_classes(targets, seed=1)
    assert [len({targets[index] for index in chosen}), len(set(chosen))] == [3, 18]
    assert len(images_of_few_classes(list(range(30)), seed=0)) == 18  # one image of each class
    assert len(images_of_few_classes([0, 1, 1], seed=0)) == 3


@pytest.mark.usefixtures("rendered")
def test_several_encoders_share_a_figure_that_their_results_redraw(images, tmp_path, run_script):
    weights = tmp_path / "trained.safetensors"
    save_encoder(weights, build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    out = tmp_path / "out"
    results = analyse(images, out, "--finetune", "", str(weights), "--label", "random", "a/b c")
    assert sorted(results) == ["a_b_c", "random"]
    assert results["a_b_c"]["label"] == "a/b c"
    assert len(results["a_b_c"]["encoder"]["sha256"]) == 64 and not results["a_b_c"]["random_weights"]
    assert (out / "attention.pdf").read_bytes().startswith(b"%PDF")
    assert json.loads((out / "args.json").read_text())["args"]["finetune"] == ["", str(weights)]

    board = EventAccumulator(str(out / "random"))
    board.Reload()
    drawn = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in WITHOUT_REGISTERS}
    for name, metric in results["random"]["metrics"].items():
        assert drawn[name] == [(block["block"], pytest.approx(block["mean"])) for block in metric["blocks"]]

    with safe_open(out / "a_b_c" / "examples.safetensors", framework="pt") as file:
        maps, facts = {name: file.get_tensor(name) for name in ("pictures", "patches", "attention")}, file.metadata()
    view = eval_transform(32)
    seen = torch.stack([view(Image.open(path)) for path in json.loads(facts["images"])])
    assert len(seen) == 4 and torch.equal(
        maps["pictures"], torch.from_numpy((255 * visible(seen, view)).round()).byte()
    )
    backbone = load_encoder(str(weights), "vit_demo_patch8").backbone.eval()
    tokens = backbone.norm(backbone(seen, [5])[5].patches)
    assert torch.allclose(maps["patches"].float(), tokens / tokens.norm(dim=-1).mean(), atol=1e-3)
    last = list(backbone.trace(seen))[-1]
    explicit = (last.q.double()[:, :, 0:1] @ last.k.double().mT * last.scale).softmax(-1)[:, :, 0, 1:]
    assert torch.allclose(maps["attention"][:, 5].double(), explicit / explicit.mean(-1, keepdim=True), rtol=2e-3)

    inputs = [str(out / name / "attention.json") for name in ("random", "a_b_c")]
    run_script("plot_attention.py", *inputs, "--output", tmp_path / "again.png")
    first, second = (np.asarray(Image.open(path)) for path in (out / "attention.png", tmp_path / "again.png"))
    assert np.array_equal(first, second)


def test_encoders_without_cls_have_the_metrics_of_patches_alone(images, tmp_path):
    found = analyse(images, tmp_path, "--no_cls_token", "--num_images", "3")["random_weights"]
    assert set(found["metrics"]) == {name for name in WITHOUT_REGISTERS if "cls" not in METRICS[name].needs}
    assert found["tokens"] == found["patches"] and (tmp_path / "attention.png").exists()


def test_subset_of_the_images_is_a_function_of_the_seed():
    chosen = main_analyze_attention.subset(IMAGES, 10, seed=0)
    assert chosen == sorted(set(chosen)) == main_analyze_attention.subset(IMAGES, 10, seed=0)
    assert chosen != main_analyze_attention.subset(IMAGES, 10, seed=1)


def measure_once(model, *metrics: str) -> dict:
    batches = [Sample(torch.zeros(2, 3, 64, 64), torch.zeros(2), torch.arange(2), torch.zeros(2, 0)), None]
    sizes = SIZES._replace(tokens=65, patches=64, grid=(8, 8))
    return measure(model, batches, applicable(metrics, model), sizes, torch.float32, "auto", torch.device("cpu"))


def overflow(step):
    step.out[0, 3, 1] = math.inf


def hide_a_key(step):
    """Every query gives the attention 0 to key 5, so that the block's output is finite."""
    step.q[..., 0], step.k[0, 0, 5, 0] = 1.0, -math.inf


def no_token(step):
    step.x[1, 2] = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overflow, "activations are not finite.*overflow in float32"),
        (hide_a_key, "activations are not finite"),
        (no_token, "patch_update_ratio is not finite in block 1: leave this metric out"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_analysis(monkeypatch, change, message):
    model = build_vit("vit_demo_patch8", depth=2).eval()
    steps = list(model.trace(torch.zeros(2, 3, 64, 64)))
    with torch.no_grad():
        change(steps[1])
    monkeypatch.setattr(model, "trace", lambda images: iter(steps))
    with pytest.raises(FloatingPointError, match=message):
        measure_once(model, "patch_patch_entropy", "patch_update_ratio")
    if change is no_token:  # the advice works
        assert measure_once(model, "patch_patch_entropy")


def test_the_update_of_a_zero_token_is_left_out():
    model = build_vit("vit_demo_patch8", depth=2).eval()
    model.cls_token.data.zero_()
    model.pos_embed.data[:, 0] = 0.0
    assert {name for name, _ in measure_once(model, "cls_update_ratio", "cls_patch_entropy")} == {"cls_patch_entropy"}


def test_weights_that_are_not_finite_are_named():
    model = build_vit("vit_demo_patch8", depth=2).eval()
    model.blocks[0].mlp.fc2.bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"blocks.0.mlp.fc2.bias holds NaN or infinity"):
        measure_once(model, "patch_patch_entropy")


def test_damaged_images_are_left_out_and_not_counted(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "val" / "class0" / "0.png").write_text("no image")
    flags = ["--metrics", "cls_patch_entropy", "--batch_size", "1"]
    with pytest.raises(ValueError, match=r"cannot read image .*class0/0.png"):
        analyse(tmp_path / "images", tmp_path / "stopped", *flags)
    found = analyse(tmp_path / "images", tmp_path / "run", *flags, "--on_bad_image", "skip")["random_weights"]
    assert {block["count"] for block in found["metrics"]["cls_patch_entropy"]["blocks"]} == {IMAGES - 1}
    assert f"random weights: {IMAGES - 1} images" in capsys.readouterr().out


def test_token_map_of_images_of_several_labels_is_refused(tmp_path):
    words = ["--data_path", str(tmp_path), "--dataset", "coco", "--tsne_blocks", "0", *FLAGS]
    with pytest.raises(ValueError, match=r"--tsne_blocks .*--dataset coco"):
        main_analyze_attention.main(parse(get_args_parser(), words))


def test_folder_without_splits_is_analysed_whole(images, tmp_path, result):
    found = analyse(images / "val", tmp_path, "--batch_size", "7")["random_weights"]
    assert_same_numbers(found, result)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit_giant"], "unknown model 'vit_giant'"),
        (["--num_images", "38"], "choose from 1 to 37"),
        (["--num_images", "0"], "an integer >= 1, got '0'"),
        (["--label", "one", "two"], "2 names for 1 encoders"),
        (["--finetune", "", ""], "encoders share a name"),
        (["--finetune", "", "", "--label", "a", "b", "--family", "mae", "mae", "mae"], "3 values for 2 encoders"),
        (["--input_size", "36"], "not divisible by the patch size"),
        (["--metrics", "entropy"], "--metrics: unknown 'entropy': did you mean cls_patch_entropy"),
        (["--no_cls_token", "--metrics", "cls_patch_entropy"], "this encoder has no [cls] token and no register token"),
        (["--tsne_blocks", "6"], "block 6 does not exist"),
        (["--reduction", "triton"], "reduction triton does not run on cpu: use auto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_end_in_one_line_before_any_work(images, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(main_analyze_attention, "measure", None)
    argv = ["--data_path", str(images), "--output_dir", str(tmp_path), *FLAGS, *flags]
    with pytest.raises(SystemExit) as stopped:
        run_main(main_analyze_attention.main, parse(get_args_parser(), argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
