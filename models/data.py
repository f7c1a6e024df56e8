"""Which blocks a step trains on, and as what tensors.

The order is a pure function of (seed, step): blocks are numbered in an endless row of epochs, each a
permutation of its own, and step s takes the s-th group of `batch`.  Both are computed, not stored, so three
integers suffice to go on: (seed, step, batch), or (seed, epoch, index).  Neither the number of processes nor of
micro-batches changes what a step sees.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from corpora.errors import InputError
from corpora.order import Permutation
from models.loss import IGNORED
from models.settings import Model

if TYPE_CHECKING:  # pyarrow is not everywhere where a step is made
    from corpora.blocks import Blocks


class Batch(NamedTuple):
    """Rows as tensors [n, T] on the device.

    ids_BT: int64; targets_BT: the id that follows each, or IGNORED; documents_BT: int32, which document of its
    row each id belongs to, if the model is to know
    """

    ids_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None


class Order:
    """The blocks of each step."""

    def __init__(self, blocks: int, batch: int, seed: int) -> None:
        if blocks < batch:
            raise InputError(
                f"the train shards have {blocks} blocks, a step takes {batch}; "
                f"lower train.batch to at most {blocks}, or train on more shards"
            )
        self.blocks, self.batch, self.seed = blocks, batch, seed

    def step(self, step: int) -> npt.NDArray[np.int64]:
        """Return the indices of step `step`, counted from 0."""
        epoch, first = divmod(step * self.batch, self.blocks)
        last = min(first + self.batch, self.blocks)
        # A step is at most as long as an epoch, so it reaches at most into the next one.
        rest = self.batch - (last - first)
        return np.concatenate([self._epoch(epoch, first, last), self._epoch(epoch + 1, 0, rest)])

    def _epoch(self, epoch: int, first: int, last: int) -> npt.NDArray[np.int64]:
        return Permutation(self.blocks, self.seed, epoch)(np.arange(first, last))


def check_fits(blocks: "Blocks", model: Model) -> None:
    """Refuse blocks that the model has no positions or no rows of the embedding for."""
    if blocks.length - 1 > model.context:
        raise InputError(
            f"blocks of {blocks.length} ids need a context of {blocks.length - 1}, model.context is {model.context}"
        )
    made = blocks.metadata.get("tokenizer", {})
    if made.get("vocab_size", 0) > model.vocab:
        raise InputError(
            f"the blocks were made by a tokenizer of {made['vocab_size']} ids, but model.vocab is {model.vocab}; "
            f"set model.vocab to at least {made['vocab_size']}"
        )


def batch(
    blocks: "Blocks",
    indices: npt.NDArray[np.int64],
    vocab: int,
    device: torch.device,
    documents: bool = False,
) -> Batch:
    """Return inputs and targets [n, length - 1]: each row without its last id, and without its first.

    A target that is padding becomes IGNORED.  An id outside the vocabulary is an error here, by name,
    because a GPU would only tell of a failed assertion and lose the whole process.
    """
    rows, tokens = blocks.rows(indices)
    if (largest := int(rows.max())) >= vocab:
        block = int(indices[int(rows.max(axis=1).argmax())])
        raise InputError(
            f"block {block} holds id {largest}, but model.vocab is {vocab}; "
            f"set model.vocab to more than {largest}, or prepare the shards again"
        )
    ids = torch.from_numpy(rows.astype(np.int64))
    targets = ids[:, 1:].clone()
    targets[torch.arange(1, blocks.length) >= torch.from_numpy(tokens)[:, None]] = IGNORED
    owners = torch.from_numpy(blocks.documents(indices)[:, :-1]).to(device) if documents else None
    return Batch(ids[:, :-1].to(device), targets.to(device), owners)


def micro_batches(
    indices: npt.NDArray[np.int64], rank: int, processes: int, size: int | None
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield this process's share of a step's indices, at most `size` at a time."""
    own = indices[rank::processes]
    for start in range(0, len(own), size or len(own)):
        yield own[start : start + (size or len(own))]
