"""The same ids from fastokens, six to ten times as fast; it is an extra, and nothing here is believed untested."""

import importlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.errors import InputError
from corpora.tokenizer import Ids, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, byte_names

ENCODINGS = ("r50k_base", "gpt2")  # those of which every Unicode character in four contexts was compared


class Fastokens:
    """The fast engine for one tokenizer; its ids must be compared with the tokenizer's own by whoever uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raise InputError for a tokenizer that it does not serve, ImportError where it is not installed."""
        if isinstance(tokenizer, TiktokenTokenizer) and tokenizer.encoding.name in ENCODINGS:
            model = _byte_level(tokenizer.encoding._mergeable_ranks)
        elif isinstance(tokenizer, SentencePieceTokenizer) and _is_as_llamas(tokenizer):
            model = _llama(tokenizer)
        else:
            raise InputError(
                f'[tokenizer] backend = "fastokens" is for {", ".join(ENCODINGS)} and for SentencePiece models '
                "made as LLaMA's; leave it out"
            )
        # Shards are prepared side by side, one process each.  It is read when the first threads would start.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        native = importlib.import_module("fastokens._native")  # no type of it is told
        self.name = f"fastokens {importlib.metadata.version('fastokens')}"
        self._native = native.Tokenizer.from_json_str(
            json.dumps({"version": "1.0", "added_tokens": []} | model)
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the ids of all texts end to end, and how many each has."""
        data, ends = self._native.encode_batch_flat(list(texts), split_special_tokens=True)
        ids, offsets = np.frombuffer(data, np.uint32), np.frombuffer(ends, np.uint64).astype(np.int64)
        if len(offsets) != len(texts) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError("lengths that do not fit the ids")
        return ids, np.diff(offsets)


# Both functions below make a tokenizer.json of Hugging Face's tokenizers, in which no token is special.


def _byte_level(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return the json of r50k's ranks; its pre-tokenizer splits by GPT-2's pattern."""
    table = dict(enumerate(byte_names()))
    names = {token: token.decode("latin-1").translate(table) for token in ranks}
    return {
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": [f"{names[left]} {names[right]}" for left, right in merges(ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens that each longer token was merged from, by rank: what is left of it without it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        places = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        if len(places) == 1:  # seven of ten
            yield token[: places[0]], token[places[0] :]
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            lowest = min(pairs)
            if lowest >= rank:
                raise ValueError(f"{token!r} is not merged from two tokens of lower rank")
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _is_as_llamas(tokenizer: SentencePieceTokenizer) -> bool:
    """Tell whether a model is BPE by distinct scores and nothing else, over a text with a space put before it.

    Every character of its pieces' names must be a piece: at one that is none fastokens takes the longest name
    that it finds, so that without "<" a literal "<s>" would become BOS.
    """
    model, spec = tokenizer.model, tokenizer.spec
    pieces, merged = _pieces(tokenizer), _merged(tokenizer)
    scores = {model.get_score(i) for i in merged}
    return (
        (tokenizer.lossless and spec.bpe and spec.dummy_prefix and not spec.own_symbols)
        and len(scores) == len(merged)
        and set("".join(pieces)) <= set(pieces)
        and not any(
            model.is_unused(i) or (len(piece) == 1 and (model.is_control(i) or model.is_unknown(i)))
            for i, piece in enumerate(pieces)
        )
    )


def _pieces(tokenizer: SentencePieceTokenizer) -> list[str]:
    return [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]


def _merged(tokenizer: SentencePieceTokenizer) -> list[int]:
    """Return the ids that are made by merging."""
    model = tokenizer.model
    return [
        i
        for i, piece in enumerate(_pieces(tokenizer))
        if len(piece) > 1 and not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]


def _llama(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the json of a SentencePiece model.

    Every pair that makes a piece is listed.  Whichever of them a text would meet first, it is always the same
    one: with all better merges done, the same characters stand there in the same parts.
    """
    model = tokenizer.model
    pieces = _pieces(tokenizer)
    merged = sorted(_merged(tokenizer), key=model.get_score, reverse=True)
    usable = {pieces[i] for i in merged} | {piece for piece in pieces if len(piece) == 1}
    pairs = [
        f"{piece[:at]} {piece[at:]}"
        for piece in (pieces[i] for i in merged)
        for at in range(1, len(piece))
        if piece[:at] in usable and piece[at:] in usable
    ]
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[model.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": pairs,
        },
    }
