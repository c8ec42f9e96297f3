"""main_pretrain end to end; what it shares with main_finetune is in test_training_mains."""

import json
from datetime import UTC, datetime

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import COMMON, Program, log_lines, out_of_range, results, weights

import main_pretrain
from encoders.load import load_encoder


@pytest.fixture
def program(image_folder):
    return Program("main_pretrain", [*COMMON, "--data_path", str(image_folder)])


def test_a_run_learns_and_leaves_an_encoder_and_its_records(program, tmp_path):
    program.run(tmp_path / "run", "--epochs", "6")
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]
    encoder = load_encoder(str(tmp_path / "run" / "encoder.safetensors"), "vit_demo_patch8")
    assert encoder.record["family"] == "mae" and encoder.backbone.grid_size == (4, 4)
    checkpoint = load_encoder(str(tmp_path / "run" / "checkpoint-5.pth"), "vit_demo_patch8")
    assert checkpoint.record["family"] == "mae"
    for name, value in checkpoint.backbone.state_dict().items():
        assert value.equal(encoder.backbone.state_dict()[name]), name
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"]["epochs"] == 6 and record["effective_batch"] == 8 and "commit" in record
    found = results(tmp_path / "run")
    assert found["last"]["epoch"] == 5 and found["last"]["loss"] == losses[-1] and found["seconds"] > 0
    assert found.items() > record.items() and datetime.fromisoformat(found["finished"]).tzinfo is UTC


def test_results_are_those_of_the_last_epoch_after_a_run_that_had_ended_too(program, tmp_path):
    program.run(tmp_path / "run")
    before = results(tmp_path / "run")["last"]
    (tmp_path / "run" / "results.json").unlink()
    program.run(tmp_path / "run", "--resume", "auto")
    assert results(tmp_path / "run")["last"] == before


def pictures(folder):
    """{step: height and width} of the figures that TensorBoard has."""
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {event.step: (event.height, event.width) for event in board.Images("reconstruction")}


@pytest.mark.parametrize(("every", "steps"), [("0", [8]), ("2", [5, 8])])
def test_reconstructions_are_drawn_every_so_many_epochs_and_at_the_end(program, tmp_path, every, steps):
    program.run(tmp_path / "run", "--figure_every", every)
    assert Image.open(tmp_path / "run" / "reconstruction.png").size[0] > 800
    assert pictures(tmp_path / "run") == dict.fromkeys(steps, (6 * 32, 4 * 32))


def test_figures_change_nothing_of_the_run(program, tmp_path):
    program.run(tmp_path / "none", "--figure_every", "0")
    program.run(tmp_path / "many", "--figure_every", "1")
    assert weights(tmp_path / "none") == weights(tmp_path / "many")


def test_saved_arguments_replay_the_run(program, tmp_path):
    program.run(tmp_path / "first")
    again = Program("main_pretrain", ["--args_from", str(tmp_path / "first" / "args.json")]).run(tmp_path / "again")
    assert weights(again) == weights(tmp_path / "first")


def test_an_initial_network_depends_on_the_seed_alone(program, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(len(name))
        program.run(tmp_path / name, "--lr", "0", "--epochs", "1", "--seed", seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_run_may_start_at_a_later_epoch(program, tmp_path):
    program.run(tmp_path / "run", "--start_epoch", "1")
    assert [line["epoch"] for line in log_lines(tmp_path / "run")] == [1, 2]


def test_pretraining_crops_as_torchvision_does(program, tmp_path, monkeypatch):
    asked = []

    def spy(*args, **options):
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_pretrain, "train_transform", spy)
    with pytest.raises(KeyboardInterrupt):
        program.run(tmp_path / "run")
    assert asked == [{"scale": (0.2, 1.0), "crop": "torchvision", "loader": "pil"}]


OUT_OF_RANGE = (
    "--contrastive_weight 1.5", "--temperature 0", "--view_drop 1", "--mask_ratio 1", "--figure_every -1",
    "--crop_scale 2", "--lr nan", "--blr inf", "--min_lr -1", "--weight_decay -1", "--num_workers -1",
    "--save_every_minutes nan",
)  # fmt: skip
MISTAKES = {
    "micro-steps": (["--batch_size", "13", "--accum_iter", "2"], "is larger than the 24 training images"),
    "nothing to see": (["--mask_ratio", "0.95"], "--mask_ratio 0.95 leaves none of 16 patches: lower it"),
    "no contrast": (["--temperature", "0.1"], "--temperature has no effect at --contrastive_weight 0: "),
    "no decoder": (["--contrastive_weight", "1", "--mask_ratio", "0.6"], "--mask_ratio has no effect at "),
    "classes": (["--nb_classes", "10"], "--nb_classes 10: pretraining "),
    **out_of_range(*OUT_OF_RANGE),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_before_the_folder_is_made(program, tmp_path, capsys, flags, message):
    assert message in program.mistake(capsys, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_the_command_line_leaves_one_line_on_standard_error(program, run_program):
    done = run_program("main_pretrain.py", *program.flags, "--data_path", "absent", "--output_dir", "")
    assert done.returncode == 2
    assert done.stderr == "main_pretrain.py: --data_path absent: there is no such folder\n"
