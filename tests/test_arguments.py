"""Arguments replayed from a run, and mistakes in one line."""

import argparse
import importlib
import json
import shlex
import signal
from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
from attention.metrics import METRICS
from cli import encoder_arguments
from cli.arguments import plain
from cli.console import parse, run_main
from cli.encoder_arguments import build_encoder
from cli.linprobe import head_precision
from data_sets.table import DATASETS
from encoders.catalogue import CATALOGUE
from encoders.families import FAMILIES
from models_vit import ARCHITECTURES
from probing.heads import AGGREGATIONS
from util import signals
from util.choices import instead_of
from util.distributed import PeerLost

PARSER = main_finetune.get_args_parser


@pytest.fixture
def saved(tmp_path):
    """args.json of a run with a few settings of every kind."""
    argv = ["--data_path", "images", "--epochs", "7", "--aa", "", "--no_pin_mem", "--lr", "0.5", "--eval"]
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"args": plain(parse(PARSER(), argv)), "commit": "abc"}))
    return path


def test_saved_arguments_are_replayed(saved):
    args = parse(PARSER(), ["--args_from", str(saved)])
    assert args.args_from == saved and args.data_path == Path("images")
    original = json.loads(saved.read_text())["args"]
    assert {**plain(args), "args_from": None} == original


def test_flags_win_over_saved_arguments(saved):
    args = parse(PARSER(), ["--args_from", str(saved), "--epochs", "9", "--data_path", "elsewhere"])
    assert (args.epochs, args.data_path, args.lr) == (9, Path("elsewhere"), 0.5)


def test_required_arguments_stay_required_where_nothing_is_saved(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"args": {"epochs": 3}}')
    with pytest.raises(SystemExit):
        parse(PARSER(), ["--args_from", str(tmp_path / "args.json")])
    assert "--data_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not the args.json of a run"),
        ("{", "not the args.json of a run"),
        ("[1]", "not the args.json of a run"),
        ('{"lr": 1}', "not the args.json of a run"),
        ('{"args": 3}', "not the args.json of a run"),
        ('{"args": {"cls_features": ["pos"]}}', "this program has no argument 'cls_features'"),
        ('{"args": {"epochs": null}}', "--epochs does not take null"),
        ('{"args": {"epochs": [3]}}', "--epochs does not take [3]"),
        ('{"args": {"model": {}}}', "--model does not take {}"),
        ('{"args": {"eval": 1}}', "--eval does not take 1"),
        ('{"args": {"mean": [0.5]}}', "--mean does not take [0.5]"),
    ],
)
def test_what_is_no_record_of_arguments_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        parse(PARSER(), ["--args_from", str(tmp_path / "args.json")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_maes_published_commands_are_understood():
    pretraining = """--batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800
        --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path images --world_size 8 --local_rank 0"""
    args = parse(main_pretrain.get_args_parser(), shlex.split(pretraining))
    assert (args.model, args.norm_pix_loss, args.blr) == ("vit_large_patch16", True, 1.5e-4)
    fine_tuning = """--accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune mae.pth --epochs 100 --blr 5e-4
        --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --dist_eval
        --cls_token --data_path images"""
    args = parse(PARSER(), shlex.split(fine_tuning))
    assert (args.layer_decay, args.cutmix, args.dist_eval) == (0.65, 1.0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cls_feature", "cls"], "--cls_feature: unknown; did you mean --cls_features? --help lists the arguments"),
        (["--data_pth=x"], "--data_pth: unknown; did you mean --data_path? --help"),
        (["--data_path", "x", "--lr_min", "1"], "--lr_min: unknown; did you mean --min_lr? --help"),
        (["--data_path", "x", "--zzz"], "--zzz: unknown; --help lists the arguments"),
        (["--data_path", ""], "--data_path: is empty: is a shell variable not set?; --help"),
        (["--data_path", "x", "--save_every_steps", "-1"], "--save_every_steps: must be an integer >= 0, got '-1'"),
        (["--data_path", "x", "--save_every_minutes", "nan"], "--save_every_minutes: must be a number >= 0, got 'nan'"),
        (["--data_path", "x", "--num_workers", "2.5"], "--num_workers: must be an integer >= 0, got '2.5'"),
        (["--data_path", "x", "y"], "unrecognized arguments: y; --help lists the arguments"),
        (["--data_path", "x", "--crop", "tv"], "--crop: unknown 'tv': choose one of mae, torchvision, center; --help"),
        (["--data_path", "x", "--crop", "centre"], "did you mean center? There are mae, torchvision, center; --help"),
    ],
)
def test_a_word_that_does_not_exist_is_answered_with_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(main_linprobe.get_args_parser(), words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("word", "names", "near"),
    [
        ("abmlip", AGGREGATIONS, "abmilp"), ("ABMILP", AGGREGATIONS, "abmilp"), ("mean", AGGREGATIONS, ""),
        ("mocov2", FAMILIES, "mocov3"), ("stl", DATASETS, "stl10"), ("cls_entropy", METRICS, "cls_patch_entropy"),
        ("vit_smal_patch16", ARCHITECTURES, "vit_small_patch16"), ("", ARCHITECTURES, ""),
        ("dino_base_16", CATALOGUE, "dino_vit_base_patch16"),
    ],
)  # fmt: skip
def test_the_nearest_name_comes_first(word, names, near):
    said = instead_of(word, names)
    assert said.startswith(f"did you mean {near}" if near else "choose one of ") and said.endswith(", ".join(names))


@pytest.mark.parametrize(
    ("program", "mistake", "message"),
    [
        ("main_linprobe", ["--data_path", "absent"], "--data_path absent: there is no such folder"),
        ("main_linprobe", ["--data_path", __file__], f"--data_path {__file__}: this is a file, not a folder"),
        ("main_linprobe", ["--dataset", "cub200", "--data_path", "absent"], "there is no such folder; it comes from"),
        ("main_linprobe", ["--dataset", "imagnet1k"], "did you mean imagenet1k?"),
        ("main_linprobe", ["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
        ("main_linprobe", ["--finetune", "mae_vit_large_patch16"], "write --model vit_large_patch16"),
        ("main_linprobe", ["--finetune", "mae_vit_base_patch16", "--family", "mea"], "did you mean mae?"),
        ("main_linprobe", ["--cls_features", "abmlip"], "did you mean abmilp?"),
        ("main_linprobe", ["--no_cls_token"], "this encoder has no [cls] token"),
        ("main_linprobe", ["--return_block", "12"], "has blocks 0 to 11"),
        ("main_linprobe", ["--bn_group", "100"], "--bn_group 100 and --batch_size 512"),
        ("main_linprobe", ["--dataset", "coco", "--knn", "10"], "--knn needs one label per image"),
        ("main_linprobe", ["--eval", "--resume", "absent.pth"], "--resume absent.pth: no such file"),
        ("main_finetune", ["--dataset", "coco"], "has several labels per image"),
        ("main_finetune", ["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
        ("main_pretrain", ["--dataset", "imagenette1k"], "unknown data set 'imagenette1k'"),
        ("main_analyze_attention", ["--tsne_blocks", "12"], "has blocks 0 to 11"),
        ("main_analyze_attention", ["--metrics", "cls_entropy"], "did you mean cls_patch_entropy or"),
        ("main_analyze_attention", ["--finetune", "", "", "--label", "a"], "--label has 1 names for 2 encoders"),
        ("main_analyze_attention", ["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
        ("main_analyze_aggregation", ["--finetune", "absent.pth"], "--finetune absent.pth: no such file"),
        ("main_analyze_aggregation", ["--dataset", "imagnet1k"], "did you mean imagenet1k?"),
    ],
)
def test_a_folder_that_is_taken_does_not_hide_a_mistake(program, mistake, message, tmp_path, capsys):
    for name in ("log.txt", "aggregation.json", "MAE/attention.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    main = importlib.import_module(program)
    words = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises((ValueError, SystemExit)) as error:
        main.main(parse(main.get_args_parser(), [*words, *mistake]))
    assert message in f"{error.value} {capsys.readouterr().err}"
    with pytest.raises(ValueError, match="already holds"):
        main.main(parse(main.get_args_parser(), words))


def test_an_impossible_input_size_is_refused_before_the_weights_are_read():
    args = parse(PARSER(), ["--data_path", "x", "--input_size", "40", "--finetune", "absent.pth"])
    with pytest.raises(ValueError, match="--input_size 40"):
        build_encoder(args)


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    def main(args):
        raise ValueError("Error in loading:\n\tMissing key: norm.weight")

    with pytest.raises(SystemExit) as stopped:
        run_main(main, argparse.Namespace())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(": Error in loading: Missing key: norm.weight\n")


def test_other_errors_keep_their_traceback():
    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(main, argparse.Namespace())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nmistake"), 2), (FloatingPointError("it diverged"), 1), (KeyboardInterrupt(), 130),
        (signals.Stopped(signal.SIGTERM), 85), (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 1),
        (PeerLost("rank 1 has ended", answered=True), 1),
    ],
)  # fmt: skip
def test_the_exit_code_says_what_happened_in_one_line(error, code, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_main(main, argparse.Namespace())
    assert stopped.value.code == code and capsys.readouterr().err.count("\n") == 1


PROGRAMS = [
    "submitit_linprobe",
    "main_linprobe",
    "main_pretrain",
    "main_finetune",
    "main_analyze_aggregation",
    "main_analyze_attention",
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "flags", [["--help"], ["--misspelt"], ["--job_dir", "x", "--cluster", "local", "--nodes", "2"]]
)
def test_help_and_mistakes_answer_without_slow_imports(program, flags, run_program):
    code = f"""
import runpy, sys
sys.argv = {[f"{program}.py", *flags]}
try:
    runpy.run_path("{program}.py", run_name="__main__")
except SystemExit as end:
    slow = sys.modules.keys() & {{"torch", "torchvision", "timm", "matplotlib", "scipy", "sklearn"}}
    print("exit", end.code, sorted(slow))
"""
    done = run_program("-c", code)
    assert done.stdout.splitlines()[-1] == f"exit {0 if flags == ['--help'] else 2} []", done.stderr


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("flags : avx2 fma", "cpu", "float32"),
        ("flags : avx2 avx512_bf16", "cpu", "bfloat16"),
        ("Features : asimd bf16", "cpu", "bfloat16"),
        ("", "cpu", "float32"),
        ("flags : avx2 fma", "cuda", "bfloat16"),
    ],
)
def test_bfloat16_is_the_default_where_the_device_computes_it(flags, device, expected, tmp_path, monkeypatch, caplog):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert encoder_arguments.cpu_flags(tmp_path / "nothing") == set()
    listed = encoder_arguments.cpu_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr(encoder_arguments, "cpu_flags", lambda: listed)
    given, chosen = argparse.Namespace(amp="float16"), argparse.Namespace(amp=None)
    with caplog.at_level("INFO", "beyond_cls"):
        for args in (given, chosen):
            encoder_arguments.choose_precision(args, torch.device(device))
    assert (given.amp, chosen.amp) == ("float16", expected)
    assert ("--amp float32: this CPU" in caplog.text) == (expected == "float32")


def test_head_amp_is_refused_where_it_has_no_effect_or_gradients_underflow():
    for amp, message in (("float32", "no effect"), ("float16", "underflow")):
        with pytest.raises(ValueError, match=message):
            head_precision(argparse.Namespace(head_amp=True, amp=amp), torch.device("cpu"))
    assert head_precision(argparse.Namespace(head_amp=False, amp="float16"), torch.device("cpu")) == torch.float32
