"""Checkpoints on disk: which are sound, which is the best, and what is in them.  Nothing here writes."""

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from corpora.errors import InputError
from corpora.files import sha256_file
from models import runs
from models.state import STATE, State, parse

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FILES = (WEIGHTS, OPTIMIZER)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
CURE = "remove the folder, so that the checkpoint before it is taken, or train again"


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    final = run / "checkpoints" / name_of(step)
    old = hidden(final, "old")
    return old if old.exists() and not final.exists() else final


def name_of(step: int) -> str:
    """Return the name that a step's checkpoint gets when it is whole."""
    return f"step-{step:07d}"


def hidden(folder: Path, suffix: str) -> Path:
    """Return the name of a checkpoint that is not whole yet ("tmp"), not any more ("tmp"), or made way ("old")."""
    return folder.with_name(f".{folder.name.removeprefix('.').removesuffix('.old')}.{suffix}")


def newest_sound(run: Path, files: Sequence[str] = FILES) -> Path | None:
    """Return the newest checkpoint of which these files are as they were written; None when there is none yet.

    Says which ones it steps over.  Raises InputError when every checkpoint is damaged.
    """
    while True:
        found, told = runs.checkpoints(run), None
        for _, folder in reversed(found):
            told = fault(folder, files)
            if told is None:
                return folder
            log.warning("%s: %s; stepping back to the checkpoint before it", folder, told)
        if runs.checkpoints(run) == found:  # else a trainer has removed some while they were read
            break
    if found:
        raise InputError(
            f"{run / 'checkpoints'}: every checkpoint is damaged ({found[0][1].name}: {told}); "
            "remove the folder and train again from the start"
        )
    return None


def best(run: Path, files: Sequence[str] = FILES) -> Path | None:
    """Return the checkpoint with the lowest held-out bits per byte of which these files are as they were written.

    Only those count whose own weights were scored.  None when there is none; says which ones it steps over.
    """
    found = [folder for _, folder in runs.checkpoints(run)]
    states = {folder: state for folder in found if isinstance(state := read(folder), State)}
    for folder in by_score(states):
        told = fault(folder, files)
        if told is None:
            return folder
        log.warning("%s: %s; taking the next best", folder, told)
    return None


def by_score(states: Mapping[Path, State]) -> list[Path]:
    """Return the checkpoints whose own weights were scored, lowest bits per byte first; of equals the newest."""
    scored = [
        (state.scores.val_bpb, -state.step, folder)
        for folder, state in states.items()
        if state.scored_step == state.step
    ]
    return [folder for *_, folder in sorted(scored)]


def fault(folder: Path, files: Sequence[str] = FILES) -> str | None:
    """Say what is wrong with a checkpoint's state or with these of its files, or None."""
    state = read(folder)
    if isinstance(state, str):
        return state
    if runs.step_of(folder) != state.step:
        return f"{STATE} is of step {state.step}"
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if sha256_file(folder / name) != state.files.get(name):
                return f"{name} is not as it was written (its sha256 differs)"
        except OSError as error:
            return _unreadable(name, error)
    return None


def read_state(folder: Path) -> State:
    """Read state.json; a torn or changed one is an InputError."""
    state = read(folder)
    if isinstance(state, str):
        raise InputError(f"{folder}: {state}")
    return state


def read(folder: Path) -> State | str:
    """Return the state of a checkpoint, or what is wrong with it."""
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    try:
        return parse((folder / STATE).read_bytes())
    except OSError as error:
        return _unreadable(STATE, error)


def _unreadable(name: str, error: OSError) -> str:
    """Say of a bad sector and of a file that has gone that it is damaged; other errors may pass, so raise them."""
    if error.errno not in (errno.EIO, errno.ENOENT):
        raise error
    return f"{name} cannot be read ({error.strerror})"


def load(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    """Read the tensors of one file of a checkpoint."""
    with _told(folder / name):
        return load_file(folder / name, device=str(device))


@contextmanager
def open_tensors(folder: Path, name: str) -> Iterator[Any]:
    """Open one file of a checkpoint to read only parts of it, as safetensors' `safe_open`.

    `handle.get_slice(name)[first:last]` reads those rows and no others; `.get_shape()` of it reads none.
    """
    with _told(folder / name), safe_open(folder / name, framework="pt", device="cpu") as handle:
        yield handle


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Tell in one line that a file is missing, holds no tensors, or not these."""
    if not file.is_file():
        raise InputError(f"{file} is missing; {CURE}")
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{file}: {' '.join(str(error).split())[:200]}; {CURE}") from None


def check_shapes(folder: Path, network: nn.Module) -> None:
    """Refuse weights that are not those of this network by name, format and shape, before one is read."""
    wanted = {name: (DTYPES.get(one.dtype), [*one.shape]) for name, one in network.state_dict().items()}
    with open_tensors(folder, WEIGHTS) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}
        found = {name: (one.get_dtype(), [*one.get_shape()]) for name, one in slices.items()}
    differing = [
        f"{name} {_shape(found.get(name))} in the checkpoint, {_shape(wanted.get(name))} in the network"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{folder / WEIGHTS} is not of the recipe's network ({'; '.join(differing[:3])}{more}); "
            "make a run folder of its own: python -m models new RECIPE"
        )


def _shape(tensor: tuple[str | None, list[int]] | None) -> str:
    return "is missing" if tensor is None else f"is {tensor[0]} {tensor[1]}"


def finite(tensor: Tensor) -> bool:
    """Tell whether every number of a tensor is finite."""
    # One that is not makes the sum another, and a sum costs a tenth of a look at each.  A sum may also overflow.
    return (
        not tensor.is_floating_point()
        or bool(torch.isfinite(tensor.sum()))
        or bool(torch.isfinite(tensor).all())
    )
