"""The README's words: every file in its tree, every command, every deployment."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_the_tree_lists_every_file() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = {
        path
        for path in tracked
        if re.match(r"(flows|tasks|models|corpora|deployments|benchmarks)/[^/]+\.py$", path)
    }
    tree = TEXT.partition("## The tree")[2]
    listed = set()
    room = ""
    for line in tree.splitlines():
        if start := re.match(r"(\w+)/ ", line):
            room = start[1]
        if name := re.match(r"  (\w+\.py) ", line):
            listed.add(f"{room}/{name[1]}")
    assert listed == {path for path in files if not path.endswith("__init__.py")}


@pytest.mark.parametrize("module", ["corpora", "models"])
def test_every_step_of_the_command_lines_is_shown(module: str) -> None:
    usage = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = set(re.findall(r"^    ([a-z-]+)(?: |$)", usage.stdout, re.MULTILINE))
    assert steps
    assert steps == set(re.findall(rf"-m {module} ([a-z-]+)", TEXT))


def test_every_deployment_is_in_the_table() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
    names = {f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}" for entry in deployments}
    assert names == set(re.findall(r"^\| `((?:pretrain|evaluate)/\S+)` \|", TEXT, re.MULTILINE))


def test_every_make_target_is_there() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"make (demo|test|serve|check|bench)\b", TEXT)) <= targets
