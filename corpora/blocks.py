"""Blocks on disk: rows of ids as Arrow IPC files (for training) or Parquet (for exchange).

A row's columns:

input_ids  fixed-size list of uint16 (uint32 above 65,536 ids)
tokens     how many of these ids are real; the rest, at the end, is padding
shard      the shard that its documents come from
segments   the pieces of documents in it, in order: `document`, its number in the part's documents file; `line`,
           that of the shard, from 1; `offset`, where in the document's ids the piece begins; `length`, in ids

What the rows were made from stands as JSON under the key "pileline" of the schema's metadata.  Any Arrow or
Parquet reader opens them.
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from corpora.errors import InputError
from corpora.pack import Ids, Rows

Format = Literal["arrow", "parquet"]
PARQUET_ROW_GROUP_TOKENS = 1 << 19  # a random row costs the decoding of its whole group: 1 MB of ids
METADATA_KEY = b"pileline"
SEGMENT = pa.struct(
    [
        pa.field("document", pa.uint32(), nullable=False),
        pa.field("line", pa.uint64(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("length", pa.uint32(), nullable=False),
    ]
)


def schema(length: int, dtype: np.dtype[Any], metadata: dict[str, Any]) -> pa.Schema:
    """Return the schema of blocks of `length` ids."""
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    fields = [
        pa.field("input_ids", pa.list_(item, length), nullable=False),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("segments", pa.list_(pa.field("item", SEGMENT, nullable=False)), nullable=False),
    ]
    text = json.dumps(metadata, sort_keys=True, ensure_ascii=False)
    return pa.schema(fields, metadata={METADATA_KEY: text.encode()})


# pa.array would import pandas, where it is installed: 0.3 s and 40 MB for each worker.


def numbers(values: npt.NDArray[Any], type: pa.DataType) -> pa.Array:
    """Return numbers as a column of this type, without nulls."""
    plain = np.ascontiguousarray(values, type.to_pandas_dtype())
    return pa.Array.from_buffers(type, len(plain), [None, pa.py_buffer(plain)])


def strings(values: Sequence[str]) -> pa.Array:
    """Return strings as a column, without nulls."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


class HashingFile(io.RawIOBase):
    """A file that keeps the sha256 of what is written to it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


class BlockWriter:
    """Write batches of rows to one file; give it a name only after `close` has returned its sha256.

    A Parquet file that is closed early is valid and short, an Arrow file is not: in both cases the caller
    writes aside and renames.
    """

    def __init__(self, path: Path, format: Format, schema: pa.Schema) -> None:
        self.schema = schema
        self.length = schema.field("input_ids").type.list_size
        self.file = HashingFile(path)
        self.rows = 0
        self._writer: Any
        if format == "arrow":
            self._writer = pa.ipc.new_file(self.file, schema)
        else:
            self._writer = pq.ParquetWriter(
                self.file,
                schema,
                compression="zstd",
                compression_level=3,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )

    def write(self, rows: Rows, shard: str, lines: npt.NDArray[np.uint64]) -> None:
        """Append rows of a shard; `lines` are those of the part's documents."""
        kind = self.schema.field("input_ids").type
        ids = pa.FixedSizeListArray.from_arrays(numbers(rows.ids.reshape(-1), kind.value_type), type=kind)
        columns = (rows.document, lines[rows.document], rows.offset, rows.length)
        pieces = pa.StructArray.from_arrays(
            [numbers(values, field.type) for values, field in zip(columns, SEGMENT, strict=True)],
            fields=list(SEGMENT),
        )
        ends = np.searchsorted(rows.row, np.arange(len(rows.ids) + 1))
        segments = pa.ListArray.from_arrays(
            numbers(ends, pa.int32()), pieces, type=self.schema.field("segments").type
        )
        tokens, names = numbers(rows.tokens, pa.uint32()), strings([shard] * len(rows.ids))
        self.write_batch(pa.record_batch([ids, tokens, names, segments], schema=self.schema))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Append a batch of this schema."""
        if isinstance(self._writer, pq.ParquetWriter):
            group = max(1, PARQUET_ROW_GROUP_TOKENS // self.length)
            self._writer.write_table(pa.Table.from_batches([batch]), row_group_size=group)
        else:
            self._writer.write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> str:
        """Finish the file and return its sha256."""
        self._writer.close()
        self.file.close()
        return self.file.sha256.hexdigest()


class _ArrowFile:
    """Rows of one Arrow IPC file, memory-mapped: a row is read from the page cache without a copy."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.schema = reader.schema
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        length = self.schema.field("input_ids").type.list_size
        self.ids = [b.column("input_ids").flatten().to_numpy().reshape(-1, length) for b in self.batches]
        self.tokens = [b.column("tokens").to_numpy() for b in self.batches]
        self.starts = np.cumsum([0, *(b.num_rows for b in self.batches)])

    def chunk(self, index: int) -> tuple[Ids, npt.NDArray[np.uint32]]:
        return self.ids[index], self.tokens[index]

    def segments(self, index: int) -> pa.ListArray:
        return self.batches[index].column("segments")

    def batch(self, index: int) -> pa.RecordBatch:
        return self.batches[index]


class _ParquetFile:
    """Rows of one Parquet file; the row groups last used are kept decoded."""

    def __init__(self, path: Path, keep: int = 8) -> None:
        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        self.schema = self.file.schema_arrow
        self.length = self.schema.field("input_ids").type.list_size
        meta = self.file.metadata
        self.starts = np.cumsum([0, *(meta.row_group(i).num_rows for i in range(meta.num_row_groups))])
        self.keep = keep
        self.groups: OrderedDict[int, tuple[Ids, npt.NDArray[np.uint32]]] = OrderedDict()
        self.pieces: OrderedDict[int, pa.ListArray] = OrderedDict()

    def chunk(self, index: int) -> tuple[Ids, npt.NDArray[np.uint32]]:
        if index not in self.groups:
            table = self.file.read_row_group(index, columns=["input_ids", "tokens"]).combine_chunks()
            ids = table["input_ids"].chunk(0).flatten().to_numpy().reshape(-1, self.length)
            self.groups[index] = ids, table["tokens"].chunk(0).to_numpy()
            if len(self.groups) > self.keep:
                self.groups.popitem(last=False)
        self.groups.move_to_end(index)
        return self.groups[index]

    def segments(self, index: int) -> pa.ListArray:
        if index not in self.pieces:
            table = self.file.read_row_group(index, columns=["segments"]).combine_chunks()
            self.pieces[index] = table["segments"].chunk(0)
            if len(self.pieces) > self.keep:
                self.pieces.popitem(last=False)
        self.pieces.move_to_end(index)
        return self.pieces[index]

    def batch(self, index: int) -> pa.RecordBatch:
        table = self.file.read_row_group(index).cast(self.schema).combine_chunks()
        return table.to_batches()[0]


class Blocks:
    """The rows of several block files as one sequence, in the files' order.

    It is a map-style dataset as PyTorch's DataLoader wants one, and can be handed to processes: memory-mapped
    files are opened anew there.

    length: ids in a row
    metadata: of the first file (see the module)
    """

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise InputError("no block files given")
        self.paths = tuple(files)
        self.files = [_open(path) for path in files]
        self.length: int = self.files[0].schema.field("input_ids").type.list_size
        self.metadata: dict[str, Any] = json.loads(self.files[0].schema.metadata[METADATA_KEY])
        for path, file in zip(files, self.files, strict=True):
            if file.schema.field("input_ids").type != self.files[0].schema.field("input_ids").type:
                raise InputError(
                    f"{path}: its rows are {file.schema.field('input_ids').type}, not of the same kind as {files[0]}"
                )
        self.starts = np.cumsum([0, *(int(file.starts[-1]) for file in self.files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Blocks, (self.paths,)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: `input_ids`, int64 [length], and `tokens`, how many of them are real."""
        ids, tokens = self.rows([index])
        return {"input_ids": ids[0].astype(np.int64), "tokens": int(tokens[0])}

    def where(self, index: int) -> tuple[Path, int, dict[str, Any]]:
        """Return a row's file, its number there, and all its columns as Python values."""
        path, file, row, chunk = self._find(index)
        one = file.batch(chunk).slice(row - int(file.starts[chunk]), 1)
        return path, row, one.to_pylist()[0]

    def _find(self, index: int) -> tuple[Path, "_ArrowFile | _ParquetFile", int, int]:
        """Return a row's file, its number in it, and the chunk it lies in."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        f = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, row = self.files[f], int(index - self.starts[f])
        return self.paths[f], file, row, int(np.searchsorted(file.starts, row, side="right")) - 1

    def rows(self, indices: Iterable[int]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the rows [n, length] of these indices, and how many ids of each are real [n]."""
        wanted = np.fromiter(indices, np.int64)
        dtype = self.files[0].schema.field("input_ids").type.value_type.to_pandas_dtype()
        ids = np.empty((len(wanted), self.length), dtype)
        tokens = np.empty(len(wanted), np.int64)
        for n, index in enumerate(wanted):
            _, file, row, c = self._find(int(index))
            chunk_ids, chunk_tokens = file.chunk(c)
            ids[n] = chunk_ids[row - file.starts[c]]
            tokens[n] = chunk_tokens[row - file.starts[c]]
        return ids, tokens

    def documents(self, indices: Iterable[int]) -> npt.NDArray[np.int32]:
        """Return for each id of these rows which document of its row it belongs to, [n, length].

        Documents count from 0 in each row; padding comes after the last of them and has the next number.  A
        row of 6 ids with pieces of 2 and 3 gives [0 0 1 1 1 2].
        """
        wanted = np.fromiter(indices, np.int64)
        documents = np.empty((len(wanted), self.length), np.int32)
        for n, index in enumerate(wanted):
            _, file, row, c = self._find(int(index))
            lengths = file.segments(c)[row - int(file.starts[c])].values.field("length").to_numpy()
            ends = np.cumsum(lengths)
            documents[n] = np.searchsorted(ends, np.arange(self.length), side="right")
        return documents

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, with all columns, as batches of the files."""
        for file in self.files:
            for chunk in range(len(file.starts) - 1):
                yield file.batch(chunk)


def _open(path: Path) -> _ArrowFile | _ParquetFile:
    try:
        return _ParquetFile(path) if path.suffix == ".parquet" else _ArrowFile(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; prepare its shard again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path}: not a whole block file ({error}); delete it and prepare its shard again"
        ) from None


def convert(source: Path, target: Path, format: Format) -> str:
    """Write the rows of one block file in another format, metadata and all; return the new file's sha256.

    `target` is written in place: the caller writes aside.
    """
    blocks = Blocks([source])
    writer = BlockWriter(target, format, blocks.files[0].schema)
    for batch in blocks.batches():
        writer.write_batch(batch)
    return writer.close()
