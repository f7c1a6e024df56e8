"""Shards that are not JSON lines: each of their records becomes a JSON line on its way in.

So there is one parser, one quarantine and one ledger for all of them.  What a record holds that is no UTF-8 is
put into its line as it stands, and `parse_record` names it.
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpora.errors import InputError
from corpora.read import (
    CHUNK,
    FORMATS,
    MAGIC,
    Format,
    Limits,
    Line,
    Lines,
    damaged,
    open_bytes,
    suffix_of,
    wrong_kind,
)
from corpora.settings import Corpus

BATCH_ROWS = 16  # of a Parquet file, decoded at a time: a row may be as long as a line
_BOM = b"\xef\xbb\xbf"

Progress = Callable[[int], None]
Reader = Callable[[Path, Corpus, Progress], Iterator[Line]]


class Shard:
    """A shard's records as JSON lines, read as the end of its name says; whole, or part by part.

    Part n of size s holds the records whose first byte lies in [n s, (n + 1) s) of the decompressed shard:
    which part a record belongs to depends on nothing but its place.

    Opening and reading raise InputError for a name of no known format, and for a file that is of another
    format, cut short, damaged or without the settings' text column.
    """

    def __init__(self, path: Path, corpus: Corpus, progress: Progress | None = None) -> None:
        suffix = suffix_of(path.name)
        if suffix is None:
            raise InputError(f"{path}: its name ends in no known format; known: {', '.join(FORMATS)}")
        self.lines = _READERS[FORMATS[suffix]](path, corpus, progress or (lambda _: None))
        self.ended = False
        self._next: Line | None = None

    def part(self, number: int, size: int) -> Iterator[Line]:
        """Yield the records of a part.  Parts are asked for in ascending order; those between are passed over."""
        start, end = number * size, (number + 1) * size
        if isinstance(self.lines, Lines):
            self.lines.skip_to(start)
            while self.lines.offset < end and (line := next(self.lines, None)) is not None:
                yield line
            self.ended = self.lines.offset < end
            return
        while True:
            # Here only the record itself tells where it begins: one that is past the end is kept for later.
            self._next = self._next or next(self.lines, None)
            if self._next is None:
                self.ended = True
                return
            if self._next.offset >= end:
                return
            line, self._next = self._next, None
            if line.offset >= start:
                yield line

    def close(self) -> None:
        """Close the file."""
        if isinstance(self.lines, Lines):
            self.lines.file.close()
        elif isinstance(self.lines, Generator):
            self.lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_shard(path: Path, corpus: Corpus, progress: Progress | None = None) -> Iterator[Line]:
    """Yield all of a shard's records as JSON lines; see `Shard`.

    `progress` is told the bytes read of the file.  A record above [corpus] max_record_bytes has no data.
    """
    with Shard(path, corpus, progress) as shard:
        yield from shard.lines


def _lines(path: Path, corpus: Corpus, progress: Progress) -> Lines:
    return Lines(open_bytes(path, progress, Limits.of(corpus)), corpus.max_record_bytes)


def _text(path: Path, corpus: Corpus, progress: Progress) -> Iterator[Line]:
    """Yield the texts of a .txt file."""
    with open_bytes(path, progress, Limits.of(corpus)) as file:
        yield from _texts(file, corpus)


def _texts(file: io.BufferedReader, corpus: Corpus) -> Iterator[Line]:
    """Yield an open file's texts as JSON lines; offset and size are those of the text in the file.

    The meaning of `sample_by` is that of `load_dataset("text")` in Hugging Face's datasets, but:
    a line ends at LF or CRLF, never at a lone CR, as in JSON lines ([clean] makes that a newline);
    paragraphs are parted by any number of blank lines, spaces in them allowed, and end without a newline, so
    that none is empty, begins with a newline, or is another text for being the last of its file;
    blank lines and blank files are given as they stand, for the ledger to count.
    """
    for text in _SAMPLERS[corpus.sample_by](file, corpus.max_record_bytes):
        data = text.data
        if data is not None:
            # In front of a shard's first line a byte order mark is taken off, and counted, as in JSON lines.
            mark = _BOM if text.number == 1 and data.startswith(_BOM) else b""
            data = data.removeprefix(mark)
            if data.strip():
                data = _json({corpus.text_field: _decode(data)})
            data = mark + data
        yield Line(text.number, text.offset, text.size, data)


def _whole(file: io.BufferedReader, max_bytes: int) -> Iterator[Line]:
    held, size = bytearray(), 0
    while chunk := file.read(CHUNK):
        size += len(chunk)
        if size <= max_bytes:
            held += chunk
    yield Line(1, 0, size, bytes(held) if size <= max_bytes else None)


def _paragraphs(file: io.BufferedReader, max_bytes: int) -> Iterator[Line]:
    number = 0
    for blank, lines in itertools.groupby(Lines(file, max_bytes), _is_blank):
        if blank:
            continue
        number += 1
        held, start, size = bytearray(), -1, 0
        for line in lines:
            start = line.offset if start < 0 else start
            size = line.offset + line.size - start
            if line.data is not None and size <= max_bytes:
                held += line.data + b"\n"
            else:
                held.clear()
        yield _without_cr(Line(number, start, size, bytes(held[:-1]) if size <= max_bytes else None))


def _separate_lines(file: io.BufferedReader, max_bytes: int) -> Iterator[Line]:
    return map(_without_cr, Lines(file, max_bytes))


def _is_blank(line: Line) -> bool:
    return line.data is not None and not line.data.strip()


def _without_cr(line: Line) -> Line:
    if line.data is None or not line.data.endswith(b"\r"):
        return line
    return Line(line.number, line.offset, line.size - 1, line.data[:-1])


def _tar(path: Path, corpus: Corpus, progress: Progress) -> Iterator[Line]:
    """Yield the texts of the files in a .tar, in its order; offsets are those in the archive."""
    number = told = 0
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")
        except (tarfile.TarError, ValueError):
            raise wrong_kind(path, "tar", head) from None
        try:
            while (member := _next_file(path, archive)) is not None:
                for text in _texts(cast(io.BufferedReader, archive.extractfile(member)), corpus):
                    number += 1
                    data = text.data
                    if data is not None and number > 1:
                        data = data.removeprefix(_BOM)
                    yield Line(number, member.offset_data + text.offset, text.size, data)
                progress(archive.offset - told)
                told = archive.offset
        except tarfile.TarError as error:
            raise damaged(path, f"damaged or cut short tar data ({error})") from None
        # tarfile takes a cut or a broken header for the archive's end; that is two blocks of zeros, or more.
        zeros = 0
        file.seek(archive.offset)
        while chunk := file.read(CHUNK):
            zeros += len(chunk)
            if any(chunk):
                raise damaged(path, f"damaged tar data (no file's header at byte {archive.offset:,})")
        if zeros < 2 * tarfile.BLOCKSIZE:
            raise damaged(path, f"the file is cut short (no end of the archive at byte {archive.offset:,})")
        progress(archive.offset + zeros - told)


def _next_file(path: Path, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return an archive's next regular file, or None at what tarfile takes for its end."""
    while True:
        try:
            member = archive.next()
        except ValueError as error:
            raise tarfile.ReadError(str(error)) from None
        archive.members = []  # type: ignore[attr-defined]  # where it would keep every header
        if member is None:
            return None
        if member.size < 0:
            raise tarfile.ReadError("a file of negative size")
        if member.isreg() and not member.issparse():
            return member
        if not member.isdir():
            raise InputError(f"{path}: {member.name!r} in it is no plain file; pack texts only, no links")


def _parquet(path: Path, corpus: Corpus, progress: Progress) -> Iterator[Line]:
    """Yield the rows of a .parquet file; offset and size are those of the JSON lines made of them."""
    with path.open("rb") as file:
        head = file.read(4)
        size = file.seek(0, io.SEEK_END)
    if not head.startswith(MAGIC[".parquet"]):
        raise wrong_kind(path, "parquet", head)
    number = offset = told = 0
    try:
        # Both are needed to read page by page; otherwise it holds a whole column of a row group at a time.
        paged = {"buffer_size": CHUNK, "pre_buffer": False}
        with pq.ParquetFile(path, page_checksum_verification=True, **paged) as table:
            fields = [[corpus.text_field], corpus.subset_field.split(".")]
            has_text, has_subset = (_has_strings(table.schema_arrow, keys) for keys in fields)
            if not has_text:
                columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
                raise InputError(
                    f"{path}: no column {corpus.text_field!r} of strings in it; name one in [corpus] text_field; "
                    f"it has: {columns[:500] or 'none'}"
                )
            if not has_subset:
                del fields[1]
            names, total = [".".join(keys) for keys in fields], table.metadata.num_rows
            for batch in table.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
                for row in zip(*(_strings(batch, keys) for keys in fields), strict=True):
                    data = _json(_nested(fields, row))
                    number += 1
                    fits = len(data) <= corpus.max_record_bytes
                    yield Line(number, offset, len(data), data if fits else None)
                    offset += len(data) + 1
                done = size * number // max(1, number, total)
                progress(done - told)
                told = done
            if number != total:
                raise pa.ArrowInvalid(f"{number:,} rows instead of {total:,}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the data
            raise
        reason = str(error).partition("\n")[0]
        raise damaged(path, f"damaged or cut short parquet data ({reason})") from None
    progress(size - told)


def _has_strings(schema: pa.Schema, keys: list[str]) -> bool:
    """Tell whether a column of strings, or of bytes, stands at this path, and is the only one there."""
    kind = pa.struct(schema)
    for key in keys:
        index = kind.get_field_index(key) if pa.types.is_struct(kind) else -1
        if index < 0:
            return False
        kind = kind.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in _STRINGS)


def _strings(batch: pa.RecordBatch, keys: list[str]) -> list[str | None]:
    # By way of bytes: as strings, one that is not UTF-8 would be an exception for all rows of the batch.
    column = pc.struct_field(batch.to_struct_array(), keys).cast(pa.large_binary())
    return [None if value is None else _decode(value) for value in column.to_pylist()]


def _nested(paths: list[list[str]], values: Iterable[Any]) -> dict[str, Any]:
    """Put values at their paths: [["a"], ["b", "c"]] and (1, 2) are {"a": 1, "b": {"c": 2}}."""
    nested: dict[str, Any] = {}
    for keys, value in zip(paths, values, strict=True):
        for key in reversed(keys[1:]):
            value = {key: value}
        nested[keys[0]] = value
    return nested


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _json(value: dict[str, Any]) -> bytes:
    """Return a JSON line; what `_decode` escaped, because it is no UTF-8, comes out as the bytes it was."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


_READERS: dict[Format, Reader] = {"lines": _lines, "text": _text, "parquet": _parquet, "tar": _tar}
_SAMPLERS: dict[str, Callable[[io.BufferedReader, int], Iterator[Line]]] = {
    "document": _whole,
    "paragraph": _paragraphs,
    "line": _separate_lines,
}
_STRINGS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
