"""main_pretrain as its users run it: end to end, interrupted, on two processes, with mistakes."""

import json
import shutil
from datetime import UTC, datetime

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from cli.console import parse, run_main
from encoders.load import load_encoder
from models_mae import MaskedAutoencoder
from runtime.folder import load_checkpoint, sealed
from runtime.training import Training


@pytest.fixture
def command(image_folder):
    """Flags of a short run: vit_demo_patch8 on 4 x 4 patches, 3 steps an epoch."""
    return [
        "--model", "vit_demo_patch8", "--input_size", "32", "--data_path", str(image_folder), "--batch_size", "8",
        "--epochs", "3", "--warmup_epochs", "1", "--lr", "2e-3", "--amp", "float32", "--device", "cpu",
        "--num_workers", "0",
    ]  # fmt: skip


def run(folder, command, *flags):
    main_pretrain.main(parse(main_pretrain.get_args_parser(), [*command, "--output_dir", str(folder), *flags]))


def weights(folder):
    return (folder / "encoder.safetensors").read_bytes()


def log(folder):
    """The lines of log.txt without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0 and 0 <= line.pop("data_wait") <= 1 and line.pop("memory_gib") > 0
    return lines


def test_a_run_learns_and_leaves_an_encoder_and_its_records(command, tmp_path):
    run(tmp_path / "run", command, "--epochs", "6")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]
    encoder = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae" and encoder.backbone.grid_size == (4, 4)
    checkpoint = load_encoder(str(tmp_path / "run" / "checkpoint-5.pth"), "vit_demo_patch8")
    assert checkpoint.record["family"] == "mae"
    for name, value in checkpoint.backbone.state_dict().items():
        assert value.equal(encoder.backbone.state_dict()[name]), name
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"]["epochs"] == 6 and record["effective_batch"] == 8 and "commit" in record
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["last"]["epoch"] == 5 and results["last"]["loss"] == losses[-1] and results["seconds"] > 0
    assert results.items() > record.items() and datetime.fromisoformat(results["finished"]).tzinfo is UTC


def test_results_are_those_of_the_last_epoch_after_a_run_that_had_ended_too(command, tmp_path):
    run(tmp_path / "run", command)
    before = json.loads((tmp_path / "run" / "results.json").read_text())["last"]
    (tmp_path / "run" / "results.json").unlink()
    run(tmp_path / "run", command, "--resume", "auto")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["last"] == before


def pictures(folder):
    """{step: height and width} of the figures that TensorBoard has."""
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {event.step: (event.height, event.width) for event in board.Images("reconstruction")}


@pytest.mark.parametrize(("every", "steps"), [("0", [8]), ("2", [5, 8])])
def test_reconstructions_are_drawn_every_so_many_epochs_and_at_the_end(command, tmp_path, every, steps):
    run(tmp_path / "run", command, "--figure_every", every)
    assert Image.open(tmp_path / "run" / "reconstruction.png").size[0] > 800
    assert pictures(tmp_path / "run") == dict.fromkeys(steps, (6 * 32, 4 * 32))


def test_figures_change_nothing_of_the_run(command, tmp_path):
    run(tmp_path / "none", command, "--figure_every", "0")
    run(tmp_path / "many", command, "--figure_every", "1")
    assert weights(tmp_path / "none") == weights(tmp_path / "many")


def test_compiled_pretraining_is_the_same_run(command, tmp_path, monkeypatch):
    """Up to what the compiler's kernels round differently: here they are left to PyTorch."""
    compiled = []

    def spy(model):
        compiled.append(model)
        compile_blocks(model, backend="eager")

    compile_blocks = MaskedAutoencoder.compile_blocks
    monkeypatch.setattr(MaskedAutoencoder, "compile_blocks", spy)
    command = [*command, "--epochs", "1", "--warmup_epochs", "0"]
    run(tmp_path / "plain", command)
    run(tmp_path / "compiled", command, "--compile")
    assert len(compiled) == 1
    assert weights(tmp_path / "compiled") == weights(tmp_path / "plain")


def test_damaged_images_are_skipped_when_asked(command, image_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    next((images / "train" / "red").iterdir()).write_text("no image")
    command = [*command, "--data_path", str(images), "--epochs", "1", "--warmup_epochs", "0"]
    with pytest.raises(ValueError, match=r"cannot read image .*train/red"):
        run(tmp_path / "stopped", command)
    run(tmp_path / "run", command, "--on_bad_image", "skip")
    assert len(log(tmp_path / "run")) == 1


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
    states = [torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True) for name in ("halves", "whole")]
    for first, second in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(first[key].equal(second[key]) for key in first)


def test_saved_arguments_replay_the_run(command, tmp_path):
    run(tmp_path / "first", command)
    run(tmp_path / "again", ["--args_from", str(tmp_path / "first" / "args.json")])
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


def test_an_initial_network_depends_on_the_seed_alone(command, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(len(name))
        run(tmp_path / name, command, "--lr", "0", "--epochs", "1", "--seed", seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_every_epoch_draws_anew(command, tmp_path):
    run(tmp_path / "run", command, "--lr", "0")
    assert len({line["loss"] for line in log(tmp_path / "run")}) == 3


def test_maes_own_command_is_understood(image_folder):
    words = "--batch_size 64 --model mae_vit_large_patch16_dec512d8b --norm_pix_loss --mask_ratio 0.75 --epochs 800 "
    words += "--warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --accum_iter 1 --input_size 224 --min_lr 0 --seed 0 "
    words += "--log_dir logs --device cuda --start_epoch 0 --num_workers 10 --pin_mem --world_size 1 --local_rank -1"
    args = parse(main_pretrain.get_args_parser(), [*words.split(), "--data_path", str(image_folder)])
    main_pretrain.check(args)
    assert (args.model, args.epochs, args.norm_pix_loss) == ("vit_large_patch16", 800, True)


def test_a_run_may_start_at_a_later_epoch(command, tmp_path):
    run(tmp_path / "run", command, "--start_epoch", "1")
    assert [line["epoch"] for line in log(tmp_path / "run")] == [1, 2]


def test_pretraining_crops_as_torchvision_does(command, tmp_path, monkeypatch):
    asked = []

    def spy(*args, **options):
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_pretrain, "train_transform", spy)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", command)
    assert asked == [{"scale": (0.2, 1.0), "crop": "torchvision", "loader": "pil"}]


def test_a_diverging_run_stops_and_keeps_no_checkpoint_of_it(command, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite in epoch 0, step 2; lower the learning rate"):
        run(tmp_path / "run", command, "--lr", "1e30")
    assert not any((tmp_path / "run").glob("checkpoint-*"))


MISTAKES = {
    "no data": (["--data_path", "absent"], "--data_path absent: there is no such folder"),
    "unknown model": (["--model", "vit_bas"], "unknown model 'vit_bas': did you mean vit_base_patch16, "),
    "batch": (["--batch_size", "13", "--accum_iter", "2"], "is larger than the 24 training images"),
    "mask": (["--mask_ratio", "1"], "--mask_ratio 1.0: a share between 0 and 1"),
    "figures": (["--figure_every", "-1"], "--figure_every -1: write how often, or 0 for once, at the end"),
    "nothing to see": (["--mask_ratio", "0.95"], "leaves none of the 16 patches to be seen"),
    "checkpoint": (["--resume", "absent.pth"], "--resume absent.pth: there is no file"),
    "data set": (["--dataset", "imagenet"], "unknown data set 'imagenet': did you mean imagenet1k, "),
    "size": (["--input_size", "0"], "--input_size 0 is not divisible by the patch size 8"),
    "crop": (["--crop_scale", "2"], "--crop_scale 2.0: write a number, more than 0 and at most 1"),
    "rate": (["--lr", "nan"], "--lr nan: write a number, 0 or more"),
    "infinite rate": (["--blr", "inf"], "--blr inf: write a number, 0 or more"),
    "rate at the end": (["--min_lr", "-1"], "--min_lr -1.0: write a number, 0 or more"),
    "decay": (["--weight_decay", "-1"], "--weight_decay -1.0: write a number, 0 or more"),
    "workers": (["--num_workers", "-1"], "--num_workers -1: write a number, 0 or more"),
    "clock": (["--save_every_minutes", "nan"], "--save_every_minutes nan: write how often, or 0 for never"),
    "start": (["--start_epoch", "3"], "--start_epoch 3: the epochs are 0 to 2"),
    "classes": (["--nb_classes", "10"], "--nb_classes 10: pretraining looks at no labels; leave it out"),
    "device": (["--device", "gpu"], "--device gpu: write cuda, cpu or auto"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_before_the_folder_is_made(command, tmp_path, capsys, flags, message):
    words = [*command, "--output_dir", str(tmp_path / "run"), *flags]
    with pytest.raises(SystemExit) as stopped:
        run_main(main_pretrain.main, parse(main_pretrain.get_args_parser(), words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("optimizer"), "not a checkpoint of main_pretrain.py (no optimizer)"),
        (lambda state: state["model"].pop("mask_token"), 'does not fit this run: Error(s) in loading'),
        (lambda state: state["model"].update(extra=torch.zeros(1)), "does not fit this run: Error(s) in loading"),
        (lambda state: state["optimizer"]["param_groups"].pop(), "does not fit this run: loaded state dict"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(command, tmp_path, capsys, change, message):
    command = [*command, "--epochs", "1"]
    run(tmp_path / "run", command)
    state = load_checkpoint(tmp_path / "run" / "checkpoint-0.pth")
    change(state)
    torch.save(sealed(state), tmp_path / "other.pth")
    words = [*command, "--resume", str(tmp_path / "other.pth"), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stopped:
        run_main(main_pretrain.main, parse(main_pretrain.get_args_parser(), words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_a_mistake_on_the_command_line_leaves_one_line_on_standard_error(command, run_program):
    result = run_program("main_pretrain.py", *command, "--data_path", "absent", "--output_dir", "")
    assert result.returncode == 2
    assert result.stderr == "main_pretrain.py: --data_path absent: there is no such folder\n"
