"""Block files: what is written is read, by us, by pyarrow and by datasets; a torn file is refused."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import blocks, pack
from corpora.errors import InputError
from corpora.pack import BestFitPacker, ConcatPacker, Rows

LENGTH = 6
FORMATS = ("arrow", "parquet")
LINES = np.arange(1, 90_001, 10, dtype=np.uint64)  # document n stands in line 10 n + 1


def write(path: Path, rows: np.ndarray, padding: int = 0) -> str:
    format = "parquet" if path.suffix == ".parquet" else "arrow"
    writer = blocks.BlockWriter(path, format, blocks.schema(LENGTH, rows.dtype, {"made": "here"}))
    for start in range(0, len(rows), 4):
        batch = rows[start : start + 4]
        tokens = np.full(len(batch), LENGTH)
        if start + 4 >= len(rows):
            tokens[-1] -= padding
        numbers = np.arange(len(batch))
        pieces = Rows(batch, row=numbers, document=start + numbers, offset=numbers * 0, length=tokens)
        writer.write(pieces, "train/00", LINES)
    return writer.close()


def columns(row: int, tokens: int = LENGTH) -> dict[str, Any]:
    segment = {"document": row, "line": 10 * row + 1, "offset": 0, "length": tokens}
    return {"tokens": tokens, "shard": "train/00", "segments": [segment]}


def some_rows(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n * LENGTH, dtype=np.uint16).reshape(n, LENGTH)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_come_back_in_any_order(tmp_path: Path, format: str) -> None:
    paths = [tmp_path / f"a.{format}", tmp_path / f"b.{format}"]
    digest = write(paths[0], some_rows(9))
    assert digest == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    write(paths[1], some_rows(5, 1000), padding=2)
    both = blocks.Blocks(paths)
    assert (len(both), both.length, both.metadata) == (14, LENGTH, {"made": "here"})
    ids, tokens = both.rows([13, 0, 8, 9])
    assert ids.dtype == np.uint16
    assert ids.tolist() == [
        some_rows(5, 1000)[4].tolist(),
        *some_rows(9)[[0, 8]].tolist(),
        [1000, 1001, 1002, 1003, 1004, 1005],
    ]
    assert tokens.tolist() == [4, 6, 6, 6]
    with pytest.raises(IndexError):
        both.rows([14])
    assert sum(batch.num_rows for batch in both.batches()) == 14
    assert both.where(12) == (paths[1], 3, {"input_ids": some_rows(5, 1000)[3].tolist(), **columns(3)})
    assert both.where(13)[2]["segments"] == columns(4, tokens=4)["segments"]


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_are_a_map_style_dataset_that_can_be_handed_to_processes(tmp_path: Path, format: str) -> None:
    write(tmp_path / f"a.{format}", some_rows(9), padding=2)
    copy = pickle.loads(pickle.dumps(blocks.Blocks([tmp_path / f"a.{format}"])))
    assert len(copy) == 9
    assert copy[8]["input_ids"].dtype == np.int64
    assert (copy[8]["input_ids"].tolist(), copy[8]["tokens"]) == (some_rows(9)[8].tolist(), 4)


@pytest.mark.parametrize("format", FORMATS)
def test_others_read_them_without_our_code(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"part-0000.{format}"
    write(path, some_rows(9))
    table = pq.read_table(path) if format == "parquet" else pa.ipc.open_file(path).read_all()
    assert np.array(table["input_ids"].to_pylist()).tolist() == some_rows(9).tolist()
    assert json.loads(table.schema.metadata[b"pileline"]) == {"made": "here"}
    dataset = datasets.load_dataset(
        format, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset.num_rows == 9
    assert dataset[8] == {"input_ids": some_rows(9)[8].tolist(), **columns(8)}


def test_arrow_is_two_bytes_a_token(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", np.zeros((4000, LENGTH), np.uint16))
    # Beside them, for each row: its tokens, the shard's name and where it ends, one segment and where it ends.
    assert (tmp_path / "a.arrow").stat().st_size < 4000 * (2 * LENGTH + 4 + 8 + 4 + 20 + 4) + 1000 * 700


@pytest.mark.parametrize("format", FORMATS)
def test_a_torn_file_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format}"
    write(path, some_rows(9))
    whole = path.read_bytes()
    for size in range(0, len(whole), 41):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a whole block file"):
            blocks.Blocks([path])
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        blocks.Blocks([path])


def test_files_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", some_rows(2))
    write(tmp_path / "b.arrow", some_rows(2).astype(np.uint32))
    with pytest.raises(InputError, match=r"b\.arrow.*not of the same kind"):
        blocks.Blocks([tmp_path / "a.arrow", tmp_path / "b.arrow"])


def test_convert_keeps_rows_and_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", some_rows(9), padding=3)
    blocks.convert(tmp_path / "a.arrow", tmp_path / "b.parquet", "parquet")
    blocks.convert(tmp_path / "b.parquet", tmp_path / "c.arrow", "arrow")
    first, last = blocks.Blocks([tmp_path / "a.arrow"]), blocks.Blocks([tmp_path / "c.arrow"])
    assert first.metadata == last.metadata
    for row in range(9):
        assert first.where(row)[1:] == last.where(row)[1:]
    assert first.where(8)[2] == {"input_ids": some_rows(9)[8].tolist(), **columns(8, tokens=3)}


@pytest.mark.parametrize("format", FORMATS)
def test_each_id_knows_its_document(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format}"
    writer = blocks.BlockWriter(path, format, blocks.schema(LENGTH, np.dtype(np.uint16), {}))
    packer = ConcatPacker(LENGTH, np.uint16, pad=0)
    lengths = [2, 3, 8, 0, 5, 1, 1, 1]  # 21 ids; one document has none
    for rows in (*packer.add(np.arange(1, 22, dtype=np.uint16), lengths), *packer.finish()):
        writer.write(rows, "train/00", LINES)
    writer.close()
    read = blocks.Blocks([path])
    documents = read.documents([3, 0, 2, 1])
    assert documents.dtype == np.int32
    assert documents.tolist() == [
        [0, 1, 2, 3, 3, 3],  # three of one id each, and padding
        [0, 0, 1, 1, 1, 2],
        [0, 1, 1, 1, 1, 1],  # the end of the one that fills the row before
        [0, 0, 0, 0, 0, 0],
    ]
    assert read.documents([]).shape == (0, LENGTH)
    with pytest.raises(IndexError):
        read.documents([4])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("packer", [ConcatPacker, BestFitPacker])
def test_documents_are_the_segments(
    tmp_path: Path, format: str, packer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "BATCH_TOKENS", 32 * 11)  # many batches in a file
    paths = [tmp_path / f"{name}.{format}" for name in "ab"]
    for path, seed in zip(paths, (1, 2), strict=True):
        lengths = np.random.default_rng(seed).integers(1, 20, 500).tolist()
        packing = packer(32, np.uint16, 0)
        writer = blocks.BlockWriter(path, format, blocks.schema(32, np.dtype(np.uint16), {}))
        for rows in (*packing.add(np.ones(sum(lengths), np.uint16), lengths), *packing.finish()):
            writer.write(rows, "train/00", LINES)
        writer.close()
    read = blocks.Blocks(paths)
    every = np.arange(len(read))[::-1]
    for index, documents in zip(every, read.documents(every), strict=True):
        lengths = [segment["length"] for segment in read.where(int(index))[2]["segments"]]
        lengths.append(32 - sum(lengths))
        assert documents.tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()
