"""A shard's bytes to its records: zstd, lines, JSON; bounded memory, and no silent end.

Lines end at the byte 0x0A only (never `str.splitlines`, which also splits at U+2028, U+0085 and others), and
every line is one record: a document, or a named reason why it is none.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from corpora.errors import InputError
from corpora.settings import Corpus

CHUNK = 1 << 20
MAX_LINE_BYTES = 64 << 20
UNKNOWN_SUBSET = "unknown"

_END = b"pileline: the shard ends here, and it ends where a frame ends\n" * 2
_END_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(_END)
_MAGIC = b"\x28\xb5\x2f\xfd"


class _AndEndFrame(io.RawIOBase):
    """A file's bytes followed by one more zstd frame, whose text is `_END`."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self.file, self.progress = file, progress
        self.frame = io.BytesIO(_END_FRAME)
        self.file_ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if data := self.file.read(size):
            if self.progress is not None:
                self.progress(len(data))
            return data
        self.file_ended = True
        # Its first byte comes alone.  libzstd, with a frame header cut in two before it, takes a whole frame
        # that a buffer begins with for the rest of that one (its single-pass shortcut), and all looks well.
        return self.frame.read(size if self.frame.tell() else 1)


class ZstdFile(io.RawIOBase):
    """Decompress a .zst file, all frames of it, and raise when it is cut short.

    python-zstandard's stream_reader treats the end of the file as the end of the data, wherever it comes: half
    a shard reads as half the documents and no error.  Here one known frame is put after the file's last byte.
    If the file ends where a frame ends, the text ends with `_END`, which is taken off; if it ends inside a
    frame, the known frame's bytes are swallowed as part of that one, and the text ends otherwise or breaks.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.file = path.open("rb")
        head = self.file.read(4)
        self.file.seek(0)
        if head != _MAGIC and not (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # or a skippable frame
            self.file.close()
            what = "is empty" if not head else f"is not zstd data (it begins with {head!r})"
            raise InputError(f"{path} {what}; fetch it again")
        self.source = _AndEndFrame(self.file, progress)
        self.reader = zstandard.ZstdDecompressor().stream_reader(
            cast(BinaryIO, self.source), read_size=128 << 10, read_across_frames=True
        )
        self.held = b""  # the last bytes read: perhaps the end mark, so not yet given out
        self.given = 0  # bytes given out
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ended:
            try:
                chunk = self.reader.read(min(len(buffer), CHUNK))
            except zstandard.ZstdError as error:
                raise self._fault(str(error)) from None
            if not chunk:
                self.ended = True
                if self.held != _END:
                    raise self._fault("unexpected end")
                return 0
            data = self.held + chunk
            ready = max(0, len(data) - len(_END))  # fits: `held` is never longer than `_END`
            self.held = data[ready:]
            if ready:
                buffer[:ready] = data[:ready]
                self.given += ready
                return ready
        return 0

    def _fault(self, error: str) -> InputError:
        what = "the file is cut short (it does not end where a zstd frame ends)"
        if not self.source.file_ended:
            what = f"damaged zstd data ({error})"
        return InputError(
            f"{self.path}: {what}, after {self.given:,} bytes of text; delete it and fetch it again"
        )

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a shard, without its newline; `data` is None when it is longer than allowed."""

    number: int  # from 1
    offset: int  # of its first byte in the decompressed shard
    size: int  # in bytes
    data: bytes | None


def read_lines(
    path: Path, progress: Callable[[int], None] | None = None, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[Line]:
    """Yield a .zst file's lines; a last line without a newline counts.

    `progress` is told the compressed bytes read.  Raises InputError for a file that is cut short or damaged.
    """
    with ZstdFile(path, progress) as raw, io.BufferedReader(raw, CHUNK) as file:
        number = offset = 0
        while data := file.readline(max_bytes + 1):
            number += 1
            size = len(data)
            too_long = size > max_bytes and not data.endswith(b"\n")
            if too_long:
                while not data.endswith(b"\n") and (data := file.readline(CHUNK)):
                    size += len(data)
            whole = size
            if data.endswith(b"\n"):
                size -= 1
            yield Line(number, offset, size, None if too_long else data[:size])
            offset += whole


@dataclass(frozen=True, slots=True)
class Record:
    """A document as it stands in the shard."""

    text: str
    subset: str
    repaired: bool  # lone surrogates were replaced


class BadRecord(Exception):
    """A line that is no document; the message is the reason, one of a small set."""


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_record(data: bytes, corpus: Corpus) -> Record:
    """Parse one JSON line.  Raises BadRecord with the reason."""
    repaired = False
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = _lenient(data)
        repaired = True
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object")
    text = value.get(corpus.text_field)
    if text is None:
        raise BadRecord("no text")
    if not isinstance(text, str):
        raise BadRecord("text is not a string")
    if repaired:
        text, count = _LONE_SURROGATE.subn("\ufffd", text)
        repaired = count > 0
    subset: Any = value
    for key in corpus.subset_field.split("."):
        subset = subset.get(key) if isinstance(subset, dict) else None
    if not isinstance(subset, str) or not subset or _LONE_SURROGATE.search(subset):
        subset = UNKNOWN_SUBSET
    return Record(text, subset, repaired)


def _lenient(data: bytes) -> Any:
    """Give JSON a second opinion: orjson refuses escapes of lone surrogates (\\ud83d), the standard allows them."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8") from None
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRecord("invalid JSON") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
