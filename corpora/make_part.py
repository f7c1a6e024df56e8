"""One part of a shard to its files, in one streamed pass: read, clean, encode, pack, write, account.

A part's record, part-00000.json, is written last and is what says that the part is done.  Its files are a
function of its lines, the settings, the tokenizer and the version of the step, and of nothing else: not of the
engine that encodes, the number of workers, or what was there before.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora import blocks, pack
from corpora.clean import Cleaned, Cleaner
from corpora.documents import Outputs, Quarantine, Table, content_hash
from corpora.encode import Encoder
from corpora.errors import InputError, PilelineError
from corpora.files import read_json, sha256_json, write_aside, write_json
from corpora.formats import Shard
from corpora.ledger import Changes, Ledger, Subset, broken_laws, check_laws
from corpora.read import BadRecord, Line, Lines, parse_record
from corpora.settings import Corpus, DataSettings
from corpora.tokenizer import Ids, Tokenizer, Unencodable

log = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20  # of cleaned text, encoded at a time
BATCH_DOCUMENTS = 512
TEXT_PER_BYTE = 4  # of a compressed shard, about
SMALL = 16_000_000  # bytes of text: less is encoded before a faster engine is loaded
MOST_SUBSETS = 10_000  # in a part; more are no subsets
_BOM = b"\xef\xbb\xbf"
_PARTS_OF_A_RECORD = {"made_from", "part", "lines", "ends", "engine", "ledger", "outputs"}


@dataclass(frozen=True)
class Job:
    """What a worker has to know of a shard.

    path: the fetched file
    folder: where the shard's blocks go
    made: what decides them, see `prepare.made_with`; of JSON values
    data: root of all data
    """

    settings: DataSettings
    path: Path
    folder: Path
    made: dict[str, Any] = field(repr=False)
    data: Path

    @property
    def text_about(self) -> int:
        """A guess at the bytes of text in the shard, from the size of its file."""
        return self.path.stat().st_size * (TEXT_PER_BYTE if self.path.suffix in (".zst", ".gz") else 1)

    @property
    def digest(self) -> str:
        """The sha256 that a part's record carries for all of `made`."""
        return sha256_json(self.made)


@dataclass(frozen=True, slots=True)
class Read:
    """A document read and cleaned; `changes` include what the parser mended."""

    line: Line
    subset: str
    size: int  # bytes of its text as it came
    changes: Changes
    cleaned: Cleaned


def read_document(line: Line, corpus: Corpus, cleaner: Cleaner) -> Read | None:
    """Read a line's document and clean it; None for a blank line.  Raises BadRecord with the reason."""
    if line.data is None:
        raise BadRecord("line too long")
    content = line.data.removeprefix(_BOM) if line.number == 1 else line.data
    if not content.strip():
        return None
    record = parse_record(content, corpus)
    cleaned = cleaner(record.text, record.subset)
    changes = cleaned.changed
    size = changes[0][1] if changes else len(cleaned.data)
    if record.repaired:
        changes = (("lone_surrogates", size, size), *changes)
    return Read(line, record.subset, size, changes, cleaned)


_Waiting = tuple[Read, Subset, bytes, bool]  # a document to be encoded, its content hash, whether a duplicate


class PartMaker:
    """Makes parts of one shard, in ascending order; what only has to be loaded once is kept."""

    def __init__(self, job: Job, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None) -> None:
        self.job, self.tokenizer = job, tokenizer
        backend = job.settings.tokenizer.backend
        self.encoder = Encoder(tokenizer, "own" if backend == "auto" and job.text_about < SMALL else backend)
        self.cleaner = Cleaner(job.settings.clean)
        self.shard = Shard(job.path, job.settings.corpus, progress)

    def make(self, number: int) -> dict[str, Any] | None:
        """Make a part, or find it made, and return its record; None where the shard has no such part.

        A record without outputs is that of a part in which no line begins: it has no file.
        """
        done = find_record(self.job, number)
        if done is not None:
            return done
        return _Part(self, number).make(self.shard.part(number, self.job.settings.blocks.part_bytes))


def find_record(job: Job, number: int) -> dict[str, Any] | None:
    """Return the record of a part that is done: made from the same, all its files there in their sizes."""
    path = job.folder / f"part-{number:05}.json"
    try:
        record = read_json(path)
    except InputError:  # missing, or torn by something else than us
        return None
    try:
        ours = record["made_from"] == job.digest and _PARTS_OF_A_RECORD <= record.keys()
        sound = ours and not broken_laws(record["ledger"]) and is_whole(job.folder, record["outputs"])
    except (KeyError, TypeError, AttributeError):  # of some other shape
        return None
    return dict(record) if sound else None


def is_whole(folder: Path, outputs: Outputs) -> bool:
    """Tell whether every output is there in its size (its hash is for `verify`)."""
    for name, output in outputs.items():
        try:
            if (folder / name).stat().st_size != output["size"]:
                return False
        except OSError:
            return False
    return True


class _Part:
    """One part on its way."""

    def __init__(self, maker: PartMaker, number: int) -> None:
        self.maker, self.job = maker, maker.job
        self.number, self.stem = number, f"part-{number:05}"
        settings, tokenizer = self.job.settings, maker.tokenizer
        self.clean, self.length = settings.clean, settings.blocks.length
        self.ledger = Ledger(self.length)
        self.table = Table()
        self.seen: set[bytes] = set()
        self.pending: list[_Waiting] = []
        self.pending_bytes = 0
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.pad = tokenizer.eos if tokenizer.eos is not None else tokenizer.bos or 0
        self.packer = pack.packer(settings.blocks, self.dtype, self.pad)
        metadata = {**self.job.made, "part": number, "padding": self.pad}
        self.schema = blocks.schema(self.length, self.dtype, metadata)
        self.writer: blocks.BlockWriter | None = None
        self.specials: dict[int, int] = {
            special: 0 for special in (tokenizer.bos, tokenizer.eos) if special is not None
        }
        self.stack = ExitStack()
        self.quarantine = Quarantine(self.job.folder, f"quarantine-{number:05}")

    def make(self, lines: Iterator[Line]) -> dict[str, Any] | None:
        shard, folder = self.maker.shard, self.job.folder
        self.maker.encoder.begin_part()
        first: Line | None = None
        end = 0
        with self.stack, self.quarantine:
            if isinstance(shard.lines, Lines):  # before a line is read: the first may be one to spill
                shard.lines.spill = self.quarantine.spill
            for line in lines:
                first = first or line
                self.ledger.lines += 1
                self._take(line)
                end = line.offset + line.size
            if first is None:
                return None if shard.ended else {"ends": False}
            self._encode()
            for rows in self.packer.finish():
                self._write(rows)
            outputs = self._close()
        ledger = self.ledger.as_dict()
        self._check(ledger)
        record = {
            "made_from": self.job.digest,
            "part": self.number,
            "lines": {"first": first.number, "count": self.ledger.lines, "from": first.offset, "to": end},
            "ends": shard.ended,
            "engine": self.maker.encoder.engine,
            "ledger": ledger,
            "outputs": outputs,
        }
        write_json(folder / f"{self.stem}.json", record)
        return record

    def _take(self, line: Line) -> None:
        """Read a line and put its document to those waiting to be encoded; account for it otherwise."""
        ledger = self.ledger
        if line.number == 1 and line.data is not None and line.data.startswith(_BOM):
            ledger.cleaned["byte_order_mark"] += 1
        try:
            read = read_document(line, self.job.settings.corpus, self.maker.cleaner)
        except BadRecord as error:
            ledger.quarantine(None, 0, str(error))
            self.quarantine.add(line, str(error))
            return
        if read is None:
            ledger.dropped["blank_line"] += 1
            return
        subset = self._subset(read.subset)
        ledger.read(subset, read.size, read.changes)
        cleaned = read.cleaned
        if cleaned.dropped is not None:
            ledger.drop(subset, len(cleaned.data), cleaned.dropped)
            return
        hash, duplicate = content_hash(cleaned.data), False
        if self.clean.duplicates != "off":
            duplicate = hash in self.seen
            self.seen.add(hash)
        if duplicate and self.clean.duplicates == "drop":
            ledger.drop(subset, len(cleaned.data), "duplicate")
            return
        self.pending.append((read, subset, hash, duplicate))
        self.pending_bytes += len(cleaned.data)
        if self.pending_bytes >= BATCH_BYTES or len(self.pending) >= BATCH_DOCUMENTS:
            self._encode()

    def _subset(self, name: str) -> Subset:
        subset = self.ledger.subsets.get(name)
        if subset is None:
            if len(self.ledger.subsets) == MOST_SUBSETS:
                field = self.job.settings.corpus.subset_field
                raise InputError(
                    f"{self.job.path}: its documents are of more than {MOST_SUBSETS:,} subsets; does [corpus] "
                    f"subset_field = {field!r} name one?"
                )
            cleaner = self.maker.cleaner
            subset = self.ledger.subsets[name] = Subset(cleaner.profile(name), cleaner.known(name))
        return subset

    def _encode(self) -> None:
        """Encode the documents that wait, and pack them."""
        waiting, self.pending, self.pending_bytes = self.pending, [], 0
        if not waiting:
            return
        encoder, tokenizer = self.maker.encoder, self.maker.tokenizer
        try:
            flat, lengths = encoder.encode_batch([read.cleaned.text for read, *_ in waiting])
        except Unencodable:
            waiting, flat, lengths = self._encode_one_by_one(waiting)
        if len(flat) and int(flat.max()) >= tokenizer.vocab_size:
            raise PilelineError(
                f"{encoder.engine} gave id {flat.max()} of {tokenizer.vocab_size}; please report this"
            )
        if len(flat) == 0 or not lengths.all():
            waiting, lengths = self._drop_empty(waiting, lengths)
        specials = tokenizer.specials_per_document
        head, tail = tokenizer.bos, tokenizer.eos
        ids = np.empty(len(flat) + specials * len(waiting), self.dtype)
        sizes = lengths.tolist()
        at = source = 0
        for (read, subset, hash, duplicate), size in zip(waiting, sizes, strict=True):
            if head is not None:
                ids[at] = head
                at += 1
            ids[at : at + size] = flat[source : source + size]
            at += size
            source += size
            if tail is not None:
                ids[at] = tail
                at += 1
            text_bytes = len(read.cleaned.data)
            self.ledger.keep(subset, text_bytes, size, specials)
            subset.duplicates += duplicate
            self.ledger.duplicates += duplicate
            text = read.cleaned.text
            exact = tokenizer.lossless and tokenizer.decoded(text) == text
            self.table.add(read.line, text_bytes, size, read.subset, hash, duplicate=duplicate, exact=exact)
        for rows in self.packer.add(ids, [size + specials for size in sizes]):
            self._write(rows)

    def _drop_empty(
        self, waiting: list[_Waiting], lengths: npt.NDArray[np.int64]
    ) -> tuple[list[_Waiting], npt.NDArray[np.int64]]:
        """Drop documents of which a tokenizer makes no ids, such as NFKC's of a text of zero-width spaces."""
        for (read, subset, *_), size in zip(waiting, lengths, strict=True):
            if not size:
                self.ledger.drop(subset, len(read.cleaned.data), "no_ids")
        return [one for one, size in zip(waiting, lengths, strict=True) if size], lengths[lengths > 0]

    def _encode_one_by_one(
        self, waiting: list[_Waiting]
    ) -> tuple[list[_Waiting], Ids, npt.NDArray[np.int64]]:
        """Encode each document by itself, and put those that cannot be into quarantine."""
        kept, found = [], []
        for one in waiting:
            read, subset, *_ = one
            try:
                found.append(self.maker.tokenizer.encode(read.cleaned.text))
                kept.append(one)
            except Unencodable as error:
                self.ledger.quarantine(subset, len(read.cleaned.data), str(error))
                self.quarantine.add(read.line, str(error))
        flat = np.concatenate([*found, np.empty(0, np.uint32)])
        return kept, flat, np.array([len(ids) for ids in found], np.int64)

    def _write(self, rows: pack.Rows) -> None:
        settings = self.job.settings.blocks
        if self.writer is None:
            aside = self.stack.enter_context(write_aside(self.job.folder / f"{self.stem}.{settings.format}"))
            self.aside = aside
            self.writer = blocks.BlockWriter(aside, settings.format, self.schema)
            self.stack.callback(self.writer.file.close)
        padding = rows.ids.size - int(rows.length.sum())
        self.ledger.padding += padding
        for special in self.specials:
            found = np.count_nonzero(rows.ids == special)
            self.specials[special] += int(found) - (padding if special == self.pad else 0)
        self.writer.write(rows, self.job.made["input"]["shard"], self.table.lines)

    def _close(self) -> Outputs:
        outputs = self.quarantine.close()
        if self.writer is not None:
            digest = self.writer.close()
            self.ledger.blocks = self.writer.rows
            name = f"{self.stem}.{self.job.settings.blocks.format}"
            outputs[name] = {"size": self.aside.stat().st_size, "sha256": digest}
        if len(self.table):
            final = self.job.folder / f"documents-{self.number:05}.arrow"
            aside = self.stack.enter_context(write_aside(final))
            digest = self.table.write(aside)
            outputs[final.name] = {"size": aside.stat().st_size, "sha256": digest}
        return outputs

    def _check(self, ledger: dict[str, Any]) -> None:
        """Prove the part's laws: of its ledger, and that BOS and EOS stand once for each document."""
        where = str(self.job.folder / self.stem)
        check_laws(ledger, where)
        tokenizer = self.maker.tokenizer
        for special, found in self.specials.items():
            wanted = self.ledger.kept * (tokenizer.bos, tokenizer.eos).count(special)
            if found != wanted:
                raise PilelineError(
                    f"{where}: special id {special} stands {found} times in the blocks, {self.ledger.kept} documents "
                    f"want {wanted}; please report this"
                )
