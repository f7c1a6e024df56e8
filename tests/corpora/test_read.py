"""Bytes to records: every way a shard can end, and every way a line can be no document."""

import json
import random
from pathlib import Path

import pytest
import zstandard

from corpora.errors import InputError
from corpora.read import BadRecord, Line, ZstdFile, parse_record, read_lines
from corpora.settings import Corpus

CORPUS = Corpus(name="tiny", train=("a",), val=("b",))


def compress(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


def read_all(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with ZstdFile(path) as file:
        return file.read()


def incompressible(size: int) -> bytes:
    return random.Random(1).randbytes(size)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(
    "text",
    [b"one\ntwo\n", b"x" * 1000, incompressible(700), b"pileline: the shard ends here"],
    ids=["lines", "run", "raw block", "looks like the mark"],
)
def test_every_cut_of_a_frame_is_an_error(tmp_path: Path, text: bytes, checksum: bool) -> None:
    whole = compress(text, checksum)
    path = tmp_path / "shard.zst"
    assert read_all(path, whole) == text
    for cut in range(len(whole)):
        with pytest.raises(InputError, match=str(path)):
            read_all(path, whole[:cut])


def test_a_large_file_cut_in_half_is_an_error(tmp_path: Path) -> None:
    whole = compress(incompressible(3 << 20))
    with pytest.raises(InputError, match="cut short"):
        read_all(tmp_path / "shard.zst", whole[: len(whole) // 2])


SKIPPABLE = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (compress(b"one\n") + compress(b"two\n"), b"one\ntwo\n"),
        (compress(b"") + compress(b"two\n"), b"two\n"),
        (SKIPPABLE + compress(b"one\n"), b"one\n"),
        (compress(b"one\n") + SKIPPABLE + compress(b"two\n"), b"one\ntwo\n"),
        (compress(b""), b""),
    ],
    ids=["two frames", "empty first frame", "skippable first", "skippable between", "empty"],
)
def test_frames_are_all_read(tmp_path: Path, data: bytes, text: bytes) -> None:
    assert read_all(tmp_path / "shard.zst", data) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00 gzip", "not zstd data"),
        (b"<!doctype html>", "not zstd data"),
        (compress(b"one\n") + b"garbage", "damaged|cut short"),
        (compress(b"one\n") + b"\x00", "damaged"),
        (compress(b"one\n") + compress(b"two\n")[:-1], "cut short|damaged"),
        (bytes([*compress(b"one\n" * 50)[:-1], 0x55]), "damaged"),
    ],
    ids=["empty file", "gzip", "html", "garbage behind", "zero behind", "second frame cut", "checksum"],
)
def test_what_is_not_whole_zstd_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_all(tmp_path / "shard.zst", data)


def test_lines_end_at_the_newline_byte_only(tmp_path: Path) -> None:
    path = tmp_path / "shard.zst"
    separators = "a\u2028b\x0cc\x85d\r".encode()
    path.write_bytes(compress(separators + b"\n\nlast"))
    assert list(read_lines(path)) == [
        Line(1, 0, len(separators), separators),
        Line(2, len(separators) + 1, 0, b""),
        Line(3, len(separators) + 2, 4, b"last"),
    ]


def test_a_long_line_is_passed_over_without_reading_it_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "shard.zst"
    path.write_bytes(compress(b"abcd\n" + b"x" * 5_000_000 + b"\nabcde\n" + b"y" * 9))
    assert list(read_lines(path, max_bytes=5)) == [
        Line(1, 0, 4, b"abcd"),
        Line(2, 5, 5_000_000, None),
        Line(3, 5_000_006, 5, b"abcde"),
        Line(4, 5_000_012, 9, None),
    ]


def test_progress_counts_compressed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "shard.zst"
    path.write_bytes(compress(incompressible(500_000)))
    told: list[int] = []
    list(read_lines(path, told.append))
    assert sum(told) == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "text", "subset"),
    [
        (b'{"text": "hi", "meta": {"pile_set_name": "Github"}}', "hi", "Github"),
        (b'{"text": "hi"}', "hi", "unknown"),
        (b'{"text": "hi", "meta": 3}', "hi", "unknown"),
        (b'{"text": "hi", "meta": {"pile_set_name": null}}', "hi", "unknown"),
        (b'{"text": "", "extra": [1, 2]}', "", "unknown"),
        (b'{"text": "a\\u0000b"}', "a\0b", "unknown"),
        ('{"text": "a\u2028b"}\r'.encode(), "a\u2028b", "unknown"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600", "unknown"),
        (b'{"text": "a\\ud83db"}', "a\ufffdb", "unknown"),
        (b'{"text": "ok", "other": "\\ud83d"}', "ok", "unknown"),
    ],
)
def test_documents(line: bytes, text: str, subset: str) -> None:
    record = parse_record(line, CORPUS)
    assert (record.text, record.subset) == (text, subset)
    assert record.repaired == ("\ufffd" in text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid JSON"),
        (b"not json", "invalid JSON"),
        (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
        (b'{"text": "a", "n": NaN}', "invalid JSON"),
        (b'{"text": "a\nb"}', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
        (b"null", "not a JSON object"),
        (b'["text"]', "not a JSON object"),
        (b"{}", "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": 5}', "text is not a string"),
        (b'{"text": ["a"]}', "text is not a string"),
    ],
)
def test_lines_that_are_no_document(line: bytes, reason: str) -> None:
    with pytest.raises(BadRecord, match=f"^{reason}$"):
        parse_record(line, CORPUS)


def test_the_fields_are_settings() -> None:
    corpus = Corpus(name="x", train=("a",), val=("b",), text_field="content", subset_field="source")
    record = parse_record(json.dumps({"content": "hi", "source": "web"}).encode(), corpus)
    assert (record.text, record.subset) == ("hi", "web")
