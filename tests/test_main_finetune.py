"""main_finetune end to end; what it shares with main_pretrain is in test_training_mains."""

import shutil
from datetime import UTC, datetime

import pytest
import safetensors.torch
import torch
from PIL import Image
from training_runs import COMMON, PLAIN, Program, contents, log_lines, out_of_range, results

import main_finetune
from encoders.load import load_encoder
from engine_finetune import Classifier
from models_vit import build_vit
from util.progress import setup_logging


@pytest.fixture
def program(image_folder, pretrained):
    return Program("main_finetune", [*COMMON, "--finetune", str(pretrained), "--data_path", str(image_folder)])


def test_a_run_learns_and_leaves_a_classifier_and_its_records(program, tmp_path):
    program.run(tmp_path / "run", *PLAIN, "--epochs", "6", "--layer_decay", "1")
    lines = log_lines(tmp_path / "run")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["test"]["top1"] == 100
    assert {line["test"]["n"] for line in lines} == {7}
    found = results(tmp_path / "run")
    assert found["last"]["test"] == lines[-1]["test"] and found["n_train"] == 24 and found["classes"] == 3
    assert found["seconds"] > 0 and found["args"]["epochs"] == 6 and {"commit", "dirty"} < found.keys()
    assert datetime.fromisoformat(found["finished"]).tzinfo is UTC
    assert found["train_images"] != found["test_images"]
    encoder = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft"


def test_a_classifier_of_the_mean_patch_loads_as_maes_published_ones_do(program, tmp_path):
    program.run(tmp_path / "run", *PLAIN, "--epochs", "6", "--layer_decay", "1", "--global_pool")
    assert log_lines(tmp_path / "run")[-1]["test"]["top1"] == 100
    path = tmp_path / "run" / "encoder.safetensors"
    state = safetensors.torch.load_file(path)
    assert {"fc_norm.weight", "head.weight"} < state.keys() and "norm.weight" not in state
    encoder = load_encoder(str(path), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft_mean"
    encoder = load_encoder(str(tmp_path / "run" / "checkpoint-5.pth"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft_mean"


def test_an_encoder_without_cls_is_fine_tuned_on_its_mean_patch(program, tmp_path):
    program.run(tmp_path / "run", *PLAIN, "--finetune", "", "--no_cls_token", "--global_pool", "--epochs", "1")
    assert len(log_lines(tmp_path / "run")) == 1


def test_every_layer_moves_at_its_own_rate_positions_included(program, pretrained, tmp_path):
    one_step = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--weight_decay", "0"]
    program.run(tmp_path / "run", *PLAIN, *one_step, "--layer_decay", "0.5")
    before = load_encoder(str(pretrained), "vit_demo_patch8").backbone.state_dict()
    after = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8").backbone.state_dict()
    layers = {"pos_embed": 0, **{f"blocks.{index}.mlp.fc2.weight": index + 1 for index in range(6)}, "norm.weight": 7}
    for name, layer in layers.items():  # Adam's first step is the rate itself, wherever there is a gradient
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(2e-3 * 0.5 ** (7 - layer), rel=0.02), name


def test_every_regulariser_has_its_effect(program, tmp_path):
    choices = [
        [], ["--mixup", "0.8"], ["--cutmix", "1"], ["--drop_path", "0.5"], ["--smoothing", "0.2"], ["--reprob", "1"],
        ["--aa", "rand-m9-mstd0.5-inc1"], ["--color_jitter", "0.4"], ["--crop_scale", "0.9"],
    ]  # fmt: skip
    losses = []
    for index, flags in enumerate(choices):
        fixed = ["--lr", "0", "--min_lr", "0", "--epochs", "1"]
        program.run(tmp_path / str(index), *PLAIN, *fixed, *flags)
        losses.append(log_lines(tmp_path / str(index))[0]["loss"])
    assert len(set(losses)) == len(choices)


def test_maes_own_flags_reach_timm(program, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("timm.data.Mixup", lambda *words, **options: asked.append((words, options)))
    old = "--start_epoch 2 --remode const --recount 3 --resplit --mixup_prob 0.9 --mixup_switch_prob 0.4 --dist_eval"
    old += " --mixup_mode elem --cutmix_minmax 0.2 0.8 --mixup 0 --cutmix 0 --nb_classes 3"
    program.run(tmp_path / "run", *old.split())
    assert asked == [((0.0, 0.0, [0.2, 0.8], 0.9, 0.4, "elem"), {"label_smoothing": 0.1, "num_classes": 3})]
    args = program.parse(*old.split())
    erasing = main_finetune.augmentation(args, 32, load_encoder("", "vit_demo_patch8", img_size=32)).transforms[-1]
    assert (erasing.mode, erasing.max_count, erasing.probability) == ("const", 3, 0.25)


@pytest.mark.parametrize(("size", "whole"), [(32, False), (224, False), (232, True), (384, True)])
def test_the_test_image_is_cropped_up_to_224_pixels_and_whole_above(program, monkeypatch, size, whole):
    """As in MAE's fine-tuning."""
    asked = []

    def spy(*words, **options):
        asked.append((words[0], options["crop_pct"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(main_finetune, "eval_transform", spy)
    with pytest.raises(KeyboardInterrupt):
        program.run("", "--input_size", size)
    assert asked == [(size, 1.0 if whole else 0.875)]


def test_positions_are_resampled_once_and_trained_at_the_size_that_was_asked(program, pretrained, tmp_path):
    program.run(tmp_path / "run", *PLAIN, "--input_size", "64", "--epochs", "1", "--lr", "0", "--min_lr", "0")
    trained = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8").backbone
    start = load_encoder(str(pretrained), "vit_demo_patch8").backbone
    assert start.grid_size == (4, 4) and trained.grid_size == (8, 8) and trained.pos_embed.shape == (1, 65, 128)
    images = torch.randn(2, 3, 64, 64)
    assert trained(images)[5].cls.equal(start(images)[5].cls)


def test_randaugment_may_posterize_to_nothing(program):
    """A magnitude of 10, which the noise of the default policy reaches, leaves no bit."""
    args = program.parse("--aa", "rand-m10-n8-inc1")
    encoder = load_encoder("", "vit_demo_patch8", img_size=32)
    augment = main_finetune.augmentation(args, 32, encoder)
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    assert all(augment(picture).isfinite().all() for _ in range(40))
    assert main_finetune.posterize(picture, 0).getextrema() == ((0, 0),) * 3
    assert main_finetune.posterize(picture, 8) is picture


def test_micro_steps_equal_one_batch_where_nothing_is_drawn_by_batch(program, tmp_path):
    program.run(tmp_path / "whole", *PLAIN, "--epochs", "2")
    program.run(tmp_path / "micro", *PLAIN, "--epochs", "2", "--batch_size", "4", "--accum_iter", "2")
    one, two = (
        load_encoder(str(tmp_path / name / "encoder.safetensors"), "vit_demo_patch8").backbone.state_dict()
        for name in ("whole", "micro")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_evaluation_alone_repeats_the_last_scores_and_writes_nothing(program, tmp_path, capsys):
    program.run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").write_text("another run")
    before, last = contents(tmp_path), log_lines(tmp_path / "run")[-1]["test"]
    for folder in ("other", "run"):
        program.run(tmp_path / folder, "--eval", "--resume", str(tmp_path / "run" / "checkpoint-2.pth"))
        expected = "top-1 {top1:.2f}, top-5 {top5:.2f}, loss {loss:.4f} on {n} images".format(**last)
        assert capsys.readouterr().out.splitlines()[-1].endswith(expected)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("pool", [[], ["--global_pool"]], ids=["cls", "mean"])
def test_published_classifiers_are_evaluated_as_maes_command_asks(program, tmp_path, capsys, pool):
    """Files of weights alone: which pooling they are for, they show themselves."""
    program.run(tmp_path / "run", *PLAIN, *pool, "--epochs", "1")
    expected = capsys.readouterr().out.splitlines()[-1]
    top1 = expected.split("top-1 ")[1].split(",")[0]
    encoder = tmp_path / "run" / "encoder.safetensors"
    torch.save({"model": safetensors.torch.load_file(encoder)}, tmp_path / "mae_finetuned.pth")
    for path in (encoder, tmp_path / "mae_finetuned.pth"):
        program.run(tmp_path / "none", "--finetune", "", "--eval", "--resume", str(path))
        assert f"top-1 {top1}," in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "none").exists()


@pytest.fixture
def trained(program, tmp_path, image_folder):
    """(folder of a copy of the images, run on them)"""
    shutil.copytree(image_folder, tmp_path / "images")
    program.flags += ["--data_path", str(tmp_path / "images"), *PLAIN, "--epochs", "1"]
    return tmp_path / "images", program.run(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint-0.pth", "encoder.safetensors"])
def test_other_classes_than_those_of_training_are_not_evaluated(program, trained, capsys, name):
    images, folder = trained
    for split in ("train", "val"):
        (images / split / "red").rename(images / split / "a red one")  # now the first class
    message = program.mistake(capsys, "--eval", "--resume", folder / name)
    assert "class names was" in message or "is class blue, the data has a red one" in message


@pytest.mark.parametrize(
    ("change", "name"),
    [(["--input_size", "40"], "pixels"), (["--finetune", ""], "family"), (["--num_heads", "2"], "num_heads")],
)
def test_a_checkpoint_is_evaluated_with_the_network_and_pixels_of_its_training(program, trained, capsys, change, name):
    _, folder = trained
    flags = ["--eval", "--resume", folder / "checkpoint-0.pth"]
    assert f"{name} was" in (message := program.mistake(capsys, *flags, *change)) and "--args_from" in message
    Program("main_finetune", ["--args_from", str(folder / "args.json")]).run("", *flags)


def test_published_classifiers_are_evaluated_on_imagenets_classes_in_their_order(tmp_path, capsys):
    from timm.data import ImageNetInfo

    setup_logging()
    path, wnids = str(tmp_path / "mae_finetuned.pth"), ImageNetInfo("imagenet1k").label_names()
    main_finetune.check_classes(path, wnids)
    for classes in (sorted(map(str, range(1000))), wnids[1:] + wnids[:1]):
        with pytest.raises(
            ValueError, match=r"mae_finetuned\.pth is taken for a classifier of ImageNet-1k: .*n01440764"
        ):
            main_finetune.check_classes(path, classes)
    main_finetune.check_classes(path, ["b", "a"])
    assert "does not name its classes: the scores assume the order b, a" in capsys.readouterr().out


def test_other_test_images_are_another_run(program, trained, capsys):
    images, folder = trained
    Image.new("RGB", (40, 40), "white").save(next((images / "val" / "red").iterdir()))
    message = program.mistake(capsys, "--output_dir", folder, "--resume", "auto")
    assert "test images was" in message and "training images" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.weight"), "holds no classifier (no head.weight)"),
        (lambda state: state.pop("norm.bias"), "missing norm.bias"),
        (lambda state: state.update({"head.weight": torch.zeros(5, 128)}), "size mismatch for head.weight"),
    ],
)
def test_other_files_are_not_evaluated(program, tmp_path, capsys, change, message):
    state = Classifier(build_vit("vit_demo_patch8", img_size=32), 3).published_state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "other.pth")
    assert message in program.mistake(capsys, "--eval", "--resume", tmp_path / "other.pth", "--output_dir", "")


MISTAKES = {
    "classes": (["--nb_classes", "1000"], "has 3 classes: correct it or leave it out"),
    "other weights": (["--model", "vit_tiny_patch16"], "write --model vit_demo_patch8"),
    "odd batch": (["--batch_size", "7"], "--batch_size 7 must be even: mixup and cutmix pair images"),
    "sides": (["--cutmix_minmax", "0.9", "0.2"], "--cutmix_minmax 0.9 0.2: MIN must be smaller than MAX"),
    "policy": (["--aa", "xyz"], "--aa xyz: timm has no such policy (Unknown AA policy xyz); the recipe's is rand-m9"),
    "float16": (["--amp", "float16"], "--amp float16 would need a loss scaler to train; use bfloat16"),
    "nothing to evaluate": (["--eval"], "--eval needs a classifier: name its file with --resume"),
    "both heads": (["--global_pool", "--cls_token"], "--global_pool classifies the mean patch and --cls_token [cls]"),
    "no [cls]": (["--no_cls_token", "--finetune", ""], "fine-tuning on [cls] needs an encoder with a [cls] token"),
    **out_of_range("--drop_path 1", "--smoothing 1.5", "--reprob 2", "--mixup nan", "--layer_decay 0", "--clip_grad 0"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_before_the_folder_is_made(program, tmp_path, capsys, flags, message):
    assert message in program.mistake(capsys, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
