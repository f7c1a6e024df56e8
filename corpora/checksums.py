"""Lists of checksums: SHA256SUMS, MD5SUMS, checklist.chk and their kin, read as a table of names.

    0804c42ca65584f50234a86d71e6916a  consolidated.00.pth          as `md5sum` and `sha256sum` write it
    SHA256 (params.json) = 9f86d081884c7d659a2feaa0c55ad015...      as BSD and `sha256sum --tag` write it

A list decides where files go, and often comes from a stranger: a line or a name that is not plain is refused.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from corpora.errors import InputError

CHUNK = 1 << 20
HEX_DIGITS = {"md5": 32, "sha256": 64}
GNU = re.compile(r"(?P<hex>[0-9A-Fa-f]+) [ *](?P<name>.+)", re.DOTALL)
TAG = re.compile(r"(?P<kind>[A-Za-z0-9/-]+) \((?P<name>.+)\) = (?P<hex>[0-9A-Fa-f]+)", re.DOTALL)
ESCAPES = {"\\": "\\", "n": "\n", "r": "\r"}


@dataclass(frozen=True, slots=True)
class Checksum:
    """What is known of a file's bytes, in lower-case hex."""

    md5: str | None = None
    sha256: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The digests that are known, by name."""
        return tuple(kind for kind in HEX_DIGITS if getattr(self, kind))

    def merge(self, other: Self) -> Self:
        """Return what both say together; a `ValueError` where they contradict each other."""
        for kind in HEX_DIGITS:
            one, two = getattr(self, kind), getattr(other, kind)
            if one and two and one != two:
                raise ValueError(f"{kind} {one} and {kind} {two}")
        return type(self)(self.md5 or other.md5, self.sha256 or other.sha256)


def check_name(name: str) -> str:
    """Return a file's name without a leading ./, or a `ValueError` if it could leave its folder."""
    path = name.removeprefix("./")
    if {"", ".", ".."} & set(path.split("/")) or not path.isprintable() or "\\" in path:
        raise ValueError(
            f"{name[:80]!r} is no plain relative path (no / in front or twice, no .., no \\, "
            "no control characters)"
        )
    return path


def parse_checksums(text: bytes | str, origin: str) -> dict[str, Checksum]:
    """Return name -> checksum of a list in GNU or BSD form; `origin` says in errors whose list it is."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{origin}: is not a list of checksums: it is no UTF-8 text") from None
    if text.lstrip().startswith("<"):
        raise InputError(
            f"{origin}: is not a list of checksums but an HTML page (or XML), of a login or a proxy perhaps"
        )
    found: dict[str, Checksum] = {}
    lines_of: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, checksum = _parse_line(line)
            same = name.casefold()  # on some file systems Params.json and params.json are one file
            if same in lines_of and name not in found:
                raise ValueError(f"{name!r} differs in case only from the name in line {lines_of[same]}")
            found[name] = _merge(found.get(name), checksum, name)
            lines_of.setdefault(same, number)
        except ValueError as error:
            raise InputError(f"{origin}: line {number}: {error}") from None
    if not found:
        raise InputError(f"{origin}: is not a list of checksums: it names no file")
    return found


def checksum_file(path: Path, like: Checksum, progress: Callable[[int], None] | None = None) -> Checksum:
    """Return a file's checksum, of the kinds that `like` has; `progress` gets the bytes just read."""
    # usedforsecurity: where policy forbids md5 it may still tell a damaged file from a whole one
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in like.kinds}
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return Checksum(**{kind: digest.hexdigest() for kind, digest in digests.items()})


def _parse_line(line: str) -> tuple[str, Checksum]:
    escaped = line.startswith("\\")
    plain = line[1:] if escaped else line
    if match := GNU.fullmatch(plain):
        digits = match["hex"]
        kind = next((kind for kind, length in HEX_DIGITS.items() if length == len(digits)), "")
        if not kind:
            raise ValueError(f"{len(digits)} hex digits are neither an md5 (32) nor a sha256 (64)")
    elif match := TAG.fullmatch(plain):
        digits, kind = match["hex"], match["kind"].lower()
        if kind not in HEX_DIGITS:
            raise ValueError(f"{match['kind'][:20]} is neither MD5 nor SHA256")
        if len(digits) != HEX_DIGITS[kind]:
            raise ValueError(f"{len(digits)} hex digits instead of the {HEX_DIGITS[kind]} of {kind}")
    else:
        raise ValueError(f"neither `HEX  NAME` nor `SHA256 (NAME) = HEX`: {line[:80]!r}")
    name = _unescape(match["name"]) if escaped else match["name"]
    return check_name(name), Checksum(**{kind: digits.lower()})


def _unescape(name: str) -> str:
    """Undo what coreutils do to a name with a backslash or a line break in it."""
    if re.fullmatch(r"(?:[^\\]|\\[\\nr])*", name, re.DOTALL) is None:
        raise ValueError(f"{name[:80]!r} has a backslash before something else than \\, n or r")
    return re.sub(r"\\(.)", lambda escape: ESCAPES[escape[1]], name)


def _merge(known: Checksum | None, checksum: Checksum, name: str) -> Checksum:
    try:
        return checksum if known is None else known.merge(checksum)
    except ValueError as error:
        raise ValueError(f"{name!r} has two checksums: {error}") from None
