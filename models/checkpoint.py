"""Checkpoints: a folder of safetensors and JSON, whole or absent, with the sha256 of each file.

    checkpoints/step-0000100/model.safetensors       weights
                             optimizer.safetensors   moments, and the states of the random generators
                             state.json              step, tokens, scores, what it belongs to, hashes; written last
               .step-0000200.tmp                     being written, or being removed: worth nothing
               .step-0000100.old                     made way for another of its step; counts until that is there

The folder is written under another name, synced and renamed, by a thread while training goes on.  A reader
takes the newest one whose hashes are right, or the one with the lowest held-out loss.  Nothing here is ever
unpickled.
"""

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from corpora.errors import InputError, of_the_system
from corpora.files import sha256_file, sync_folder
from models import runs
from models.randomness import random_state, restore_random
from models.sound import (
    FILES,
    OPTIMIZER,
    WEIGHTS,
    best,
    by_score,
    check_shapes,
    fault,
    finite,
    folder_of,
    hidden,
    load,
    name_of,
    newest_sound,
    open_tensors,
    read,
    read_state,
)
from models.state import STATE, Best, RollBack, Scores, Skip, State, check_belongs, decisive

__all__ = [
    "OPTIMIZER",
    "STATE",
    "WEIGHTS",
    "Best",
    "RollBack",
    "Saver",
    "Scores",
    "Skip",
    "State",
    "best",
    "check_belongs",
    "check_shapes",
    "decisive",
    "fault",
    "finite",
    "folder_of",
    "load",
    "newest_sound",
    "open_tensors",
    "random_state",
    "read_state",
    "remove_after",
    "restore_random",
    "save",
]

log = logging.getLogger(__name__)

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Saver:
    """Writes checkpoints in a thread, one at a time; what goes wrong in it is raised by the next call.

    Only the process that holds the run's lock may have one.  It keeps memory for one copy of all tensors: to
    ask for it anew each time would cost many times the copying.
    """

    def __init__(self, run: Path, keep: int) -> None:
        if keep < 2:
            raise ValueError(
                f"keep {keep}: the newest checkpoint may turn out damaged, so at least 2 are kept"
            )
        self.run, self.keep = run, keep
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, state: State, weights: Named, optimizer: Named) -> Path:
        """Copy the tensors and return the folder that they will be in; a thread writes it.

        Tensors may come as pairs from a generator: then one at a time is copied.  Waits for the save before
        this one.  Raises InputError when a number is not finite: nothing is written then.
        """
        self.wait()
        state = State.model_validate(state.model_dump())  # or what cannot be read again would be written
        copies = self._copy(state.step, {WEIGHTS: weights, OPTIMIZER: optimizer})
        self._thread = Thread(target=self._write, args=(state, copies), name="checkpoint")
        self._thread.start()
        return self.run / "checkpoints" / name_of(state.step)

    def wait(self) -> None:
        """Wait until the last save is on disk, and raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: object, first: BaseException | None, __: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if first is None:
                raise
            log.error("%s", error)  # the one that came first ends the run

    def _write(self, state: State, tensors: dict[str, dict[str, Tensor]]) -> None:
        try:
            save(self.run, state, tensors[WEIGHTS], tensors[OPTIMIZER], self.keep)
        except Exception as error:
            self._error = error

    def _copy(self, step: int, files: Mapping[str, Named]) -> dict[str, dict[str, Tensor]]:
        """Return copies in main memory that no update changes, by file and name."""
        before, self._buffers = self._buffers, {}
        devices = set()
        for file, tensors in files.items():
            for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
                if not finite(tensor):
                    raise InputError(
                        f"step {step}: {name} in {file} holds numbers that are not finite; nothing was saved; "
                        "lower train.lr, or raise train.warmup"
                    )
                buffer = before.pop((file, name), None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = _buffer(tensor)
                buffer.copy_(tensor.detach(), non_blocking=True)
                self._buffers[file, name] = buffer
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.synchronize(device)
        return {
            file: {name: copy for (owner, name), copy in self._buffers.items() if owner == file}
            for file in files
        }


def _buffer(tensor: Tensor) -> Tensor:
    """Return main memory for a copy: of a GPU's tensor pinned, which the GPU writes to by itself."""
    like: dict[str, Any] = {"device": "cpu", "memory_format": torch.contiguous_format}
    if tensor.is_cuda:
        try:
            return torch.empty_like(tensor.detach(), pin_memory=True, **like)
        except RuntimeError:
            log.warning("no more memory can be pinned; the checkpoint's copy is made more slowly")
    return torch.empty_like(tensor.detach(), **like)


def save(
    run: Path, state: State, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], keep: int
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` and the best; return its folder.

    At every moment of it the run has the checkpoints from before, or this one.  A checkpoint of this step that
    is there already makes way, or stays when it is the same.  Raises InputError or Unavailable for what the
    system refuses.
    """
    final = run / "checkpoints" / name_of(state.step)
    aside = hidden(final, "tmp")
    try:
        _sweep(run)
        if not aside.parent.is_dir():
            aside.parent.mkdir(parents=True)
            sync_folder(run)
        try:
            aside.mkdir()
            _fill(aside, state, {WEIGHTS: weights, OPTIMIZER: optimizer})
            _commit(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _retain(run, keep)
    except (OSError, SafetensorError) as error:
        raise of_the_system(_os_error(error, final)) from None
    return final


def _fill(aside: Path, state: State, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write all files of a checkpoint, durably; the state goes last, since it has the others' hashes."""
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / name)
    hashes = {name: sha256_file(aside / name) for name in files}
    (aside / STATE).write_text(state.model_copy(update={"files": hashes}).sealed(), "utf-8")
    mode = stat.S_IMODE((aside / STATE).stat().st_mode)
    for name in (*files, STATE):
        (aside / name).chmod(mode)  # safetensors lets only a file's owner read it
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(aside)


def _commit(aside: Path, final: Path) -> None:
    """Give a finished folder its name."""
    old = hidden(final, "old")
    if final.exists():
        if fault(final) is None and read_state(final) == read_state(aside):
            return
        final.rename(old)
    aside.rename(final)
    sync_folder(final.parent)
    _delete(old)


def _retain(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` that look sound, and the best of those that do."""
    found = [folder for _, folder in runs.checkpoints(run)]
    sound = {folder: state for folder in found if (state := _glance(folder)) is not None}
    kept = {*[*sound][-keep:], *by_score(sound)[:1]}
    for folder in found:
        if folder not in kept:
            _remove(folder)


def _glance(folder: Path) -> State | None:
    """Return the state of a checkpoint that is sound as far as can be told without reading its tensors."""
    state = read(folder)
    if isinstance(state, str):
        return None
    try:
        for name in FILES:
            with open_tensors(folder, name):  # refuses a header that does not account for every byte
                pass
    except InputError:
        return None
    return state


def _sweep(run: Path) -> None:
    """Remove what a killed process left, and give its name back to what made way for nothing.

    The run's lock keeps out a process that is alive.
    """
    for path in (run / "checkpoints").glob(".step-*"):
        name = path.with_name(path.name[1 : -len(path.suffix)])
        if path.suffix == ".old" and not name.exists():
            path.rename(name)
        elif path.suffix in (".old", ".tmp"):
            _delete(path)


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps: damaged ones, which would be taken for the newest."""
    for later, folder in runs.checkpoints(run):
        if later > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; its name goes first, so that what is left of it by a kill is not taken for one."""
    gone = hidden(folder, "tmp")
    _delete(gone)
    folder.rename(gone)
    _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _os_error(error: OSError | SafetensorError, where: Path) -> OSError:
    """Return the operating system's error, with a place; safetensors has it only in its message."""
    if isinstance(error, OSError):
        if error.filename is None:
            error.filename = str(where)
        return error
    number = re.search(r"\(os error ([0-9]+)\)", str(error))
    if number is None:
        raise error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(where))
