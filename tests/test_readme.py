"""What README says can be typed, and what it points to is there."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cli.console
import cli.launcher
from attention.metrics import METRICS
from cli.console import parse
from cli.launcher import PROGRAMS, parser_module
from encoders.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md", ROOT / "REPRODUCTION.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
README = PAGES[0].read_text()


PARSERS = {program: parser_module(program).get_args_parser for program in PROGRAMS}
PARSERS["submitit_linprobe"] = cli.launcher.get_args_parser


def commands(text: str) -> list[str]:
    return command_lines("\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)))


def inline(text: str) -> list[str]:
    """Commands among the words of a page; RUN and the like stand for names."""
    return [" ".join(words.split()) for words in re.findall(r"`((?:python|bash) (?:scripts|tests)/[^`]+)`", text)]


def shell_script(name: str, *words: str, **settings: str) -> list[str]:
    """The commands that a script would run, sorted: some run beside each other and report in any order."""
    # One write a line: two commands at once would mix their words.
    stubs = """
        python() { if [ "$1" = -c ]; then echo 1; else local line; line=$(printf '%q ' python "$@"); echo "$line"; fi; }
        rm() { :; }; mkdir() { :; }; cp() { :; }; mv() { :; }
        export -f python rm mkdir cp mv
        bash "$@" """
    done = subprocess.run(["bash", "-c", stubs, "bash", f"scripts/{name}.sh", *words], cwd=ROOT, capture_output=True,
                          text=True, check=True, env=os.environ | settings)  # fmt: skip
    lines = done.stdout.splitlines()
    assert all(line.count("python ") <= 1 for line in lines), lines
    return sorted(line for line in lines if line.startswith("python "))


def command_lines(text: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def examples(program: str) -> list[str]:
    """The commands at the end of a program's help."""
    return command_lines(PARSERS[program]().epilog.removeprefix("examples:\n"))


@pytest.mark.parametrize("program", PARSERS)
def test_help_ends_with_examples_and_says_something_of_every_flag_in_a_titled_group(program):
    parser = PARSERS[program]()
    assert 2 <= len(examples(program)) <= 4 and all(f"{program}.py" in command for command in examples(program))
    told = [action for group in parser._action_groups[2:] for action in group._group_actions]
    assert {action.dest for action in parser._actions} == {"help"} | {action.dest for action in told}
    assert not [action.dest for action in told if not action.help]
    assert "accepted for old commands" in [group.title for group in parser._action_groups[-1:]] or program in (
        "main_pretrain", "main_analyze_attention", "main_analyze_aggregation",
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        *(command for page in PAGES for command in commands(page.read_text())),
        *sorted({command for page in PAGES for command in inline(page.read_text())}),
        *(command for program in PARSERS for command in examples(program)),
        *(command for words in ([], ["--short"], ["--real"]) for command in shell_script("quickstart", *words)),
        *shell_script("real_encoder", "--finetune", "a.pth", DATA="d", OUT="o", LABEL="l", SIZE="224", TINY_SIZE="112"),
    ],
)
def test_command_is_understood(command, tmp_path, monkeypatch):
    (tmp_path / "args.json").write_text('{"args": {"data_path": "images"}}')
    words = shlex.split(re.sub(r"--args_from \S+", f"--args_from {tmp_path}/args.json", command))
    if words[0] in ("pip", "jupyter"):
        return
    program = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / program).is_file()
    argv = words[words.index(program) + 1 :]
    if program == "submitit_linprobe.py":
        launcher, argv = cli.launcher.get_args_parser().parse_known_args(argv)
        program = f"{launcher.main}.py"
    if program.startswith("main_"):
        parse(importlib.import_module(program.removesuffix(".py")).get_args_parser(), argv)
    elif program.startswith("scripts/") and program.endswith(".py"):
        parsed = []  # by the script itself, which then does nothing
        monkeypatch.syspath_prepend(ROOT / "scripts")
        monkeypatch.setattr(cli.console, "run_main", lambda main, args: parsed.append(args))
        monkeypatch.setattr(sys, "argv", [program, *argv])
        runpy.run_path(str(ROOT / program), run_name="__main__")
        assert len(parsed) == 1


ALTERNATIVES = re.findall(r"`((?:main_\w+\.py )?--[^`]+)`", (ROOT / "REPRODUCTION.md").read_text())


@pytest.mark.parametrize("words", sorted(set(ALTERNATIVES)))
def test_flags_of_the_page_on_reproduction_exist_and_take_what_it_says(words):
    """Of main_linprobe.py where no program is named; a flag alone may be one that takes a value."""
    program, *argv = words.split() if words.startswith("main_") else ["main_linprobe.py", *words.split()]
    if not (ROOT / program).exists():
        pytest.skip(f"{program} is not there yet")
    main = importlib.import_module(program.removesuffix(".py"))
    parser = main.get_args_parser()
    if len(argv) == 1:
        assert argv[0] in parser._option_string_actions
        return
    args = parse(parser, [*argv, "--data_path", "images"])
    if program == "main_linprobe.py":
        main.check(args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_code_map_names_every_folder_and_program():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"scripts", "tests"}
    assert not [folder for folder in folders if f"[{folder}/]({folder})" not in README]
    patterns = re.findall(r"`([\w*]+\.py)`", README.partition("## Code map")[2].partition("To add")[0])
    known = {path.name for pattern in patterns for path in ROOT.glob(pattern)}
    assert not {path.name for path in ROOT.glob("*.py")} - known


@pytest.mark.parametrize(("words", "table"), [("measurements", METRICS), ("published files", CATALOGUE)])
def test_numbers_of_entries_are_those_of_the_tables(words, table):
    (told,) = re.findall(rf"(\d+) {words}", README)
    if int(told) != len(table):
        pytest.fail(f"README.md says {told} {words}, and there are {len(table)}: say so", pytrace=False)
