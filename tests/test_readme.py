"""What README says can be typed, and what it points to is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import submitit_linprobe
from util.arguments import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def commands(text: str) -> list[str]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in blocks.splitlines() if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", [command for page in PAGES for command in commands(page.read_text())])
def test_command_is_understood(command):
    words = shlex.split(command)
    program = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / program).is_file()
    argv = words[words.index(program) + 1 :]
    if program == "submitit_linprobe.py":
        launcher, argv = submitit_linprobe.get_args_parser().parse_known_args(argv)
        program = f"{launcher.main}.py"
    if program.startswith("main_"):
        parse(importlib.import_module(program.removesuffix(".py")).get_args_parser(), argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_code_map_names_every_module():
    modules = [*ROOT.glob("*.py"), *(path for path in (ROOT / "util").glob("*.py") if path.name != "__init__.py")]
    missing = [str(path.relative_to(ROOT)) for path in modules if f"]({path.relative_to(ROOT)})" not in README]
    assert not missing
