"""Checkpoints: a folder of safetensors and JSON, whole or absent, with the sha256 of each file.

    checkpoints/step-0000100/model.safetensors       weights
                             optimizer.safetensors   moments, and the state of torch's random generators
                             state.json              step, tokens, scores, what it belongs to, hashes; written last

The folder is written under another name, synced and renamed.  A reader takes the newest one whose hashes are
right.  Nothing here is ever unpickled.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from corpora.errors import InputError
from corpora.files import sha256_file, sha256_json, sync_folder
from corpora.settings import Strict
from models import runs
from models.settings import RunSettings

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Scores(Strict):
    """Held-out loss in nats per token, and bits per byte of text."""

    val_loss: float
    val_bpb: float


class State(Strict):
    """What a checkpoint knows of itself.

    settings: the tables of the recipe that decide the weights
    data: fingerprint of the blocks it was trained on
    made_on: device, threads and version, on which the last bits depend
    """

    step: int
    tokens: int
    settings: dict[str, Any]
    data: str
    tokenizer: str
    parameters: int
    made_on: str
    untrained: Scores
    scores: Scores
    scored_step: int
    files: dict[str, str] = Field(default_factory=dict)


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:07d}"


def save(
    run: Path, state: State, weights: dict[str, Tensor], optimizer: dict[str, Tensor], keep: int
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`; return its folder."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.tmp"):  # of a process that was killed; the run's lock keeps out a living one
        shutil.rmtree(stale)
    final = folder_of(run, state.step)
    aside = folder / f".{final.name}.tmp"
    aside.mkdir()
    for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / name)
    files = {name: sha256_file(aside / name) for name in (WEIGHTS, OPTIMIZER)}
    fields = state.model_copy(update={"files": files}).model_dump(mode="json")
    sealed = json.dumps({**fields, "sha256": sha256_json(fields)}, indent=2)
    (aside / STATE).write_text(sealed + "\n", "utf-8")
    for file in aside.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    sync_folder(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    sync_folder(folder)
    for _, old in runs.checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def newest_sound(run: Path, files: Sequence[str] = (WEIGHTS, OPTIMIZER)) -> Path | None:
    """Return the newest checkpoint of which these files are as they were written; None when there is none yet.

    Says which ones it steps over.  Raises InputError when every checkpoint is damaged.
    """
    found = runs.checkpoints(run)
    for _, folder in reversed(found):
        told = fault(folder, files)
        if told is None:
            return folder
        log.warning("%s: %s; stepping back to the checkpoint before it", folder, told)
    if found:
        raise InputError(
            f"{run / 'checkpoints'}: every checkpoint is damaged; remove the folder and train again from the start"
        )
    return None


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps: damaged ones, which would be taken for the newest."""
    for later, folder in runs.checkpoints(run):
        if later > step:
            shutil.rmtree(folder)


def fault(folder: Path, files: Sequence[str]) -> str | None:
    """Say what is wrong with a checkpoint's state or with these of its files, or None."""
    try:
        state = read_state(folder)
    except InputError as error:
        return str(error)
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != state.files.get(name):
            return f"{name} is not as it was written (its sha256 differs)"
    return None


def read_state(folder: Path) -> State:
    """Read state.json; a torn or changed one is an InputError."""
    try:
        fields = json.loads((folder / STATE).read_bytes())
        whole = fields.pop("sha256") == sha256_json(fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{STATE} is not as it was written")
    return State.model_validate(fields)


def load(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    """Read the tensors of one file of a checkpoint."""
    return load_file(folder / name, device=str(device))


def check_belongs(folder: Path, state: State, settings: RunSettings) -> None:
    """Refuse a checkpoint that was trained by another recipe, and name the keys that differ."""
    ours, theirs = decisive(settings), state.settings
    differing = [
        f"{table}.{key} {theirs.get(table, {}).get(key)} in the checkpoint, {value} in the recipe"
        for table, keys in ours.items()
        for key, value in keys.items()
        if theirs.get(table, {}).get(key) != value
    ]
    if differing:
        raise InputError(
            f"{folder} belongs to another recipe ({'; '.join(differing[:3])}); "
            "make a run folder of its own: python -m models new RECIPE"
        )


def decisive(settings: RunSettings) -> dict[str, Any]:
    """Return the tables that decide the weights, given the blocks."""
    return {
        table: getattr(settings, table).model_dump(mode="json") for table in ("model", "train", "tokenizer")
    }
