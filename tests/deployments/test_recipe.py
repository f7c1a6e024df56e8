"""Recipes: each one loads, says what it is, survives being written down, and refuses what it does not know."""

from pathlib import Path

import pytest

from corpora.errors import InputError
from corpora.settings import DataSettings
from deployments import recipe
from models.settings import RunSettings


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_whole(name: str, tmp_path: Path) -> None:
    loaded = recipe.load(name)
    assert loaded.description.endswith(".")
    written = tmp_path / "recipe.toml"
    written.write_text(loaded.toml())
    assert recipe.load(written) == loaded
    assert DataSettings.read(written).blocks == loaded.blocks
    assert RunSettings.read(written).model == loaded.model


def test_the_named_runs_are_there() -> None:
    assert recipe.names() == ["13m", "13m-gpt", "13m-sp", "2b", "2b-gpt", "demo", "llama-250m", "tiny"]


def test_every_setting_is_explained() -> None:
    for table, field in recipe.Recipe.model_fields.items():
        for key, setting in getattr(field.annotation, "model_fields", {}).items():
            assert setting.description, f"[{table}] {key} has no description"


def test_overrides_change_single_keys() -> None:
    changed = recipe.load(
        "demo", {"train.steps": 7, "corpus.train": ["train/00"], "blocks.format": "parquet"}
    )
    assert (changed.train.steps, changed.corpus.train, changed.blocks.format) == (7, ("train/00",), "parquet")
    assert changed.train.lr == recipe.load("demo").train.lr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.stepz": 1}, r"demo\.toml: \[train\] stepz: unknown key \(known: .*steps"),
        ({"modle.layers": 1}, r"demo\.toml: modle: unknown key \(known: .*model"),
        ({"train": 3}, r"demo\.toml: train: "),
        ({"description.x": 3}, "'description' is not a table"),
        ({"train.steps": 0, "train.batch": 0}, r"steps: .*\(got 0\); \[train\] batch: .*\(got 0\)"),
        ({"model.heads": 3}, "width 128 is not a multiple of heads 3"),
        ({"blocks.length": 999}, "blocks.length 999 is more than model.context"),
        ({"model.vocab": 50256}, "tokenizer.bos 50256 is outside model.vocab 50256"),
        ({"model.head_bias": True}, "head_bias needs tie = false"),
        ({"train.lr": float("nan")}, r"\[train\] lr"),
    ],
)
def test_faults_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recipe.load("demo", overrides)
    assert "\n" not in str(caught.value)


def test_lock_that_is_changed_lies_beside_the_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe.recipe_path("demo").read_text("utf-8"), "utf-8")
    assert recipe.load(path, {"corpus.lock": "own.lock.json"}).corpus.lock == tmp_path / "own.lock.json"
