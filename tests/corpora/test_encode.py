"""Engines: the ids never depend on them; a fast one that is wrong, fails or is missing does no harm."""

import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from corpora import encode, fast, settings, tokenizer
from corpora.encode import NASTY, Encoded, Encoder
from corpora.errors import InputError

no_deadline = hypothesis.settings(deadline=None)  # what is loaded first takes its time
TIKTOKEN = f"tiktoken {tiktoken.__version__}"
SENTENCEPIECE = f"sentencepiece {sentencepiece.__version__}"
FASTOKENS = "fastokens 0.3.5"


@functools.cache
def r50k() -> tokenizer.Tokenizer:
    return tokenizer.load(settings.Tokenizer(name="r50k_base", bos=50256, eos=50256))


def train_llama(folder: Path, **changes: Any) -> tokenizer.Tokenizer:
    model = folder / "tokenizer.model"
    options: dict[str, Any] = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "required_chars": "".join(sorted(set("<unk></s><0x0123456789ABCDEF>"))),
        "minloglevel": 2,
    }
    with model.open("wb") as file:
        text = Path(sentencepiece.__file__).read_text("utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()), model_writer=file, **(options | changes)
        )
    return tokenizer.load(settings.Tokenizer(kind="sentencepiece", model=model, bos=1, eos=2))


@functools.cache
def llama() -> tokenizer.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return train_llama(Path(folder))


@functools.cache
def encoder_of(load: Callable[[], tokenizer.Tokenizer]) -> Encoder:
    return Encoder(load(), "fastokens")


BOTH = pytest.mark.parametrize("load", [r50k, llama])


def check_same(load: Callable[[], tokenizer.Tokenizer], texts: list[str]) -> None:
    """Compare with the tokenizer's own ids, and see that it was fastokens that encoded, compared or not."""
    encoder, own = encoder_of(load), load()
    for _ in range(2):  # within the probe and, with it spent, beyond
        ids, lengths = encoder.encode_batch(texts)
        assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
        assert lengths.tolist() == [len(own.encode(text)) for text in texts]
        assert ids.tolist() == [id for text in texts for id in own.encode(text).tolist()]
        assert encoder.engine == FASTOKENS
        encoder._probe = 0, 0
    encoder.begin_part()


@BOTH
@pytest.mark.parametrize("texts", [[], [""], ["", "", ""], ["hello world"], NASTY, ["\n".join(NASTY)]])
def test_fastokens_gives_the_same_ids(load: Callable[[], tokenizer.Tokenizer], texts: list[str]) -> None:
    check_same(load, texts)


def test_fastokens_gives_known_ids() -> None:
    ids, lengths = encoder_of(r50k).encode_batch(["hello world", "<|endoftext|>", "a\0b"])
    assert ids.tolist() == [31373, 995, 27, 91, 437, 1659, 5239, 91, 29, 64, 188, 65]
    assert lengths.tolist() == [2, 7, 3]


ODD = [
    *" \t\n\r\0\x1c\x85\xa0\u2028\u3000aZé19'=-_./漢ア\u0301\u200d\u2581\U0001f600",
    "self",
    " the",
    "<s>",
    "<0x0A>",
]
RUNS = st.builds(lambda one, count: one * count, st.sampled_from(ODD), st.sampled_from([1, 1, 2, 3, 7, 20]))


@BOTH
@no_deadline
@given(st.lists(st.one_of(st.text(), st.lists(RUNS).map("".join)), max_size=8))
def test_fastokens_gives_the_same_ids_of_anything(
    load: Callable[[], tokenizer.Tokenizer], texts: list[str]
) -> None:
    check_same(load, texts)


@BOTH
def test_every_character_has_the_same_ids(load: Callable[[], tokenizer.Tokenizer]) -> None:
    """Of the Basic Multilingual Plane here; all planes were tried once."""
    fastokens, own = fast.Fastokens(load()), load()
    texts = [f"a{c}{c} {c}1" for c in map(chr, range(0x10000)) if not "\ud800" <= c <= "\udfff"]
    for got, expected in zip(fastokens.encode_batch(texts), own.encode_batch(texts), strict=True):
        assert np.array_equal(got, expected)


def test_merges_are_those_of_the_published_file() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"abab": 6}
    assert list(fast.merges(ranks)) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"ab", b"ab")]
    ranks = {b"a": 0, b"aa": 1, b"aaa": 2, b"aaaa": 3}
    assert list(fast.merges(ranks)) == [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aa")]
    with pytest.raises(ValueError, match="b'abc' is not merged"):
        list(fast.merges({b"a": 0, b"b": 1, b"c": 2, b"abc": 3}))
    ranks = r50k().encoding._mergeable_ranks  # type: ignore[attr-defined]
    for (left, right), (token, rank) in zip(fast.merges(ranks), list(ranks.items())[256:], strict=True):
        assert left + right == token
        assert max(ranks[left], ranks[right]) < rank


def test_it_is_one_thread() -> None:
    assert encoder_of(r50k).engine == FASTOKENS
    assert os.environ["FASTOKENS_BPE_THREADS"] == "1"


# --- Which engine ---


def test_the_backend_is_chosen(tmp_path: Path) -> None:
    assert Encoder(r50k(), "own").engine == TIKTOKEN
    assert Encoder(llama(), "own").engine == SENTENCEPIECE
    assert Encoder(r50k()).engine == Encoder(r50k(), "fastokens").engine == FASTOKENS
    unigram = train_llama(tmp_path, model_type="unigram", vocab_size=400)
    assert Encoder(unigram).engine == SENTENCEPIECE
    with pytest.raises(
        InputError, match='backend = "fastokens" is for r50k_base, gpt2 and for SentencePiece'
    ):
        Encoder(unigram, "fastokens")


@pytest.mark.parametrize(
    "changes",
    [
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
        {"user_defined_symbols": ["xyz"]},
        {"required_chars": ""},  # "<" is no piece of it
    ],
)
def test_models_that_do_more_than_merge_are_not_for_fastokens(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert Encoder(train_llama(tmp_path, **changes)).engine == SENTENCEPIECE
    assert caplog.text == ""  # known beforehand, not found out


def test_another_pattern_is_not_for_fastokens() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})
    assert Encoder(tokenizer.TiktokenTokenizer(encoding, None, None)).engine == TIKTOKEN


def test_a_missing_package_is_no_fault_but_where_it_is_demanded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    encoder = Encoder(r50k(), "auto")
    assert encoder.engine == TIKTOKEN
    assert encoder.encode_batch(["hello world"])[0].tolist() == [31373, 995]
    with pytest.raises(InputError, match=r"pip install fastokens==0\.3\.5"):
        Encoder(r50k(), "fastokens")
    assert caplog.text == ""


def test_another_version_that_has_another_interface_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens._native", object())
    assert Encoder(r50k(), "auto").engine == TIKTOKEN
    assert "fastokens cannot be used: AttributeError" in caplog.text


# --- A fast engine that is wrong ---


class Double:
    """An engine that is right, but for the texts that `spoil` changes."""

    name = "double 1.0"

    def __init__(self, spoil: Callable[[list[str], Encoded], Encoded] = lambda _, encoded: encoded) -> None:
        self.spoil, self.texts = spoil, 0

    def encode_batch(self, texts: list[str]) -> Encoded:
        self.texts += len(texts)
        return self.spoil(texts, r50k().encode_batch(texts))


def with_double(double: Double) -> Encoder:
    """Return an encoder whose fast engine is a double; it has stood the nasty strings."""
    encoder = Encoder(r50k(), "own")
    encoder._fast = double
    encoder.begin_part()
    return encoder


def other_id(texts: list[str], encoded: Encoded) -> Encoded:
    ids = encoded[0].copy()
    if "bad" in texts:
        ids[encoded[1][: texts.index("bad")].sum()] ^= 1
    return ids, encoded[1]


def other_length(texts: list[str], encoded: Encoded) -> Encoded:
    lengths = encoded[1].copy()
    if "bad" in texts:
        lengths[texts.index("bad")] += 1
    return encoded[0], lengths


def fails(texts: list[str], encoded: Encoded) -> Encoded:
    if "bad" in texts:
        raise RuntimeError("out of luck")
    return encoded


class PanicException(BaseException):
    """Named as Rust's panic is."""


def panics(texts: list[str], encoded: Encoded) -> Encoded:
    if "bad" in texts:
        raise PanicException("index out of bounds")
    return encoded


@pytest.mark.parametrize("batch", [1, 5, 64, 100])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_id, "it gives other ids"),
        (other_length, "it gives another number of ids"),
        (fails, "RuntimeError: out of luck"),
        (panics, "PanicException: index out of bounds"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 63])
def test_a_wrong_engine_is_caught_in_a_part_s_first_texts(
    spoil: Callable[[list[str], Encoded], Encoded],
    told: str,
    place: int,
    batch: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    double = Double(spoil)
    encoder = with_double(double)
    texts = [f"good text {n}" for n in range(100)]
    texts[place] = "bad"
    for _ in range(2):
        encoder.begin_part()
        double.texts = 0
        caplog.clear()
        batches = [encoder.encode_batch(texts[at : at + batch]) for at in range(0, 100, batch)]
        expected = r50k().encode_batch(texts)
        assert np.array_equal(np.concatenate([ids for ids, _ in batches]), expected[0])
        assert np.array_equal(np.concatenate([lengths for _, lengths in batches]), expected[1])
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"double 1.0 is not used for now, {TIKTOKEN} is: {told}"
        before = place // batch * batch  # texts that it encoded
        assert double.texts == min(before + batch, 100)
        assert encoder.engine == (f"double 1.0, {TIKTOKEN}" if before else TIKTOKEN)
    encoder.begin_part()
    assert encoder.engine == "double 1.0"
    encoder.encode_batch(["good"])
    assert encoder.engine == "double 1.0"


@pytest.mark.parametrize("spoil", [fails, panics])
def test_a_failure_in_the_middle_of_a_part_is_made_good(
    spoil: Callable[[list[str], Encoded], Encoded],
) -> None:
    encoder = with_double(Double(spoil))
    encoder.encode_batch(["good"] * 1000)
    assert encoder.encode_batch(["good", "bad"])[0].tolist() == [11274, 14774]
    assert encoder.engine == f"double 1.0, {TIKTOKEN}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_other_errors_pass(error: type[BaseException]) -> None:
    def spoil(texts: list[str], encoded: Encoded) -> Encoded:
        raise error

    with pytest.raises(error):
        with_double(Double(spoil)).encode_batch(["hello"])


def test_the_probe_is_64_texts_or_256_000_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def count(texts: list[str]) -> Encoded:
        compared.extend(texts)
        return tokenizer.TiktokenTokenizer.encode_batch(r50k(), texts)  # type: ignore[arg-type]

    encoder = with_double(Double())
    monkeypatch.setattr(
        Double, "encode_batch", lambda _, texts: tokenizer.Tokenizer.encode_batch(r50k(), texts)
    )
    monkeypatch.setattr(r50k(), "encode_batch", count)
    for batch in (["a"] * 40, ["b"] * 40, ["c"] * 40):
        encoder.encode_batch(batch)
    assert compared == ["a"] * 40 + ["b"] * 24
    compared.clear()
    encoder.begin_part()
    for _ in range(3):
        encoder.encode_batch(["x " * 60_000] * 2)
    assert len(compared) == 3
    assert encoder.engine == "double 1.0"


def test_an_engine_that_stumbles_over_the_nasty_strings_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(texts: list[str], encoded: Encoded) -> Encoded:
        assert texts == NASTY
        ids = encoded[0].copy()
        ids[-1] ^= 1
        return ids, encoded[1]

    double = Double(spoil)
    monkeypatch.setattr(encode, "Fastokens", lambda _: double)
    encoder = Encoder(r50k(), "fastokens")
    encoder.begin_part()
    assert encoder.encode_batch(["hello"])[0].tolist() == [31373]
    assert (encoder.engine, double.texts) == (TIKTOKEN, len(NASTY))
    assert "it gives other ids" in caplog.text


def test_long_texts_go_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "LONGEST", 10)
    double = Double()
    encoder = with_double(double)
    encoder.encode_batch(["hello", "hello" * 3])
    assert (double.texts, encoder.engine) == (0, TIKTOKEN)
    encoder.encode_batch(["hello", "hello" * 2])
    assert (double.texts, encoder.engine) == (2, f"{TIKTOKEN}, double 1.0")


def test_what_cannot_be_encoded_is_so_by_either_engine() -> None:
    for encoder in (encoder_of(r50k), Encoder(r50k(), "own")):
        with pytest.raises(tokenizer.Unencodable):
            encoder.encode_batch(["hello", "\ud800"])
        encoder.begin_part()
        assert encoder.encode_batch(["hello"])[0].tolist() == [31373]
    # The bounds of what a tokenizer refuses lie above what the fast engine is given.
    assert encode.LONGEST <= tokenizer.LONGEST_RUN // 4
