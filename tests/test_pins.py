"""What is installed is what the project's own files say."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
)


def test_every_dependency_has_an_exact_version() -> None:
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        if wanted.name == "torch":  # its build differs between machines: pinned in pyproject.toml itself
            assert str(wanted.specifier).startswith("==")
            continue
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def test_the_pins_are_installed() -> None:
    wrong = {}
    for name, version in PINS.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        if installed != version:
            wrong[name] = (installed, version)
    assert not wrong, "run `make test`, which brings .venv up to date"


def test_the_makefile_installs_the_torch_of_the_project() -> None:
    makefile = re.search(r"TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text("utf-8"))
    assert makefile and f"torch=={makefile[1]}" in PROJECT["dependencies"]
