"""What a recipe will cost, before anything starts: bytes, documents, tokens, disk, hours on this machine.

Shards that are prepared already are counted exactly, and tell the ratios of the others; without any, typical
figures of English text stand in.  The speed is measured here and now, on this machine.
"""

import json
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import tokenizer
from corpora.clean import Cleaner
from corpora.encode import Encoder
from corpora.errors import InputError, PilelineError
from corpora.formats import read_shard
from corpora.local import local_path
from corpora.lock import Entry, Lock, load_lock
from corpora.part import part_of
from corpora.prepare import find_manifest, made_with
from corpora.read import BadRecord, parse_record
from corpora.receipts import raw_path
from corpora.settings import DataSettings, Tokenizer

# Bytes of text per byte of file.  zstd: the Pile's; the others: ours, by trying.
TEXT_PER_BYTE = {".zst": 2.94, ".gz": 2.9, ".parquet": 2.0, ".jsonl": 0.95, ".json": 0.95}
DOCUMENT_BYTES = 5_560  # of text; the Pile: 984 GB in 177 million documents
BYTES_PER_TOKEN = 3.5  # r50k_base on the Pile's held-out split
# Fewer than 65,536 ids, so two bytes each.
_NARROW = ("r50k_base", "p50k_base", "gpt2")
GUESS = 1 << 30  # bytes of a file of which nobody tells anything
SURE = 0.8  # of the blocks' reckoned size; a run is not refused for the rest
SAMPLE = 4 << 20  # bytes of text that the speed is measured on
SLOWER = "which is about twice as fast as the SentencePiece model that is still to be trained"


@dataclass(frozen=True, slots=True)
class ShardEstimate:
    """One shard's sizes; `prepared` ones are counted, the others reckoned."""

    name: str
    raw: int  # bytes of the file
    known: bool  # its size is exact
    guessed: bool  # nobody tells even roughly
    missing: int  # bytes still to come
    text: int  # bytes of UTF-8
    documents: int
    tokens: int
    blocks: int  # bytes that its blocks take, or will
    prepared: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """All shards of a recipe."""

    shards: tuple[ShardEstimate, ...]

    @property
    def download(self) -> int:
        """Bytes still to come."""
        return sum(shard.missing for shard in self.shards)

    @property
    def blocks(self) -> int:
        """Bytes that the blocks still to be made will take."""
        return sum(shard.blocks for shard in self.shards if not shard.prepared)

    @property
    def text_to_prepare(self) -> int:
        """Bytes of text that are still to be cleaned and encoded."""
        return sum(shard.text for shard in self.shards if not shard.prepared)


def estimate(settings: DataSettings, data: Path, shards: tuple[str, ...] | None = None) -> Estimate:
    """Reckon the recipe's shards, or these of them.  No shard's server is asked."""
    lock = load_lock(settings.corpus, data)
    entries = [lock.entry(name) for name in shards or settings.corpus.shards]
    sizes = [entry.size or entry.about for entry in lock.files]
    usual = sum(size for size in sizes if size) // max(1, sum(1 for size in sizes if size)) or GUESS
    made = _made_with(settings, data)
    ledgers = {entry.name: _ledger(settings, entry.name, data, made) for entry in entries}
    done = [(_raw(entry, usual), *figures) for entry in entries if (figures := ledgers[entry.name])]
    known: tuple[int, ...] = tuple(map(sum, zip(*done, strict=True))) if done else ()
    wide = 2 if settings.tokenizer.kind == "sentencepiece" or settings.tokenizer.name in _NARROW else 4
    found = []
    for entry in entries:
        raw, figures = _raw(entry, usual), ledgers[entry.name]
        if figures:
            text, documents, tokens = figures
        elif known:
            text, documents, tokens = (int(raw * figure / known[0]) for figure in known[1:])
        else:
            text = int(raw * TEXT_PER_BYTE.get(Path(entry.path).suffix, 1.0))
            documents, tokens = text // DOCUMENT_BYTES + 1, int(text / BYTES_PER_TOKEN)
        if entry.texts and not figures and settings.corpus.sample_by == "document":
            documents = len(entry.texts)
        file = raw_path(settings.corpus.name, entry.name, entry.path, data)
        there = next((path.stat().st_size for path in (file, part_of(file)) if path.is_file()), 0)
        rows = tokens // settings.blocks.length + 1
        found.append(
            ShardEstimate(
                name=entry.name,
                raw=raw,
                known=entry.size is not None,
                guessed=not (entry.size or entry.about),
                missing=0 if _is_linked(lock, entry, data) else max(0, raw - there),
                text=text,
                documents=documents,
                tokens=tokens,
                blocks=rows * (settings.blocks.length * wide + 4),
                prepared=figures is not None,
            )
        )
    return Estimate(tuple(found))


def _is_linked(lock: Lock, entry: Entry, data: Path) -> bool:
    """Tell whether a shard is a file of the same disk, which gets a second name and needs no room."""
    if not lock.url.startswith("file:") or entry.texts:
        return False
    try:
        return local_path(lock.url_of(entry)).stat().st_dev == _nearest(data).stat().st_dev
    except OSError:
        return False


def _raw(entry: Entry, usual: int) -> int:
    return entry.size or entry.about or usual


def _made_with(settings: DataSettings, data: Path) -> dict[str, Any] | None:
    """Return what prepared blocks are known by; None, and no tokenizer loaded, where there are none."""
    if not (data / settings.corpus.name / "blocks").is_dir():
        return None
    try:
        return made_with(settings, tokenizer.for_recipe(settings, data))
    except PilelineError:
        return None


def _ledger(
    settings: DataSettings, shard: str, data: Path, made: dict[str, Any] | None
) -> tuple[int, int, int] | None:
    """Return text bytes, documents and tokens of a prepared shard."""
    if made is None:
        return None
    try:
        _, manifest = find_manifest(settings, shard, data, made)
    except InputError:
        return None
    ledger = manifest["ledger"]
    text = sum(subset["bytes"] for subset in ledger["subsets"].values())
    return text, ledger["kept"], ledger["text_tokens"] + ledger["special_tokens"]


def check_space(found: Estimate, data: Path, *, prepare: bool) -> str | None:
    """Refuse what the disk cannot hold; return a warning where only the blocks will not fit.

    With `prepare`, blocks that will not fit are refused as well.
    """
    free = free_bytes(data)
    room = "free some, or set PILELINE_DATA to a larger disk"
    about = "" if all(shard.known for shard in found.shards) else "about "
    told = sum(shard.missing for shard in found.shards if not shard.guessed)
    if told > free:
        raise InputError(
            f"{data}: no space: {about}{told:,} bytes are to be downloaded, {free:,} are free; {room}"
        )
    if found.download + found.blocks <= free:
        return None
    warning = (
        f"{data}: no space: {about}{found.download:,} bytes to download and about {found.blocks:,} for blocks, "
        f"{free:,} are free; {room}"
    )
    if prepare and told + SURE * found.blocks > free:
        raise InputError(warning)
    return warning


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a folder that may not be there yet."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path


def measure_speed(settings: DataSettings, data: Path) -> tuple[float, str]:
    """Return bytes of text that one process cleans and encodes in a CPU second, and on what that was measured."""
    lines, told = _sample(settings, data)
    try:
        known = tokenizer.for_recipe(settings, data)
    except InputError:
        if settings.tokenizer.train is None:
            raise
        known, told = tokenizer.load(Tokenizer(name="r50k_base")), f"{told} with r50k_base, {SLOWER}"
    encoder, cleaner = Encoder(known, settings.tokenizer.backend), Cleaner(settings.clean)
    encoder.encode_batch(["warm up"])
    began, text = time.process_time(), 0
    batch: list[str] = []
    for line in lines:
        try:
            record = parse_record(line, settings.corpus)
        except BadRecord:
            continue
        cleaned = cleaner(record.text, record.subset)
        batch.append(cleaned.text)
        text += len(cleaned.data)
        if len(batch) == 64:
            _encode(encoder, batch)
    _encode(encoder, batch)
    return text / max(1e-9, time.process_time() - began), told


def _encode(encoder: Encoder, batch: list[str]) -> None:
    with suppress(tokenizer.Unencodable):  # `prepare` puts it into quarantine
        encoder.encode_batch(batch)
    batch.clear()


def _sample(settings: DataSettings, data: Path) -> tuple[list[bytes], str]:
    """Return a few MB of JSON lines: of a shard that is here, else of Python's own sources."""
    lock = load_lock(settings.corpus, data)
    for shard in settings.corpus.shards:
        entry = lock.entry(shard)
        file = raw_path(settings.corpus.name, shard, entry.path, data)
        if file.is_file():
            lines = (line.data for line in read_shard(file, settings.corpus) if line.data)
            return list(_first(lines)), f"the beginning of {shard}"
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (json.dumps({settings.corpus.text_field: path.read_text("utf-8")}).encode() for path in sources)
    return list(_first(texts)), "Python's own sources"


def _first(lines: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for line in lines:
        yield line
        size += len(line)
        if size > SAMPLE:
            return
