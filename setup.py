"""Build the folder as the package `beyond_cls`; pyproject.toml has its facts.

In the folder, modules import each other as `util.files` or `models_vit`. Installed like that they would collide with
other packages, so the wheel holds them below `beyond_cls`, with these imports rewritten.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("attention", "cli", "data_sets", "encoders", "probing", "runtime", "util")
# modules of the packages that are not taken whole
KEPT = {"beyond_cls": ("abmilp", "api", "models_mae", "models_vit"), "beyond_cls.cli": ("console", "encoder_arguments")}
OURS = re.compile(rf"(^\s*from |lazy\(\")((?:{'|'.join(ROOMS + KEPT['beyond_cls'])})\b)", re.MULTILINE)
INIT = '"""Frozen encoders and trained probes."""\n\nfrom beyond_cls.api import encoder, probe  # noqa: F401\n'


class Build(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package not in KEPT or module[1] in KEPT[package]]

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib, "beyond_cls")
        for path in package.rglob("*.py"):
            path.write_text(OURS.sub(r"\1beyond_cls.\2", path.read_text()))
        (package / "__init__.py").write_text(INIT)
        (package / "py.typed").touch()


setup(
    package_dir={"beyond_cls": "."},
    packages=["beyond_cls", *(f"beyond_cls.{room}" for room in ROOMS)],
    package_data={"": ["*.toml", "*.json"]},
    cmdclass={"build_py": Build},
)
