"""Before any work: the run folder, and the faults that can be known without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corpora.errors import InputError
from deployments import recipe
from tasks.begin import begin, check


def test_the_run_folder_holds_the_recipe_as_run(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILELINE_DATA", str(demo_corpus))
    monkeypatch.setenv("PILELINE_RUNS", str(tmp_path))
    settings = recipe.load("demo", {"train.steps": 7})
    run = begin.fn("demo", settings, settings.toml())
    assert run.parent == tmp_path
    assert recipe.load(run / "recipe.toml") == settings
    assert begin.fn("demo", settings, settings.toml()) == run
    other = recipe.load("demo", {"train.steps": 8})
    assert begin.fn("demo", other, other.toml()) != run


def test_a_vocabulary_that_does_not_fit_is_refused(
    demo_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILELINE_DATA", str(demo_corpus))
    monkeypatch.setenv("PILELINE_RUNS", str(tmp_path))
    settings = recipe.load("demo")
    small = settings.model_copy(update={"model": settings.model.model_copy(update={"vocab": 50256})})
    assert check.fn("demo", settings, settings.toml()) == []
    with pytest.raises(InputError, match=r"the tokenizer has 50257 ids, but model\.vocab is 50256"):
        check.fn("demo", small, small.toml())
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_before_anything_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILELINE_DATA", str(tmp_path))
    settings = recipe.load("2b")
    with pytest.raises(
        InputError, match=r"^recipe 2b: 41\.1B tokens .* on this CPU; use a machine with a GPU, or "
    ):
        check.fn("2b", settings, settings.toml(), "cpu")
    assert list(tmp_path.iterdir()) == []


def test_torch_stays_out_of_the_flow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, flows.pretrain; print('torch' in sys.modules)"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
