"""The cost of training, against the arithmetic done by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.estimate import estimate, flops_per_token, tokens
from models.settings import RunSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("recipe", "trained", "operations"),
    [
        # 8 layers of width 192 at length 1024; the table is tied, so it multiplies
        ("13m", 4100 * 64 * 1023, 6 * 13_200_576 + 12 * 8 * 192 * 1024),
        ("2b", 78_400 * 256 * 2047, 6 * 2_055_682_560 + 12 * 28 * 2560 * 2048),
        # one layer of width 128, untied: its input table (50304 x 128) and positions (128 x 128) are looked up
        ("13m-gpt", None, 6 * (13_142_656 - 50_304 * 128 - 128 * 128) + 12 * 1 * 128 * 128),
    ],
)
def test_arithmetic(recipe: str, trained: int | None, operations: int) -> None:
    settings = RunSettings.read(recipe)
    assert flops_per_token(settings) == operations
    assert trained is None or tokens(settings) == trained


def test_hours_of_the_2b() -> None:
    # 41.1e9 tokens x 14.1e9 operations / (989e12 x 0.4) / 3600
    assert "H100 406." in estimate(RunSettings.read("2b"))


def test_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models", "estimate", "13m"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == estimate(RunSettings.read("13m")) + "\n"
