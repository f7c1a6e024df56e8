"""Run folders, and the command line over them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corpora.errors import InputError
from deployments import recipe
from models import __main__ as cli
from models import runs

Make = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_named_after_recipe_and_inputs(tmp_path: Path) -> None:
    folder = runs.create("demo", "a = 1\n", "inputs", tmp_path)
    assert folder == runs.run_folder("demo", "a = 1\n", "inputs", tmp_path)
    assert folder.parent == tmp_path and len(folder.name) == len("demo-") + 8
    assert (folder / "recipe.toml").read_text() == "a = 1\n"
    written = (folder / "recipe.toml").stat().st_mtime_ns
    assert runs.create("demo", "a = 1\n", "inputs", tmp_path) == folder
    assert (folder / "recipe.toml").stat().st_mtime_ns == written
    assert runs.run_folder("demo", "a = 2\n", "inputs", tmp_path) != folder
    assert runs.run_folder("demo", "a = 1\n", "other", tmp_path) != folder


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipes_text_is_the_one_that_the_flow_writes(name: str) -> None:
    loaded = recipe.load(name)
    assert runs.recipe_text(loaded.model_copy(), loaded.description).count("[train]") == 1
    settings = runs.RunSettings.model_validate(loaded.model_dump(exclude={"description"}))
    assert runs.recipe_text(settings, loaded.description) == loaded.toml()


def test_the_newest_run_of_each_recipe(tmp_path: Path) -> None:
    def checkpointed(name: str, text: str, step: int, at: int) -> Path:
        folder = runs.create(name, text, "", tmp_path)
        state = folder / "checkpoints" / f"step-{step:07d}" / "state.json"
        state.parent.mkdir(parents=True)
        state.touch()
        os.utime(state, (at, at))
        return folder

    checkpointed("13m", "old", step=500, at=100)
    new = checkpointed("13m", "new", step=7, at=200)
    gpt = checkpointed("13m-gpt", "x", step=7, at=50)
    runs.create("2b", "no checkpoint", "", tmp_path)
    (tmp_path / "stray-folder" / "checkpoints").mkdir(parents=True)
    assert runs.newest(tmp_path) == {"13m": new, "13m-gpt": gpt}
    assert runs.newest(tmp_path / "nowhere") == {}


def test_a_checkpoint_counts_when_it_is_complete(tmp_path: Path) -> None:
    for name in ("step-0000002", ".step-0000009.tmp", "step-0000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert runs.latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step-0000002" / "state.json").touch()
    (tmp_path / "checkpoints" / ".step-0000009.tmp" / "state.json").touch()
    assert runs.latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-0000002"


def test_steps_are_ordered_as_numbers_and_only_true_names_count(tmp_path: Path) -> None:
    names = ("step-0000002", "step-10000000", "step-9999999", ".step-0000004.old", ".step-0000002.old")
    others = (
        "step-1",
        "step-00000003",
        "step-000000\u0661",
        "step-0000005.old",
        ".step-0000006",
        "xstep-0000007",
    )
    for name in (*names, *others):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").touch()
    found = [(step, folder.name) for step, folder in runs.checkpoints(tmp_path)]
    assert found == [
        (2, "step-0000002"),
        (4, ".step-0000004.old"),
        (9_999_999, "step-9999999"),
        (10_000_000, "step-10000000"),
    ]
    assert [runs.step_of(tmp_path / name) for name in (*names, *others)] == [
        *(2, 10_000_000, 9_999_999, 4, 2),
        *(None for _ in others),
    ]
    (tmp_path / "checkpoints" / "step-0000002" / "state.json").unlink()
    assert runs.checkpoints(tmp_path)[0] == (2, tmp_path / "checkpoints" / ".step-0000002.old")


def test_a_checkpoint_that_is_removed_meanwhile_was_followed_by_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("one", "two"):
        state = runs.create("13m", text, "", tmp_path) / "checkpoints" / "step-0000001" / "state.json"
        state.parent.mkdir(parents=True)
        state.touch()
    busy = runs.run_folder("13m", "one", "", tmp_path)
    latest = runs.latest_checkpoint

    def then_removed(run: Path) -> Path | None:
        folder = latest(run)
        if folder is not None and run == busy:
            (folder / "state.json").unlink()
        return folder

    monkeypatch.setattr(runs, "latest_checkpoint", then_removed)
    assert runs.newest(tmp_path) == {"13m": busy}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["models", *map(str, arguments)])
    return cli.main()


def test_the_steps_by_hand(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file = tmp_path / "by-hand.toml"
    recipe_file.write_bytes(
        (make_run(train={"steps": 150, "lr": 0.02, "eval_every": 50}) / "recipe.toml").read_bytes()
    )

    assert command(monkeypatch, "new", recipe_file) == 0
    run = Path(capsys.readouterr().out.strip())
    assert run.parent == tmp_path and run.name.startswith("by-hand-")

    assert command(monkeypatch, "train", run, "--device", "cpu") == 0
    assert "done: step 150, " in capsys.readouterr().out
    assert command(monkeypatch, "train", run, "--events") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["event"], result["step"], result["skipped"]) == ("result", 150, True)

    assert command(monkeypatch, "evaluate", run, "--events") == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["event"] == "result" and scores["step"] == 150
    assert command(monkeypatch, "evaluate", run) == 0
    assert f"{scores['bits_per_byte']:.4f}" in capsys.readouterr().out

    assert command(monkeypatch, "smoke", run, "--events") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["event"] == "result" and len(told["samples"]) == 4
    assert command(monkeypatch, "smoke", run) == 0
    assert "passed: every sample has text" in capsys.readouterr().out

    assert command(monkeypatch, "generate", run, "The cat", "--greedy", "--max-new-tokens", "5") == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("The cat") and len(greedy) > len("The cat\n")
    texts = []
    for seed in ("1", "1", "2"):
        command(monkeypatch, "generate", run, "The cat", "--seed", seed, "--temperature", "2", "--top-p", "1")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "for no randomness use --greedy"),
        (["--temperature", "nan"], "is not a number above 0"),
        (["--top-p", "1.5"], "is not above 0 and at most 1"),
        (["--max-new-tokens", "0"], "is not at least 1"),
    ],
)
def test_senseless_sampling_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, "generate", "run", "x", *arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"recipe 'nonsense' is unknown; known: 13m"):
        command(monkeypatch, "new", "nonsense")


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models", "train", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path} is not a run folder (no recipe.toml in it); make one: python -m models new RECIPE\n"
    )


def test_every_step_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("new", "train", "evaluate", "smoke", "generate"):
        with pytest.raises(SystemExit) as left:
            command(monkeypatch, step, "--help")
        assert left.value.code == 0
        assert f"python -m models {step}" in capsys.readouterr().out
