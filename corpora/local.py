"""Files of this machine: addresses that begin with file:"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from corpora.errors import InputError, Unavailable
from corpora.files import commit
from corpora.part import is_at
from corpora.patience import NotThere

CHUNK = 1 << 20


def local_path(url: str) -> Path:
    """Return the path of a file: URL."""
    return Path(url2pathname(urlsplit(url).path))


@contextmanager
def source(url: str) -> Iterator[BinaryIO]:
    path = local_path(url)
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        yield file


def read(file: BinaryIO, url: str) -> bytes:
    try:
        return file.read(CHUNK)
    except OSError as error:
        raise _unreadable(local_path(url), error) from None


def _unreadable(path: Path, error: OSError) -> InputError | Unavailable:
    told = f"{path}: cannot be read: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        return NotThere(f"{told}; correct the URL or the lock")
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return InputError(f"{told}; correct the URL or the lock")
    return Unavailable(f"{told}; run again")  # a network folder that went away, a bad disk


def link(
    url: str, size: int | None, digest: str | None, final: Path, tick: Callable[[int], None]
) -> tuple[str, os.stat_result] | None:
    """Give a right file of this file system a second name instead of a second copy.

    Returns its sha256 and stat, or None where that fails: another file system, other bytes than wanted.
    """
    name = final.with_name(f".{final.name}.link")
    try:
        with local_path(url).resolve().open("rb") as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode) or size not in (None, stat.st_size):
                return None
            name.unlink(missing_ok=True)
            os.link(file.name, name)
            if not is_at(file, name):
                return None
            sha256 = hashlib.sha256()
            while chunk := file.read(CHUNK):
                sha256.update(chunk)
                tick(len(chunk))
            changed = os.fstat(file.fileno()).st_mtime_ns != stat.st_mtime_ns
    except OSError:  # another file system, or not ours to link, or not there: reading it will tell
        return None
    else:
        if changed or digest not in (None, sha256.hexdigest()):
            tick(-stat.st_size)
            return None
        commit(name, final)
        return sha256.hexdigest(), stat
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)
