"""What main_pretrain.py and main_finetune.py have in common: resumption, divergence, damaged images, mistakes."""

import shutil

import pytest
from training_runs import COMMON, PLAIN, Program, contents, log_lines, weights

from models_vit import compile_blocks


@pytest.fixture(params=["main_pretrain", "main_finetune"])
def program(request, image_folder, pretrained):
    more = ["--finetune", str(pretrained)] if request.param == "main_finetune" else []
    return Program(request.param, [*COMMON, *more, "--data_path", str(image_folder)])


def plain(program):
    return PLAIN if program.module.__name__ == "main_finetune" else []


def test_every_epoch_draws_anew(program, tmp_path):
    program.run(tmp_path, *plain(program), "--lr", "0", "--min_lr", "0")
    assert len({line["loss"] for line in log_lines(tmp_path)}) == 3


def test_a_compiled_run_is_the_same_run(program, tmp_path, monkeypatch):
    """Except for rounding in the compiler's kernels, which are left to PyTorch here."""
    compiled = []
    monkeypatch.setattr(
        program.module, "compile_blocks", lambda model: compiled.append(compile_blocks(model, backend="eager"))
    )
    flags = [*plain(program), "--epochs", "1", "--warmup_epochs", "0"]
    runs = program.run(tmp_path / "plain", *flags), program.run(tmp_path / "compiled", *flags, "--compile")
    assert len(compiled) == 1 and weights(runs[0]) == weights(runs[1])


def test_damaged_images_are_skipped_when_asked_and_not_counted(program, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for split in ("train", "val"):
        next((images / split / "red").iterdir()).write_text("no image")
    flags = ["--data_path", images, *plain(program), "--epochs", "1", "--warmup_epochs", "0"]
    with pytest.raises(ValueError, match=r"cannot read image .*train/red"):
        program.run(tmp_path / "stopped", *flags)
    (line,) = log_lines(program.run(tmp_path / "run", *flags, "--on_bad_image", "skip"))
    assert line.get("test", {"n": 6})["n"] == 6


def test_a_diverging_run_stops_and_keeps_no_checkpoint_of_it(program, tmp_path):
    with pytest.raises(FloatingPointError, match=r"training diverged: .* epoch 0, step 2; lower the learning rate"):
        program.run(tmp_path / "run", "--lr", "1e30")
    assert not any((tmp_path / "run").glob("checkpoint-*"))


MISTAKES = {
    "no data": (["--data_path", "absent"], "--data_path absent: there is no such folder"),
    "unknown model": (["--model", "vit_bas"], "unknown model 'vit_bas': did you mean vit_base_patch16, "),
    "batch": (["--batch_size", "26"], "is larger than the 24 training images"),
    "data set": (["--dataset", "imagenet"], "unknown data set 'imagenet': did you mean imagenet1k, "),
    "size": (["--input_size", "0"], "--input_size 0 is not divisible by the patch size 8"),
    "start": (["--start_epoch", "3"], "--start_epoch 3: the epochs are 0 to 2"),
    "checkpoint": (["--resume", "absent.pth"], "--resume absent.pth: no such file"),
    "device": (["--device", "gpu"], "--device gpu: write cuda, cpu or auto"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_before_the_folder_is_made(program, tmp_path, capsys, flags, message):
    assert message in program.mistake(capsys, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(program, tmp_path, capsys):
    program.run(tmp_path / "run", "--epochs", "1")
    before = contents(tmp_path)
    message = program.mistake(capsys, "--output_dir", tmp_path / "run")
    assert "already holds a run (checkpoint-0.pth)" in message and contents(tmp_path) == before
