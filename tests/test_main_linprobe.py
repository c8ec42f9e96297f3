"""main_linprobe as its users run it: one and two processes, resumed, with mistakes, with published command lines."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import make_coco
from PIL import Image

import cli.launcher
import main_linprobe
from cli.console import parse, run_main
from data_sets.table import DATASETS
from encoders.load import save_encoder
from models_vit import build_vit, compile_blocks
from probing.predictions import FILE, read_predictions
from util.scores import multilabel_scores

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes told by their brightness: 64 training images and 101 test images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 101)):
        for index in range(count):
            label = index % 2
            path = folder / split / f"class{label}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.uniform(0, 120, (40, 48, 3)) + 100 * label).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_encoder(path, build_vit("vit_demo_patch8").state_dict(), {"family": "mae"})
    return path


@pytest.fixture
def command(data, weights, tmp_path):
    return [
        "--model", "vit_demo_patch8", "--finetune", str(weights), "--data_path", str(data), "--input_size", "32",
        "--amp", "float32", "--device", "cpu", "--num_workers", "0", "--batch_size", "16", "--epochs", "3",
        "--warmup_epochs", "1", "--blr", "20", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip


def run(argv):
    main_linprobe.main(parse(main_linprobe.get_args_parser(), argv))
    output = Path(argv[argv.index("--output_dir") + 1])
    return json.loads((output / "results.json").read_text())


def states(folder, epoch=2):
    return torch.load(folder / f"checkpoint-{epoch}.pth", weights_only=True)


def test_run_learns_and_leaves_its_records(command, tmp_path):
    results = run([*command, "--cls_features", "cls", "pos", "abmilp", "--seeds", "0", "1"])
    assert len(results["probes"]) == 6 and results["n_test"] == 101
    assert all(probe["last"]["n"] == 101 for probe in results["probes"].values())
    assert max(probe["last"]["top1"] for probe in results["probes"].values()) > 90
    assert set(results["lr"].values()) == {20 * 16 / 256}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["encoder"]["sha256"]
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_another_run_is_not_taken_for_a_resumed_one(command, tmp_path):
    run(command)
    before = (tmp_path / "run" / "results.json").read_text()
    for change, told in ((["--batch_size", "8"], "batch_size was 16, is 8"), (["--epochs", "9"], "epochs was 3, is 9"),
                         (["--accum_iter", "2"], "effective batch was 16, is 32")):  # fmt: skip
        with pytest.raises(ValueError, match=f"this is another run .*{told}"):
            run([*command, *change, "--resume", "auto"])
    assert (tmp_path / "run" / "results.json").read_text() == before


def test_evaluation_alone_repeats_the_last_scores(command, tmp_path, capsys):
    whole = run(command)
    checkpoint = str(tmp_path / "run" / "checkpoint-2.pth")
    main_linprobe.main(parse(main_linprobe.get_args_parser(), [*command, "--eval", "--resume", checkpoint]))
    (probe,) = whole["probes"].values()
    capsys_text = capsys.readouterr().out
    assert f"top-1 {probe['last']['top1']:.2f}, top-5 100.00, loss {probe['last']['loss']:.4f} on 101" in capsys_text


def test_saved_arguments_replay_the_run(command, tmp_path):
    whole = run([*command, "--cls_features", "pos", "--crop", "torchvision"])
    shutil.copy(tmp_path / "run" / "args.json", tmp_path / "args.json")
    again = run(["--args_from", str(tmp_path / "args.json"), "--output_dir", str(tmp_path / "again")])
    assert again["probes"] == whole["probes"]


def test_diverged_probe_is_reported_and_its_neighbour_goes_on(command, tmp_path, capsys):
    recipe = ["--blr", "20", "3e39", "--optimizer", "sgd", "--momentum", "0.9", "--epochs", "2"]
    probes = run([*command, *recipe])["probes"]
    healthy, lost = probes["cls/block5/sgd/blr20.0/seed0"], probes["cls/block5/sgd/blr3e+39/seed0"]
    assert healthy["diverged_at"] is None and lost["diverged_at"] == {"epoch": 0, "step": 1}
    assert "cls/block5/sgd/blr3e+39/seed0 diverged in epoch 0, step 1" in capsys.readouterr().out
    for state in states(tmp_path / "run", epoch=1)["probes"].values():
        assert all(value.isfinite().all() for value in state.values())


def test_compiled_blocks_and_heads_in_bfloat16_learn_what_a_plain_run_learns(command, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        main_linprobe, "compile_blocks", lambda model: compiled.append(compile_blocks(model, backend="eager"))
    )
    words = ["--amp", "bfloat16", "--cls_features", "abmilp:depth=2", "--epochs", "3"]
    (plain,) = run([*command, *words])["probes"].values()
    other = [*command[:-1], f"{command[-1]}-fast", *words, "--compile", "--head_amp"]
    (fast,) = run(other)["probes"].values()
    assert len(compiled) == 1 and fast["last"]["loss"] == pytest.approx(plain["last"]["loss"], rel=0.1)
    assert fast["last"]["loss"] != plain["last"]["loss"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--nb_classes", "1000"], "--nb_classes 1000, but"),
        (["--model", "vit_gigantic"], "unknown model 'vit_gigantic': choose one of vit_demo_patch8"),
        (["--model", "vit_tiny_patch16"], "6 blocks and patches of 8 pixels: write --model vit_demo_patch8"),
        (["--return_block", "6"], "block 6 does not exist: this encoder has blocks 0 to 5"),
        (["--cls_features", "mean"], "unknown head 'mean'"),
        (["--cls_features", "abmilp:depth=0"], "head abmilp:depth=0: depth=0: must be a whole number >= 1"),
        (["--cls_features", "cls", "cls"], "requested twice: cls/block5/blr20.0/seed0"),
        (["--cls_features", "abmilp", "--abmilp_branches", "0"], "--abmilp_branches 0: must be a whole number >= 1"),
        (
            ["--cls_features", "dino", "--oracle", "", "--oracle_model", "vit_tiny_patch16"],
            "its patches have 16 pixels",
        ),
        (["--no_cls_token", "--finetune", "", "--cls_features", "cls"], "this encoder has no [cls] token; use pos"),
        (["--batch_size", "65"], "larger than the 64 training images"),
        (["--input_size", "30"], "--input_size 30 is not divisible by the patch size 8"),
        (["--global_pool"], "use --cls_features pos"),
        (["--eval"], "--eval evaluates a checkpoint: name it with --resume"),
        (["--lr", "1", "--blr", "1", "2"], "--lr 1.0 sets one rate, --blr [1.0, 2.0] several"),
        (["--family", "imagenet"], "unknown family 'imagenet': choose one of auto, mae, mae_ft"),
        (["--bn_group", "24"], "--bn_group 24 and --batch_size 16: one must be a multiple of the other"),
        (["--bn_group", "32"], "takes 2 micro-steps of --batch_size 16: --accum_iter 1 must be a multiple of 2"),
        (["--bn_group", "1"], "batch normalisation needs at least two images: raise --batch_size or --bn_group"),
        (["--val_fraction", "1"], "--val_fraction: must be in [0, 1), got '1'"),
        (["--val_fraction", "0.1", "--report", "best"], "is the epoch that is best on the test set"),
        (["--cache_views", "4"], "--cache_views must be <= --epochs 3, as an epoch uses one view; got 4"),
        (
            ["--cache_views", "2", "--crop", "center"],
            "--cache_views must be 1 without augmentation (--crop center), got 2",
        ),
        (["--cache_dir", "cache"], "--cache_dir stores the features of --cache_views: set it"),
        (["--knn", "10", "0"], "--knn: must be an integer >= 1, got '0'"),
        (["--knn", "65"], "--knn 65: must be <= 64"),
        (["--eval_every", "0"], "--eval_every: must be an integer >= 1, got '0'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, mistake, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        run_main(main_linprobe.main, parse(main_linprobe.get_args_parser(), [*command, *mistake]))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "args.json").exists()


def test_held_out_images_choose_the_rate_and_the_test_set_is_used_once(command, tmp_path, capsys):
    words = ["--cls_features", "cls", "pos", "--blr", "0.001", "20", "--seeds", "0", "1", "--val_fraction", "0.25"]
    results = run([*command, *words, "--batch_size", "8", "--save_predictions", "--knn", "3"])
    probes = results["probes"]
    assert (results["n_train"], results["n_val"], results["n_test"]) == (48, 16, 101)
    for head in ("cls", "pos"):
        mean = {
            rate: sum(probes[f"{head}/block5/blr{rate}/seed{seed}"]["val"]["last"]["top1"] for seed in (0, 1))
            for rate in ("0.001", "20.0")
        }
        for rate, probe in ((name.split("/")[2], probe) for name, probe in probes.items() if name.startswith(head)):
            assert probe["chosen"] == (rate == "blr" + max(mean, key=mean.get))
    for probe in probes.values():
        assert probe["last"]["n"] == 101 and "best" not in probe
        assert probe["val"]["last"]["n"] == 16 and probe["val"]["best"]["top1"] >= probe["val"]["last"]["top1"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert all("val" in line and "test" not in line for line in lines)
    assert results["knn"].keys() == {"cls/block5", "pos/block5"}
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "at the edge of those tried" in line)
    assert "cls of block 5 (" in warning and "pos of block 5 (" in warning  # of two rates, both are

    kept = read_predictions(tmp_path / "run")
    assert all(kept.facts["probes"][name]["chosen"] == probe["chosen"] for name, probe in probes.items())
    assert kept.index.equal(torch.arange(101)) and list(kept.outputs) == list(probes)
    for name, probe in probes.items():
        hits = kept.outputs[name] == kept.labels[:, None]
        assert 100 * hits[:, 0].double().mean().item() == pytest.approx(probe["last"]["top1"])
        assert kept.losses[name].mean().item() == pytest.approx(probe["last"]["loss"], rel=1e-6)

    # the same from the checkpoint, on its own; and resumed after its end, everything again
    before, predictions = (tmp_path / "run" / "results.json").read_text(), tmp_path / "run" / FILE
    predictions.unlink()
    again = run([*command, *words, "--batch_size", "8", "--save_predictions", "--knn", "3", "--resume", "auto"])
    assert again["probes"] == json.loads(before)["probes"]
    for name, outputs in read_predictions(tmp_path / "run").outputs.items():
        assert outputs.equal(kept.outputs[name])


def test_images_of_one_label_can_be_scored_by_class(command, tmp_path):
    results = run([*command, "--per_class", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "64"])
    (probe,) = results["probes"].values()
    assert results["headline"] == "per_class" and 0 <= probe["last"]["per_class"] <= 100


def test_the_bank_is_the_product_of_what_several_flags_say(command, tmp_path):
    results = run([
        *command, "--cls_features", "cls", "abmilp:depth=2,act=tanh", "ap4", "attn-lcte", "ca2", "--epochs", "1",
        "--warmup_epochs", "0", "--return_block", "0", "5", "--optimizer", "lars", "sgd", "--blr", "0.1", "2",
        "--seeds", "0", "1", "--abmilp_content", "all",
    ])  # fmt: skip
    heads = ["cls", "abmilp:depth=2,act=tanh,content=all", "ap4", "attn-lcte", "ca2"]
    assert list(results["probes"]) == [
        f"{head}/block{block}/{optimizer}blr{blr}/seed{seed}"
        for head in heads for block in (0, 5) for optimizer in ("", "sgd/") for blr in (0.1, 2.0) for seed in (0, 1)
    ]  # fmt: skip
    lost = [name for name, probe in results["probes"].items() if probe["last"]["loss"] is None]
    assert not lost
    state = states(tmp_path / "run", 0)["optimizer"]
    assert {(group["trust_coefficient"], group["momentum"]) for group in state["param_groups"]} == {
        (1e-3, 0.9), (None, 0.0)
    }  # fmt: skip


def test_a_rate_that_is_given_is_the_probes_name(command):
    (name,) = run([*command, "--epochs", "1", "--warmup_epochs", "0", "--lr", "0.3"])["probes"]
    assert name == "cls/block5/lr0.3/seed0"


def test_an_oracle_is_read_for_the_head_that_asks_for_it_alone(command, weights, tmp_path):
    missing = [*command, "--oracle", "nowhere.pth", "--epochs", "1", "--warmup_epochs", "0"]
    assert run(missing)["oracle"] is None
    command[command.index("--output_dir") + 1] = str(tmp_path / "oracle")
    own = ["--cls_features", "dino", "attn-mn", "--oracle", str(weights), "--oracle_model", "vit_demo_patch8"]
    results = run([*command, *own])
    assert results["oracle"]["sha256"] == results["encoder"]["sha256"]
    assert min(probe["last"]["top1"] for probe in results["probes"].values()) > 70
    with pytest.raises(ValueError, match=r"--oracle: --finetune nowhere\.pth: no such file"):
        run([*missing, "--cls_features", "dino", "--output_dir", str(tmp_path / "lost")])


def test_beyond_cls_command_means_the_papers_probe():
    """The command of the published README, but for the torchrun in front."""
    args = parse(main_linprobe.get_args_parser(), shlex.split(
        "--amp bfloat16 --num_workers 16 --dataloader_affinity_hack --epochs 90 --accum_iter 2 --optimizer lars "
        "--batch_size 2048 --model vit_base_patch16 --finetune vit_base_patch16_224.mae --data_path imagenet "
        "--output_dir out --cls_features abmilp --abmilp_act relu --abmilp_sa none --abmilp_depth 1 "
        "--abmilp_cond none --abmilp_content patch"
    ))  # fmt: skip
    main_linprobe.check(args)
    (spec,) = main_linprobe.probe_specs(args, build_vit("vit_base_patch16"))
    assert (spec.head, spec.block, spec.blr) == ("abmilp", 11, 0.1)
    assert not args.final_norm and args.init == "default" and args.warmup_epochs == 10
    optimizer = main_linprobe.build_optimizer(args, [spec], [{"params": [torch.zeros(1)], "rows": [0]}])
    assert (spec.optimizer, optimizer.param_groups[0]["momentum"]) == ("lars", 0.9)


def test_mae_command_means_maes_probe():
    """The published submitit command: [cls] after the last norm, classifier from a normal of std 0.01."""
    argv = shlex.split(
        "--job_dir job --nodes 4 --batch_size 512 --model vit_base_patch16 --cls_token --finetune mae.pth --epochs 90 "
        "--blr 0.1 --weight_decay 0.0 --dist_eval --data_path imagenet"
    )
    launcher, rest = cli.launcher.get_args_parser().parse_known_args(argv)
    args = parse(main_linprobe.get_args_parser(), rest)
    main_linprobe.check(args)
    assert (launcher.nodes, cli.launcher.gpus_per_node(launcher)) == (4, 8)
    assert args.cls_features == ["cls"] and args.final_norm and args.init == "trunc_normal"
    assert (args.batch_size, args.epochs, args.blr, args.optimizer) == (512, 90, [0.1], ["lars"])


def test_launched_job_continues_the_run_on_two_processes(command, tmp_path):
    whole = run([*command, "--accum_iter", "2"])
    (tmp_path / "run" / "checkpoint-2.pth").unlink()
    (tmp_path / "run" / "results.json").unlink()
    index = command.index("--output_dir")
    launcher = [
        sys.executable, "submitit_linprobe.py", "--job_dir", command[index + 1], "--cluster", "local", "--ngpus", "0",
        "--tasks_per_node", "2", "--cpus_per_task", "1", "--wait", *command[:index],
    ]  # fmt: skip
    result = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    resumed = json.loads((tmp_path / "run" / "results.json").read_text())
    assert resumed["processes"] == 2
    for name, probe in whole["probes"].items():
        assert resumed["probes"][name]["last"]["top1"] == probe["last"]["top1"]


def test_images_of_several_labels_are_scored_by_mean_average_precision(weights, tmp_path, monkeypatch):
    images = tmp_path / "coco"
    make_coco(images)
    monkeypatch.setitem(DATASETS, "coco", DATASETS["coco"]._replace(classes=3))
    argv = [
        "--model", "vit_demo_patch8", "--finetune", str(weights), "--data_path", str(images), "--dataset", "coco",
        "--allow_subset", "--input_size", "32", "--amp", "float32", "--device", "cpu", "--num_workers", "0",
        "--batch_size", "2", "--epochs", "2", "--warmup_epochs", "0", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    for flag in (["--per_class"], ["--knn", "1"]):
        with pytest.raises(ValueError, match="needs one label per image; --dataset coco has several"):
            run([*argv, *flag])
    results = run([*argv, "--save_predictions"])
    (probe,) = results["probes"].values()
    kept = read_predictions(tmp_path / "run")
    (logits,), (losses,) = kept.outputs.values(), kept.losses.values()
    assert multilabel_scores(logits, kept.labels).map == pytest.approx(probe["last"]["map"])
    assert losses.mean().item() == pytest.approx(probe["last"]["loss"], rel=1e-6)
    assert results["classes"] == 3 and probe["last"]["classes"] == 1
    assert {"map", "any_match", "label_accuracy", "loss", "n", "classes"} <= probe["last"].keys()
    assert probe["last"]["loss"] == pytest.approx(0.69, abs=0.3)  # a new classifier's binary cross-entropy is near ln 2


def test_damaged_images_are_left_out_of_the_score_where_that_is_asked_for(command, data, tmp_path, caplog):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for number in (4, 7):
        (copy / "val" / f"class{number % 2}" / f"{number:03d}.png").write_bytes(b"not an image")
    argv = [str(copy) if word == str(data) else word for word in command]
    with pytest.raises(ValueError, match=r"cannot read image .*00[47]\.png"):
        run(argv)
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "skipping")
    (probe,) = run([*argv, "--on_bad_image", "skip"])["probes"].values()
    assert probe["last"]["n"] == 99


def test_a_run_is_not_resumed_after_its_test_images_changed(command, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    argv = [str(copy) if word == str(data) else word for word in command]
    run(argv)
    first, second = sorted((copy / "val" / "class0").iterdir())[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"another run.*test images"):
        run([*argv, "--resume", "auto"])
