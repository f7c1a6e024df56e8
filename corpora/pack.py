"""Documents to rows of equal length: concatenate, cut, pad the last row; no token is dropped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.unsignedinteger[Any]]

PACKER = "concat"
BATCH_TOKENS = 1 << 21  # tokens in one batch of rows handed on: a few MB


class ConcatPacker:
    """Fill rows of `length` ids from documents laid end to end.

    Rows come out in batches of a fixed number of rows, so the file they make does not depend on how the
    documents came in.  Example with length 4: documents [1 2 3] and [4 5 6 7 8] give the rows [1 2 3 4],
    [5 6 7 8]; with [4 5] instead the second row is [5 pad pad pad] and holds one token.
    """

    def __init__(self, length: int, vocab_size: int, pad: int) -> None:
        self.length, self.pad = length, pad
        self.rows_per_batch = max(1, min(1024, BATCH_TOKENS // length))
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.buffer: Rows = np.empty(self.rows_per_batch * length, dtype)
        self.filled = 0

    def add(self, ids: npt.NDArray[np.uint32]) -> Iterator[Rows]:
        """Take one document's ids; yield each batch of rows, shape [rows_per_batch, length], that it fills."""
        while len(ids):
            space = len(self.buffer) - self.filled
            piece = ids[:space]
            self.buffer[self.filled : self.filled + len(piece)] = piece
            self.filled += len(piece)
            ids = ids[space:]
            if self.filled == len(self.buffer):
                yield self.buffer.reshape(-1, self.length).copy()
                self.filled = 0

    def finish(self) -> tuple[Rows, int]:
        """Return the rows left, shape [n, length] with n from 0, and the padding in the last of them."""
        padding = -self.filled % self.length
        self.buffer[self.filled : self.filled + padding] = self.pad
        rows = self.buffer[: self.filled + padding].reshape(-1, self.length).copy()
        self.filled = 0
        return rows, padding
