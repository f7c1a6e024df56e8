"""Ids: the published vocabulary, special ids by declaration only, text that wants to be control ids, and text that is
too much for the libraries in one piece.
"""

import base64
import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import regex
import requests
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st

from corpora import settings, tokenizer
from corpora.errors import InputError, Unavailable

no_deadline = hypothesis.settings(deadline=None)  # what is loaded first takes its time
R50K = settings.Tokenizer(name="r50k_base", bos=50256, eos=50256)


@pytest.fixture(scope="module")
def r50k() -> tokenizer.Tokenizer:
    return tokenizer.load(R50K)


def sentencepiece_model(path: Path, **changes: object) -> Path:
    """Train a small SentencePiece model in LLaMA's manner, but for `changes`."""
    options: dict[str, object] = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(sentencepiece.__file__).read_text("utf-8").splitlines()),
            model_writer=file,
            **(options | changes),
        )
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("sp") / "tiny.model")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("hello world", [31373, 995]),
        ("def f(x):\n    return x", [4299, 277, 7, 87, 2599, 198, 220, 220, 220, 1441, 2124]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("a\0b", [64, 188, 65]),
        ("\U0001f600", [47249, 222]),
    ],
)
def test_r50k_ids(r50k: tokenizer.Tokenizer, text: str, ids: list[int]) -> None:
    assert r50k.encode(text).tolist() == ids
    assert r50k.encode_document(text).tolist() == [50256, *ids, 50256]
    assert r50k.decode(ids) == text


@functools.cache
def loaded() -> tokenizer.Tokenizer:
    return tokenizer.load(R50K)


@no_deadline
@given(st.text())
def test_no_text_makes_a_special_id(text: str) -> None:
    encoder = loaded()
    ids = encoder.encode(text + "<|endoftext|>" + text)
    assert 50256 not in ids
    assert encoder.decode(ids.tolist()) == text + "<|endoftext|>" + text


def test_token_bytes_add_up_to_the_text(r50k: tokenizer.Tokenizer) -> None:
    text = "def f(x):\n    return '\U0001f600 é\0'" * 3
    assert r50k.token_bytes()[r50k.encode(text)].sum() == len(text.encode())


def test_token_bytes_of_specials_are_none(r50k: tokenizer.Tokenizer) -> None:
    lengths = r50k.token_bytes()
    assert lengths.shape == (50257,)
    assert lengths[50256] == 0
    assert lengths[:50256].min() == 1


def test_bos_and_eos_are_separate_choices() -> None:
    only_eos = tokenizer.load(settings.Tokenizer(name="r50k_base", eos=50256))
    assert only_eos.encode_document("hello").tolist() == [31373, 50256]
    neither = tokenizer.load(settings.Tokenizer(name="r50k_base"))
    assert neither.encode_document("hello").tolist() == [31373]
    assert (only_eos.specials_per_document, neither.specials_per_document) == (1, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"name": "r50k_base", "bos": 7}, "bos = 7 is not a special id of r50k_base"),
        ({"name": "r50k"}, "not a tiktoken encoding; known: "),
        ({"name": "gpt2", "model": "x"}, "for r50k_base only"),
        ({"name": "r50k_base", "model": "nowhere"}, "nowhere: no such file"),
        ({"kind": "sentencepiece", "model": "nowhere"}, "nowhere: no such file"),
    ],
)
def test_wrong_settings(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer.load(settings.Tokenizer.model_validate(wanted))


def test_the_vocabulary_comes_from_the_first_whole_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = tokenizer._tiktoken_file(tokenizer.load(R50K).encoding._mergeable_ranks)  # type: ignore[attr-defined]
    assert hashlib.sha256(published).hexdigest() == tokenizer.R50K_SHA256
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    cached = tmp_path / hashlib.sha1(tokenizer.R50K_URL.encode()).hexdigest()
    cached.write_bytes(published)
    assert tokenizer.load(R50K).encode("hello world").tolist() == [31373, 995]

    given = tmp_path / "mine.tiktoken"
    given.write_bytes(published)
    cached.write_bytes(b"nonsense")
    with_file = tokenizer.load(settings.Tokenizer(name="r50k_base", model=given))
    assert with_file.fingerprint == tokenizer.load(R50K.model_copy(update={"model": given})).fingerprint

    swapped = published.replace(base64.b64encode(b" the") + b" 262\n", base64.b64encode(b" teh") + b" 262\n")
    given.write_bytes(swapped)
    with pytest.raises(InputError, match="sha256 is"):
        tokenizer.load(settings.Tokenizer(name="r50k_base", model=given))

    def offline(*_: object, **__: object) -> None:
        raise requests.ConnectionError("offline")

    monkeypatch.setattr(requests, "get", offline)
    cached.write_bytes(swapped)
    tiktoken_registry = __import__("tiktoken.registry").registry
    monkeypatch.setattr(tiktoken_registry, "ENCODINGS", {})
    with pytest.raises(Unavailable, match="r50k_base is not in tiktoken's cache"):
        tokenizer.load(R50K)
    assert "damaged" in caplog.text


def test_sentencepiece(pieces: Path) -> None:
    encoder = tokenizer.load(settings.Tokenizer(kind="sentencepiece", model=pieces, bos=1, eos=2))
    assert encoder.vocab_size == 600
    for text in ("hello <s> </s> <unk> \U0001f600\0\n", "  spaces ", ""):
        ids = encoder.encode_document(text)
        assert (ids[0], ids[-1]) == (1, 2)
        assert not np.isin([0, 1, 2], ids[1:-1]).any()
        assert encoder.decode(ids.tolist()) == text
        # The dummy prefix is one space more than the text has.
        assert encoder.token_bytes()[ids].sum() == len(text.encode()) + (1 if text else 0)
    with pytest.raises(InputError, match="bos = 5 is not a control id"):
        tokenizer.load(settings.Tokenizer(kind="sentencepiece", model=pieces, bos=5))
    broken = pieces.with_name("broken.model")
    broken.write_bytes(b"no model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        tokenizer.load(settings.Tokenizer(kind="sentencepiece", model=broken))


# --- Text that is too much in one piece ---


def patterns() -> dict[tokenizer.Family, str]:
    """Return the patterns of tiktoken's encodings; the vocabularies, which are on the network, are left out."""
    public = tiktoken_ext.openai_public
    with mock.patch.object(public, "load_tiktoken_bpe", lambda *_, **__: {}):
        return {
            "r50k": public.p50k_base()["pat_str"],
            "cl100k": public.cl100k_base()["pat_str"],
            "o200k": public.o200k_harmony()["pat_str"],
        }


PATTERNS = patterns()
# Rust's $ is the very end; this module's is also the place before a last newline.
SPLIT = {family: regex.compile(pattern.replace("$", r"\Z")) for family, pattern in PATTERNS.items()}


def check_cuts(text: str, family: tokenizer.Family, long_space: int) -> int:
    """Compare the pretokens of a text with those of its parts; return the number of cuts."""
    parts = [part for part in tokenizer.parts_of(text, family, long_space) if part[0]]
    pretokens = [
        pretoken for part, single in parts for pretoken in ([part] if single else SPLIT[family].findall(part))
    ]
    assert pretokens == SPLIT[family].findall(text), (text, parts)
    return len(parts) - 1


@pytest.mark.parametrize("family", list(PATTERNS))
def test_no_pretoken_spans_a_cut_in_any_short_text(family: tokenizer.Family) -> None:
    """\u0301 is a letter to o200k only; "/" is taken along by its punctuation; "é" is no ASCII letter."""
    cuts = 0
    for size in range(6):
        for characters in itertools.product("a1!/ \n\u3000é\u0301", repeat=size):
            cuts += check_cuts("".join(characters), family, 1 + size % 2)
    assert cuts > 20_000


SPACES = [chr(c) for c in range(0x110000) if regex.fullmatch(r"\s", chr(c))]
ODD = [
    *SPACES,
    *"aZ19'/!=-_.\0\x1c\x1f\x7f\xad²½éßſŉ漢字かアไ\u0301\u20dd\u0903",
    *"\u200b\u200d\ufeff\u2581\ufffd\U0001f600\U0001f1e9",
    *("<|endoftext|>", "'ll", "'S", "\r\n", "<s>"),
]
RUNS = st.builds(lambda one, count: one * count, st.sampled_from(ODD), st.sampled_from([1, 1, 2, 3, 7, 40]))
ODD_TEXT = st.lists(RUNS, max_size=12).map("".join)


def test_white_space_is_what_it_is_to_the_patterns() -> None:
    assert SPACES == [chr(c) for c in range(0x110000) if tokenizer.re.fullmatch(tokenizer._SPACE, chr(c))]
    assert len(SPACES) == 25


@no_deadline
@given(ODD_TEXT, st.sampled_from(list(PATTERNS)), st.integers(1, 5))
def test_no_pretoken_spans_a_cut(text: str, family: tokenizer.Family, long_space: int) -> None:
    check_cuts(text, family, long_space)


@functools.cache
def with_pattern(family: tokenizer.Family) -> tokenizer.TiktokenTokenizer:
    """Return an encoding with a family's own pattern, in tiktoken's own regex, but r50k's vocabulary."""
    ranks = loaded().encoding._mergeable_ranks  # type: ignore[attr-defined]
    name = {"r50k": "p50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}[family]
    encoding = tiktoken.Encoding(name, pat_str=PATTERNS[family], mergeable_ranks=ranks, special_tokens={})
    return tokenizer.TiktokenTokenizer(encoding, None, None)


@no_deadline
@given(ODD_TEXT, st.sampled_from(list(PATTERNS)), st.integers(1, 5))
def test_cut_texts_have_tiktokens_ids(text: str, family: tokenizer.Family, long_space: int) -> None:
    encoder = with_pattern(family)
    expected = encoder.encoding.encode_ordinary(text)
    with mock.patch.multiple(tokenizer, LONG=0, LONG_SPACE=long_space):
        assert encoder.encode(text).tolist() == expected
    assert encoder.encode(text).tolist() == expected
    assert encoder.decode_bytes(expected) == text.encode()


@no_deadline
@given(ODD_TEXT)
def test_r50k_is_tiktokens(text: str) -> None:
    with mock.patch.multiple(tokenizer, LONG=0, LONG_SPACE=2):
        ids = loaded().encode(text)
    assert ids.tolist() == loaded().encoding.encode_ordinary(text)  # type: ignore[attr-defined]
    assert loaded().decode(ids) == loaded().decoded(text) == text
    assert loaded().lossless


def test_an_unknown_pattern_is_not_cut() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"  ": 256}
    encoding = tiktoken.Encoding("odd", pat_str=r"[\s\S]{3}|[\s\S]", mergeable_ranks=ranks, special_tokens={})
    encoder = tokenizer.TiktokenTokenizer(encoding, None, None)
    with mock.patch.multiple(tokenizer, LONG=0, LONG_SPACE=1):
        assert encoder.encode("a  b").tolist() == [97, 256, 98]


MILLIONS = 1_100_000  # more than tiktoken's regex can go back over


@pytest.mark.parametrize("family", list(PATTERNS))
@pytest.mark.parametrize(
    ("text", "pretokens"),
    [
        (" " * MILLIONS + "a", [" " * (MILLIONS - 1), " a"]),
        ("a" + "\t" * MILLIONS + "=", ["a", "\t" * (MILLIONS - 1), "\t", "="]),
        ("a" + " " * MILLIONS, ["a", " " * MILLIONS]),
    ],
)
def test_a_million_spaces(family: tokenizer.Family, text: str, pretokens: list[str]) -> None:
    encoder = with_pattern(family)
    single = encoder.encoding._encode_single_piece
    assert encoder.encode(text).tolist() == [id for pretoken in pretokens for id in single(pretoken)]


def test_a_million_spaces_are_too_many_for_tiktoken_alone() -> None:
    """If this ever fails, tiktoken has mended it, and the cutting can go."""
    with pytest.raises(BaseException) as caught:
        loaded().encoding.encode_ordinary(" " * MILLIONS + "a")  # type: ignore[attr-defined]
    assert tokenizer.is_panic(caught.value) or isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "count"),
    [("a" * 1_000_000, 125_000), ("\0" * 1_000_000, 1_000_000), ("\n" * 1_000_001, 500_001)],
    ids=["letters", "NULs", "newlines"],
)
def test_one_character_a_million_times(r50k: tokenizer.Tokenizer, text: str, count: int) -> None:
    ids = r50k.encode(text)
    assert r50k.decode_bytes(ids) == text.encode()
    assert len(ids) == len(r50k.encoding.encode_ordinary(text))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("a" * 4001, True),
        ("a" * 4000, False),
        ("x " + "é" * 2001, True),  # bytes count
        ("1" * 4001, True),
        ("=_" * 2001, True),
        ("\0" * 4001, True),
        (" " * 4002 + "a", True),
        (" " * 4001 + "a", False),
        ("ab1=" * 4000, False),
        ("=== " * 4000, False),
        ("漢" * 1300 + " " + "漢" * 1300, False),
    ],
)
def test_a_run_beyond_bounds_is_refused(r50k: tokenizer.Tokenizer, text: str, refused: bool) -> None:
    expected = r50k.encode(text)
    with mock.patch.multiple(tokenizer, LONG=100, LONG_SPACE=100, LONGEST_RUN=4000):
        if refused:
            with pytest.raises(
                tokenizer.Unencodable, match=r"^run without a break is too long for the tokenizer$"
            ):
                r50k.encode(text)
        else:
            assert np.array_equal(r50k.encode(text), expected)


class PanicException(BaseException):
    """Named as Rust's panic is."""


@pytest.mark.parametrize("error", [ValueError("stack"), PanicException("stack"), RuntimeError("INTERNAL")])
def test_what_fails_in_a_library_is_unencodable(r50k: tokenizer.Tokenizer, error: BaseException) -> None:
    with mock.patch.object(r50k, "_encode", side_effect=error):
        for encode in (r50k.encode, r50k.encode_document, lambda text: r50k.encode_batch([text])):
            with pytest.raises(tokenizer.Unencodable, match=r"^tokenizer failed$"):
                encode("hello")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(), AttributeError("a bug")])
def test_other_errors_pass(r50k: tokenizer.Tokenizer, error: BaseException) -> None:
    with mock.patch.object(r50k, "_encode", side_effect=error), pytest.raises(type(error)):
        r50k.encode("hello")


def test_a_lone_surrogate_is_unencodable(r50k: tokenizer.Tokenizer, pieces: Path) -> None:
    for encoder in (r50k, tokenizer.SentencePieceTokenizer(pieces, None, None)):
        with pytest.raises(tokenizer.Unencodable):
            encoder.encode("a\ud800")
        with pytest.raises(tokenizer.Unencodable):
            encoder.encode_batch(["a", "a\ud800"])


def check_batch(encoder: tokenizer.Tokenizer, texts: Sequence[str]) -> None:
    ids, lengths = encoder.encode_batch(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert lengths.tolist() == [len(encoder.encode(text)) for text in texts]
    assert ids.tolist() == [id for text in texts for id in encoder.encode(text).tolist()]


@pytest.mark.parametrize("texts", [[], [""], ["", "a", ""], ["hello world", "", "<|endoftext|>", "\0"]])
def test_a_batch_is_its_texts_end_to_end(
    r50k: tokenizer.Tokenizer, pieces: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tokenizer.SentencePieceTokenizer(pieces, 1, 2)
    check_batch(r50k, texts)
    check_batch(llama, texts)
    monkeypatch.setattr(tokenizer, "LONG", 3)
    check_batch(r50k, texts)
    check_batch(llama, texts)


# --- SentencePiece ---


@functools.cache
def llama() -> tokenizer.SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.SentencePieceTokenizer(sentencepiece_model(Path(folder) / "m.model"), 1, 2)


@no_deadline
@given(
    st.lists(st.sampled_from([*ODD, " ", " ", "self", "return", "e", "the", "  "]), max_size=30).map("".join)
)
def test_cut_texts_have_sentencepieces_ids(text: str) -> None:
    encoder = llama()
    expected = encoder.model.encode(text)
    assert encoder.encode(text).tolist() == expected
    with mock.patch.object(tokenizer, "LONG", 1):
        assert encoder.encode(text).tolist() == expected
    assert encoder.decode_bytes(expected).decode() == encoder.decode(expected) == encoder.decoded(text)
    assert encoder.decoded(text) == text.replace("\u2581", " ")
    assert encoder.token_bytes()[expected].sum() == len(encoder.decoded(text).encode()) + (1 if text else 0)


def test_sentencepiece_is_called_piece_by_piece() -> None:
    encoder, calls = llama(), []

    def encode(text: str) -> tokenizer.Ids:
        calls.append(text)
        return np.array([], np.uint32)

    with mock.patch.object(tokenizer, "LONG", 4), mock.patch.object(encoder, "_encode", encode):
        encoder.encode("aaaa bbbb  cc\u2581 d e ffff g")
    # Never at a space beside another one, or beside U+2581, which is the same to SentencePiece.
    assert calls == ["aaaa", "bbbb  cc\u2581 d", "e ffff", "g"]


@pytest.mark.parametrize(
    ("changes", "cuts", "lossless"),
    [
        ({}, True, True),
        ({"byte_fallback": False}, True, False),
        ({"add_dummy_prefix": False}, True, True),
        ({"normalization_rule_name": "nmt_nfkc"}, False, False),
        ({"remove_extra_whitespaces": True}, False, False),
        ({"model_type": "unigram", "vocab_size": 400}, False, True),
        ({"treat_whitespace_as_suffix": True}, False, False),
        ({"user_defined_symbols": ["x y"]}, False, True),
        ({"user_defined_symbols": ["xyz"]}, True, True),
        ({"split_by_whitespace": False}, False, True),
    ],
)
def test_models_of_other_kinds(
    tmp_path: Path, changes: dict[str, object], cuts: bool, lossless: bool
) -> None:
    encoder = tokenizer.SentencePieceTokenizer(sentencepiece_model(tmp_path / "m", **changes), None, None)
    assert (encoder.cuts, encoder.lossless) == (cuts, lossless)
    assert encoder.spec.own_symbols == ("user_defined_symbols" in changes)
    for text in ("the x yz  self.\n", " ﬁ\0 Ａ 漢  x y", "xyz x y x yx y", ""):
        ids = encoder.model.encode(text)
        with mock.patch.object(tokenizer, "LONG", 1):
            assert encoder.encode(text).tolist() == ids
        if lossless:
            assert encoder.decode_bytes(ids).decode() == encoder.decode(ids) == text
    assert lossless or encoder.decode(encoder.encode(" ﬁ\0 漢 ")) != " ﬁ\0 漢 "


def test_sentencepiece_without_a_place_to_cut_is_refused_beyond_bounds(pieces: Path) -> None:
    encoder = tokenizer.SentencePieceTokenizer(pieces, None, None)
    with mock.patch.multiple(tokenizer, LONG=100, LONGEST_RUN=4000):
        assert len(encoder.encode("a" * 4000)) > 0
        assert len(encoder.encode("a b" * 4000)) > 4000
        with pytest.raises(tokenizer.Unencodable, match="run without a break"):
            encoder.encode("b " + "a" * 4001)


# --- What a recipe says ---


def test_the_tokenizer_of_a_recipe_is_kept(pieces: Path, tmp_path: Path) -> None:
    tables = {
        "corpus": {"name": "demo", "train": ["a"], "val": ["v"]},
        "tokenizer": {"kind": "sentencepiece", "model": pieces, "bos": 1},
        "blocks": {"length": 16},
    }
    recipe = settings.DataSettings.model_validate(tables)
    first = tokenizer.for_recipe(recipe, tmp_path)
    assert tokenizer.for_recipe(recipe, tmp_path) is first
    assert (first.bos, first.eos, first.vocab_size) == (1, None, 600)
    tables["tokenizer"] = {"name": "r50k_base"}
    assert tokenizer.for_recipe(settings.DataSettings.model_validate(tables), tmp_path).vocab_size == 50257
    os.utime(pieces, ns=(1, 1))  # another file, for all that is known
    assert tokenizer.for_recipe(recipe, tmp_path) is not first
