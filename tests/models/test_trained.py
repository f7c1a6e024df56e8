"""Which checkpoint of a run is opened, and what is refused before anything is done with it."""

import io
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora import tokenizer
from corpora.errors import InputError
from corpora.files import data_root, sha256_file
from models import checkpoint, runs, trained
from models.checkpoint import OPTIMIZER, WEIGHTS, Scores, State
from models.decoder import Decoder
from models.trained import open_run

Make = Callable[..., Path]
CPU = torch.device("cpu")


def save(run: Path, step: int, bpb: float = 1.5, keep: int = 9, **changes: Any) -> Path:
    """Write a checkpoint of the run's recipe; its final norm is the step, so that it can be told apart."""
    settings = runs.read_settings(run)
    decoder = Decoder(settings.model)
    decoder.init_weights(1)
    with torch.no_grad():
        decoder.norm.weight.fill_(step)
    scores = Scores(val_loss=2.5, val_bpb=bpb)
    fields = {
        "step": step,
        "tokens": step * 10,
        "settings": checkpoint.decisive(settings),
        "data": "d",
        "order": "o",
        "tokenizer": tokenizer.for_recipe(settings, data_root()).fingerprint,
        "parameters": 6,
        "made_on": "here",
        "untrained": scores,
        "scores": scores,
        "scored_step": step,
    }
    weights = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    return checkpoint.save(run, State(**{**fields, **changes}), weights, {}, keep)


def change(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Write a checkpoint again with other weights or another state, hashes and all."""
    state = checkpoint.read_state(folder).model_copy(update=changes)
    held = weights if weights is not None else checkpoint.load(folder, WEIGHTS, CPU)
    checkpoint.save(folder.parents[1], state, {**held}, {}, keep=9)


def refused(run: Path, message: str, **which: Any) -> None:
    with pytest.raises(InputError, match=message) as told:
        open_run(run, "cpu", **which)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("which", "ended", "opened"),
    [
        *((None, None, 4), (None, "early", 2), ("newest", None, 4), ("newest", "early", 4)),
        *(("best", None, 2), ("best", "early", 2), (3, None, 3), (4, "early", 4)),
    ],
)
def test_which_checkpoint_is_opened(which: Any, ended: Any, opened: int, make_run: Make) -> None:
    run = make_run()
    for step, bpb in {2: 1.1, 3: 1.3, 4: 1.2}.items():
        save(run, step, bpb, ended=ended if step == 4 else None)
    found = open_run(run, "cpu", which)
    assert found.checkpoint == checkpoint.folder_of(run, opened) and found.state.step == opened
    assert found.decoder.norm.weight.tolist() == [opened] * 16
    assert not found.decoder.training and found.settings.model == runs.read_settings(run).model
    assert trained.choose(run, which) == found.checkpoint


def test_a_step_that_is_not_there(make_run: Make) -> None:
    run = make_run()
    refused(run, rf"{run} has no checkpoint of step 7; it has none$", which=7)
    save(run, 3)
    save(run, 12)
    refused(run, r"has no checkpoint of step 7; it has 3, 12$", which=7)
    refused(run, r"checkpoint 'latest' is unknown; say newest, best or the number of a step", which="latest")


def test_a_damaged_step_is_not_replaced_by_another(make_run: Make) -> None:
    run = make_run()
    save(run, 3)
    (save(run, 4) / WEIGHTS).write_bytes(b"")
    refused(run, r"step-0000004: model.safetensors is not as .*; take another of its steps: 3, 4", which=4)
    assert open_run(run, "cpu").state.step == 3


def test_no_checkpoint_of_its_own_score(make_run: Make) -> None:
    run = make_run()
    save(run, 3, scored_step=0)
    save(run, 4, scored_step=2, ended="early")
    refused(run, r"no checkpoint was scored on held-out text at its own step; use the newest", which="best")
    assert open_run(run, "cpu").state.step == 4


def test_no_checkpoint_at_all(make_run: Make, tmp_path: Path) -> None:
    for which in (None, "newest", "best"):
        refused(make_run(), r"has no checkpoint yet; run: python -m models train", which=which)
    refused(tmp_path / "nowhere", r"is not a run folder .* python -m models new RECIPE")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad: float, make_run: Make) -> None:
    run = make_run()
    folder = save(run, 3)
    weights = checkpoint.load(folder, WEIGHTS, CPU)
    weights["embedding.weight"] = weights["embedding.weight"].clone()
    weights["embedding.weight"][7, 3] = bad
    change(folder, weights)
    refused(run, r"step-0000003: the weight embedding.weight holds numbers that are not finite; train again")


def test_weights_of_another_network(make_run: Make) -> None:
    """The hashes are right and so is the recipe, so only the shapes can tell."""
    run = make_run()
    folder = save(run, 3)
    whole = checkpoint.load(folder, WEIGHTS, CPU)
    norm = whole["norm.weight"]
    for weights, message in (
        (
            {**whole, "norm.weight": norm[:8]},
            r"norm.weight is F32 \[8\] in the checkpoint, is F32 \[16\] in the",
        ),
        ({**whole, "norm.weight": norm.bfloat16()}, r"norm.weight is BF16 \[16\] in the checkpoint, is F32"),
        ({**whole, "norm.weight": norm.long()}, r"norm.weight is I64 \[16\] in the checkpoint, is F32"),
        (
            {**whole, "extra": norm.clone()},
            r"extra is F32 \[16\] in the checkpoint, is missing in the network",
        ),
        ({n: t for n, t in whole.items() if n != "norm.weight"}, r"norm.weight is missing in the checkpoint"),
    ):
        change(folder, weights)
        refused(run, message)


def test_another_recipe_and_another_tokenizer(make_run: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run()
    folder = save(run, 3)
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("layers = 2", "layers = 3"))
    refused(run, r"\(model.layers 2 in the checkpoint, 3 in the recipe\); make .* RECIPE$")
    (run / "recipe.toml").write_text(recipe.replace("lr = 0.01", "lr = 0.5"))
    with caplog.at_level(logging.WARNING):
        assert open_run(run, "cpu").state.step == 3  # how it was trained does not change what it computes
    assert "train.lr 0.01 in the checkpoint, 0.5 in the recipe" in caplog.text
    (run / "recipe.toml").write_text(recipe)
    change(folder, tokenizer="0" * 64)
    refused(run, r"was trained with another tokenizer \(fingerprint 00000000, the recipe's now has")


def test_a_checkpoint_that_a_trainer_removes_meanwhile(
    make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    first = save(run, 3)
    load = checkpoint.load

    def after_retention(folder: Path, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        if folder == first:
            shutil.rmtree(first)
            save(run, 4)
        return load(folder, name, device)

    monkeypatch.setattr(checkpoint, "load", after_retention)
    assert open_run(run, "cpu").state.step == 4


# --- a stranger's folder


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def bombs(marker: Path) -> list[bytes]:
    """Return a plain pickle and one in torch's own form, both of which run code when they are loaded."""
    in_torch = io.BytesIO()
    torch.save({"w": Bomb(marker)}, in_torch)
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()
    marker.unlink()
    torch.load(io.BytesIO(in_torch.getvalue()), weights_only=False)
    assert marker.exists()
    marker.unlink()
    return [pickle.dumps(Bomb(marker)), in_torch.getvalue()]


@pytest.mark.parametrize("form", [0, 1], ids=["pickle", "torch"])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "state.json", "recipe.toml", "tokenizer.model"])
def test_no_file_of_a_strangers_run_can_run_code(
    name: str, form: int, make_run: Make, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    run = make_run()
    folder = save(run, 3)
    file = (run if name in ("recipe.toml", "tokenizer.model") else folder) / name
    file.write_bytes(bombs(marker)[form])
    if name == OPTIMIZER:  # which is not for using a model
        assert open_run(run, "cpu").state.step == 3
        assert checkpoint.fault(folder) == f"{name} is not as it was written (its sha256 differs)"
    else:
        refused(run, r"not valid TOML|as it was written|tokenizer")
    assert not marker.exists()


@pytest.mark.parametrize("form", [0, 1], ids=["pickle", "torch"])
def test_nor_under_a_true_hash(form: int, make_run: Make, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    run = make_run()
    folder = save(run, 3)
    for name in (WEIGHTS, OPTIMIZER):
        (folder / name).write_bytes(bombs(marker)[form])
    files = {name: sha256_file(folder / name) for name in (WEIGHTS, OPTIMIZER)}
    sealed = checkpoint.read_state(folder).model_copy(update={"files": files}).sealed()
    (folder / "state.json").write_text(sealed, "utf-8")
    assert checkpoint.newest_sound(run) == folder  # by its hashes it is as it was written
    refused(run, r"model.safetensors: .*header.*; remove the folder, so that the checkpoint before it")
    for name in (WEIGHTS, OPTIMIZER):
        with pytest.raises(InputError, match=rf"{name}: .*header.*; remove") as told:
            checkpoint.load(folder, name, CPU)
        assert "\n" not in str(told.value)
        with pytest.raises(InputError, match=rf"{name}: .*header"), checkpoint.open_tensors(folder, name):
            pass
    assert not marker.exists()
