"""Documents to rows of equal length, with the account of what each row is made of; no token is dropped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.settings import Blocks

Ids = npt.NDArray[np.unsignedinteger[Any]]
Numbers = npt.NDArray[np.int64]

BATCH_TOKENS = 1 << 21  # tokens in one batch of rows handed on: a few MB


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows, in order.

    ids: [n, length]; what is not in a segment is padding, at the end of its row
    segments: pieces of documents, in the order in which they lie in the rows: the row (from 0, of these), the
        document (from 0, of the part), where in the document's ids the piece begins, and how long it is
    """

    ids: Ids
    row: Numbers
    document: Numbers
    offset: Numbers
    length: Numbers

    @property
    def tokens(self) -> Numbers:
        """How many ids of each row are real, [n]."""
        return np.bincount(self.row, self.length, len(self.ids)).astype(np.int64)


def packer(settings: Blocks, dtype: npt.DTypeLike, pad: int) -> "ConcatPacker | BestFitPacker":
    """Return the packer of a recipe."""
    kind = BestFitPacker if settings.packer == "best_fit" else ConcatPacker
    return kind(settings.length, dtype, pad)


class ConcatPacker:
    """Fill rows of `length` ids from documents laid end to end; only the part's last row is padded.

    Rows come out in batches of a fixed number of rows, so the file they make does not depend on how the
    documents came in.  Example with length 4: documents [1 2 3] and [4 5 6 7 8] give the rows [1 2 3 4],
    [5 6 7 8]; with [4 5] instead the second row is [5 pad pad pad].
    """

    version = "concat/2"

    def __init__(self, length: int, dtype: npt.DTypeLike, pad: int) -> None:
        self.length, self.pad = length, pad
        self.buffer: Ids = np.empty(_rows_per_batch(length) * length, dtype)
        self.filled = 0
        self.documents = 0
        # Where documents begin in the buffer, which ones they are, and at which of their ids they begin.
        self.starts: list[int] = []
        self.numbers: list[int] = []
        self.offsets: list[int] = []

    def add(self, ids: Ids, lengths: Sequence[int]) -> Iterator[Rows]:
        """Take some documents' ids, end to end, and their lengths; yield each batch of rows that they fill."""
        at = 0
        for length in lengths:
            offset = 0
            while True:
                self.starts.append(self.filled)
                self.numbers.append(self.documents)
                self.offsets.append(offset)
                taken = min(length - offset, len(self.buffer) - self.filled)
                self.buffer[self.filled : self.filled + taken] = ids[at : at + taken]
                self.filled += taken
                offset += taken
                at += taken
                if self.filled == len(self.buffer):
                    yield self._rows()
                if offset == length:
                    break
            self.documents += 1

    def finish(self) -> Iterator[Rows]:
        """Yield the rows left, the last one padded."""
        if self.filled:
            yield self._rows()

    def _rows(self) -> Rows:
        rows = -(-self.filled // self.length)
        self.buffer[self.filled : rows * self.length] = self.pad
        documents = np.array(self.starts, np.int64)
        # A segment begins where a document begins and where a row begins.
        starts = np.union1d(documents, np.arange(0, self.filled, self.length))
        starts = starts[starts < self.filled]  # a document of no ids may stand at the very end
        own = np.searchsorted(documents, starts, side="right") - 1
        made = Rows(
            ids=self.buffer[: rows * self.length].reshape(-1, self.length).copy(),
            row=starts // self.length,
            document=np.array(self.numbers, np.int64)[own],
            offset=np.array(self.offsets, np.int64)[own] + starts - documents[own],
            length=np.diff(starts, append=self.filled),
        )
        self.filled = 0
        self.starts.clear()
        self.numbers.clear()
        self.offsets.clear()
        return made


class BestFitPacker:
    """Cut only documents that are longer than a row, and lay the pieces into as few rows as best fit finds.

    A document longer than a row gives full rows and one rest.  Rests and short documents, longest first (equal
    ones in their order), go each into the fullest row that has room for it: best-fit decreasing, as in "Fewer
    Truncations Improve Language Modeling" (Ding et al. 2024).  Rows stand in the order of their first document,
    the pieces in a row in that of theirs.  All ids of the part are held until its end.
    """

    version = "best_fit/1"

    def __init__(self, length: int, dtype: npt.DTypeLike, pad: int) -> None:
        self.length, self.pad, self.dtype = length, pad, np.dtype(dtype)
        self.held: list[Ids] = []
        self.lengths: list[int] = []

    def add(self, ids: Ids, lengths: Sequence[int]) -> Iterator[Rows]:
        """Take some documents' ids, end to end, and their lengths; nothing comes out before the end."""
        self.held.append(ids.astype(self.dtype, copy=False))
        self.lengths += lengths
        return iter(())

    def finish(self) -> Iterator[Rows]:
        """Yield all rows, in batches."""
        if not self.lengths:
            return
        ids = np.concatenate(self.held)
        self.held.clear()
        row, document, offset, length = self._places()
        begins = np.cumsum([0, *self.lengths])[document] + offset
        rows = int(row[-1]) + 1
        per_batch = _rows_per_batch(self.length)
        for first in range(0, rows, per_batch):
            last = min(rows, first + per_batch)
            here = slice(*np.searchsorted(row, [first, last]))
            batch: Ids = np.full((last - first) * self.length, self.pad, self.dtype)
            ends = np.cumsum(length[here])
            at = (row[here] - first) * self.length + ends - length[here]
            at -= _before(row[here], ends - length[here])
            for to, source, size in zip(
                at.tolist(), begins[here].tolist(), length[here].tolist(), strict=True
            ):
                batch[to : to + size] = ids[source : source + size]
            yield Rows(
                batch.reshape(-1, self.length), row[here] - first, document[here], offset[here], length[here]
            )

    def _places(self) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Return row, document, offset and length of all pieces, sorted by row and document."""
        lengths = np.array(self.lengths, np.int64)
        full, rest = np.divmod(lengths, self.length)
        # Full rows: document d gives pieces at 0, L, 2L, ...
        whole = np.repeat(np.arange(len(lengths)), full)
        nth = np.arange(len(whole)) - np.repeat(np.cumsum(full) - full, full)
        # Rests: into rows by best fit.  `fits` has bit c set while a row has room for exactly c more ids, so
        # the fullest row with room for a piece is its lowest set bit from there on.
        rests = np.flatnonzero(rest)
        rests = rests[np.argsort(-rest[rests], kind="stable")]
        row_of = np.empty(len(rests), np.int64)
        rooms: list[list[int]] = [[] for _ in range(self.length)]
        fits = opened = 0
        for n, size in enumerate(rest[rests].tolist()):
            above = fits >> size
            if above:
                room = size + (above & -above).bit_length() - 1
                bin = rooms[room].pop()
                if not rooms[room]:
                    fits ^= 1 << room
            else:
                room, bin = self.length, opened
                opened += 1
            row_of[n] = bin
            if room > size:
                rooms[room - size].append(bin)
                fits |= 1 << (room - size)
        row = np.concatenate([np.arange(len(whole)), len(whole) + row_of])
        document = np.concatenate([whole, rests])
        offset = np.concatenate([nth * self.length, full[rests] * self.length])
        length = np.concatenate([np.full(len(whole), self.length), rest[rests]])
        # Rows in the order of their first document (a long one's full rows before its rest).
        first = np.full(len(whole) + opened, np.iinfo(np.int64).max)
        np.minimum.at(first, row, document)
        rank = np.empty(len(first), np.int64)
        rank[np.lexsort((np.arange(len(first)), first))] = np.arange(len(first))
        row = rank[row]
        order = np.lexsort((document, row))
        return row[order], document[order], offset[order], length[order]


def _before(row: Numbers, starts: Numbers) -> Numbers:
    """Return for each piece the sum of lengths in the rows before its own, from the running starts."""
    new = np.r_[True, row[1:] != row[:-1]]
    before: Numbers = starts[new][np.cumsum(new) - 1]
    return before


def _rows_per_batch(length: int) -> int:
    return max(1, min(1024, BATCH_TOKENS // length))
