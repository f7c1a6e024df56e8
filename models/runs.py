"""Run folders: RUNS/<recipe>-<8 hex>, where the hex stands for the recipe's text and its inputs' hashes."""

import hashlib
import os
import re
from pathlib import Path
from time import time_ns
from typing import Any

import tomli_w

from corpora.errors import InputError
from corpora.files import write_aside
from corpora.lock import load_lock
from corpora.prepare import PREPARE_VERSION
from corpora.settings import Corpus
from models.settings import RunSettings

# A checkpoint; or one that made way for another of its step, which a kill may have kept from coming.
STEP = re.compile(r"step-(?P<step>[0-9]{7}|[1-9][0-9]{7,})|\.step-(?P<old>[0-9]{7}|[1-9][0-9]{7,})\.old")


def runs_root() -> Path:
    """Return the folder of all runs: $PILELINE_RUNS, or runs/ in the working directory."""
    return Path(os.environ.get("PILELINE_RUNS") or "runs")


def run_folder(name: str, toml: str, inputs: str, runs: Path) -> Path:
    """Return the folder of a recipe over these inputs; nothing is written."""
    return runs / f"{name}-{hashlib.sha256((toml + inputs).encode()).hexdigest()[:8]}"


def create(name: str, toml: str, inputs: str, runs: Path) -> Path:
    """Make the run folder with its recipe.toml, or find it made; return it."""
    folder = run_folder(name, toml, inputs, runs)
    recipe = folder / "recipe.toml"
    if not (recipe.is_file() and recipe.read_text("utf-8") == toml):
        with write_aside(recipe) as aside:
            aside.write_text(toml, "utf-8")
    return folder


def inputs_of(corpus: Corpus, data: Path) -> str:
    """Return what stands for a run's data before it is prepared: its shards' hashes, and the step's version."""
    return load_lock(corpus, data).fingerprint(corpus.shards) + PREPARE_VERSION


def recipe_text(settings: RunSettings, description: str) -> str:
    """Return a recipe as TOML with every default written out, single keys before tables."""
    tables: dict[str, Any] = {"description": description}
    tables |= settings.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps(dict(sorted(tables.items(), key=lambda item: isinstance(item[1], dict))))


def read_settings(run: Path) -> RunSettings:
    """Read the recipe of a run folder."""
    recipe = run / "recipe.toml"
    if not recipe.is_file():
        raise InputError(
            f"{run} is not a run folder (no recipe.toml in it); make one: python -m models new RECIPE"
        )
    return RunSettings.read(recipe)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints of a run by step, oldest first."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("*step-*")):  # a dot sorts first: the true name is last
        step = step_of(folder)
        if step is not None and (folder / "state.json").is_file():  # it got its name after its last file
            found[step] = folder
    return sorted(found.items())


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's name tells, or None for another name."""
    match = STEP.fullmatch(folder.name)
    return None if match is None else int(match["step"] or match["old"])


def latest_checkpoint(run: Path) -> Path | None:
    """Return the folder of the checkpoint with the most steps, or None."""
    found = checkpoints(run)
    return found[-1][1] if found else None


def newest(runs: Path) -> dict[str, Path]:
    """Return, for each recipe that has one, the run folder whose latest checkpoint was written last."""
    written: dict[str, tuple[int, Path]] = {}
    for recipe in sorted(runs.glob("*/recipe.toml")):
        run = recipe.parent
        checkpoint = latest_checkpoint(run)
        name, dash, digest = run.name.rpartition("-")
        if checkpoint is None or not dash or not re.fullmatch("[0-9a-f]{8}", digest):
            continue
        try:
            time = (checkpoint / "state.json").stat().st_mtime_ns
        except FileNotFoundError:  # a trainer has removed it just now, so there is a newer one
            time = time_ns()
        if name not in written or time > written[name][0]:
            written[name] = (time, run)
    return {name: run for name, (_, run) in written.items()}
