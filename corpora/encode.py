"""Which engine encodes: the tokenizer's own library, or a faster one that has just proved to give the same ids.

The ids never depend on the engine: the first texts of each part are encoded by both and compared id by id, and
at the first doubt the tokenizer's own goes on alone.
"""

import logging
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from corpora.errors import InputError
from corpora.fast import Fastokens
from corpora.tokenizer import Ids, Tokenizer, is_panic

log = logging.getLogger(__name__)

Encoded = tuple[Ids, npt.NDArray[np.int64]]

PROBE_TEXTS, PROBE_CHARS = 64, 256_000  # of each part, whichever is reached first
LONGEST = 4_000_000  # characters; longer texts go to the tokenizer, which cuts them, or refuses them, by its own rules

# What tokenizers have stumbled over.
NASTY = [
    "",
    " ",
    "hello world",
    "<|endoftext|> <s> </s> <unk> [INST] <0x0A>",
    "it's IT'S it’s 'S 'll'LL we'd've",
    "\0\0a\0 \x01\x1c \x1c\x1f\x7f\x85",
    "line\rline\r\nline\n\n\r\n \n  \n\n   x",
    "  two   three    four \t\t tab\t \u00a0\u00a0no-break\u2003\u3000\u2028\u2029\u200b\ufeffend  ",
    "1 12 123 1234567890 ١٢٣ ²³ Ⅷ ½ 3.14159e-10",
    "e\u0301 a\u0308\u0323 \u0301\u0301 नमस्ते ก็ ไทย",
    "漢字かなカナ한국어，。「」！",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea ❤\ufe0f \U0001f3fd",
    "\u2581 \u2581\u2581x \ufffd \ufffe \uffff \U0010ffff \u0378 \ue000",
    "ſt ß ẞ ﬁ ǅ İı Σσς ΑΒΓ абв \u0130 Ａ１",
    "a" * 3000 + " " * 3000 + "b" + "=" * 3000 + "\n" * 3000 + "0" * 3000 + "é" * 3000,
    "def f(x):\n\tif x:\n        return {**x, 'a': [1, 2]}  # äöü\r\n",
]


class Engine(Protocol):
    """What encodes many texts at once."""

    name: str

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Return the ids of all texts end to end, and how many each has."""


class Encoder:
    """Encode a part's texts by the fastest engine that is to be trusted; one for a process, as it is slow to make."""

    def __init__(self, tokenizer: Tokenizer, backend: Literal["auto", "own", "fastokens"] = "auto") -> None:
        """Raise InputError for backend = "fastokens" where that is not installed, or not for this tokenizer."""
        self.tokenizer = tokenizer
        self._fast = None if backend == "own" else _fastokens(tokenizer, demanded=backend == "fastokens")
        if self._fast is not None and self._try(self._fast, NASTY, NASTY) is None:
            self._fast = None
        self.begin_part()

    def begin_part(self) -> None:
        """Take the next texts for the first of a part: compare again, and trust again where that was lost."""
        self._trusted = self._fast
        self._probe = PROBE_TEXTS, PROBE_CHARS
        self._used: dict[str, None] = {}  # a set that keeps its order

    @property
    def engine(self) -> str:
        """What encoded this part so far, or will begin it: "fastokens 0.3.5", or two, parted by a comma."""
        return ", ".join(self._used) or (self._trusted.name if self._trusted else self.tokenizer.library)

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Return the ids of all texts end to end, and how many each has.  Raises Unencodable for any of them."""
        if self._trusted is not None and max(map(len, texts), default=0) <= LONGEST:
            count = self._to_compare(texts)
            encoded = self._try(self._trusted, texts, texts[:count])
            if encoded is not None:
                self._probe = self._probe[0] - count, self._probe[1] - sum(map(len, texts[:count]))
                self._used[self._trusted.name] = None
                return encoded
            self._trusted = None
        encoded = self.tokenizer.encode_batch(texts)
        self._used[self.tokenizer.library] = None
        return encoded

    def _to_compare(self, texts: list[str]) -> int:
        """Return how many of these texts, the next ones of the part, the probe still wants."""
        most, chars = self._probe
        for count, text in enumerate(texts[:most]):
            if chars <= 0:
                return count
            chars -= len(text)
        return min(most, len(texts))

    def _try(self, fast: Engine, texts: list[str], probe: list[str]) -> Encoded | None:
        """Encode by the fast engine; None, and a line in the log, if anything is amiss with it.

        The first texts, `probe`, are encoded by the tokenizer as well; what that raises is not caught.
        """
        try:
            encoded = fast.encode_batch(texts)
        except BaseException as error:
            if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
                raise
            fault = f"{type(error).__name__}: {error}"[:200]
        else:
            fault = _difference(encoded, self.tokenizer.encode_batch(probe)) if probe else ""
        if not fault:
            return encoded
        log.warning("%s is not used for now, %s is: %s", fast.name, self.tokenizer.library, fault)
        return None


def _difference(encoded: Encoded, own: Encoded) -> str:
    """Say where a batch does not begin with the ids of `own`; "" for nowhere."""
    (ids, lengths), (own_ids, own_lengths) = encoded, own
    if not np.array_equal(lengths[: len(own_lengths)], own_lengths):
        return "it gives another number of ids"
    if not np.array_equal(ids[: len(own_ids)], own_ids):
        return "it gives other ids"
    return ""


def _fastokens(tokenizer: Tokenizer, demanded: bool) -> Engine | None:
    try:
        return Fastokens(tokenizer)
    except ImportError:
        if demanded:
            raise InputError(
                '[tokenizer] backend = "fastokens": it is not installed; run: pip install fastokens==0.3.5'
            ) from None
    except InputError:
        if demanded:
            raise
    except BaseException as error:
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        log.warning("fastokens cannot be used: %s: %s", type(error).__name__, str(error)[:200])
    return None
