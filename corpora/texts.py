"""A folder of text files as a few shards: deterministic tar files, one member a text.

Thousands of small files would be thousands of shards, each with a receipt and a manifest of its own.  So the
texts of a folder are dealt to a few tars; the lock holds each text's sha256, and names the one that changed.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from corpora.errors import InputError
from corpora.files import inside


def deal(paths: Iterable[str], shards: int) -> dict[str, list[str]]:
    """Deal text files to shards "FOLDER/0" ...: by the hash of a path, so that a new file moves no other.

    FOLDER is the first folder on a path, or "text"; a shard that gets nothing is none.
    """
    dealt: dict[str, list[str]] = {}
    for path in sorted(paths):
        folder = path.split("/")[0] if "/" in path else "text"
        number = int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % shards
        dealt.setdefault(f"{folder}/{number:0{len(str(shards - 1))}}", []).append(path)
    return dict(sorted(dealt.items()))


class _Hashing:
    """A file to write to that hashes what goes through."""

    def __init__(self, file: IO[bytes] | None, tick: Callable[[int], None]) -> None:
        self.file, self.tick, self.sha256, self.size = file, tick, hashlib.sha256(), 0
        self.failed = False

    def write(self, data: bytes) -> int:
        if self.file is not None:
            try:
                self.file.write(data)
            except OSError:
                self.failed = True
                raise
        self.sha256.update(data)
        self.size += len(data)
        self.tick(len(data))
        return len(data)


def measure_tar(root: Path, paths: Iterable[str]) -> tuple[int, str, dict[str, str]]:
    """Return size and sha256 of the tar of these texts, and each text's sha256; nothing is written."""
    out = _Hashing(None, lambda _: None)
    texts = _tar(root, dict.fromkeys(paths), out)
    return out.size, out.sha256.hexdigest(), texts


def write_tar(root: Path, texts: Mapping[str, str], final: Path, tick: Callable[[int], None]) -> str:
    """Write the tar of these texts (path -> sha256) and return its sha256.

    Raises InputError for a text that is gone or is no longer the lock's.
    """
    with final.open("wb") as file:
        out = _Hashing(file, tick)
        _tar(root, texts, out)
    return out.sha256.hexdigest()


def _tar(root: Path, texts: Mapping[str, Any], out: _Hashing) -> dict[str, str]:
    found = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for name, expected in texts.items():
            path = inside(root, name)
            try:
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    size = file.tell()
                    file.seek(0)
                    if expected not in (None, sha256):
                        raise InputError(
                            f"{path}: is not the text that the lock names: expected sha256 {expected}, got {sha256}; "
                            "put it back, or lock the folder again"
                        )
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = size, 0o644
                    tar.addfile(member, file)
            except OSError as error:
                if out.failed:  # the tar cannot be written, the text can be read
                    raise
                raise InputError(
                    f"{path}: cannot be read: {error.strerror or error}; put it back, or lock the folder again"
                ) from None
            found[name] = sha256
    return found
