"""Ids: the published vocabulary, special ids by declaration only, and text that wants to be control ids."""

import base64
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from corpora import settings, tokenizer
from corpora.errors import InputError, Unavailable

R50K = settings.Tokenizer(name="r50k_base", bos=50256, eos=50256)


@pytest.fixture(scope="module")
def r50k() -> tokenizer.Tokenizer:
    return tokenizer.load(R50K)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small SentencePiece model in LLaMA's manner."""
    model = tmp_path_factory.mktemp("sp") / "tiny"
    text = Path(sentencepiece.__file__).read_text("utf-8")

    def lines() -> Iterator[str]:
        yield from text.splitlines()

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_prefix=str(model),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.with_suffix(".model")


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
