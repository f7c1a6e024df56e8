"""A tokenizer of one's own: the same input gives the same bytes, from train shards only, and nothing is left out unsaid."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from corpora import tokenizer, train_tokenizer
from corpora.encode import Encoder
from corpora.errors import InputError
from corpora.fetch import fetch
from corpora.settings import DataSettings
from corpora.train_tokenizer import (
    SENTENCE,
    Trained,
    _place,
    _sentences,
    learn,
    made_from,
    take,
    train,
    trained,
)

Make = Callable[..., tuple[DataSettings, Path]]


def model_path(settings: DataSettings, data: Path) -> Path:
    return _place(settings, data, made_from(settings, data))


WORDS = (
    "the of and to in a is that for it was on are as with his they at be this from have or by one had".split()
)


def prose(count: int, seed: int = 0) -> list[str]:
    """Return so many documents of words that are made of words."""
    chance = random.Random(seed)
    more = ["".join(chance.choices(WORDS, k=2)) for _ in range(400)]
    return [" ".join(chance.choices(WORDS + more, k=chance.randint(5, 120))) for _ in range(count)]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(
        json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}).encode() + b"\n" for text in texts
    )


def ask(vocab: int = 400, size: int = 50_000) -> dict[str, Any]:
    """Return the table [tokenizer] of a recipe that trains one."""
    return {
        "kind": "sentencepiece",
        "name": None,
        "bos": 1,
        "eos": 2,
        "train": {"vocab": vocab, "bytes": size},
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., tuple[DataSettings, Path]]:
    """Return make(shards, ...) -> (settings, data root): train shards of these texts, and one held out, not fetched."""

    def make(shards: dict[str, list[str]], data: str = "data", **tables: Any) -> tuple[DataSettings, Path]:
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        files = []
        for name, texts in {**shards, "v": ["held out ☃"]}.items():
            packed = zstandard.ZstdCompressor().compress(jsonl(texts))
            (source / f"{name}.jsonl.zst").write_bytes(packed)
            sha256 = hashlib.sha256(packed).hexdigest()
            files.append({"name": name, "path": f"{name}.jsonl.zst", "size": len(packed), "sha256": sha256})
        (source / "lock.json").write_text(
            json.dumps({"corpus": "tiny", "url": source.as_uri(), "files": files})
        )
        recipe = {
            "corpus": {
                "name": "tiny",
                "train": list(shards),
                "val": ["v"],
                "lock": str(source / "lock.json"),
            },
            "tokenizer": ask(),
            "blocks": {"length": 16},
        }
        settings = DataSettings.model_validate(recipe | tables)
        for name in shards:
            fetch(settings.corpus, name, tmp_path / data)
        return settings, tmp_path / data

    return make


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def test_the_same_input_gives_the_same_bytes(corpus: Make) -> None:
    settings, data = corpus({"a": prose(300), "b": prose(300, seed=1)})
    ticks: list[int] = []
    done = train(settings, data, ticks.append)
    assert not done.skipped
    assert done.model == model_path(settings, data) == trained(settings, data)
    assert done.model.parent.parent == data / "tiny" / "tokenizers"
    content = done.model.read_bytes()
    assert done.manifest["outputs"]["tokenizer.model"] == {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert done.manifest["counts"]["bytes"] == sum(ticks) == 50_000
    assert [share["bytes"] for share in done.manifest["shards"].values()] == [25_000, 25_000]
    assert done.manifest["made_from"] == made_from(settings, data)
    assert [name for name, *_ in done.manifest["made_from"]["input"]] == ["a", "b"]
    assert len(pieces_of(content)) == 400

    again = train(settings, data, ticks.append)
    assert again == Trained(done.model, done.manifest, skipped=True)
    assert sum(ticks) == 50_000
    elsewhere = train(*corpus({"a": prose(300), "b": prose(300, seed=1)}, data="other"))
    assert elsewhere.model.read_bytes() == content
    assert elsewhere.manifest == done.manifest


@pytest.mark.parametrize(
    "tables",
    [
        {"tokenizer": ask(vocab=401)},
        {"tokenizer": ask(size=50_001)},
        {"clean": {"min_chars": 2}},
        {"clean": {"subsets": {"Github": "prose"}}},
    ],
)
def test_what_decides_the_model_decides_its_place(corpus: Make, tables: dict[str, Any]) -> None:
    texts = {"a": prose(300)}
    first = train(*corpus(texts))
    settings, data = corpus(texts, **tables)
    assert model_path(settings, data) != first.model
    with pytest.raises(InputError, match="is not there yet; run: python -m corpora train-tokenizer RECIPE"):
        trained(settings, data)
    assert not train(settings, data).skipped
    assert train(*corpus(texts)).skipped


def test_other_shards_are_another_place_and_held_out_ones_are_not(corpus: Make) -> None:
    settings, data = corpus({"a": prose(300)})
    model = train(settings, data).model
    assert not {"☃", "h"} & set(pieces_of(model.read_bytes())[259:]) - set("".join(WORDS))
    assert not (data / "tiny" / "raw" / "v.jsonl.zst").exists()
    tables = settings.model_dump(mode="json")
    tables["tokenizer"] |= {"bos": None, "backend": "own"}
    tables["blocks"]["length"] = 99
    assert model_path(DataSettings.model_validate(tables), data) == model
    changed, _ = corpus({"a": prose(299)})
    assert model_path(changed, data) != model


def test_the_place_is_known_without_reading_a_shard(corpus: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data = corpus({"a": prose(300)})
    model = train(settings, data).model
    shutil.rmtree(data / "tiny" / "raw")
    assert trained(settings, data) == model
    assert train(settings, data).skipped


def test_the_recipe_s_tokenizer_is_the_trained_one(corpus: Make) -> None:
    settings, data = corpus({"a": prose(300)})
    with pytest.raises(InputError, match="run: python -m corpora train-tokenizer RECIPE"):
        tokenizer.for_recipe(settings, data)
    train(settings, data)
    encoder = tokenizer.for_recipe(settings, data)
    assert tokenizer.for_recipe(settings, data) is encoder
    assert isinstance(encoder, tokenizer.SentencePieceTokenizer)
    assert (encoder.vocab_size, encoder.bos, encoder.eos) == (400, 1, 2)
    assert encoder.lossless
    assert encoder.cuts
    for text in ("the of and\n\n  12 <s>\0", " é漢\U0001f600", ""):
        assert encoder.decode_bytes(encoder.encode(text)) == text.encode()
    assert encoder.encode("12").tolist() == encoder.encode("1").tolist() + encoder.encode("2").tolist()[1:]


def damage(model: Path) -> None:
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (damage, "is damaged; run"),
        (lambda model: model.unlink(), "is not there yet; run"),
        (lambda model: model.with_name("manifest.json").unlink(), "is damaged; run"),
        (lambda model: model.with_name("manifest.json").write_text("{"), "is damaged; run"),
        (lambda model: model.with_name("manifest.json").write_text("[]"), "is damaged; run"),
    ],
)
def test_a_damaged_model_is_made_anew(corpus: Make, harm: Callable[[Path], object], told: str) -> None:
    settings, data = corpus({"a": prose(300)})
    done = train(settings, data)
    content = done.model.read_bytes()
    harm(done.model)
    with pytest.raises(InputError, match=told):
        trained(settings, data)
    assert train(settings, data) == done
    assert done.model.read_bytes() == content


def test_a_vocabulary_that_does_not_fit_the_text(corpus: Make) -> None:
    settings, data = corpus({"a": ["the one and only"] * 3}, tokenizer=ask(vocab=32_000))
    with pytest.raises(
        InputError, match=r"vocab = 32000 is too large for this text: at most \d+; or raise bytes"
    ):
        train(settings, data)
    assert not model_path(settings, data).parent.exists()
    many = "".join(map(chr, range(0x4E00, 0x4E80)))
    settings, data = corpus({"a": [many]}, tokenizer=ask(vocab=300))
    with pytest.raises(InputError, match=r"vocab = 300 is too small for this text: at least 3\d\d, for its"):
        train(settings, data)
    settings, data = corpus({"a": ["", " "]})
    with pytest.raises(InputError, match="no text to learn a tokenizer from"):
        train(settings, data)


def test_a_recipe_without_the_table(corpus: Make) -> None:
    settings, data = corpus({"a": prose(3)}, tokenizer={"name": "r50k_base"})
    with pytest.raises(InputError, match=r"\[tokenizer.train\] is missing"):
        train(settings, data)


def test_a_shard_that_is_not_fetched(corpus: Make) -> None:
    settings, data = corpus({"a": prose(300)})
    shutil.rmtree(data / "tiny" / "raw")
    with pytest.raises(InputError, match="shard a is not there; run `python -m corpora fetch"):
        train(settings, data)


# --- What is learned from ---


def test_what_is_taken_is_cleaned_spread_and_exact(corpus: Make) -> None:
    texts = [f"document {n:04} \r\n" + "x" * (n % 50) for n in range(2000)]
    settings, data = corpus({"a": ["  ", *texts, "not\x07 printable"]})
    ticks: list[int] = []
    taken = take(settings, "a", data, 5000, ticks.append)
    assert sum(map(len, taken)) == sum(ticks) == 5000
    numbers = [int(text[9:13]) for text in taken]
    assert numbers == sorted(numbers)
    quarters = [sum(n // 500 == quarter for n in numbers) for quarter in range(4)]
    assert len(numbers) > 100
    assert min(quarters) > len(numbers) / 8
    assert all(b"\r" not in text for text in taken)
    whole = [text for text in taken if text.decode() in {text.replace("\r\n", "\n") for text in texts}]
    assert len(whole) >= len(taken) - 1  # the last one taken is cut
    assert take(settings, "a", data, 5000, ticks.append) == taken
    everything = take(settings, "a", data, 10**9, lambda _: None)
    assert len(everything) == 2001
    assert everything[-1] == b"not printable"
    assert set(whole) <= set(everything)


def test_a_share_is_cut_between_characters(corpus: Make) -> None:
    settings, data = corpus({"a": ["é" * 100]})
    assert take(settings, "a", data, 51, lambda _: None) == ["é".encode() * 25]


def test_a_bad_line_is_passed_over(corpus: Make, tmp_path: Path) -> None:
    settings, data = corpus({"a": prose(5)})
    raw = next((data / "tiny" / "raw").glob("a*zst"))
    assert len(take(settings, "a", data, 10**6, lambda _: None)) == 5
    lines = b"{}\nno json\n" + jsonl(["good"]) + b'{"text": "cut'
    packed = zstandard.ZstdCompressor().compress(lines)
    source = tmp_path / "source"
    (source / "a.jsonl.zst").write_bytes(packed)
    lock = json.loads((source / "lock.json").read_text())
    lock["files"][0] |= {"size": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    (source / "lock.json").write_text(json.dumps(lock))
    raw.unlink()
    fetch(settings.corpus, "a", data)
    assert take(settings, "a", data, 10**6, lambda _: None) == [b"good"]


def test_the_end_of_a_huge_shard_is_not_read(corpus: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data = corpus({"a": [f"{n:020}" for n in range(1000)]})
    monkeypatch.setattr(train_tokenizer, "READ", 5000)
    taken = take(settings, "a", data, 10**6, lambda _: None)
    assert [int(text) for text in taken] == list(range(len(taken)))
    assert 50 < len(taken) < 100


@given(st.text(), st.integers(1, 9))
def test_sentences_leave_nothing_out(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "SENTENCE", limit)
        sentences = list(_sentences([text.encode()]))
    assert all(0 < len(sentence) <= limit for sentence in sentences)
    left_out = str.maketrans("", "", "\n\u2585 ")
    assert "".join(sentences).translate(left_out) == text.translate(left_out)


def test_sentences_are_cut_at_spaces() -> None:
    word = "w" * 99
    line = " ".join([word] * 100)
    assert len(line) > 2 * SENTENCE
    sentences = list(_sentences([b"one\n\ntwo \xe2\x96\x85three\n", line.encode()]))
    assert sentences[:3] == ["one", "two ", "three"]
    assert " ".join(sentences[3:]) == line
    assert set(" ".join(sentences[3:]).split(" ")) == {word}


@pytest.mark.parametrize(
    "line",
    [
        "zebra " * 20_000,  # longer than SentencePiece's own limit
        "zebra" * 20_000,
        "zebra \u2585 zebra",
        "zebra\0zebra zebra",
        "zebra\u2581zebra",
        "zebra\tzebra",
    ],
    ids=["long", "unbroken", "reserved", "NUL", "U+2581", "tab"],
)
def test_sentencepiece_learns_from_every_line(line: str) -> None:
    model = learn([text.encode() for text in [*prose(300), *[line] * 50]], 500)
    assert [piece for piece in pieces_of(model) if "zebra" in piece or piece in ("ze", "bra", "▁ze")]
    pieces = pieces_of(model)
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert not any("▁" in piece.lstrip("▁") for piece in pieces)
    assert not any(set(piece) & set("\0\n\u2585") for piece in pieces)


def test_spaces_are_pieces_and_digits_are_single() -> None:
    texts = [f"def f():\n    return {n}{n}\n        x" for n in range(500)]
    pieces = pieces_of(learn([text.encode() for text in [*texts, *prose(100)]], 400))
    assert {"▁▁▁▁", "1", "▁"} <= set(pieces)
    assert not any(any(c.isdigit() for c in piece) and len(piece.lstrip("▁")) > 1 for piece in pieces[259:])


def test_fastokens_gives_a_trained_model_s_ids(tmp_path: Path) -> None:
    names = "<unk></s><0x0A> "
    texts = [
        *prose(300),
        *["< u n k > / s 0x0123456789ABCDEF"] * 200,
    ]  # training passes over the names themselves
    model = tmp_path / "tokenizer.model"
    model.write_bytes(learn([text.encode() for text in texts], 500))
    llama = tokenizer.SentencePieceTokenizer(model, 1, 2)
    encoder = Encoder(llama, "fastokens")
    ids, _ = encoder.encode_batch([*texts, names])
    assert encoder.engine == "fastokens 0.3.5"
    assert ids.tolist() == [id for text in [*texts, names] for id in llama.encode(text).tolist()]
