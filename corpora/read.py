"""A shard's bytes to its records: zstd or gzip, lines, JSON; bounded memory, and no silent end.

Lines end at the byte 0x0A only (never `str.splitlines`, which also splits at U+2028, U+0085 and others), and
every line is one record: a document, or a named reason why it is none.  What is not JSON lines becomes so in
corpora.formats.
"""

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson
import zstandard

from corpora.errors import InputError
from corpora.settings import Corpus

CHUNK = 1 << 17  # larger ones leave the processor cache
SLACK = 256 << 20  # text that any compressed file may hold, however small it is
UNKNOWN_SUBSET = "unknown"

Format = Literal["lines", "text", "parquet", "tar"]
FORMATS: dict[str, Format] = {  # by the end of a file's name; .json is C4's and Dolma's name for JSON lines
    **{f".{name}{packed}": "lines" for name in ("jsonl", "ndjson", "json") for packed in ("", ".gz", ".zst")},
    **{f".txt{packed}": "text" for packed in ("", ".gz", ".zst")},
    ".parquet": "parquet",
    ".tar": "tar",
}
MAGIC = {  # what a file begins with, by the last suffix of its name
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),  # or skippable
    ".gz": (b"\x1f\x8b",),
    ".parquet": (b"PAR1",),
}

_END = b"pileline: the shard ends here, and it ends where a frame ends\n" * 2
_END_FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(_END)


def suffix_of(name: str) -> str | None:
    """Return the longest known suffix of a file's name, or None."""
    return max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len, default=None)


def wrong_kind(path: Path, kind: str, head: bytes) -> InputError:
    """Return the error of a file that begins otherwise than its name says."""
    what = f"is not {kind} data (it begins with {head[:4]!r})" if head else "is empty"
    return InputError(f"{path} {what}; fetch it again")


def damaged(path: Path, what: str) -> InputError:
    """Return the error of a file that began well."""
    return InputError(f"{path}: {what}; delete it and fetch it again")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compressed file may ask for; see [corpus] max_window_bytes and max_expansion."""

    window: int = 128 << 20
    expansion: int = 200

    @classmethod
    def of(cls, corpus: Corpus) -> "Limits":
        """Return a recipe's limits."""
        return cls(corpus.max_window_bytes, corpus.max_expansion)

    def check_bomb(self, path: Path, taken: int, given: int) -> None:
        """Refuse a file of which `taken` bytes became `given` bytes of text, where that is out of all proportion."""
        if given > SLACK + self.expansion * taken:
            raise InputError(
                f"{path}: its first {taken:,} bytes hold more than {given:,} bytes of text; is it a decompression "
                f"bomb? If it is as it should be, raise [corpus] max_expansion above {self.expansion}"
            )


class _AndEndFrame(io.RawIOBase):
    """A file's bytes followed by one more zstd frame, whose text is `_END`."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self.file, self.progress = file, progress
        self.taken = 0  # bytes of the file
        self.frame = io.BytesIO(_END_FRAME)
        self.file_ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if data := self.file.read(size):
            self.taken += len(data)
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

    def __init__(
        self, path: Path, progress: Callable[[int], None] | None = None, limits: Limits | None = None
    ) -> None:
        self.path, self.limits = path, limits or Limits()
        self.file = path.open("rb")
        head = self.file.read(4)
        self.file.seek(0)
        if not head.startswith(MAGIC[".zst"]):
            self.file.close()
            raise wrong_kind(path, "zstd", head)
        self.source = _AndEndFrame(self.file, progress)
        self.reader = zstandard.ZstdDecompressor(max_window_size=self.limits.window).stream_reader(
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
                self.limits.check_bomb(self.path, self.source.taken, self.given)
                return ready
        return 0

    def _fault(self, error: str) -> InputError:
        if "too much memory" in error:
            return InputError(
                f"{self.path}: one of its zstd frames needs a window of more than {self.limits.window:,} bytes "
                "(`zstd --long`); raise [corpus] max_window_bytes, to at most 2_147_483_648; reading it takes as much "
                "memory"
            )
        what = "the file is cut short (it does not end where a zstd frame ends)"
        if not self.source.file_ended:
            what = f"damaged zstd data ({error})"
        return damaged(self.path, f"{what}, after {self.given:,} bytes of text")

    def close(self) -> None:
        self.file.close()
        super().close()


class GzipFile(io.RawIOBase):
    """Decompress a .gz file, all members of it, and raise when it is cut short or damaged.

    Unlike the standard library's, it takes no zeros behind the last member: they are what a download leaves
    that reserved its room and did not fill it.
    """

    def __init__(
        self, path: Path, progress: Callable[[int], None] | None = None, limits: Limits | None = None
    ) -> None:
        self.path, self.progress, self.limits = path, progress, limits or Limits()
        self.file = path.open("rb")
        head = self.file.read(4)
        self.file.seek(0)
        if not head.startswith(MAGIC[".gz"]):
            self.file.close()
            raise wrong_kind(path, "gzip", head)
        self.member: zlib._Decompress | None = None
        self.ready = b""  # compressed bytes, read and not yet used
        self.given = 0  # bytes given out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if not self.ready:
                self.ready = self.file.read(128 << 10)
                if self.progress is not None:
                    self.progress(len(self.ready))
            if not self.ready:
                if self.member is not None:
                    raise self._fault("the file is cut short (it does not end where a gzip member ends)")
                return 0
            if self.member is None:
                self.member = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: gzip, with its CRC and length
            try:
                data = self.member.decompress(self.ready, len(buffer))
            except zlib.error as error:
                raise self._fault(f"damaged gzip data ({error})") from None
            self.ready = self.member.unconsumed_tail
            if self.member.eof:
                self.ready, self.member = self.member.unused_data, None
            if data:
                buffer[: len(data)] = data
                self.given += len(data)
                self.limits.check_bomb(self.path, self.file.tell(), self.given)
                return len(data)

    def _fault(self, what: str) -> InputError:
        return damaged(self.path, f"{what}, after {self.given:,} bytes of text")

    def close(self) -> None:
        self.file.close()
        super().close()


class PlainFile(io.FileIO):
    """Read a file that is not compressed; a cut in it cannot be seen here, only by its sha256."""

    def __init__(
        self, path: Path, progress: Callable[[int], None] | None = None, limits: Limits | None = None
    ) -> None:
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        if self.progress is not None and count:
            self.progress(count)
        return count


def open_bytes(
    path: Path, progress: Callable[[int], None] | None = None, limits: Limits | None = None
) -> io.BufferedReader:
    """Open a file for reading, decompressed where its name ends in .zst or .gz.

    `progress` is told the bytes read of the file itself.  Opening and reading raise InputError for a
    compressed file that is of another kind, cut short, damaged or beyond the limits.
    """
    kinds: dict[str, Callable[..., io.RawIOBase]] = {".zst": ZstdFile, ".gz": GzipFile}
    return io.BufferedReader(kinds.get(path.suffix, PlainFile)(path, progress, limits), CHUNK)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a shard, without its newline; `data` is None when it is longer than allowed.

    Where a shard is not JSON lines, `data` is the JSON line made of one of its records.
    """

    number: int  # from 1
    offset: int  # of its first byte in the decompressed shard
    size: int  # in bytes
    data: bytes | None


class Lines(Iterator[Line]):
    """The lines of an open file; what is longer than `max_bytes` is measured and not kept.

    number, offset: of the line that comes next
    spill: is given the bytes of a line that is not kept, in pieces, as they are read
    """

    def __init__(self, file: io.BufferedReader, max_bytes: int) -> None:
        self.file, self.max_bytes = file, max_bytes
        self.number, self.offset = 1, 0
        self.spill: Callable[[bytes], object] | None = None

    def __next__(self) -> Line:
        data = self.file.readline(self.max_bytes + 1)
        if not data:
            raise StopIteration
        size = len(data)
        too_long = size > self.max_bytes and not data.endswith(b"\n")
        if too_long:
            self._spill(data)
            while not data.endswith(b"\n") and (data := self.file.readline(CHUNK)):
                size += len(data)
                self._spill(data)
        line = Line(
            self.number,
            self.offset,
            size - data.endswith(b"\n"),
            None if too_long else data.removesuffix(b"\n"),
        )
        self.number += 1
        self.offset += size
        return line

    def skip_to(self, offset: int) -> None:
        """Go on to the first line that begins at `offset` or behind it, as fast as the file can be read."""
        if self.offset >= offset:
            return
        while data := self.file.peek():
            end = data.find(b"\n", max(0, offset - 1 - self.offset)) + 1
            taken = self.file.read(end or len(data))
            self.number += taken.count(b"\n")
            self.offset += len(taken)
            if end:
                return

    def _spill(self, data: bytes) -> None:
        if self.spill is not None:
            self.spill(data.removesuffix(b"\n"))


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
