"""main_finetune as its users run it: end to end, interrupted, on two processes, evaluated, with mistakes."""

import json
import shutil
from datetime import UTC, datetime

import pytest
import safetensors.torch
import torch
from PIL import Image

import main_finetune
from cli.console import parse, run_main
from encoders.load import load_encoder, save_encoder
from engine_finetune import Classifier
from models_vit import VisionTransformer, build_vit
from runtime.folder import load_checkpoint, sealed
from runtime.training import Training
from util.progress import setup_logging


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_encoder(path, build_vit("vit_demo_patch8", img_size=32).state_dict(), {"family": "mae"})
    return path


@pytest.fixture
def command(image_folder, pretrained):
    """Flags of a short run with all of the recipe's randomness: 3 steps an epoch on 4 x 4 patches."""
    return [
        "--model", "vit_demo_patch8", "--finetune", str(pretrained), "--input_size", "32", "--data_path",
        str(image_folder), "--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1", "--lr", "2e-3", "--amp",
        "float32", "--device", "cpu", "--num_workers", "0",
    ]  # fmt: skip


PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop_path", "0", "--aa", "", "--reprob", "0", "--smoothing", "0"]


def run(folder, command, *flags):
    main_finetune.main(parse(main_finetune.get_args_parser(), [*command, "--output_dir", str(folder), *flags]))


def weights(folder):
    return (folder / "encoder.safetensors").read_bytes()


def log(folder):
    """The lines of log.txt without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0 and 0 <= line.pop("data_wait") <= 1 and line.pop("memory_gib") > 0
    return lines


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_learns_and_leaves_a_classifier_and_its_records(command, tmp_path):
    run(tmp_path / "run", command, *PLAIN, "--epochs", "6", "--layer_decay", "1")
    lines = log(tmp_path / "run")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["test"]["top1"] == 100
    assert {line["test"]["n"] for line in lines} == {7}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["last"]["test"] == lines[-1]["test"] and results["n_train"] == 24 and results["classes"] == 3
    assert results["seconds"] > 0 and results["args"]["epochs"] == 6 and {"commit", "dirty"} < results.keys()
    assert datetime.fromisoformat(results["finished"]).tzinfo is UTC
    assert results["train_images"] != results["test_images"]
    encoder = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft"


def test_a_classifier_of_the_mean_patch_loads_as_maes_published_ones_do(command, tmp_path):
    run(tmp_path / "run", command, *PLAIN, "--epochs", "6", "--layer_decay", "1", "--global_pool")
    assert log(tmp_path / "run")[-1]["test"]["top1"] == 100
    path = tmp_path / "run" / "encoder.safetensors"
    state = safetensors.torch.load_file(path)
    assert {"fc_norm.weight", "head.weight"} < state.keys() and "norm.weight" not in state
    encoder = load_encoder(str(path), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft_mean"
    encoder = load_encoder(str(tmp_path / "run" / "checkpoint-5.pth"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae_ft_mean"


def test_an_encoder_without_cls_is_fine_tuned_on_its_mean_patch(command, tmp_path):
    run(tmp_path / "run", command, *PLAIN, "--finetune", "", "--no_cls_token", "--global_pool", "--epochs", "1")
    assert len(log(tmp_path / "run")) == 1


def test_compiled_fine_tuning_is_the_same_run(command, tmp_path, monkeypatch):
    """Up to what the compiler's kernels round differently: here they are left to PyTorch."""
    compiled = []

    def spy(backbone):
        compiled.append(backbone)
        compile_blocks(backbone, backend="eager")

    compile_blocks = VisionTransformer.compile_blocks
    monkeypatch.setattr(VisionTransformer, "compile_blocks", spy)
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        run(tmp_path / name, command, *PLAIN, "--epochs", "1", "--warmup_epochs", "0", *flags)
    assert len(compiled) == 1
    assert weights(tmp_path / "compiled") == weights(tmp_path / "plain")


def test_damaged_images_are_skipped_when_asked_and_not_counted(command, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for split in ("train", "val"):
        next((images / split / "red").iterdir()).write_text("no image")
    command = [*command, "--data_path", str(images), *PLAIN, "--epochs", "1", "--warmup_epochs", "0"]
    with pytest.raises(ValueError, match=r"cannot read image .*train/red"):
        run(tmp_path / "stopped", command)
    run(tmp_path / "run", command, "--on_bad_image", "skip")
    (line,) = log(tmp_path / "run")
    assert line["test"]["n"] == 6


def test_every_layer_moves_at_its_own_rate_positions_included(command, pretrained, tmp_path):
    one_step = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--weight_decay", "0"]
    run(tmp_path / "run", command, *PLAIN, *one_step, "--layer_decay", "0.5")
    before = load_encoder(str(pretrained), "vit_demo_patch8").backbone.state_dict()
    after = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8").backbone.state_dict()
    layers = {"pos_embed": 0, **{f"blocks.{index}.mlp.fc2.weight": index + 1 for index in range(6)}, "norm.weight": 7}
    for name, layer in layers.items():  # Adam's first step is the rate itself, wherever there is a gradient
        moved = (after[name] - before[name]).abs().max().item()
        assert moved == pytest.approx(2e-3 * 0.5 ** (7 - layer), rel=0.02), name


def test_every_regulariser_has_its_effect(command, tmp_path):
    choices = [
        [], ["--mixup", "0.8"], ["--cutmix", "1"], ["--drop_path", "0.5"], ["--smoothing", "0.1"], ["--reprob", "1"],
        ["--aa", "rand-m9-mstd0.5-inc1"], ["--color_jitter", "0.4"], ["--crop_scale", "0.9"],
    ]  # fmt: skip
    losses = []
    for index, flags in enumerate(choices):
        fixed = ["--lr", "0", "--min_lr", "0", "--epochs", "1"]
        run(tmp_path / str(index), command, *PLAIN, *fixed, *flags)
        losses.append(log(tmp_path / str(index))[0]["loss"])
    assert len(set(losses)) == len(choices)


def test_maes_own_flags_reach_timm(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("timm.data.Mixup", lambda *words, **options: asked.append((words, options)))
    old = "--start_epoch 2 --remode const --recount 3 --resplit --mixup_prob 0.9 --mixup_switch_prob 0.4 --dist_eval"
    old += " --mixup_mode elem --cutmix_minmax 0.2 0.8 --mixup 0 --cutmix 0 --nb_classes 3"
    run(tmp_path / "run", command, *old.split())
    assert asked == [
        ((0.0, 0.0, [0.2, 0.8], 0.9, 0.4, "elem"), {"label_smoothing": 0.1, "num_classes": 3}),
    ]
    args = parse(main_finetune.get_args_parser(), [*command, *old.split()])
    erasing = main_finetune.augmentation(args, 32, load_encoder("", "vit_demo_patch8", img_size=32)).transforms[-1]
    assert (erasing.mode, erasing.max_count, erasing.probability) == ("const", 3, 0.25)


@pytest.mark.parametrize(("size", "whole"), [(32, False), (224, False), (232, True), (384, True)])
def test_the_test_image_is_cropped_up_to_224_pixels_and_whole_above(command, monkeypatch, size, whole):
    """As in MAE's fine-tuning."""
    asked = []

    def spy(*words, **options):
        asked.append((words[0], options))
        raise KeyboardInterrupt

    monkeypatch.setattr(main_finetune, "eval_transform", spy)
    with pytest.raises(KeyboardInterrupt):
        run("", command, "--input_size", str(size), "--output_dir", "")
    assert asked == [(size, {"whole": whole})]


def test_positions_are_resampled_once_and_trained_at_the_size_that_was_asked(command, tmp_path):
    run(tmp_path / "run", command, *PLAIN, "--input_size", "64", "--epochs", "1", "--lr", "0", "--min_lr", "0")
    trained = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8").backbone
    start = load_encoder(command[3], "vit_demo_patch8").backbone
    assert start.grid_size == (4, 4) and trained.grid_size == (8, 8) and trained.pos_embed.shape == (1, 65, 128)
    images = torch.randn(2, 3, 64, 64)
    assert trained(images)[5].cls.equal(start(images)[5].cls)


def test_randaugment_may_posterize_to_nothing(command):
    """A magnitude of 10, which the noise of the default policy reaches, leaves no bit."""
    args = parse(main_finetune.get_args_parser(), [*command, "--aa", "rand-m10-n8-inc1"])
    encoder = load_encoder("", "vit_demo_patch8", img_size=32)
    augment = main_finetune.augmentation(args, 32, encoder)
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    assert all(augment(picture).isfinite().all() for _ in range(40))
    assert main_finetune.posterize(picture, 0).getextrema() == ((0, 0),) * 3
    assert main_finetune.posterize(picture, 8) is picture


def test_every_epoch_draws_anew(command, tmp_path):
    run(tmp_path / "run", command, *PLAIN, "--lr", "0", "--min_lr", "0")
    assert len({line["loss"] for line in log(tmp_path / "run")}) == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_interrupted_run_continues_to_the_bit(command, tmp_path, monkeypatch, workers):
    def interrupted(training):
        if training.epoch == 1:
            raise KeyboardInterrupt
        return train_one_epoch(training)

    train_one_epoch = Training.train_one_epoch
    run(tmp_path / "whole", command)
    monkeypatch.setattr(Training, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", command)
    monkeypatch.undo()
    torch.manual_seed(1)  # the state of the process has no say
    run(tmp_path / "halves", command, "--resume", "auto", "--num_workers", workers)
    assert weights(tmp_path / "halves") == weights(tmp_path / "whole")
    assert log(tmp_path / "halves") == log(tmp_path / "whole")


def test_micro_steps_equal_one_batch_where_nothing_is_drawn_by_batch(command, tmp_path):
    run(tmp_path / "whole", command, *PLAIN, "--epochs", "2")
    run(tmp_path / "micro", command, *PLAIN, "--epochs", "2", "--batch_size", "4", "--accum_iter", "2")
    one, two = (
        load_encoder(str(tmp_path / name / "encoder.safetensors"), "vit_demo_patch8").backbone.state_dict()
        for name in ("whole", "micro")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_evaluation_alone_repeats_the_last_scores_and_writes_nothing(command, tmp_path, capsys):
    run(tmp_path / "run", command)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").write_text("another run")
    before, last = contents(tmp_path), log(tmp_path / "run")[-1]["test"]
    for folder in ("other", "run"):
        run(tmp_path / folder, command, "--eval", "--resume", str(tmp_path / "run" / "checkpoint-2.pth"))
        expected = "top-1 {top1:.2f}, top-5 {top5:.2f}, loss {loss:.4f} on {n} images".format(**last)
        assert capsys.readouterr().out.splitlines()[-1].endswith(expected)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("pool", [[], ["--global_pool"]], ids=["cls", "mean"])
def test_published_classifiers_are_evaluated_as_maes_command_asks(command, tmp_path, capsys, pool):
    """Files of weights alone: which pooling they are for, they show themselves."""
    run(tmp_path / "run", command, *PLAIN, *pool, "--epochs", "1")
    expected = capsys.readouterr().out.splitlines()[-1]
    top1 = expected.split("top-1 ")[1].split(",")[0]
    encoder = tmp_path / "run" / "encoder.safetensors"
    torch.save({"model": safetensors.torch.load_file(encoder)}, tmp_path / "mae_finetuned.pth")
    for path in (encoder, tmp_path / "mae_finetuned.pth"):
        run(tmp_path / "none", command, "--finetune", "", "--eval", "--resume", str(path))
        assert f"top-1 {top1}," in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "none").exists()


@pytest.fixture
def trained(command, tmp_path, image_folder):
    """A run on a copy of the images, and the flags that evaluate it: (folder of the images, run, flags)."""
    shutil.copytree(image_folder, tmp_path / "images")
    flags = [*command, "--data_path", str(tmp_path / "images"), *PLAIN, "--epochs", "1", "--output_dir", ""]
    run(tmp_path / "run", flags)
    return tmp_path / "images", tmp_path / "run", flags


@pytest.mark.parametrize("name", ["checkpoint-0.pth", "encoder.safetensors"])
def test_other_classes_than_those_of_training_are_not_evaluated(trained, capsys, name):
    images, folder, flags = trained
    for split in ("train", "val"):
        (images / split / "red").rename(images / split / "a red one")  # now the first class
    message = mistake([*flags, "--eval", "--resume", str(folder / name)], capsys)
    assert "class names was" in message or "is class blue, the data has a red one" in message


@pytest.mark.parametrize(
    ("change", "name"),
    [(["--input_size", "40"], "pixels"), (["--finetune", ""], "family"), (["--num_heads", "2"], "num_heads")],
)
def test_a_checkpoint_is_evaluated_with_the_network_and_pixels_of_its_training(trained, capsys, change, name):
    _, folder, flags = trained
    words = [*flags, "--eval", "--resume", str(folder / "checkpoint-0.pth")]
    assert f"{name} was" in (message := mistake([*words, *change], capsys)) and "--args_from" in message
    run("", ["--args_from", str(folder / "args.json"), "--eval", "--resume", words[-1], "--output_dir", ""])


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


def test_other_test_images_are_another_run(trained, capsys):
    images, folder, flags = trained
    Image.new("RGB", (40, 40), "white").save(next((images / "val" / "red").iterdir()))
    message = mistake([*flags, "--output_dir", str(folder), "--resume", "auto"], capsys)
    assert "test images was" in message and "training images" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.weight"), "holds no classifier (no head.weight)"),
        (lambda state: state.pop("norm.bias"), "missing norm.bias"),
        (lambda state: state.update({"head.weight": torch.zeros(5, 128)}), "size mismatch for head.weight"),
    ],
)
def test_other_files_are_not_evaluated(command, tmp_path, capsys, change, message):
    state = Classifier(build_vit("vit_demo_patch8", img_size=32), 3).published_state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "other.pth")
    words = [*command, "--eval", "--resume", str(tmp_path / "other.pth"), "--output_dir", ""]
    assert message in mistake(words, capsys)


def test_a_diverging_run_stops_and_keeps_no_checkpoint_of_it(command, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite in epoch 0, step 2; lower the learning rate"):
        run(tmp_path / "run", command, "--lr", "1e30")
    assert not any((tmp_path / "run").glob("checkpoint-*"))


MISTAKES = {
    "no data": (["--data_path", "absent"], "--data_path absent: there is no such folder"),
    "unknown model": (["--model", "vit_bas"], "unknown model 'vit_bas': did you mean vit_base_patch16, "),
    "classes": (["--nb_classes", "1000"], "has 3 classes: correct it or leave it out"),
    "batch": (["--batch_size", "26"], "is larger than the 24 training images"),
    "weights": (["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
    "other weights": (["--model", "vit_tiny_patch16"], "write --model vit_demo_patch8"),
    "odd batch": (["--batch_size", "7"], "--batch_size 7: mixup and cutmix pair images, so it must be even"),
    "several labels": (["--dataset", "coco"], "--dataset coco has several labels an image"),
    "depth": (["--drop_path", "1"], "--drop_path 1.0: write a number, from 0 up to, but not, 1"),
    "smoothing": (["--smoothing", "1.5"], "--smoothing 1.5: write a number, from 0 up to, but not, 1"),
    "erasing": (["--reprob", "2"], "--reprob 2.0: write a number, from 0 to 1"),
    "mixing": (["--mixup", "nan"], "--mixup nan: write a number, 0 or more"),
    "no rate": (["--layer_decay", "0"], "--layer_decay 0.0: write a number, more than 0"),
    "clipping": (["--clip_grad", "0"], "--clip_grad 0.0: write a number, more than 0"),
    "sides": (["--cutmix_minmax", "0.9", "0.2"], "--cutmix_minmax 0.9 0.2: the first must be the smaller one"),
    "policy": (["--aa", "xyz"], "--aa xyz: timm has no such policy (Unknown AA policy xyz); the recipe's is rand-m9"),
    "float16": (["--amp", "float16"], "--amp float16 would need a loss scaler to train; use bfloat16"),
    "nothing to evaluate": (["--eval"], "--eval needs a classifier: name its checkpoint with --resume"),
    "both heads": (["--global_pool", "--cls_token"], "the mean patch or [cls]; choose one"),
    "no [cls]": (["--no_cls_token", "--finetune", ""], "fine-tuning on [cls] needs an encoder with a [cls] token"),
}


def mistake(words, capsys):
    """The message of a program that refuses its arguments: one line."""
    with pytest.raises(SystemExit) as stopped:
        run_main(main_finetune.main, parse(main_finetune.get_args_parser(), words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_before_the_folder_is_made(command, tmp_path, capsys, flags, message):
    assert message in mistake([*command, "--output_dir", str(tmp_path / "run"), *flags], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("history"), "not a checkpoint of main_finetune.py (no history)"),
        (lambda state: state["model"].pop("head.bias"), "Missing key(s) in state_dict"),
        (lambda state: state["model"].update(extra=torch.zeros(1)), "Unexpected key(s) in state_dict"),
        (lambda state: state["model"].update({"head.bias": torch.zeros(5)}), "size mismatch for head.bias"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(command, tmp_path, capsys, change, message):
    command = [*command, "--epochs", "1"]
    run(tmp_path / "run", command)
    state = load_checkpoint(tmp_path / "run" / "checkpoint-0.pth")
    change(state)
    torch.save(sealed(state), tmp_path / "other.pth")
    words = [*command, "--resume", str(tmp_path / "other.pth"), "--output_dir", str(tmp_path / "new")]
    assert message in mistake(words, capsys)


def test_a_finished_run_is_not_written_over(command, tmp_path, capsys):
    run(tmp_path / "run", command, "--epochs", "1")
    before = contents(tmp_path)
    assert "already holds a run (checkpoint-0.pth)" in mistake(
        [*command, "--output_dir", str(tmp_path / "run")], capsys
    )
    assert contents(tmp_path) == before
