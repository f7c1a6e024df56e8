"""A file that grows: NAME.part, its writer's alone, and never through a link."""

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from corpora.errors import NO_SPACE, InputError

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def meta_of(part: Path) -> Path:
    """Return where it stands what a part is the beginning of."""
    return part.with_name(f"{part.name}.json")


def part_of(final: Path) -> Path:
    """Return where a file grows."""
    return final.with_name(f"{final.name}.part")


@contextmanager
def claimed(final: Path, tick: Callable[[int], None]) -> Iterator[tuple[Path, BinaryIO, bool]]:
    """Hold the part of `final` alone; the last value tells whether another process had to be waited for."""
    part, waited = part_of(final), False
    while True:
        with _open_part(part) as file:
            try:
                waited |= _locked(file, final, tick)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                if not os.fstat(file.fileno()).st_size:
                    part.unlink(missing_ok=True)
                # No locks on this file system, so a name that nobody else has: nothing to go on from, nor to tear.
                private = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
                with _open_part(private) as alone:
                    try:
                        yield private, alone, False
                    finally:
                        private.unlink(missing_ok=True)
                return
            if not is_at(file, part):
                continue  # its holder finished, and what was locked here is now the final file
            try:
                yield part, file, waited
            finally:
                if is_at(file, part) and not os.fstat(file.fileno()).st_size:
                    meta_of(part).unlink(missing_ok=True)
                    part.unlink()
            return


def _open_part(part: Path) -> BinaryIO:
    try:  # never through a link that lies in wait
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise InputError(f"{part}: is a link or a folder, not a part of a download; remove it") from None
        raise
    file = os.fdopen(handle, "r+b", buffering=0)  # unbuffered: SIGKILL loses nothing that has come
    if not S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise InputError(f"{part}: is not a plain file; remove it")
    return file


def _locked(file: BinaryIO, final: Path, tick: Callable[[int], None]) -> bool:
    waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            if not waited:
                log.warning("%s: another process is fetching it; waiting for that one", final)
            waited = True
            tick(0)
            time.sleep(0.2)


def is_at(file: BinaryIO, path: Path) -> bool:
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


def cannot_write(path: Path, error: OSError) -> InputError:
    """Say why a file could not be written."""
    if error.errno in NO_SPACE:
        return InputError(
            f"{path}: no space left; free some, or choose a folder on a larger disk, then run again: "
            "it goes on from here"
        )
    where = f" ({error.filename})" if error.filename else ""
    return InputError(f"{path}: cannot be written: {error.strerror or error}{where}")
