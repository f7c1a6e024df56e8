"""Files that are whole or absent: written aside, fsynced, renamed."""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from corpora.errors import InputError


def data_root() -> Path:
    """Return the folder of all corpora: $PILELINE_DATA, or data/ in the working directory."""
    return Path(os.environ.get("PILELINE_DATA") or "data")


def inside(root: Path, relative: str) -> Path:
    """Return `root`/`relative`; refuse a name that could lead out of `root`, by "..", "/" or a link."""
    parts = relative.split("/")
    path = root.joinpath(*parts) if parts else root
    if {"", ".", ".."} & set(parts) or "\\" in relative or not relative.isprintable():
        raise InputError(
            f"{relative[:200]!r} is not a plain name inside {root}; correct the lock or the list"
        )
    try:
        leads_out = not path.parent.resolve().is_relative_to(root.resolve()) or path.is_symlink()
    except (OSError, RuntimeError):  # links in a circle
        leads_out = True
    if leads_out:
        raise InputError(
            f"{path}: a link stands on the way to it; remove the link, or choose another folder for all of it"
        )
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(aside: Path, final: Path) -> None:
    """Give the finished file `aside` its `final` name, durably; both lie on one file system."""
    handle = os.open(aside, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    aside.replace(final)
    sync_folder(final.parent)


@contextmanager
def write_aside(final: Path) -> Iterator[Path]:
    """Yield an empty file beside `final` to write to; commit it on success, remove it on any failure.

    No two writers share a name, and each holds a lock on its file while it lives: what killed writers left
    behind is found by its missing lock, and removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    while True:
        aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
        held = aside.open("xb")  # x: never through a link that lies in wait
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if aside.exists():
            break
        held.close()  # another writer's sweep was here before the lock
    with held:
        try:
            yield aside
            commit(aside, final)
        finally:
            aside.unlink(missing_ok=True)


def _sweep(final: Path) -> None:
    """Remove what killed writers of `final` left behind."""
    for path in final.parent.glob(f".{final.name}.*.part"):
        with suppress(OSError), path.open("rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
            path.unlink(missing_ok=True)


def write_json(final: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    with write_aside(final) as aside:
        aside.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or torn file is an `InputError` that names it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run the step again") from None


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
