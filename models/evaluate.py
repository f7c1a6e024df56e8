"""Bits per byte of held-out documents, per subset.

Nats over the tokens of the text, divided by ln 2 and by the UTF-8 bytes of the cleaned text: the same text
costs the same whatever the tokenizer.  BOS and EOS are predicted too, but what they cost is not counted.

Conditioning: a document comes after an EOS and its BOS, as in the blocks (a model trained with document masks
has never seen what is before a BOS, so it gets the BOS alone; where the tokenizer has neither, the first token
is charged as one of equally likely ids).  A document longer than the context is cut into
consecutive windows, and a token sees only those before it in its window.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from corpora.errors import InputError
from corpora.files import data_root, write_json
from corpora.prepare import Document, documents
from corpora.progress import Progress
from corpora.tokenizer import Tokenizer
from models import device, score
from models.decoder import Decoder
from models.loss import IGNORED
from models.score import Sums
from models.settings import RunSettings
from models.trained import open_run


class Window(NamedTuple):
    """A part of a document: the inputs, what follows each, and the subset to count it for."""

    subset: str
    inputs: list[int]
    targets: list[int]


class Tally:
    """What was scored: documents, bytes and nats of each subset, and a hash of the text itself."""

    def __init__(self) -> None:
        self.documents: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.nats: dict[str, float] = {}
        self.text = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Count a document; return its bytes."""
        content = document.text.encode()
        subset = document.subset
        self.documents[subset] = self.documents.get(subset, 0) + 1
        self.bytes[subset] = self.bytes.get(subset, 0) + len(content)
        self.text.update(f"{subset}\0{len(content)}\0".encode() + content)
        return len(content)

    def charge(self, subset: str, nats: float) -> None:
        """Count what a part of a document costs."""
        self.nats[subset] = self.nats.get(subset, 0.0) + nats

    def subsets(self) -> dict[str, dict[str, float]]:
        """Return the figures of each subset."""
        return {
            name: {
                "documents": self.documents[name],
                "bytes": self.bytes[name],
                "nats": self.nats[name],
                "bits_per_byte": self.nats[name] / math.log(2) / self.bytes[name],
            }
            for name in sorted(self.documents)
        }


def evaluate(
    run: Path, wanted: device.Device = "auto", which: str | int | None = None, *, events: bool = False
) -> dict[str, Any]:
    """Score a checkpoint of a run and write RUN/evaluations/<checkpoint>.json; return its content.

    which: see `trained.open_run`
    """
    trained = open_run(run, wanted, which)
    settings = trained.settings
    dtype = device.choose_dtype(settings.train.dtype, trained.device)
    total = settings.evaluate.bytes * len(settings.corpus.val)
    tally = Tally()
    with Progress(f"evaluate {run.name}", total, "B", events=events) as progress:
        found = first_documents(settings, trained.tokenizer)
        charge(trained.decoder, trained.tokenizer, found, tally, settings.evaluate.batch, dtype, progress)
    nats, size = sum(tally.nats.values()), sum(tally.bytes.values())
    if not math.isfinite(nats):
        raise InputError(
            f"{trained.checkpoint}: the held-out loss is {nats}; the checkpoint is spoilt, train again"
        )
    file = run / "evaluations" / f"{trained.checkpoint.name}.json"
    scores: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.state.step,
        "bits_per_byte": nats / math.log(2) / size,
        "documents": sum(tally.documents.values()),
        "bytes": size,
        "subsets": tally.subsets(),
        "eval_set": tally.text.hexdigest(),
        "file": str(file),
    }
    write_json(file, scores)
    return scores


def first_documents(settings: RunSettings, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the first documents of each held-out shard, or their beginnings, as [evaluate] says."""
    wanted = settings.evaluate
    for shard in settings.corpus.val:
        size = 0
        for document in documents(settings, shard, data_root()):
            text = document.text[: wanted.document_chars]
            if text != document.text:
                document = replace(document, text=text, ids=tokenizer.encode_document(text))
            yield document
            size += len(text.encode())
            if size >= wanted.bytes:
                break


@torch.no_grad()
def charge(
    decoder: Decoder,
    tokenizer: Tokenizer,
    found: Iterator[Document],
    tally: Tally,
    batch: int,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Score documents, `batch` windows at a time."""
    here = decoder.embedding.weight.device
    bytes_V = score.bytes_of_ids(tokenizer, decoder.settings.vocab, here)

    def parts() -> Iterator[Window]:
        for document in found:
            progress.add(tally.add(document))
            if tokenizer.bos is None and tokenizer.eos is None:
                tally.charge(document.subset, math.log(tokenizer.vocab_size))
            yield from windows(document, tokenizer, decoder.settings.context, alone=decoder.document_mask)

    remaining = parts()
    while group := list(islice(remaining, batch)):
        longest = max(len(window.inputs) for window in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        targets = torch.full((len(group), longest), IGNORED)
        for row, window in enumerate(group):
            # What fills up a row comes after its tokens, where a causal model cannot see it.
            ids[row, : len(window.inputs)] = torch.tensor(window.inputs)
            targets[row, : len(window.targets)] = torch.tensor(window.targets)
        ids, targets = ids.to(here), targets.to(here)
        nats_BT = decoder(ids, targets, dtype=dtype, reduction="none")
        for row, window in enumerate(group):
            sums: Sums = score.sums(nats_BT[row], targets[row], bytes_V)
            tally.charge(window.subset, sums.text_nats)


def windows(
    document: Document, tokenizer: Tokenizer, context: int, *, alone: bool = False
) -> Iterator[Window]:
    """Cut a document into windows of at most `context` targets; every token after the first is one target.

    alone: begin with the document's own BOS, if there is one, not with the EOS of another document
    """
    ids = [int(i) for i in document.ids]
    if tokenizer.eos is not None and not (alone and tokenizer.bos is not None):
        ids = [tokenizer.eos, *ids]
    for start in range(0, len(ids) - 1, context):
        part = ids[start : start + context + 1]
        yield Window(document.subset, part[:-1], part[1:])
