"""What a recipe will cost: counted where it is done, reckoned where it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from corpora.errors import InputError
from corpora.estimate import check_space, estimate, free_bytes, measure_speed
from corpora.prepare import prepare
from corpora.settings import Corpus, DataSettings

Tiny = Callable[..., tuple[DataSettings, Path]]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


LINE = b'{"text": "%s", "meta": {"pile_set_name": "Github"}}\n' % (b"hello world " * 50)


def test_pile_before_anything_is_here(tmp_path: Path) -> None:
    found = estimate(DataSettings.read("13m"), tmp_path)
    train, val = found.shards
    assert (train.raw, train.known, train.missing) == (11_152_428_427, True, 11_152_428_427)
    assert (val.raw, val.known) == (338_000_000, False)
    assert found.download == 11_152_428_427 + 338_000_000
    # 32.8 GB of text and 5.9 million documents in a shard; 9.3 to 9.8 thousand million tokens of two bytes
    assert 32.5e9 < train.text < 33.1e9
    assert 5.7e6 < train.documents < 6.1e6
    assert 9.2e9 < train.tokens < 9.9e9
    assert found.blocks == pytest.approx(2 * sum(shard.tokens for shard in found.shards), rel=0.01)


def test_what_is_prepared_is_counted_and_tells_the_ratios(tiny: Tiny) -> None:
    settings, data = tiny(LINE * 20)
    before = estimate(settings, data)
    assert before.download == 0 and all(shard.known and not shard.prepared for shard in before.shards)
    ledger = prepare(settings, "a", data).manifest["ledger"]
    counted, other = estimate(settings, data).shards
    tokens = ledger["text_tokens"] + ledger["special_tokens"]
    assert (counted.prepared, counted.documents, counted.text, counted.tokens) == (True, 20, 12_000, tokens)
    assert not other.prepared
    assert other.text == int(other.raw * 12_000 / counted.raw)
    assert estimate(settings, data).blocks == other.blocks  # those of `a` are there


def test_part_of_a_download_is_not_counted_again(tiny: Tiny) -> None:
    settings, data = tiny(LINE)
    raw = data / "tiny" / "raw" / "a.jsonl.zst"
    away = settings.corpus.model_copy(update={"url": "https://example.org"})
    settings = settings.model_copy(update={"corpus": away})
    whole = raw.stat().st_size
    raw.rename(raw.with_name("a.jsonl.zst.part"))
    raw.with_name("a.jsonl.zst.part").write_bytes(b"x" * 10)
    assert estimate(settings, data).download == whole - 10
    assert estimate(settings, data, ("v",)).download == 0


def test_file_of_the_same_disk_needs_no_room(tiny: Tiny) -> None:
    settings, data = tiny(LINE)
    (data / "tiny" / "raw" / "a.jsonl.zst").unlink()
    assert estimate(settings, data).download == 0


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimate(DataSettings.read("13m"), tmp_path)
    for free, prepares, told in (
        (10**12, True, None),
        (
            found.download - 1,
            False,
            r"about 11,490,428,427 bytes are to be downloaded, 11,490,428,426 are free",
        ),
        (
            found.download + 1,
            True,
            r"and about 19,\d{3},\d{3},\d{3} for blocks, 11,490,428,428 are free; free some",
        ),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        if told is None:
            assert check_space(found, tmp_path, prepare=prepares) is None
            continue
        with pytest.raises(InputError, match=told):
            check_space(found, tmp_path, prepare=prepares)
    warning = check_space(found, tmp_path, prepare=False)  # room for the download, not for the blocks
    assert warning is not None and "for blocks" in warning


def test_free_bytes_of_a_folder_to_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_speed_is_measured_on_what_is_here(tiny: Tiny, tmp_path: Path) -> None:
    settings, data = tiny(LINE * 500)
    speed, told = measure_speed(settings, data)
    assert told == "the beginning of a" and speed > 100_000
    speed, told = measure_speed(settings, tmp_path / "nothing here")
    assert told == "Python's own sources" and speed > 100_000


def test_texts_of_a_folder_are_counted(tmp_path: Path) -> None:
    lock = tmp_path / "own.lock.json"
    texts = {f"{number}.txt": "a" * 64 for number in range(480)}
    files = [{"name": "text/0", "path": "text/0.tar", "size": 500_000, "sha256": "a" * 64, "texts": texts}]
    lock.write_text(json.dumps({"corpus": "own", "url": tmp_path.as_uri(), "files": files}))
    corpus = Corpus(name="own", train=("text/0",), val=("x",), lock=lock)
    settings = DataSettings.read("demo").model_copy(update={"corpus": corpus})
    assert estimate(settings, tmp_path, ("text/0",)).shards[0].documents == 480
