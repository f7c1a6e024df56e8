"""Train a SentencePiece model on the cleaned text of a recipe's train shards, in LLaMA's manner.

BPE, bytes for characters it does not know, each digit by itself, no normalisation.  The same shards, cleaning and
settings give the same bytes of the model: it is fed exactly what it shall learn from, in a fixed order, and its own
sampling and threads are left out.
"""

import heapq
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import xxhash

from corpora.clean import Cleaner
from corpora.errors import InputError
from corpora.fetch import verified
from corpora.files import read_json, sha256_file, sha256_json, write_aside, write_json
from corpora.formats import read_shard
from corpora.lock import load_lock
from corpora.make_part import read_document
from corpora.read import BadRecord, suffix_of
from corpora.settings import DataSettings, TrainTokenizer

STEP = "train-tokenizer/1"  # raise it with any change that alters the model of the same input
READ = (
    4 << 30
)  # bytes of a shard's records that are looked at; the Pile's 44 GB would take a minute for each shard
SENTENCE = 4096  # characters; SentencePiece leaves out what is longer than it is told, without a word

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Trained:
    """A trained model; `skipped` when it was there already."""

    model: Path
    manifest: dict[str, Any] = field(repr=False)
    skipped: bool


def made_from(settings: DataSettings, data: Path) -> dict[str, Any]:
    """Return what decides the model, as JSON; no shard is read for it.

    Raises InputError where a shard's sha256 is not known before its first download.
    """
    corpus, lock = settings.corpus, load_lock(settings.corpus, data)
    lock.fingerprint(corpus.train)
    entries = [lock.entry(name) for name in corpus.train]
    return {
        "input": [[entry.name, entry.sha256, suffix_of(entry.path)] for entry in entries],
        "fields": [corpus.text_field, corpus.subset_field, corpus.sample_by, corpus.max_record_bytes],
        "clean": Cleaner(settings.clean).made(),
        "tokenizer": _wanted(settings).model_dump(mode="json"),
        "sentencepiece": sentencepiece.__version__,
        "step": STEP,
    }


def trained(settings: DataSettings, data: Path) -> Path:
    """Return the trained model.  Raises InputError when there is none, or a damaged one."""
    made = made_from(settings, data)
    model = _place(settings, data, made)
    if _find(model, made) is None:
        what = "is damaged" if model.exists() else "is not there yet"
        raise InputError(
            f"{model}: the recipe's tokenizer {what}; run: python -m corpora train-tokenizer RECIPE"
        )
    return model


def train(settings: DataSettings, data: Path, progress: Progress | None = None) -> Trained:
    """Train the model, or find it trained.

    `progress` is told the bytes of text found to learn from.  Raises InputError for shards that are not
    fetched or damaged, and for a vocabulary that does not fit the text.
    """
    wanted, made = _wanted(settings), made_from(settings, data)
    model = _place(settings, data, made)
    manifest = _find(model, made)
    if manifest is not None:
        return Trained(model, manifest, skipped=True)

    texts: list[bytes] = []
    shares: dict[str, dict[str, int]] = {}
    names = settings.corpus.train
    for number, name in enumerate(names):
        share = wanted.bytes * (number + 1) // len(names) - wanted.bytes * number // len(names)
        found = take(settings, name, data, share, progress or (lambda _: None)) if share else []
        texts += found
        shares[name] = {"documents": len(found), "bytes": sum(map(len, found))}
    if not texts:
        raise InputError(
            f"corpus {settings.corpus.name}: no text to learn a tokenizer from in its train shards"
        )
    learned = learn(texts, wanted.vocab)
    with write_aside(model) as aside:
        aside.write_bytes(learned)
        output = {"size": len(learned), "sha256": sha256_file(aside)}
        _manifest(model).unlink(missing_ok=True)  # of a damaged model, perhaps
    counts = sum((Counter(share) for share in shares.values()), Counter())
    write_json(
        _manifest(model),
        {"made_from": made, "outputs": {model.name: output}, "counts": counts, "shards": shares},
    )
    return Trained(model, read_json(_manifest(model)), skipped=False)


def take(settings: DataSettings, shard: str, data: Path, share: int, progress: Progress) -> list[bytes]:
    """Return cleaned texts of `share` UTF-8 bytes in all (the last is cut), from all over a shard.

    Each record's number gets a hash, and the documents of the lowest hashes are taken: a record is parsed
    only while it may be one of them, and no more than `share` is held.  A shard with less gives all it has.
    """
    path = data / verified(settings.corpus, shard, data).path
    cleaner = Cleaner(settings.clean)
    taken: list[tuple[int, int, bytes]] = []  # a heap: the highest hash (negated) comes first
    size = told = 0
    for line in read_shard(path, settings.corpus):
        if line.offset >= READ:
            break
        key = -xxhash.xxh3_64_intdigest(line.number.to_bytes(8, "little"))
        if size >= share and key < taken[0][0]:
            continue
        try:
            read = read_document(line, settings.corpus, cleaner)
        except BadRecord:  # `prepare` counts and keeps it
            continue
        if read is None or read.cleaned.dropped:
            continue
        heapq.heappush(taken, (key, line.number, read.cleaned.data))
        size += len(read.cleaned.data)
        while size - len(taken[0][2]) >= share:
            size -= len(heapq.heappop(taken)[2])
        if min(size, share) > told:
            progress(min(size, share) - told)
            told = min(size, share)
    if size > share:
        key, number, text = taken[0]
        taken[0] = key, number, text[: len(text) - (size - share)].decode("utf-8", "ignore").encode()
    return [text for _, _, text in sorted(taken, key=lambda one: one[1])]


def learn(texts: list[bytes], vocab: int) -> bytes:
    """Return a SentencePiece model of `vocab` ids.  Raises InputError when the texts are not enough for it."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            max_sentence_length=4 * SENTENCE,  # in bytes
            input_sentence_size=0,  # all of them
            num_threads=1,  # it is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"size too high.*<= (\d+)", str(error)):
            raise InputError(
                f"[tokenizer.train] vocab = {vocab} is too large for this text: at most {most[1]}; "
                "or raise bytes, or give it more shards"
            ) from None
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"[tokenizer.train] vocab = {vocab} is too small for this text: at least {least[1]}, for its "
                "characters, 256 bytes and 3 special ids"
            ) from None
        raise InputError(f"[tokenizer.train] SentencePiece cannot learn from this text: {error}") from None
    return model.getvalue()


def _sentences(texts: list[bytes]) -> Iterator[str]:
    """Yield lines, long ones in pieces that begin, if they can, at a space.

    U+2585 parts them as well: SentencePiece keeps it for itself, and leaves out a line that has it.  (It also
    learns nothing across a literal "<s>", or another special name; those it handles by itself.)
    """
    for text in texts:
        for line in re.split("[\n\u2585]", text.decode()):
            start = 0
            while len(line) - start > SENTENCE:
                space = line.rfind(" ", start + 1, start + SENTENCE)
                end = space if space > 0 else start + SENTENCE
                yield line[start:end]
                start = end + (space > 0)  # the space comes again, as the piece's dummy prefix
            if start < len(line):
                yield line[start:]


def _wanted(settings: DataSettings) -> TrainTokenizer:
    if settings.tokenizer.train is None:
        raise InputError("[tokenizer.train] is missing: the recipe's tokenizer is given, not trained")
    return settings.tokenizer.train


def _place(settings: DataSettings, data: Path, made: dict[str, Any]) -> Path:
    """Return where a model lies; the folder's name is a key of all that decides it."""
    key = f"bpe-{made['tokenizer']['vocab']}-{sha256_json(made)[:8]}"
    return data / settings.corpus.name / "tokenizers" / key / "tokenizer.model"


def _manifest(model: Path) -> Path:
    return model.with_name("manifest.json")


def _find(model: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a model that was made from this, and is whole."""
    if not model.is_file() or not _manifest(model).is_file():
        return None
    try:
        manifest = read_json(_manifest(model))
    except InputError:
        return None
    if not isinstance(manifest, dict) or manifest.get("made_from") != made:
        return None
    whole = {model.name: {"size": model.stat().st_size, "sha256": sha256_file(model)}}
    return manifest if manifest.get("outputs") == whole else None
