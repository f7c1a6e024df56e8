"""Every format to JSON lines: the same documents are the same records, and no damage is a shorter shard."""

import gzip
import hashlib
import io
import json
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corpora.errors import InputError
from corpora.fetch import fetch
from corpora.formats import read_shard
from corpora.prepare import documents, made_with, open_blocks, prepare
from corpora.read import FORMATS, BadRecord, Line, parse_record
from corpora.settings import Clean, Corpus, DataSettings
from corpora.tokenizer import load

BOM = b"\xef\xbb\xbf"
DOCUMENTS = [
    ("hello world", "Github"),
    ("zwei\nZeilen, ü\u2028\x85 und \U0001f600", "Pile-CC"),
    ('"quotes" \\ and \t tabs', "Github"),
    ("e" * 500, "unknown"),
]
SampleBy = Literal["document", "paragraph", "line"]


def corpus(**changes: Any) -> Corpus:
    return Corpus.model_validate({"name": "tiny", "train": ("a",), "val": ("v",)} | changes)


def json_lines(rows: list[tuple[str, str]] = DOCUMENTS) -> bytes:
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": subset}}) for text, subset in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def table(rows: list[tuple[str, str]] = DOCUMENTS, kind: pa.DataType | None = None) -> pa.Table:
    """Return rows with a nested subset, between columns that nothing is to read."""
    texts = pa.array([text for text, _ in rows], pa.string())
    metas = [{"pile_set_name": subset, "when": 1} for _, subset in rows]
    return pa.table({"id": range(len(rows)), "text": texts.cast(kind or pa.string()), "meta": metas})


def tar(
    texts: list[bytes] | dict[str, bytes], format: int = tarfile.PAX_FORMAT, *others: tarfile.TarInfo
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for other in others:
            archive.addfile(other)
        named = texts if isinstance(texts, dict) else {f"{n}.txt": text for n, text in enumerate(texts)}
        for name, text in named.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return file.getvalue()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    other = tarfile.TarInfo(name)
    other.type, other.linkname = kind, target
    return other


def pack(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if name.endswith(".zst") else data


def lines_of(
    path: Path,
    data: bytes,
    settings: Corpus | None = None,
    max_bytes: int = 64 << 20,
    progress: Callable[[int], None] | None = None,
) -> list[Line]:
    path.write_bytes(data)
    limited = (settings or corpus()).model_copy(update={"max_record_bytes": max_bytes})
    return list(read_shard(path, limited, progress))


def records(lines: list[Line], settings: Corpus | None = None) -> list[tuple[str, str]]:
    """Return (text, subset) of each line, or ("", reason) of one that is no document."""
    found = []
    for line in lines:
        try:
            assert line.data is not None
            record = parse_record(line.data, settings or corpus())
            found.append((record.text, record.subset))
        except BadRecord as error:
            found.append(("", str(error)))
    return found


@pytest.mark.parametrize("suffix", [suffix for suffix, kind in FORMATS.items() if kind == "lines"])
def test_json_lines_by_any_name(tmp_path: Path, suffix: str) -> None:
    lines = lines_of(tmp_path / f"a{suffix}", pack(suffix, json_lines()))
    assert records(lines) == DOCUMENTS
    assert [line.data for line in lines] == json_lines().splitlines()


TEXT_KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("rows_in_group", [1, 3, 100])
@pytest.mark.parametrize("kind", TEXT_KINDS, ids=str)
def test_parquet_rows_are_the_same_records(tmp_path: Path, kind: pa.DataType, rows_in_group: int) -> None:
    data = parquet(table(DOCUMENTS * 20, kind), row_group_size=rows_in_group)
    lines = lines_of(tmp_path / "a.parquet", data)
    assert records(lines) == DOCUMENTS * 20
    assert [line.number for line in lines] == list(range(1, 81))
    assert [line.size for line in lines] == [len(line.data or b"") for line in lines]
    assert [line.offset for line in lines] == [sum(line.size + 1 for line in lines[:n]) for n in range(80)]


def test_a_parquet_row_is_its_text_and_its_subset(tmp_path: Path) -> None:
    data = parquet(table(DOCUMENTS[:1]))
    [line] = lines_of(tmp_path / "a.parquet", data)
    assert line == Line(1, 0, 56, b'{"text":"hello world","meta":{"pile_set_name":"Github"}}')
    [line] = lines_of(tmp_path / "a.parquet", data, corpus(subset_field="meta"))
    assert line.data == b'{"text":"hello world"}'


def test_nulls_are_no_text_and_no_subset(tmp_path: Path) -> None:
    meta = pa.array(
        [{"pile_set_name": "A"}, None, {"pile_set_name": None}, {"pile_set_name": "B"}],
        pa.struct([("pile_set_name", pa.dictionary(pa.int32(), pa.string()))]),
    )
    rows = pa.table({"text": [None, "one", "two", "three"], "meta": meta})
    found = records(lines_of(tmp_path / "a.parquet", parquet(rows)))
    assert found == [("", "no text"), ("one", "unknown"), ("two", "unknown"), ("three", "B")]


@pytest.mark.parametrize(
    ("subset_field", "subset"),
    [
        ("source", "web"),
        ("source.name", "unknown"),
        ("n", "unknown"),
        ("gone.name", "unknown"),
        ("text", "t"),
    ],
)
def test_the_subset_is_any_column_of_strings(tmp_path: Path, subset_field: str, subset: str) -> None:
    rows = pa.table({"source": ["web"], "text": ["t"], "n": [5]})
    settings = corpus(subset_field=subset_field)
    lines = lines_of(tmp_path / "a.parquet", parquet(rows), settings)
    assert records(lines, settings) == [("t", subset)]


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_strings_that_are_no_utf8(tmp_path: Path, dictionary: bool) -> None:
    offsets = pa.py_buffer(np.array([0, 4, 6, 9], np.int32))
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b'\xff"\na' + b"ok" + b"\xed\xa0\x80")]
    )
    rows = pa.table({"text": bad.dictionary_encode() if dictionary else bad})
    lines = lines_of(tmp_path / "a.parquet", parquet(rows))
    assert records(lines) == [("", "invalid UTF-8"), ("ok", "unknown"), ("", "invalid UTF-8")]
    assert lines[0].data == b'{"text": "\xff\\"\\na"}'


def test_a_long_row_is_measured_and_not_given(tmp_path: Path) -> None:
    rows = pa.table({"text": ["abc", "x" * 1000, "abcd"]})
    lines = lines_of(tmp_path / "a.parquet", parquet(rows), max_bytes=14)
    assert [(line.offset, line.size, line.data is None) for line in lines] == [
        (0, 14, False),
        (15, 1011, True),
        (1027, 15, True),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"content": ["a"], "n": [1]},
            r"it has: content \(string\), n \(int64\)",
        ),
        ({"text": [1]}, r"it has: text \(int64\)$"),
        ({"text": [["a"]]}, "it has: text .list"),
        ({"text": [{"text": "a"}]}, "it has: text .struct"),
        ({}, "it has: none"),
    ],
)
def test_parquet_without_the_text_column_is_refused(
    tmp_path: Path, rows: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        InputError,
        match=rf"{tmp_path}/a.parquet: no column 'text' of strings .*\[corpus\] text_field; {message}",
    ):
        lines_of(tmp_path / "a.parquet", parquet(pa.table(rows)))


def test_parquet_with_two_text_columns_is_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(InputError, match=r"it has: text \(string\), text \(string\)"):
        lines_of(tmp_path / "a.parquet", parquet(rows))


def test_parquet_without_rows_has_no_lines(tmp_path: Path) -> None:
    told: list[int] = []
    data = parquet(table([]))
    assert lines_of(tmp_path / "a.parquet", data, progress=told.append) == []
    assert sum(told) == len(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.parquet", parquet(table(), row_group_size=2)), ("a.tar", tar([b"one", b"", b"t" * 600])[: 8 * 512])],
    ids=["parquet", "tar"],
)
def test_every_cut_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    assert len(lines_of(tmp_path / name, data)) in (3, 4)
    for cut in range(len(data)):
        with pytest.raises(InputError, match=f"{tmp_path / name}.*fetch it again"):
            lines_of(tmp_path / name, data[:cut])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_damage_is_told_or_harmless(tmp_path: Path, kind: str) -> None:
    """Any byte may be wrong: an InputError, or as many records; never a traceback, never fewer."""
    data = tar([b"one", b"two", b"three"]) if kind == "tar" else parquet(table(), row_group_size=2)
    path = tmp_path / f"a.{kind}"
    count, refused, rng = len(lines_of(path, data)), 0, random.Random(5)
    for place in range(0, len(data), 5 if kind == "tar" else 2):
        damaged = bytearray(data)
        damaged[place] ^= rng.randrange(1, 256)
        try:
            assert len(lines_of(path, bytes(damaged))) == count
        except InputError:
            refused += 1
    assert refused > 300


def test_a_flipped_page_is_found_by_its_checksum(tmp_path: Path) -> None:
    data = parquet(table(), compression="none", use_dictionary=False, write_page_checksum=True)
    damaged = data.replace(b"hello world", b"hellO world", 1)
    with pytest.raises(InputError, match=r"damaged or cut short parquet data .*delete it and fetch it again"):
        lines_of(tmp_path / "a.parquet", damaged)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"", "a.parquet is empty; fetch it again"),
        ("a.parquet", b"<!doctype html>", r"is not parquet data \(it begins with b'<!do'\); fetch it again"),
        ("a.parquet", b"PAR1", "damaged or cut short parquet data"),
        ("a.parquet", parquet(table()) + b"\n", "damaged or cut short parquet data"),
        ("a.tar", b"", "a.tar is empty; fetch it again"),
        ("a.tar", b"<!doctype html>" * 100, r"is not tar data \(it begins with b'<!do'\)"),
        ("a.tar", gzip.compress(tar([b"one"])), "is not tar data"),
        ("a.tar", tar([b"one"]) + b"garbage", r"damaged tar data \(no file's header at byte 1,024\)"),
        ("a.tar", tar([b"one"]) + tar([b"two"]), "damaged tar data"),
        ("a.tar", tar([b"one"])[: 3 * 512], r"cut short \(no end of the archive at byte 1,024\)"),
        ("a.tar", tar([b"one", b"two"])[: 1024 + 100] + bytes(9000), "damaged tar data"),
        ("a.tar", bytes(512), "cut short"),
        ("a.txt.gz", b"", "is empty"),
        ("a.txt.zst", b"text", "is not zstd data"),
        ("a.json.gz", b"{}", "is not gzip data"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lines_of(tmp_path / name, data)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.bz2", "a.JSONL", "a"])
def test_an_unknown_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InputError, match=rf"{name}: its name ends in no known format; known: \.jsonl, .*\.tar$"
    ):
        lines_of(tmp_path / name, b"{}")


PARAGRAPHS = b"  one\n  more\n\n\n \t\r\ntwo\r\nmore\r\n\r\nthree\xe2\x80\xa8\n"


@pytest.mark.parametrize(
    ("sample_by", "data", "expected"),
    [
        ("document", PARAGRAPHS, [(1, 0, 41, PARAGRAPHS.decode())]),
        ("document", b"", [(1, 0, 0, None)]),
        ("document", b" \n", [(1, 0, 2, None)]),
        (
            "paragraph",
            PARAGRAPHS,
            [(1, 0, 12, "  one\n  more"), (2, 19, 9, "two\r\nmore"), (3, 32, 8, "three\u2028")],
        ),
        ("paragraph", b"", []),
        ("paragraph", b"\n \n", []),
        ("paragraph", b"\n\none\rtwo", [(1, 2, 7, "one\rtwo")]),
        ("line", b"", []),
        (
            "line",
            b"one\r\n\r\n\n two\r\r\nlast",
            [(1, 0, 3, "one"), (2, 5, 0, None), (3, 7, 0, None), (4, 8, 5, " two\r"), (5, 15, 4, "last")],
        ),
    ],
)
def test_what_a_document_of_a_text_is(
    tmp_path: Path, sample_by: SampleBy, data: bytes, expected: list[tuple[int, int, int, str | None]]
) -> None:
    """Blank ones, None here, are given as they stand: prepare counts them as blank lines."""
    settings = corpus(sample_by=sample_by, text_field="content")
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        lines = lines_of(tmp_path / name, pack(name, data), settings)
        texts = [
            json.loads(line.data)["content"] if (line.data or b"").strip() else None
            for line in lines
            if line.data is not None
        ]
        assert [
            (line.number, line.offset, line.size, text) for line, text in zip(lines, texts, strict=True)
        ] == expected


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_a_long_text_is_measured_and_not_given(tmp_path: Path, sample_by: SampleBy) -> None:
    settings = corpus(sample_by=sample_by)
    [line] = lines_of(tmp_path / "a.txt", b"x" * 3_000_000, settings, max_bytes=10)
    assert line == Line(1, 0, 3_000_000, None)
    [line] = lines_of(tmp_path / "a.txt", b"x" * 10, settings, max_bytes=10)
    assert line == Line(1, 0, 10, b'{"text":"xxxxxxxxxx"}')


def test_a_long_paragraph_of_short_lines_does_not_hide_the_next(tmp_path: Path) -> None:
    data = b"abc\n" * 5 + b"\nabc\nabc\n\n" + b"x" * 50 + b"\nab\n\nend"
    lines = lines_of(tmp_path / "a.txt", data, corpus(sample_by="paragraph"), max_bytes=7)
    assert lines == [
        Line(1, 0, 19, None),
        Line(2, 21, 7, b'{"text":"abc\\nabc"}'),
        Line(3, 30, 53, None),
        Line(4, 85, 3, b'{"text":"end"}'),
    ]


def test_a_text_that_is_no_utf8_is_quarantined(tmp_path: Path) -> None:
    lines = lines_of(
        tmp_path / "a.txt", b'good\n\xe9t\xe9 "quoted"\n\xed\xa0\x80\nb\xc3\xa9\n', corpus(sample_by="line")
    )
    assert records(lines) == [
        ("good", "unknown"),
        ("", "invalid UTF-8"),
        ("", "invalid UTF-8"),
        ("bé", "unknown"),
    ]
    assert lines[1].data == b'{"text": "\xe9t\xe9 \\"quoted\\""}'


@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=30), sample_by=st.sampled_from(["document", "paragraph", "line"]))
def test_any_bytes_are_texts_or_invalid_utf8(tmp_path: Path, data: bytes, sample_by: SampleBy) -> None:
    settings = corpus(sample_by=sample_by)
    for line in lines_of(tmp_path / "a.txt", data, settings):
        assert line.data is not None
        stood = data[line.offset : line.offset + line.size]
        content, stood = line.data.removeprefix(BOM), stood.removeprefix(BOM) if line.number == 1 else stood
        if not stood.strip():
            assert content == stood
            continue
        try:
            assert parse_record(content, settings).text.encode() == stood
        except BadRecord as error:
            assert str(error) == "invalid UTF-8"
            with pytest.raises(UnicodeDecodeError):
                stood.decode()


LOADED = "  one\n  more\n\ntwo\n\n\n\nthree\u2028\x85\x0b\n\nfour ü"


@pytest.mark.parametrize(
    ("sample_by", "text", "loaded"),
    [
        ("document", LOADED, None),
        ("paragraph", LOADED, None),
        ("line", LOADED, None),
        ("document", "one\n\n", None),
        ("line", "one\ntwo\n", None),
        ("line", "one\r\n\r\ntwo\r\n", None),
        ("paragraph", "one\r\n\r\ntwo", None),
        # Three newlines begin their second paragraph with one, and the last paragraph keeps its own.
        ("paragraph", "one\n\n\ntwo\n", ["one", "\ntwo\n"]),
        ("paragraph", "one\n \ntwo", ["one\n \ntwo"]),
        ("paragraph", "\n\n\n", ["\n"]),
        # Their newlines are translated before anything else, lone CRs too.
        ("line", "one\rtwo", ["one", "two"]),
        ("document", "one\r\ntwo", ["one\ntwo"]),
    ],
)
def test_texts_are_those_of_the_datasets_loader(
    tmp_path: Path, sample_by: SampleBy, text: str, loaded: list[str] | None
) -> None:
    """`loaded` is what the loader gives where we differ, for the reasons in `_texts`."""
    from datasets import load_dataset

    path = tmp_path / "a.txt"
    ours = lines_of(path, text.encode(), corpus(sample_by=sample_by))
    texts = [json.loads(line.data)["text"] if line.data else "" for line in ours if line.data is not None]
    rows = load_dataset("text", data_files=str(path), sample_by=sample_by, split="train", streaming=True)
    theirs = [row["text"] for row in rows]
    assert theirs == (texts if loaded is None else loaded)
    if loaded is not None:
        assert theirs != texts


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    line = Line(1, 0, 6, BOM + b'{"text":"one"}')  # in front, where prepare takes it off and counts it
    assert lines_of(tmp_path / "a.txt", BOM + b"one") == [line]
    assert lines_of(tmp_path / "a.txt", BOM) == [Line(1, 0, 3, BOM)]
    first, second, third = lines_of(tmp_path / "a.tar", tar([BOM + b"one", BOM + b"two", b"x" + BOM]))
    assert (first.data, second.data) == (line.data, b'{"text":"two"}')
    assert records([third]) == [("x\ufeff", "unknown")]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_its_texts_in_order(tmp_path: Path, format: int) -> None:
    folder = member("b", tarfile.DIRTYPE)
    long = "/".join(["x" * 60, "y" * 60 if format == tarfile.USTAR_FORMAT else "é" * 200])
    texts = {"b/2": b"two\n\nmore", "a": b"", long: b"three" * 300, "a/1": b"one"}
    data = tar(texts, format, folder)
    lines = lines_of(tmp_path / "a.tar", data)
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert [data[line.offset : line.offset + line.size] for line in lines] == list(texts.values())
    assert lines[1].data == b""
    assert [text for text, _ in records([line for line in lines if line.data])] == [
        "two\n\nmore",
        "three" * 300,
        "one",
    ]
    by_line = lines_of(tmp_path / "a.tar", data, corpus(sample_by="line"))
    assert [(line.number, line.data) for line in by_line[:3]] == [
        (1, b'{"text":"two"}'),
        (2, b""),
        (3, b'{"text":"more"}'),
    ]
    assert [data[line.offset :][: line.size] for line in by_line][-1] == b"one"


@pytest.mark.parametrize(
    "other",
    [
        member("here", tarfile.SYMTYPE, "/etc/passwd"),
        member("here", tarfile.LNKTYPE, "0.txt"),
        member("here", tarfile.CHRTYPE),
        member("here", tarfile.FIFOTYPE),
        member("here", tarfile.GNUTYPE_SPARSE),
    ],
    ids=["symlink", "hard link", "device", "fifo", "sparse"],
)
def test_a_tar_of_more_than_files_is_refused(tmp_path: Path, other: tarfile.TarInfo) -> None:
    with pytest.raises(InputError, match="'here' in it is no plain file"):
        lines_of(tmp_path / "a.tar", tar([b"one"], tarfile.GNU_FORMAT, other))


@pytest.mark.parametrize("size", [-512, -1024, 8**12])
def test_a_tar_of_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    """At a negative size tarfile goes back, and round and round."""
    wrong = tarfile.TarInfo("x.txt")
    wrong.size = size
    data = tar([b"one"])[:1024] + wrong.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(InputError, match=r"damaged or cut short tar data .*delete it and fetch it again$"):
        lines_of(tmp_path / "a.tar", data)


def test_a_tar_without_files_has_no_lines(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "a.tar", tar([])) == []


def test_a_tar_with_a_broken_header_is_not_its_first_half(tmp_path: Path) -> None:
    data = bytearray(tar([b"one", b"two", b"three"]))
    data[1024 + 150] ^= 1  # the checksum of the second header: tarfile takes it for the end
    with pytest.raises(InputError, match=r"damaged tar data \(no file's header at byte 1,024\)"):
        lines_of(tmp_path / "a.tar", bytes(data))


@pytest.mark.parametrize("suffix", FORMATS)
def test_progress_ends_at_the_size_of_the_file(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(1)
    rows = [(f"{rng.random()} " * 50, "A") for _ in range(300)]
    kind = FORMATS[suffix]
    data = json_lines(rows) if kind == "lines" else b"\n".join(text.encode() for text, _ in rows)
    if kind == "parquet":
        data = parquet(table(rows), row_group_size=70)
    if kind == "tar":
        data = tar([text.encode() for text, _ in rows])
    data, told = pack(suffix, data), []
    lines_of(tmp_path / f"a{suffix}", data, progress=told.append)
    assert sum(told) == len(data)
    assert min(told) >= 0


def test_parquet_is_read_in_little_memory_however_large_its_row_group(tmp_path: Path) -> None:
    """One row group of 128 MB: neither it nor one of its columns is ever held."""
    path, text = tmp_path / "a.parquet", random.Random(1).randbytes(8000).hex()
    rows = pa.table({"text": pa.repeat(text, 4000), "junk": pa.repeat(text, 4000)})
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 64}
    pq.write_table(rows, path, row_group_size=4000, **options)
    del rows
    assert path.stat().st_size > 100_000_000
    before, most, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        for _ in read_shard(path, corpus()):
            count += 1
            most = max(most, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert count == 4000
    assert most < 8_000_000


def test_a_tar_of_many_files_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar([b"text"] * 3000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_shard(path, corpus())) == 3000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


Fetched = Callable[..., tuple[DataSettings, Path]]


@pytest.fixture
def fetched(tmp_path: Path) -> Fetched:
    """Return make(name, data, ...) -> (settings, data root): shard `a`, a file of that name, fetched."""

    def make(name: str, data: bytes, **changes: Any) -> tuple[DataSettings, Path]:
        source = tmp_path / name
        source.mkdir(exist_ok=True)
        files = []
        for shard, path, content in (("a", name, data), ("v", "v.jsonl", json_lines())):
            (source / path).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"name": shard, "path": path, "size": len(content), "sha256": sha256})
        lock = {"corpus": "tiny", "url": source.as_uri(), "files": files}
        (source / "lock.json").write_text(json.dumps(lock))
        tables = {
            "corpus": {"name": "tiny", "train": ["a"], "val": ["v"], "lock": str(source / "lock.json")}
            | changes,
            "tokenizer": {"name": "r50k_base", "bos": 50256, "eos": 50256},
            "blocks": {"length": 16},
        }
        settings = DataSettings.model_validate(tables)
        fetch(settings.corpus, "a", source / "data")
        return settings, source / "data"

    return make


TEXTS = [text.encode() for text, _ in DOCUMENTS]
SHARDS: list[tuple[str, bytes, SampleBy]] = [
    ("a.jsonl", json_lines(), "document"),
    ("a.json.gz", pack(".gz", json_lines()), "document"),
    ("a.parquet", parquet(table()), "document"),
    ("a.tar", tar(TEXTS), "document"),
    ("a.txt", b"\n\n".join(TEXTS), "paragraph"),
    ("a.txt.gz", pack(".gz", b"\r\n\r\n".join(TEXTS)), "paragraph"),
]


@pytest.mark.parametrize(("name", "data", "sample_by"), SHARDS, ids=[name for name, _, _ in SHARDS])
def test_the_blocks_are_those_of_the_documents(
    fetched: Fetched, name: str, data: bytes, sample_by: SampleBy
) -> None:
    # A text has no subset, so all are cleaned as those that have none.
    alike = Clean(profiles={"prose": ("newlines", "control_characters")})
    zst, zst_root = fetched("a.jsonl.zst", pack(".zst", json_lines()))
    zst = zst.model_copy(update={"clean": alike})
    expected = prepare(zst, "a", zst_root).manifest["ledger"]
    assert (expected["lines"], expected["kept"]) == (4, 4)

    settings, root = fetched(name, data, sample_by=sample_by)
    settings = settings.model_copy(update={"clean": alike})
    ledger = prepare(settings, "a", root).manifest["ledger"]
    if name.endswith((".txt", ".txt.gz", ".tar")):
        (mine,), theirs = ledger["subsets"].values(), expected["subsets"].values()
        for key in ("documents", "bytes", "tokens", "read", "bytes_read"):
            assert mine[key] == sum(counts[key] for counts in theirs)
        ledger["subsets"] = expected["subsets"]
    assert ledger == expected
    blocks, same = open_blocks(settings, ["a"], root), open_blocks(zst, ["a"], zst_root)
    np.testing.assert_array_equal(blocks.rows(range(len(blocks)))[0], same.rows(range(len(same)))[0])
    assert [document.text for document in documents(settings, "a", root)] == [
        text.replace("\x85", "")  # a control character to [clean]
        for text, _ in DOCUMENTS
    ]
    assert prepare(settings, "a", root).skipped


def test_every_line_of_a_text_is_accounted_for(fetched: Fetched) -> None:
    settings, root = fetched("a.txt", BOM + b"one\n\n \r\n\xff\ntwo\r\nlast", sample_by="line")
    ledger = prepare(settings, "a", root).manifest["ledger"]
    assert (ledger["lines"], ledger["kept"]) == (6, 3)
    assert ledger["dropped"] == {"blank_line": 2}
    assert ledger["quarantined"] == {"invalid UTF-8": 1}
    assert ledger["cleaned"] == {"byte_order_mark": 1}


def test_the_key_of_the_blocks_knows_sample_by() -> None:
    tables: dict[str, Any] = {
        "corpus": {"name": "tiny", "train": ["a"], "val": ["v"]},
        "tokenizer": {"name": "r50k_base"},
        "blocks": {"length": 16},
    }
    made = []
    for changes in ({}, {"sample_by": "document"}, {"sample_by": "line"}):
        settings = DataSettings.model_validate(tables | {"corpus": tables["corpus"] | changes})
        made.append(made_with(settings, load(settings.tokenizer))["records"])
    assert [records["sample_by"] for records in made] == ["document", "document", "line"]
