"""Rows: exact examples; no token is lost, doubled or moved; segments say where each one comes from."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import pack
from corpora.pack import BestFitPacker, ConcatPacker, Rows
from corpora.settings import Blocks

PAD = 9
KINDS = {"concat": ConcatPacker, "best_fit": BestFitPacker}


def packed(kind: str, documents: list[list[int]], length: int, batch: int = 3) -> list[Rows]:
    """Pack documents, handed over `batch` at a time."""
    packer = KINDS[kind](length, np.uint16, PAD)
    found: list[Rows] = []
    for start in range(0, len(documents), batch):
        some = documents[start : start + batch]
        ids = np.array(list(itertools.chain(*some)), np.uint16)
        found += packer.add(ids, [len(document) for document in some])
    return found + list(packer.finish())


def segments(rows: Rows) -> list[tuple[int, ...]]:
    columns = (rows.row, rows.document, rows.offset, rows.length)
    return [tuple(int(n) for n in one) for one in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("documents", "ids", "pieces"),
    [
        (
            [[1, 2, 3], [4, 5, 6, 7, 8]],
            [[1, 2, 3, 4], [5, 6, 7, 8]],
            [(0, 0, 0, 3), (0, 1, 0, 1), (1, 1, 1, 4)],
        ),
        ([[1, 2, 3], [4, 5]], [[1, 2, 3, 4], [5, PAD, PAD, PAD]], [(0, 0, 0, 3), (0, 1, 0, 1), (1, 1, 1, 1)]),
        ([[1, 2, 3, 4], [5]], [[1, 2, 3, 4], [5, PAD, PAD, PAD]], [(0, 0, 0, 4), (1, 1, 0, 1)]),
        (
            [list(range(9))],
            [[0, 1, 2, 3], [4, 5, 6, 7], [8, PAD, PAD, PAD]],
            [(0, 0, 0, 4), (1, 0, 4, 4), (2, 0, 8, 1)],
        ),
    ],
)
def test_concat(documents: list[list[int]], ids: list[list[int]], pieces: list[tuple[int, ...]]) -> None:
    [rows] = packed("concat", documents, 4)
    assert rows.ids.tolist() == ids
    assert segments(rows) == pieces
    assert rows.tokens.tolist() == [sum(i != PAD for i in row) for row in ids]


@pytest.mark.parametrize(
    ("documents", "ids", "pieces"),
    [
        # 3 and 1 fit together; 2 and 2 do; the second document opens no row of its own.
        (
            [[1, 1, 1], [2, 2], [3, 3], [4]],
            [[1, 1, 1, 4], [2, 2, 3, 3]],
            [(0, 0, 0, 3), (0, 3, 0, 1), (1, 1, 0, 2), (1, 2, 0, 2)],
        ),
        # The fullest row with room is taken: 1 goes to the row of 3, not to that of 2.
        (
            [[1, 1], [2, 2, 2], [3]],
            [[1, 1, PAD, PAD], [2, 2, 2, 3]],
            [(0, 0, 0, 2), (1, 1, 0, 3), (1, 2, 0, 1)],
        ),
        # A long one gives full rows and a rest, which shares a row with a short one.
        (
            [[1], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]],
            [[1, 2, 2, PAD], [2, 2, 2, 2], [2, 2, 2, 2]],
            [(0, 0, 0, 1), (0, 1, 8, 2), (1, 1, 0, 4), (2, 1, 4, 4)],
        ),
        ([[1, 2, 3, 4]], [[1, 2, 3, 4]], [(0, 0, 0, 4)]),
    ],
)
def test_best_fit(documents: list[list[int]], ids: list[list[int]], pieces: list[tuple[int, ...]]) -> None:
    [rows] = packed("best_fit", documents, 4)
    assert rows.ids.tolist() == ids
    assert segments(rows) == pieces


@pytest.mark.parametrize("kind", KINDS)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), max_size=30),
    length=st.integers(2, 9),
    batch=st.integers(1, 7),
)
def test_every_token_stands_once_where_its_segment_says(
    kind: str, documents: list[list[int]], length: int, batch: int
) -> None:
    got = packed(kind, documents, length, batch)
    seen: list[list[int | None]] = [[None] * len(document) for document in documents]
    cut = 0
    for rows in got:
        place: dict[int, int] = {}
        for row, document, offset, size in segments(rows):
            start = place.get(row, 0)
            place[row] = start + size
            assert size > 0
            for n in range(size):
                assert seen[document][offset + n] is None
                seen[document][offset + n] = int(rows.ids[row, start + n])
            cut += size < len(documents[document]) <= length
        for row, filled in place.items():
            assert rows.tokens[row] == filled
            assert rows.ids[row, filled:].tolist() == [PAD] * (length - filled)
        assert sorted(place) == list(range(len(rows.ids)))
        assert rows.row.tolist() == sorted(rows.row.tolist())
    assert seen == documents
    padding = sum(rows.ids.size - int(rows.tokens.sum()) for rows in got)
    if kind == "concat":
        assert padding == -sum(map(len, documents)) % length
    else:
        assert cut == 0
        # Best fit leaves no two rows that would go into one.
        filled = sorted(int(n) for rows in got for n in rows.tokens)
        assert len(filled) < 2 or filled[0] + filled[1] > length


@pytest.mark.parametrize("kind", KINDS)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    batches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_rows_do_not_depend_on_how_documents_are_handed_over(
    kind: str, sizes: list[int], batches: tuple[int, int]
) -> None:
    documents = [[n % 250] * size for n, size in enumerate(sizes)]
    one, other = (packed(kind, documents, 7, batch) for batch in batches)
    assert [rows.ids.tolist() for rows in one] == [rows.ids.tolist() for rows in other]
    assert list(map(segments, one)) == list(map(segments, other))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_rows_are_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "BATCH_TOKENS", 12)
    documents = [[n] * 5 for n in range(9)]
    got = packed(kind, documents, 4)
    assert [len(rows.ids) for rows in got[:-1]] == [3] * (len(got) - 1)
    assert len(got) > 3
    flat = np.concatenate([rows.ids for rows in got])
    assert np.sort(flat[flat != PAD]).tolist() == sorted(n for d in documents for n in d)


def test_best_fit_pads_next_to_nothing_on_lengths_like_the_pile() -> None:
    """Lognormal lengths, mean 1,600 and median 500 tokens; 0.02 % is what may be lost."""
    lengths = np.random.default_rng(1).lognormal(np.log(500), 1.5, 20_000).astype(int) + 2
    documents = [np.zeros(n, np.uint16) for n in lengths]
    packer = BestFitPacker(2048, np.uint16, PAD)
    list(packer.add(np.concatenate(documents), lengths.tolist()))
    padding = sum(rows.ids.size - int(rows.tokens.sum()) for rows in packer.finish())
    assert 0 < padding / lengths.sum() < 0.0002


def test_the_seed_articles_group_texts_gives_the_same_blocks() -> None:
    """Concatenate a batch of documents, drop what does not fill a block: equal where there is nothing to drop."""

    def group_texts(documents: list[list[int]], length: int) -> list[list[int]]:
        flat = list(itertools.chain(*documents))
        whole = len(flat) // length * length
        return [flat[start : start + length] for start in range(0, whole, length)]

    generator = np.random.default_rng(2)
    documents = [generator.integers(0, 8, n).tolist() for n in (5, 1, 30, 12, 16)]
    assert sum(map(len, documents)) % 16 == 0
    [rows] = packed("concat", documents, 16)
    assert rows.ids.tolist() == group_texts(documents, 16)


def test_the_recipe_chooses() -> None:
    for kind, cls in KINDS.items():
        packer = pack.packer(Blocks.model_validate({"length": 8, "packer": kind}), np.uint32, 0)
        assert type(packer) is cls
        assert packer.version.startswith(kind)
