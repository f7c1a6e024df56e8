"""The table of a part's documents, and the file of its lines that are none.

documents-00000.arrow has a row for each document kept: where it comes from (line, offset and size in the
decompressed shard), how much there is of it (bytes of cleaned text, tokens without BOS and EOS), its subset, the
128-bit xxh3 of its cleaned text in UTF-8, whether an earlier document of the part has the same, and whether its
ids decode to exactly its text (SentencePiece takes U+2581 for a space).

quarantine-00000.jsonl.zst holds the raw bytes of the lines that are no document, a line each, so that it is a
shard that can be mended and run again; quarantine-00000.index.jsonl says for each which line it was and why.
"""

import io
import json
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import xxhash
import zstandard

from corpora.blocks import HashingFile, numbers, strings
from corpora.errors import InputError
from corpora.files import sha256_file, write_aside
from corpora.read import Line

SCHEMA = pa.schema(
    [
        pa.field("line", pa.uint64(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("size", pa.uint64(), nullable=False),
        pa.field("bytes", pa.uint64(), nullable=False),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("subset", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("xxh3_128", pa.binary(16), nullable=False),
        pa.field("duplicate", pa.bool_(), nullable=False),
        pa.field("exact", pa.bool_(), nullable=False),
    ]
)
Outputs = dict[str, dict[str, Any]]  # file name -> size, sha256


def content_hash(text: bytes) -> bytes:
    """Return the 128-bit hash that a cleaned text is known by."""
    return xxhash.xxh3_128_digest(text)


class Table:
    """The rows of a part's documents, in little memory: there may be a million."""

    def __init__(self) -> None:
        self.numbers = {name: array("Q") for name in ("line", "offset", "size", "bytes", "tokens")}
        self.subsets: dict[str, int] = {}
        self.subset = array("i")
        self.hashes = bytearray()
        self.duplicate = array("b")
        self.exact = array("b")

    def __len__(self) -> int:
        return len(self.duplicate)

    def add(
        self,
        line: Line,
        text_bytes: int,
        tokens: int,
        subset: str,
        hash: bytes,
        *,
        duplicate: bool,
        exact: bool,
    ) -> None:
        """Append a document."""
        numbers = self.numbers
        numbers["line"].append(line.number)
        numbers["offset"].append(line.offset)
        numbers["size"].append(line.size)
        numbers["bytes"].append(text_bytes)
        numbers["tokens"].append(tokens)
        self.subset.append(self.subsets.setdefault(subset, len(self.subsets)))
        self.hashes += hash
        self.duplicate.append(duplicate)
        self.exact.append(exact)

    @property
    def lines(self) -> npt.NDArray[np.uint64]:
        """The line of each document."""
        return np.array(self.numbers["line"], np.uint64)

    def write(self, path: Path) -> str:
        """Write the table to a file and return its sha256; the caller writes aside."""
        columns = [
            *(numbers(np.array(self.numbers[f.name], np.uint64), f.type) for f in list(SCHEMA)[:5]),
            pa.DictionaryArray.from_arrays(
                numbers(np.array(self.subset), pa.int32()), strings(list(self.subsets))
            ),
            pa.Array.from_buffers(pa.binary(16), len(self), [None, pa.py_buffer(bytes(self.hashes))]),
            _truths(self.duplicate),
            _truths(self.exact),
        ]
        file = HashingFile(path)
        with pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        file.close()
        return file.sha256.hexdigest()


def _truths(values: "array[int]") -> pa.Array:
    bits = np.packbits(np.array(values, np.bool_), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def read_table(path: Path) -> pa.Table:
    """Read a part's documents.  Raises InputError for a file that is missing or torn."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a whole documents file ({error}); delete it and prepare its shard again"
        ) from None


class Quarantine:
    """The lines of a part that are no document; its files are made with the first of them.

    Used as a context: what is written gets its name when the context ends well.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.lines = folder / f"{stem}.jsonl.zst"
        self.index = folder / f"{stem}.index.jsonl"
        self.rows = 0
        self._stack = ExitStack()
        self._asides: tuple[Path, Path] | None = None
        self._spilled = False
        self._packed: zstandard.ZstdCompressionWriter
        self._told: io.BufferedWriter

    def spill(self, data: bytes) -> None:
        """Take a piece of a line that is too long to be handed over whole; `add` comes after the last."""
        self._open()
        self._packed.write(data)
        self._spilled = True

    def add(self, line: Line, reason: str) -> None:
        """Take a line.  The bytes of one too long stay in the shard, unless they were spilled."""
        self._open()
        if line.data is not None:
            self._packed.write(line.data)
        kept = line.data is not None or self._spilled
        if kept:
            self._packed.write(b"\n")
            self.rows += 1
        self._spilled = False
        told = {"line": line.number, "offset": line.offset, "bytes": line.size, "reason": reason}
        self._told.write(json.dumps(told | {"row": self.rows if kept else None}).encode() + b"\n")

    def close(self) -> Outputs:
        """Finish the files and say what they are; they get their names when the context ends."""
        if self._asides is None:
            return {}
        self._packed.close()  # type: ignore[no-untyped-call]
        self._told.close()
        return {
            final.name: {"size": aside.stat().st_size, "sha256": sha256_file(aside)}
            for final, aside in zip((self.lines, self.index), self._asides, strict=True)
        }

    def _open(self) -> None:
        if self._asides is None:
            lines = self._stack.enter_context(write_aside(self.lines))
            index = self._stack.enter_context(write_aside(self.index))
            packed, self._told = lines.open("wb"), index.open("wb")
            for file in (packed, self._told):
                self._stack.callback(file.close)
            self._packed = zstandard.ZstdCompressor(write_checksum=True).stream_writer(packed)
            self._asides = lines, index

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)
