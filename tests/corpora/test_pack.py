"""Rows: exact examples, and that no token is lost, doubled or moved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora.pack import ConcatPacker

PAD = 9


def pack(documents: list[list[int]], length: int, rows_per_batch: int = 2) -> tuple[list[list[int]], int]:
    packer = ConcatPacker(length, 256, PAD)
    packer.rows_per_batch = rows_per_batch
    packer.buffer = np.empty(rows_per_batch * length, np.uint16)
    rows: list[list[int]] = []
    for document in documents:
        for batch in packer.add(np.array(document, np.uint32)):
            assert len(batch) == rows_per_batch
            rows += batch.tolist()
    last, padding = packer.finish()
    return rows + last.tolist(), padding


@pytest.mark.parametrize(
    ("documents", "rows", "padding"),
    [
        ([[1, 2, 3], [4, 5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]], 0),
        ([[1, 2, 3], [4, 5]], [[1, 2, 3, 4], [5, PAD, PAD, PAD]], 3),
        ([[1], [], [2]], [[1, 2, PAD, PAD]], 2),
        ([list(range(8))], [[0, 1, 2, 3], [4, 5, 6, 7]], 0),
        ([list(range(9))], [[0, 1, 2, 3], [4, 5, 6, 7], [8, PAD, PAD, PAD]], 3),
        ([], [], 0),
    ],
)
def test_rows(documents: list[list[int]], rows: list[list[int]], padding: int) -> None:
    assert pack(documents, 4) == (rows, padding)


@given(
    st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=20),
    st.integers(2, 9),
    st.integers(1, 4),
)
def test_tokens_are_conserved(documents: list[list[int]], length: int, rows_per_batch: int) -> None:
    rows, padding = pack(documents, length, rows_per_batch)
    flat = [i for row in rows for i in row]
    assert flat[: len(flat) - padding] == [i for document in documents for i in document]
    assert flat[len(flat) - padding :] == [PAD] * padding
    assert 0 <= padding < length


@pytest.mark.parametrize(("vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(vocab: int, dtype: type) -> None:
    assert ConcatPacker(8, vocab, 0).buffer.dtype == dtype
