"""Files that are whole or absent: written aside, fsynced, renamed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corpora.errors import InputError


def data_root() -> Path:
    """Return the folder of all corpora: $PILELINE_DATA, or data/ in the working directory."""
    return Path(os.environ.get("PILELINE_DATA") or "data")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(aside: Path, final: Path) -> None:
    """Give the finished file `aside` its `final` name, durably; both lie on one file system."""
    handle = os.open(aside, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    aside.replace(final)
    sync_folder(final.parent)


@contextmanager
def write_aside(final: Path) -> Iterator[Path]:
    """Yield a path beside `final` to write to; commit it on success, remove it on any failure.

    The name carries the process id, so two processes never write into the same file; what a killed process
    left behind is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}.*.part"):
        if not _alive(stale.suffixes[-2].removeprefix(".")):
            stale.unlink(missing_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield aside
        commit(aside, final)
    finally:
        aside.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


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
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run the step again") from None


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
