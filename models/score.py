"""Held-out loss, and bits per byte: the loss in a unit that does not depend on the tokenizer."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from corpora.blocks import Blocks
from corpora.tokenizer import Tokenizer
from models import data
from models.loss import IGNORED


class Sums(NamedTuple):
    """Sums over targets; those of several processes or windows add up.

    `text` and `bytes` leave out special ids: what they cost says nothing about the text.
    """

    nats: float = 0.0
    targets: float = 0.0
    text_nats: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """Return the sums of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.text_nats / math.log(2) / self.bytes


def bytes_of_ids(tokenizer: Tokenizer, vocab: int, device: torch.device) -> Tensor:
    """Return how many bytes each id of the model stands for, [V]; 0 for ids that the tokenizer has not."""
    lengths = np.zeros(vocab, np.int64)
    lengths[: tokenizer.vocab_size] = tokenizer.token_bytes()
    return torch.from_numpy(lengths).to(device)


def sums(nats_BT: Tensor, targets_BT: Tensor, bytes_V: Tensor) -> Sums:
    """Add up the loss of every target."""
    real = targets_BT != IGNORED
    lengths = bytes_V[targets_BT.where(real, 0)] * real
    nats = nats_BT.double()
    text = (nats * (lengths > 0)).sum()
    return Sums(float(nats.sum()), float(real.sum()), float(text), float(lengths.sum()))


@torch.no_grad()
def blocks(
    model: nn.Module,
    held_out: Blocks,
    indices: npt.NDArray[np.int64],
    size: int,
    bytes_V: Tensor,
    dtype: torch.dtype,
    documents: bool = False,
    batches: int | None = None,
) -> Sums:
    """Score these held-out blocks, `size` at a time, with their documents if the model was trained with them.

    batches: how often `model` is called at least.  Processes that share out its weights (FSDP) must all call it
        equally often; one with fewer blocks scores block 0 and forgets the result.
    """
    total = Sums()
    for n in range(max(batches or 0, math.ceil(len(indices) / size))):
        own = indices[n * size : (n + 1) * size]
        rows = own if len(own) else np.zeros(1, np.int64)
        batch = data.batch(held_out, rows, len(bytes_V), bytes_V.device, documents=documents)
        nats_BT = model(*batch, dtype=dtype, reduction="none")
        if len(own):
            total = total.plus(sums(nats_BT, batch.targets_BT, bytes_V))
    return total
