"""A run that is stopped, killed or moved, and resumed, is the uninterrupted run to the bit."""

import contextlib
import importlib
import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from interruptions import PROGRAMS, Killed, changed, differences, flags, kill, outcome, run, scalars
from safetensors.torch import load_file

from data_sets.loader import KeyedDataset
from encoders.load import save_encoder
from models_vit import build_vit
from runtime.folder import load_checkpoint
from runtime.training import Training
from util import distributed, signals


@pytest.fixture(scope="module")
def commands(image_folder, pretrained):
    """{program: flags of 3 epochs of 3 steps of 2 micro-steps}."""
    return {
        program: [*flags(program, image_folder, pretrained), "--batch_size", "4", "--accum_iter", "2"]
        for program in PROGRAMS
    }


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """{program: outcome of the uninterrupted run}, each run once and only where it is asked for."""
    found = {}

    def of(program):
        if program not in found:
            folder = tmp_path_factory.mktemp(program) / "run"
            assert run(program, commands[program], folder) == 0
            found[program] = outcome(folder)
        return found[program]

    return of


@pytest.fixture
def after_step(monkeypatch):
    """after_step(number, action): do something after that optimizer step of the run."""
    update, due = Training._update, {}

    def spy(training, losses):
        update(training, losses)
        if action := due.pop(training.steps_done, None):
            action()

    def plan(number, action):
        due.clear()
        due[number] = action

    monkeypatch.setattr(Training, "_update", spy)
    return plan


# ---- stopped and killed


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_stopped_after_any_step_again_and_again_is_the_uninterrupted_run(
    program, commands, whole, tmp_path, after_step, capsys
):
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    for step, number in zip((1, 3, 4, 8), numbers, strict=True):  # 3 is the last of its epoch: not evaluated yet
        after_step(step, lambda number=number: signal.raise_signal(number))
        assert run(program, commands[program], tmp_path / "run", "--resume", "auto") == signals.EXIT_STOPPED
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"stopped by {signal.Signals(number).name}: saved after" in error
        assert (tmp_path / "run" / f"checkpoint-{(step - 1) // 3}-{(step - 1) % 3 + 1}.pth").exists()
        torch.manual_seed(step)  # the state of the process has no say
    assert run(program, commands[program], tmp_path / "run", "--resume", "auto", "--num_workers", 1) == 0
    assert differences(outcome(tmp_path / "run"), whole(program)) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_killed_between_checkpoints_repeats_the_steps_that_were_lost(
    program, commands, whole, tmp_path, after_step
):
    after_step(6, kill)
    with pytest.raises(Killed):
        run(program, commands[program], tmp_path / "run", "--save_every_steps", 2, "--save_every_minutes", 0)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1-1.pth"]
    assert run(program, commands[program], tmp_path / "run", "--resume", "auto") == 0
    assert differences(outcome(tmp_path / "run"), whole(program)) == []
    for tag, points in scalars(tmp_path / "run").items():  # TensorBoard has every step once
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


@pytest.mark.parametrize("program", ["main_linprobe", "main_finetune"])
def test_the_seconds_of_a_run_are_those_of_all_its_starts(program, commands, tmp_path, after_step):
    folder = tmp_path / "run"
    after_step(4, lambda: (time.sleep(2), signal.raise_signal(signal.SIGTERM)))
    assert run(program, commands[program], folder) == signals.EXIT_STOPPED
    first = load_checkpoint(folder / "checkpoint-1-1.pth")["elapsed"]
    after_step(8, lambda: (time.sleep(2), signal.raise_signal(signal.SIGTERM)))
    assert run(program, commands[program], folder, "--resume", "auto") == signals.EXIT_STOPPED
    second = load_checkpoint(folder / "checkpoint-2-2.pth")["elapsed"]
    assert run(program, commands[program], folder, "--resume", "auto") == 0
    assert 2 < first < second - 2 and second < json.loads((folder / "results.json").read_text())["seconds"]


def test_the_clock_saves_too(commands, tmp_path, after_step):
    after_step(2, kill)
    with pytest.raises(Killed):
        run("main_pretrain", commands["main_pretrain"], tmp_path / "run", "--save_every_minutes", 1e-9)
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["checkpoint-0-1.pth"]


def test_a_resumed_epoch_loads_only_what_is_left_of_it(commands, tmp_path, after_step, monkeypatch):
    after_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("main_pretrain", commands["main_pretrain"], tmp_path / "run") == signals.EXIT_STOPPED
    loaded, get = [], KeyedDataset.__getitem__
    monkeypatch.setattr("main_pretrain.record_reconstructions", lambda *words: None)  # it loads images, too
    monkeypatch.setattr(KeyedDataset, "__getitem__", lambda data, key: (loaded.append(key), get(data, key))[1])
    assert run("main_pretrain", commands["main_pretrain"], tmp_path / "run", "--resume", "auto") == 0
    assert [epoch for epoch, _ in loaded] == [0] * 8 + [1] * 24 + [2] * 24


# ---- phases


def raising(call, number=signal.SIGTERM, nth=1):
    """`call`, with a signal before its nth use."""
    uses = []

    def wrapped(*args, **kwargs):
        uses.append(1)
        if len(uses) == nth:
            signal.raise_signal(number)
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("place", "name", "nth", "saved"),
    [
        ("main_linprobe", "build_split_images", 1, "nothing to save"),
        ("main_linprobe", "frozen_encoder", 1, "nothing to save"),
        ("data_sets.loader.KeyedDataset", "__getitem__", 1, "with nothing to save"),
        ("data_sets.loader.KeyedDataset", "__getitem__", 14, "saved after 1 of 3 steps of epoch 0"),
        ("util.scores.Tally", "update", 1, "saved after 3 of 3 steps of epoch 0"),  # in the first evaluation
        ("runtime.folder", "write_atomically", 1, "saved after 0 of 3 steps of epoch 1"),  # writing log.txt
    ],
)
def test_a_signal_in_any_phase_ends_the_run_and_loses_nothing(
    place, name, nth, saved, commands, whole, tmp_path, monkeypatch, capsys
):
    module, _, kind = place.rpartition(".") if place.split(".")[-1][0].isupper() else (place, "", "")
    target = getattr(importlib.import_module(module), kind) if kind else importlib.import_module(module)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, raising(getattr(target, name), nth=nth))
        assert run("main_linprobe", commands["main_linprobe"], tmp_path / "run") == signals.EXIT_STOPPED
    error = capsys.readouterr().err
    assert saved in error and error.count("\n") == 1
    if "before" in saved:
        (tmp_path / "run" / "args.json").unlink()
    assert run("main_linprobe", commands["main_linprobe"], tmp_path / "run", "--resume", "auto") == 0
    assert differences(outcome(tmp_path / "run"), whole("main_linprobe")) == []


def test_a_second_interrupt_stops_at_once_and_two_of_one_press_are_one(monkeypatch):
    ends = []
    monkeypatch.setattr(signals, "quit_at_once", ends.append)
    with signals.listening(), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.requested() == signal.SIGINT and not ends
        time.sleep(0.15)
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested() == signal.SIGINT and not ends
        signal.raise_signal(signal.SIGINT)
        assert ends == [130]
    assert signals.requested() == 0


def test_a_request_that_compiled_code_takes_for_an_error_is_honoured_all_the_same():
    def compiled():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ValueError("could not determine the shape of a storage") from None

    for context in (contextlib.nullcontext(), signals.deferred(False)):
        with pytest.raises(signals.Stopped), signals.listening(), context:
            compiled()
    with pytest.raises(ValueError, match="disk full"), signals.listening(), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("disk full")


def test_a_run_that_has_ended_is_not_stopped(commands, tmp_path, monkeypatch):
    """A signal behind the last step that matters changes nothing but costs nothing either."""
    encoder = importlib.import_module("runtime.folder")
    monkeypatch.setattr(encoder, "save_encoder", raising(encoder.save_encoder))
    assert run("main_pretrain", commands["main_pretrain"], tmp_path / "run", "--epochs", 1) == 0
    assert (tmp_path / "run" / "encoder.safetensors").exists()


# ---- checkpoints that are not what they should be


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path):
    """One bit of a weight: the zip is whole and torch reads it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


def unsealed(path):
    state = load_checkpoint(path)
    torch.save(state, path)


def misshapen_momentum(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


BAD = {
    "truncated": (truncated, "cannot be read as a file of tensors"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "flipped bit": (flipped, "is damaged: its content is not what was saved"),
    "no seal": (unsealed, "no sha256 of its content"),
    "weights alone": (lambda path: torch.save({"model": {}}, path), "it has no epoch"),
    "another program's": (changed(lambda s: s.update(probes=s.pop("model"))), "not a checkpoint of main_pretrain.py"),
    "no weights": (changed(lambda s: s["model"].clear()), "Missing key(s) in state_dict"),
    "more weights": (changed(lambda s: s["model"].update(extra=torch.zeros(1))), "Unexpected key(s) in state_dict"),
    "wrong shape": (changed(lambda s: s["model"].update(mask_token=torch.zeros(2))), "size mismatch for "),
    "not tensors": (changed(lambda s: s.update(model=[1, 2])), "does not fit this run"),
    "wrong momentum": (changed(misshapen_momentum), "exp_avg of the optimizer is (3,)"),
    "no parameters": (changed(lambda s: s.update(optimizer=None)), "does not fit this run"),
    "fewer groups": (changed(lambda s: s["optimizer"]["param_groups"].pop()), "does not fit this run: loaded state"),
    "wrong sums": (changed(lambda s: s.update(loss_sum=torch.zeros(5))), "it counts 5 losses"),
    "no identity": (changed(lambda s: s.update(identity=None)), "does not fit this run"),
    "no evaluations": (changed(lambda s: s.update(history=["x"])), "does not fit this run"),
    "no place": (changed(lambda s: s.update(step=[])), "it stands at step [] of epoch 1"),
    "wrong place": (changed(lambda s: s.update(epoch=7)), "it stands at step None of epoch 7"),
}


@pytest.fixture(scope="module")
def two_epochs(commands, tmp_path_factory):
    """A pretraining run that was stopped behind its second epoch."""
    folder = tmp_path_factory.mktemp("two") / "run"
    end_epoch = Training.end_epoch

    def stopping(training, *args):
        end_epoch(training, *args)
        if training.epoch == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "end_epoch", stopping)
        run("main_pretrain", commands["main_pretrain"], folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(bad, two_epochs, commands, whole, tmp_path, capsys):
    folder, (damage, reason) = tmp_path / "run", BAD[bad]
    folder.mkdir()
    for name, content in two_epochs.items():
        (folder / name).write_bytes(content)
    damage(folder / "checkpoint-1.pth")
    damaged = (folder / "checkpoint-1.pth").read_bytes()
    explicit = ["--resume", folder / "checkpoint-1.pth", "--output_dir", tmp_path / "other"]
    assert run("main_pretrain", commands["main_pretrain"], folder, *explicit) == 2
    error = capsys.readouterr().err
    assert reason in error and "checkpoint-1.pth" in error and error.count("\n") == 1
    assert (folder / "checkpoint-1.pth").read_bytes() == damaged and not (tmp_path / "other").exists()
    assert run("main_pretrain", commands["main_pretrain"], folder, "--resume", "auto") == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "trying the checkpoint before it" in line)
    assert reason in warning and "checkpoint-1.pth" in warning
    assert differences(outcome(folder), whole("main_pretrain")) == []


def test_without_any_good_checkpoint_a_run_does_not_start_over(two_epochs, commands, tmp_path, capsys):
    for name, content in two_epochs.items():
        (tmp_path / name).write_bytes(content[:500])
    assert run("main_pretrain", commands["main_pretrain"], tmp_path, "--resume", "auto") == 2
    assert "can be read: remove them to start the run anew" in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(two_epochs, commands, tmp_path, after_step):
    for name, content in two_epochs.items():
        (tmp_path / name).write_bytes(content)
    truncated(tmp_path / "checkpoint-1.pth")
    after_step(5, kill)
    with pytest.raises(Killed):
        run("main_pretrain", commands["main_pretrain"], tmp_path, "--resume", "auto", "--save_every_steps", 4)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1-1.pth"]


def test_what_a_killed_run_left_half_written_is_removed(two_epochs, commands, tmp_path):
    for name, content in two_epochs.items():
        (tmp_path / name).write_bytes(content)
    for name in (".checkpoint-2.pth.abcd1234.tmp", ".log.txt.abcd_234.tmp", ".checkpoint-0-1.pth.abcd1234.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".notes.txt.abcd1234.tmp").touch()
    assert run("main_pretrain", commands["main_pretrain"], tmp_path, "--resume", "auto") == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.txt.abcd1234.tmp"]


# ---- disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 64 MiB and can be made read-only; skipped where file systems cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here; tests/test_run_folder.py pretends a full disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(small_disk, commands, whole, capsys):
    program, folder, filler = "main_pretrain", small_disk / "run", small_disk / "filler"
    whole(program)
    size = 3 * 4 * 1.5e6  # weights and both moments; two checkpoints are kept while the third is written
    filler.write_bytes(bytes(int(64 * 2**20 - 2.5 * size)))
    assert run(program, commands[program], folder) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1, error
    assert f"{folder / 'checkpoint-1.pth'} is whole" in error
    assert sorted(path.name for path in folder.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1.pth"]
    assert not any(folder.glob(".*.tmp"))
    load_checkpoint(folder / "checkpoint-1.pth")
    filler.unlink()
    assert run(program, commands[program], folder, "--resume", "auto") == 0
    assert differences(outcome(folder), whole(program)) == []


def test_a_read_only_folder_is_one_line(small_disk, commands, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for more in ([], ["--log_dir", small_disk]):
        assert run("main_linprobe", commands["main_linprobe"], small_disk / "run", *more) == 2
        error = capsys.readouterr().err
        assert "Read-only file system" in error and error.count("\n") == 1


# ---- divergence, and what a loader does


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_diverges_is_one_line_and_the_checkpoint_before_stays(
    program, commands, whole, tmp_path, monkeypatch, capsys
):
    """No checkpoint holds what the step without a finite loss left."""
    method = importlib.import_module(f"engine_{program[5:]}")
    method = getattr(method, {"main_linprobe": "Probing", "main_pretrain": "Pretraining"}.get(program, "FineTuning"))
    losses, calls = method.losses, []

    def poisoned(self, *args):
        calls.append(1)
        return losses(self, *args) * (torch.nan if len(calls) == 9 else 1.0)  # in the fifth optimizer step

    with monkeypatch.context() as patch:
        patch.setattr(method, "losses", poisoned)
        assert run(program, commands[program], tmp_path, "--save_every_steps", 2) == 1
    error = capsys.readouterr().err
    assert "diverged: the loss or its gradient is not finite in epoch 1, step 1; lower the learning rate" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1-1.pth"]
    assert run(program, commands[program], tmp_path, "--resume", "auto") == 0
    assert differences(outcome(tmp_path), whole(program)) == []


def test_a_slow_loader_is_seen_in_the_log(commands, tmp_path, monkeypatch, capsys):
    get = KeyedDataset.__getitem__
    monkeypatch.setattr(KeyedDataset, "__getitem__", lambda data, key: (time.sleep(0.03), get(data, key))[1])
    assert run("main_linprobe", commands["main_linprobe"], tmp_path, "--epochs", 1) == 0
    assert json.loads((tmp_path / "log.txt").read_text())["data_wait"] > 0.5
    assert " % of the time waiting for data" in capsys.readouterr().out


# ---- the weights behind a run


def test_weights_may_move_and_may_not_change(commands, pretrained, whole, tmp_path, after_step, capsys):
    for program in ("main_linprobe", "main_finetune"):
        folder, moved = tmp_path / program, tmp_path / f"{program}.safetensors"
        after_step(4, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(program, commands[program], folder) == signals.EXIT_STOPPED
        torch.manual_seed(1)
        save_encoder(moved, build_vit("vit_demo_patch8", img_size=32).state_dict(), {"family": "mae"})
        assert run(program, commands[program], folder, "--resume", "auto", "--finetune", moved) == 2
        assert "this is another run (weights was" in capsys.readouterr().err
        moved.write_bytes(pretrained.read_bytes())
        assert run(program, commands[program], folder, "--resume", "auto", "--finetune", moved) == 0
        assert differences(outcome(folder), whole(program)) == []


@pytest.mark.parametrize("program", ["main_linprobe", "main_finetune"])
def test_equal_tensors_of_another_family_are_another_encoder(program, commands, pretrained, tmp_path, capsys):
    """Families resample positions differently, so that tokens differ at other sizes than the file's."""
    command = [*commands[program], "--epochs", "1"]
    folder, other = tmp_path / "run", tmp_path / "other.safetensors"
    assert run(program, command, folder) == 0
    save_encoder(other, load_file(pretrained), {"family": "dino"})
    assert run(program, command, folder, "--resume", "auto", "--finetune", other) == 2
    error = capsys.readouterr().err
    assert "this is another run (" in error and "encoder: pos_resampling was plain, is offset" in error


def test_the_weights_of_an_oracle_may_not_change(commands, pretrained, tmp_path, capsys):
    folder, oracle = tmp_path / "run", tmp_path / "oracle.safetensors"
    oracle.write_bytes(pretrained.read_bytes())
    command = [*commands["main_linprobe"], "--epochs", "1", "--cls_features", "dino", "--oracle", str(oracle),
               "--oracle_model", "vit_demo_patch8"]  # fmt: skip
    assert run("main_linprobe", command, folder) == 0
    torch.manual_seed(1)
    save_encoder(oracle, build_vit("vit_demo_patch8", img_size=32).state_dict(), {"family": "mae"})
    assert run("main_linprobe", command, folder, "--resume", "auto") == 2
    assert "this is another run (oracle weights was" in capsys.readouterr().err


def test_probes_are_evaluated_on_the_encoder_of_their_training(commands, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other.safetensors"
    command = [*commands["main_linprobe"], "--epochs", "1"]
    assert run("main_linprobe", command, folder) == 0
    torch.manual_seed(1)
    save_encoder(other, build_vit("vit_demo_patch8", img_size=32).state_dict(), {"family": "mae"})
    checkpoint = ["--eval", "--resume", folder / "checkpoint-0.pth"]
    assert run("main_linprobe", command, folder, *checkpoint) == 0
    assert run("main_linprobe", command, folder, *checkpoint, "--finetune", other) == 2
    assert "this is another run (weights was" in capsys.readouterr().err
    assert run("main_linprobe", command, folder, *checkpoint, "--mean", "0.5", "0.5", "0.5") == 2
    assert "encoder: mean was [0.485, 0.456, 0.406], is [0.5, 0.5, 0.5]" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_images_may_move_and_may_not_be_others(program, commands, image_folder, whole, tmp_path, after_step, capsys):
    folder, moved = tmp_path / "run", tmp_path / "moved" / "images"
    after_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(program, commands[program], folder) == signals.EXIT_STOPPED
    shutil.copytree(image_folder, moved)
    renamed = moved / "train" / "red" / "00.png"
    renamed.rename(renamed.with_name("other.png"))
    assert run(program, commands[program], folder, "--resume", "auto", "--data_path", moved) == 2
    error = capsys.readouterr().err
    assert "this is another run (training images was" in error and error.count("\n") == 2, error
    renamed.with_name("other.png").rename(renamed)
    assert run(program, commands[program], folder, "--resume", "auto", "--data_path", moved) == 0
    assert differences(outcome(folder), whole(program)) == []


def test_random_weights_are_a_function_of_the_seed(commands, tmp_path):
    words = ["--finetune", "", "--family", "mae"][:2]
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        more = [*words, "--epochs", 1, "--seed", seed, "--seeds", 0]
        assert run("main_linprobe", commands["main_linprobe"], tmp_path / name, *more) == 0
        results.append(json.loads((tmp_path / name / "log.txt").read_text())["train_loss"])
    assert results[0] == results[1] != results[2]


def test_a_process_that_does_not_see_the_checkpoint_says_so(tmp_path, monkeypatch):
    """Rank 0 chooses; another machine without the shared folder must not begin anew."""
    from runtime.folder import RunFolder

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "from_main", lambda value: (str(tmp_path / "checkpoint-3.pth"), None))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [dict.fromkeys(value, "read"), value])
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    with pytest.raises(ValueError, match=r"checkpoint-3\.pth .*there is"):
        RunFolder(tmp_path).find_checkpoint("auto")
