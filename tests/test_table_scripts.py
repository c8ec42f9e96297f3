"""The scripts of tables and figures: every command they would run is understood by its program, and is the protocol."""

import contextlib
import importlib
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

import cli.launcher
from cli.console import parse

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*(f"table{number}" for number in (1, 2, 3, 5, 6, 7, 8)), "figure1", "figure3_6", "figure7", "figure8",
           "figure9", "figure10_13", "figure_depth"]  # fmt: skip
FOLDERS = {name: f"/data/{name.lower()}" for name in ("IMAGENET", "FOOD101", "COCO", "NUS_WIDE", "CUB200",
                                                      "STANFORD_CARS", "OXFORD_PETS")}  # fmt: skip
MODES = {"local": [], "slurm": ["--slurm", "--partition", "gpu"], "smoke": ["--smoke"]}


def call(script, *words, tmp_path, **settings):
    """A script that shows its commands and runs nothing; settings are of the environment."""
    environment = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    environment |= {"PRINT": "1", "GPUS": "4", "OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path / "results")}
    command = ["bash", f"scripts/{script}.sh", *words]
    return subprocess.run(command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True)


def commands(text):
    """(program, its words, the launcher's arguments or None, processes) of every line."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in ("cp", "mkdir", "installing"):  # env.sh says that it installs requirements
            continue
        assert words[0] in ("python", "torchrun"), line
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        program, argv, launcher, processes = words[place], words[place + 1 :], None, 1
        if "--nproc_per_node" in words[:place]:
            processes = int(words[words.index("--nproc_per_node") + 1])
        if program == "submitit_linprobe.py":
            launcher, argv = cli.launcher.get_args_parser().parse_known_args(argv)
            program, processes = f"{launcher.main}.py", launcher.ngpus
            argv = ["--output_dir", str(launcher.job_dir), *argv]
        assert (ROOT / program).is_file(), line
        yield program, argv, launcher, processes


def parsed(program, argv):
    """The arguments, as the real parser of the program reads them and checks that they go together."""
    argv = [
        str(Path(__file__)) if before == "--boxes" else word for before, word in zip(["", *argv], argv, strict=False)
    ]
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    if not program.startswith("main_"):
        return module.get_args_parser().parse_args(argv)
    args = parse(module.get_args_parser(), argv)
    for check in ("settle", "check"):
        if hasattr(module, check):
            getattr(module, check)(args)
    return args


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What reproduce_all.sh would run, in each mode: {mode: [(program, arguments, launcher, processes)]}."""
    found = {}
    for mode, words in MODES.items():
        folder = tmp_path_factory.mktemp(mode)
        done = call("reproduce_all", *words, tmp_path=folder, **({} if mode == "smoke" else FOLDERS))
        assert done.returncode == 0, done.stderr
        assert not any((folder / name).exists() for name in ("out", "results"))
        found[mode] = [(program, parsed(program, argv), launcher, processes)
                       for program, argv, launcher, processes in commands(done.stdout)]  # fmt: skip
    return found


# of all scripts in the other modes: `everything`
@pytest.mark.parametrize(
    ("script", "mode"), [*((script, "local") for script in SCRIPTS), ("table1", "slurm"), ("table2", "smoke")]
)
def test_every_command_of_a_script_is_shown_and_understood_with_the_paths_of_the_runs_before_it(script, mode, tmp_path):
    done = call(script, *MODES[mode], tmp_path=tmp_path, **({} if mode == "smoke" else FOLDERS))
    assert done.returncode == 0 and not any((tmp_path / name).exists() for name in ("out", "results")), done.stderr
    found = [(program, parsed(program, argv)) for program, argv, *_ in commands(done.stdout)]
    runs = {str(args.output_dir): args for program, args in found if program.startswith("main_")}
    analysed = [f"{folder}/{args.label[0]}" for folder, args in runs.items() if "/attention/" in folder]
    others = [folder for folder in runs if "/attention/" not in folder]
    if script.startswith("table") or script == "figure1":
        name = {"figure1": "fig1"}.get(script, script.removeprefix("table"))
        record, tables = (dict(found)[f"scripts/{program}.py"] for program in ("record", "make_tables"))
        assert sorted(map(str, record.runs)) == sorted([*others, *analysed])
        assert str(record.results) == str(tables.results) == str(tmp_path / "results") and tables.table == [name]
        assert tables.dataset == ("demo" if mode == "smoke" else "imagenet1k")
    if script in ("figure3_6", "figure10_13"):
        drawn = dict(found)["scripts/plot_attention.py"].results
        assert list(map(str, drawn)) == [f"{folder}/attention.json" for folder in analysed]
    copied = [shlex.split(line)[-2:] for line in done.stdout.splitlines() if line.startswith("cp ")]
    assert len(copied) == (script in ("figure7", "figure8", "figure9"))
    assert all(source.rpartition("/")[0] in others and "/out/figures/" in target for source, target in copied)


def test_printed_records_are_those_of_all_scripts(everything):
    """Of reproduce_all.sh, whose scripts leave records and the report to it."""
    for mode in MODES:
        by_program = {program: args for program, args, *_ in everything[mode]}
        runs = {str(args.output_dir) for program, args, *_ in everything[mode] if program.startswith("main_")}
        of_records = {str(run) for run in by_program["scripts/record.py"].runs}
        assert {run if "/attention/" not in run else run.rpartition("/")[0] for run in of_records} == runs
        assert set(by_program["scripts/make_report.py"].runs) == runs


def probes(everything, mode):
    return [(args, processes) for program, args, _, processes in everything[mode] if program == "main_linprobe.py"]


@pytest.mark.parametrize("mode", ["local", "slurm"])
def test_probes_are_trained_at_the_papers_protocol(everything, mode):
    for args, processes in probes(everything, mode):
        small = args.dataset in ("imagenet1pct", "cub200", "stanford_cars", "oxford_pets")
        attended = args.cls_features == ["abmilp:sa=both"]
        assert processes * args.batch_size * args.accum_iter == (1024 if small else 16_384)
        assert args.bn_group == (1024 if small else 2048)
        assert args.optimizer == (["sgd"] if small or attended else ["lars"])
        assert args.epochs == (50 if re.search("large|huge", args.model) else 90) and args.warmup_epochs == 10
        assert (args.blr, args.lr, args.seeds) == ([0.1], None, [0, 1, 2])
        assert args.final_norm == args.finetune.startswith("capi_")  # as its public model returns them
        assert args.crop == "mae" and args.momentum is None and not args.allow_subset and args.input_size is None


@pytest.mark.parametrize("mode", ["local", "slurm"])
def test_one_bank_serves_all_tables(everything, mode):
    banks = [args for args, _ in probes(everything, mode) if args.dataset == "imagenet1k"]
    heads = {}
    for args in banks:
        if "deep" not in args.output_dir:
            heads.setdefault(args.finetune.split("/")[-2] if "/" in args.finetune else args.finetune, args.cls_features)
    base = heads["mae_vit_base_patch16"]
    assert {"cls", "pos", "abmilp", "ap1", "ap12", "attn-mn", "attn-lcte", "ca1", "dino"} < set(base) and len(
        base
    ) == 18
    assert heads["capi_vit_large_patch14"] == ["pos", "abmilp", "ap1", "ap12"]
    assert heads["dino_vit_base_patch16"] == ["cls", "pos", "abmilp"] and len(heads) == 12


@pytest.mark.parametrize("mode", MODES)
def test_every_table_and_figure_is_made(everything, mode):
    assert [args.table for program, args, *_ in everything[mode] if program.endswith("make_tables.py")] == [
        ["1", "2", "3", "5", "6", "7", "8", "fig1"]
    ]
    programs = [program for program, *_ in everything[mode]]
    assert programs.count("scripts/plot_attention.py") == 2 and programs.count("scripts/plot_bars.py") == 1
    assert {"main_analyze_attention.py", "main_analyze_aggregation.py"} <= set(programs)


def test_the_demo_has_a_data_set_of_its_own(everything):
    for program, args, *_ in everything["smoke"]:
        if program.startswith("main_"):
            assert args.dataset in ("demo", "demo_few")
        elif program.endswith(("make_tables.py", "plot_bars.py")):
            assert args.dataset == "demo"


def test_slurm_flags_are_the_launchers(everything):
    jobs = [(launcher, args) for program, args, launcher, _ in everything["slurm"] if program.startswith("main_")]
    assert jobs and all(launcher and launcher.partition == "gpu" and launcher.wait for launcher, _ in jobs)
    assert not any(launcher for _, _, launcher, _ in everything["local"])


@pytest.mark.parametrize("script", [*SCRIPTS, "reproduce_all"])
def test_scripts_state_what_they_take_and_what_to_expect(script):
    head = (ROOT / "scripts" / f"{script}.sh").read_text().split("source ")[0]
    for word in ("odel", "ata", "xpected", "GPU-hours", "--smoke | --slurm FLAG..."):
        assert word in head, word


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--fast"], {}, "usage: bash scripts/table3.sh [--smoke | --slurm FLAG...]"),
        (["--smoke", "--fast"], {}, "usage:"),
        ([], {}, "name the folder of ImageNet-1k in IMAGENET"),
        ([], {"IMAGENET": "x", "GPUS": "3"}, "3 GPUs do not share"),
        ([], {"IMAGENET": "x", "BATCH": "100"}, "BATCH=100: 2,048 images are normalised together"),
    ],
)
def test_mistakes_are_said_before_anything_runs(words, settings, message, tmp_path):
    done = call("table3", *words, tmp_path=tmp_path, **settings)
    assert done.returncode != 0 and message in done.stderr and done.stdout == ""


def test_what_is_there_is_not_made_again(tmp_path):
    folder = tmp_path / "out" / "attention" / "mae_vit_base_patch16" / "MAE"
    folder.mkdir(parents=True)
    (folder / "attention.json").write_text("{}")
    text = call("table3", tmp_path=tmp_path, IMAGENET="x").stdout
    assert "mae_vit_base_patch16 --resume" not in text and "simmim_vit_base_patch16 --resume" in text


def test_smaller_batches_and_banks_are_the_same_protocol(tmp_path):
    text = call("table5", tmp_path=tmp_path, IMAGENET="x", GPUS="1", BATCH="256", DEEP="apart").stdout
    runs = [parsed(program, argv) for program, argv, *_ in commands(text) if program == "main_linprobe.py"]
    assert {(args.batch_size, args.accum_iter, args.bn_group) for args in runs} == {(256, 64, 2048)}
    heads = [head for args in runs for head in args.cls_features]
    assert len(runs) == 5 and len(heads) == len(set(heads)) == 19


@pytest.mark.parametrize("deep", ["", "apart"])
@pytest.mark.parametrize(("heads", "runs"), [("cls abmilp:depth=4", ["sa"]), ("cls", ["relu", "gelu", "tanh", "sa"])])
def test_deep_heads_are_trained_once_whatever_the_bank_was_asked_for(tmp_path, deep, heads, runs):
    folder = tmp_path / "probes" / "mae_vit_base_patch16"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(heads)
    done = functions(tmp_path, f"""
        DEEP={deep}
        program() {{ echo "${{1##*-}}"; }}
        deepen mae_vit_base_patch16""")  # fmt: skip
    assert done.stdout.splitlines() == runs, done.stderr


def test_encoders_that_nobody_published_are_left_out_and_named(tmp_path):
    """And one that fails does not stop the others."""
    done = functions(tmp_path, """
        attend() { echo "now $1"; [ "$1" != mae_vit_base_patch16 ]; }
        each attend mae_vit_base_patch16 mae_ft_vit_base_patch16 dino_vit_base_patch16
        finish""")  # fmt: skip
    assert done.stdout.splitlines() == ["now mae_vit_base_patch16", "now dino_vit_base_patch16"]
    assert "left out: mae_ft_vit_base_patch16, which is unpublished" in done.stderr
    assert "failed: attend mae_vit_base_patch16" in done.stderr and done.returncode == 1


@pytest.mark.parametrize(
    "call",
    [
        "attend mae_vit_small_patch16",
        *(f"{name} mae_vit_demo_patch8/decoder" for name in ("attend_all", "deep_probes")),
    ],
)
def test_a_path_of_own_encoders_is_one_word(call, tmp_path):
    done = functions(tmp_path, f"""
        own="mine  $(pwd) *" out=$own PRINT=1 batch=1
        program() {{ printf '%s\\n' "$@"; }}
        {call}""")  # fmt: skip
    folder = "mae_decoder" if "decoder" in call else "mae_small"
    assert f"mine  {ROOT} */{folder}/encoder.safetensors" in done.stdout.splitlines(), done.stderr


def test_through_slurm_encoders_go_at_a_time_and_all_are_waited_for(tmp_path):
    done = functions(tmp_path, """
        attend() { sleep 1; echo "now $1"; [ "$1" != ibot_vit_base_patch16 ]; }
        each attend {mae,dino,ibot,mocov3}_vit_base_patch16
        finish""", "--slurm")  # fmt: skip
    assert len(done.stdout.splitlines()) == 4 and done.returncode == 1
    assert done.stderr.splitlines() == ["failed: attend ibot_vit_base_patch16"]


def functions(folder, body, *words):
    """A script of these lines, with the functions of paper.sh."""
    command, settings = script_of(folder, body, *words)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)


def script_of(folder, body, *words):
    text = f'set -- {" ".join(words)}\nsource scripts/paper.sh "$@"\n{body}'
    settings = {"IMAGENET": str(folder), "OWN": str(folder), "OUT": str(folder), "GPUS": "1", "PRINT": ""}
    return ["bash", "-c", text, "scripts/some.sh"], settings


def test_records_and_figures_that_fail_are_said_at_the_end_and_the_rest_is_made(tmp_path):
    (tmp_path / "probes" / "mae").mkdir(parents=True)
    (tmp_path / "probes" / "mae" / "results.json").write_text("{}")
    done = functions(tmp_path, """
        python() { echo "now $1"; case "$1" in *record* | *plot_bars*) return 2 ;; esac; }
        tables 1 7
        bars
        report
        finish""")  # fmt: skip
    programs = ("record", "make_tables", "plot_bars", "make_report")
    assert done.stdout.splitlines() == [f"now scripts/{name}.py" for name in programs]
    assert done.stderr.splitlines() == ["failed: records: tables show older ones", "failed: figure1.pdf"]
    assert done.returncode == 1


def test_interruption_ends_the_script_and_not_only_the_program_that_runs(tmp_path):
    """The programs answer Ctrl-C with a checkpoint and an exit code of their own, after which bash would go on."""
    command, settings = script_of(tmp_path, """
        attend() { bash -c 'trap "exit 85" INT; echo "now $0"; while :; do sleep 0.1; done' "$1"; }
        each attend mae_vit_base_patch16 dino_vit_base_patch16
        finish""")  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, start_new_session=True, **pipes,
        # a shell does not trap what was ignored when it began, as in what "&" has put into the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        first = script.stdout.readline()
        os.killpg(script.pid, signal.SIGINT)
        rest, told = script.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    assert first == "now mae_vit_base_patch16\n" and rest == ""
    assert told == "interrupted: the same command goes on from here\n" and script.returncode == 130


def test_images_of_the_oracle_are_counted_too(tmp_path):
    text = call("table1", tmp_path=tmp_path, IMAGENET="x").stdout
    told = dict(re.findall(r"# \S+/probes/(\S+): (\d+) images", text))
    assert told["mae_vit_base_patch16"] == "700830180" and told["dino_vit_base_patch16"] == "350415090"
    assert told["capi_vit_large_patch14"] == "194675050"


def test_transfer_to_one_percent_of_imagenet_is_left_out_without_its_list(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in {*FOLDERS, "PRINT"}}
    environment |= {"IMAGENET": str(tmp_path), "GPUS": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", "scripts/table2.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"left out: imagenet1pct; {tmp_path}/1percent.txt is not there (SimCLR's list)" in done.stderr
    assert "failed: tables 2: no finished runs" in done.stderr and done.returncode == 1


def test_hours_are_printed_only_for_known_speeds(tmp_path):
    speed = {"IMAGENET": "x", "IMAGES_PER_SECOND": "1000"}
    assert (
        "50000 images through the encoder; hours are unknown" in call("table3", tmp_path=tmp_path, IMAGENET="x").stdout
    )
    assert ": 97.3 GPU-hours, 24.3 h on 4 GPUs" in call("table1", tmp_path=tmp_path, **speed).stdout
