"""Bytes to records: every way a shard can end, and every way a line can be no document."""

import gzip
import io
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corpora import read
from corpora.errors import InputError
from corpora.read import BadRecord, Limits, Line, Lines, ZstdFile, open_bytes, parse_record, suffix_of
from corpora.settings import Corpus

CORPUS = Corpus(name="tiny", train=("a",), val=("b",))


def compress(data: bytes, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum).compress(data)


def read_all(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with ZstdFile(path) as file:
        return file.read()


def read_lines(
    path: Path, progress: Callable[[int], None] | None = None, max_bytes: int = 64 << 20
) -> Iterator[Line]:
    with open_bytes(path, progress) as file:
        yield from Lines(file, max_bytes)


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


@pytest.mark.parametrize(
    "text", [b"one\ntwo\n", b"", b"x" * 1000, incompressible(700)], ids=["lines", "empty", "run", "stored"]
)
def test_every_cut_of_a_gzip_member_is_an_error(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "shard.gz"
    plain = gzip.compress(text, mtime=0)
    named = b"\x1f\x8b\x08\x08" + plain[4:10] + b"shard.jsonl\0" + plain[10:]
    for whole in (plain, named):
        assert gunzip(path, whole) == text
        assert gunzip(path, whole + gzip.compress(b"more")) == text + b"more"
        for cut in range(len(whole)):
            with pytest.raises(InputError, match=str(path)):
                gunzip(path, whole[:cut])
            if cut:
                with pytest.raises(InputError, match="cut short"):
                    gunzip(path, gzip.compress(b"first") + whole[:cut])


def gunzip(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with open_bytes(path) as file:
        return file.read()


ONE = gzip.compress(b"one\n", mtime=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"shard\.gz is empty; fetch it again$"),
        (compress(b"one\n"), r"is not gzip data \(it begins with b'\(\\xb5/\\xfd'\); fetch it again$"),
        (b"<!doctype html>", r"is not gzip data \(it begins with b'<!do'\)"),
        (ONE + b"garbage", r"damaged gzip data \(.*\), after 4 bytes of text; delete it and fetch it again$"),
        (ONE + bytes(512), "damaged gzip data .*, after 4 bytes"),
        (ONE[:-8] + bytes([ONE[-8] ^ 1]) + ONE[-7:], "damaged gzip data .*data check"),
        (ONE[:-1] + b"\1", "damaged gzip data .*length check"),
        (ONE[:10] + b"\xff" + ONE[11:], "damaged gzip data .*invalid block type"),
        (
            ONE[:-1],
            r"cut short \(it does not end where a gzip member ends\), after 4 bytes of text; delete it",
        ),
    ],
    ids=["empty", "zstd", "html", "garbage behind", "zeros behind", "CRC", "length", "block", "cut"],
)
def test_what_is_not_whole_gzip_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gunzip(tmp_path / "shard.gz", data)


def test_gzip_members_are_all_read_wherever_reads_cut_them(tmp_path: Path) -> None:
    parts = [incompressible(size) for size in (0, 1, 40_000, 131_072, 300_000, 0, 1_200_000)] * 2
    data = b"".join(gzip.compress(part, compresslevel=1) for part in parts)
    assert gunzip(tmp_path / "shard.gz", data) == b"".join(parts)


@pytest.mark.parametrize("name", ["bomb.gz", "bomb.zst"])
def test_a_bomb_is_one_long_line_in_little_memory(tmp_path: Path, name: str) -> None:
    size, path = 200_000_000, tmp_path / name
    packer = zlib.compressobj(wbits=31) if name == "bomb.gz" else zstandard.ZstdCompressor().compressobj()
    with path.open("wb") as file:
        for _ in range(size // 1_000_000):
            file.write(packer.compress(b"x" * 1_000_000))
        file.write(packer.flush())
    tracemalloc.start()
    try:
        assert list(read_lines(path, max_bytes=1000)) == [Line(1, 0, size, None)]
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


@hypothesis_settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(st.text(alphabet="ab \r\x0b\u2028\x85\ufeffé😀").map(str.encode)),
    last=st.binary(max_size=8),
    max_bytes=st.sampled_from([3, 1000]),
)
def test_the_same_lines_however_compressed(
    tmp_path: Path, lines: list[bytes], last: bytes, max_bytes: int
) -> None:
    text = b"\n".join([*lines, last])
    paths = [tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst")]
    for path, data in zip(paths, (text, gzip.compress(text), compress(text)), strict=True):
        path.write_bytes(data)
    read = [list(read_lines(path, max_bytes=max_bytes)) for path in paths]
    expected = text.removesuffix(b"\n").split(b"\n") if text else []
    assert [line.size for line in read[0]] == [len(line) for line in expected]
    assert [line.data for line in read[0]] == [line if len(line) <= max_bytes else None for line in expected]
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("00.jsonl.zst", ".jsonl.zst"),
        ("en/c4-train.00000-of-01024.json.gz", ".json.gz"),
        ("a.json", ".json"),
        ("a.ndjson", ".ndjson"),
        ("a.txt.gz", ".txt.gz"),
        ("a.jsonl.txt", ".txt"),
        ("a.parquet", ".parquet"),
        ("a.tar", ".tar"),
        ("a.parquet.gz", None),
        ("a.tar.gz", None),
        ("a.JSONL", None),
        ("a.zst", None),
        ("jsonl", None),
        ("", None),
    ],
)
def test_the_end_of_the_name_tells_the_format(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix


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


@pytest.mark.parametrize("name", ["shard.zst", "shard.gz", "shard.jsonl"])
def test_progress_counts_the_bytes_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = incompressible(500_000)
    path.write_bytes({"shard.zst": compress, "shard.gz": gzip.compress}.get(name, bytes)(data))
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


def frame_with_window(data: bytes, window_log: int) -> bytes:
    """Compress as `zstd --long` does: streamed, so that the frame asks for the whole window."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


def test_a_long_window_is_read_where_the_recipe_allows_it(tmp_path: Path) -> None:
    path = tmp_path / "long.zst"
    path.write_bytes(frame_with_window(b"one\ntwo\n", 28))
    with open_bytes(path) as file, pytest.raises(InputError, match=r"134,217,728 bytes.*max_window_bytes"):
        file.read()
    with open_bytes(path, limits=Limits(window=1 << 28)) as file:
        assert file.read() == b"one\ntwo\n"


@pytest.mark.parametrize("name", ["bomb.zst", "bomb.gz"])
def test_a_file_that_grows_out_of_all_proportion_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "SLACK", 1 << 20)
    data = b"x\n" * (8 << 20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else compress(data))
    ratio = len(data) / path.stat().st_size
    with open_bytes(path) as file, pytest.raises(InputError, match=r"bomb\? .*max_expansion above 200"):
        while file.read(1 << 20):
            pass
    with open_bytes(path, limits=Limits(expansion=int(ratio) + 1)) as file:
        assert file.read() == data


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=30),
    ends=st.booleans(),
    offset=st.integers(0, 600),
    buffer=st.integers(1, 70),
)
def test_skipping_leads_to_the_first_line_from_there_on(
    tmp_path: Path, lines: list[bytes], ends: bool, offset: int, buffer: int
) -> None:
    data = b"\n".join(lines) + b"\n" * ends
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)

    def from_line(start: int) -> list[Line]:
        with io.BufferedReader(io.FileIO(path), buffer) as file:
            reader = Lines(file, 1000)
            reader.skip_to(start)
            return list(reader)

    assert from_line(offset) == [line for line in from_line(0) if line.offset >= offset]


def test_a_line_too_long_is_spilled_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = incompressible(3_000_000).replace(b"\n", b"")
    path.write_bytes(b"short\n" + long + b"\nagain\n" + long)
    spilled: list[bytes] = []
    with open_bytes(path) as file:
        reader = Lines(file, 1000)
        reader.spill = spilled.append
        assert [line.data for line in reader] == [b"short", None, b"again", None]
    assert b"".join(spilled) == long * 2
    assert max(map(len, spilled)) <= 1 << 20
