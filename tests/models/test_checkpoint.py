"""Checkpoints are whole or absent, and a damaged one is never used."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora.errors import InputError
from models import checkpoint, runs
from models.checkpoint import OPTIMIZER, STATE, WEIGHTS, Scores, State

CPU = torch.device("cpu")


def state(step: int) -> State:
    scores = Scores(val_loss=2.5, val_bpb=1.1)
    return State(
        step=step,
        tokens=step * 10,
        settings={"model": {"layers": 2}},
        data="d",
        tokenizer="t",
        parameters=6,
        made_on="here",
        untrained=scores,
        scores=scores,
        scored_step=step,
    )


def save(run: Path, step: int, keep: int = 3) -> Path:
    weights = {"w": torch.full((2, 3), float(step))}
    return checkpoint.save(run, state(step), weights, {"w:exp_avg": torch.ones(3).t()}, keep)


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-0000007"
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, OPTIMIZER, STATE}
    read = checkpoint.read_state(folder)
    assert read.model_copy(update={"files": {}}) == state(7)
    assert torch.equal(checkpoint.load(folder, WEIGHTS, CPU)["w"], torch.full((2, 3), 7.0))
    assert checkpoint.newest_sound(tmp_path) == runs.latest_checkpoint(tmp_path) == folder


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [4, 30]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "missing"])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_damaged_checkpoint_is_stepped_over(
    name: str, damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_sound(tmp_path) == before
    if (name, damage) != (STATE, Path.unlink):  # without its state a folder is no checkpoint
        assert "stepping back" in caplog.text and name in caplog.text and "step-0000002" in caplog.text


def test_a_changed_number_in_the_state_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    fields = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**fields, "step": 2}))
    with pytest.raises(InputError, match=r"every checkpoint is damaged; remove the folder"):
        checkpoint.newest_sound(tmp_path)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.newest_sound(tmp_path) is None
    assert runs.latest_checkpoint(tmp_path) is None


def test_left_overs_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-0000009.tmp"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    assert checkpoint.newest_sound(tmp_path) is None
    save(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_a_step_is_written_again_over_itself(tmp_path: Path) -> None:
    flip(save(tmp_path, 1) / WEIGHTS)
    folder = save(tmp_path, 1)
    assert checkpoint.newest_sound(tmp_path) == folder


def test_nothing_is_unpickled() -> None:
    for source in Path(checkpoint.__file__).parent.glob("*.py"):
        text = source.read_text("utf-8")
        assert "pickle" not in text.replace("unpickled", "") and "torch.load(" not in text, source
