"""Downloading: whatever a server, a network, a disk or a signal does, the exact bytes or one clear line."""

import email.utils
import errno
import fcntl
import gzip
import hashlib
import logging
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.download import Downloaded, Wanted, download
from corpora.errors import InputError, PilelineError, Unavailable
from corpora.patience import Patience

sys.path.append(str(Path(__file__).parent))

from fault_server import CUT, FAULTS, GOOD, Answer, FaultServer, edit, flip

ROOT = Path(__file__).resolve().parents[2]
BYTES = random.Random(0).randbytes(300_000)
SIZE = len(BYTES)
SHA256 = hashlib.sha256(BYTES).hexdigest()
CANARY = "canaryTOKENcanary"
SOON = Patience(connect=5, read=5, window=5, least=10_000, tries=4, total=0.5, backoff=0.01, longest_wait=5)
HASTY = replace(SOON, read=0.2, tries=3, total=1)  # for a server that stalls
WATCHFUL = replace(SOON, window=0.3, tries=3, total=1.5)  # for one that drips
PATIENCE = {"stall": HASTY, "stall-always": HASTY, "drip": WATCHFUL, "drip-always": WATCHFUL}


class Place:
    """A folder for one file, and what was told of its progress."""

    def __init__(self, folder: Path) -> None:
        self.final = folder / "a"
        self.part = folder / "a.part"
        self.meta = folder / "a.part.json"
        self.told: list[int] = []

    def fetch(
        self,
        url: str,
        *,
        size: int | None = SIZE,
        sha256: str | None = SHA256,
        md5: str | None = None,
        patience: Patience = SOON,
        already: Callable[[], bool] | None = None,
    ) -> Downloaded | None:
        self.told.clear()
        wanted = Wanted("shard train/00", url, size, sha256, md5)
        return download(wanted, self.final, self.told.append, patience, already)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.final.parent.iterdir()}

    def check(self, expected: bytes = BYTES) -> None:
        """The whole file is there, nothing beside it, and the progress told is its size."""
        assert self.final.read_bytes() == expected
        assert self.files == {"a"}
        assert sum(self.told) == len(expected)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder = tmp_path / "data"
    folder.mkdir()
    return Place(folder)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"a": BYTES, "a.gz": BYTES}) as running:
        yield running


@pytest.fixture(autouse=True)
def plain_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_TOKEN_PATH", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def check_told(error: PilelineError, kind: type[PilelineError]) -> None:
    assert isinstance(error, kind)
    assert "\n" not in str(error)
    text = "".join(traceback.format_exception(error))
    for secret in (CANARY, "user:password", "sesame"):
        assert secret not in text


# --- A: the exact bytes, and how they were asked for ------------------------------------------------------

KNOWN: dict[str, Any] = {}
NO_SIZE: dict[str, Any] = {"size": None}
NO_DIGEST: dict[str, Any] = {"sha256": None}
NOTHING: dict[str, Any] = {"size": None, "sha256": None}
MD5: dict[str, Any] = {"sha256": None, "md5": hashlib.md5(BYTES).hexdigest()}
Starts = list[int | None]

WHOLE: list[tuple[str, str, dict[str, Any], Starts]] = [
    # number in the catalogue, fault, what is known, where each request wants to start
    ("-", "good", KNOWN, [None]),
    ("-", "good", NO_SIZE, [None]),
    ("-", "good", NO_DIGEST, [None]),
    ("-", "good", NOTHING, [None]),
    ("-", "good", MD5, [None]),
    ("-", "close", KNOWN, [None]),
    ("-", "close", NO_SIZE, [None]),
    ("-", "chunked", KNOWN, [None]),
    ("-", "chunked", NO_SIZE, [None]),
    ("-", "chunked", NOTHING, [None]),
    ("D1", "cut", KNOWN, [None, 200_000]),
    ("D1", "cut", NO_SIZE, [None, 200_000]),
    ("D1", "cut", NO_DIGEST, [None, 200_000]),
    ("D1", "cut", NOTHING, [None, 200_000]),
    ("D1", "cut", MD5, [None, 200_000]),
    ("D2", "reset", KNOWN, [None, 200_000]),
    ("D3", "close-cut", KNOWN, [None, 200_000]),
    ("D3", "close-cut", NO_DIGEST, [None, 200_000]),
    ("D3", "close-cut", NO_SIZE, [None, None]),  # looks like the end; the digest knows better
    ("D4", "chunked-cut", KNOWN, [None, 200_000]),
    ("D4", "chunked-cut", NO_SIZE, [None, 200_000]),
    ("D4", "chunked-cut", NOTHING, [None, 200_000]),
    ("D7", "range-ignored", KNOWN, [None, 200_000]),
    ("D7", "range-ignored", NOTHING, [None, 200_000]),
    ("D8", "range-shifted", KNOWN, [None, 200_000, None]),
    ("D8", "range-shifted", NOTHING, [None, 200_000, None]),
    ("D8", "range-other-total", KNOWN, [None, 200_000, None]),
    ("D9", "changed-and-back", KNOWN, [None, 200_000, None]),
    ("D9", "changed-and-back", NOTHING, [None, 200_000, None]),
    ("D9", "changed-same-etag", KNOWN, [None, 200_000, None]),  # a mix, seen by its digest
    ("D10", "weak-etag", KNOWN, [None, 200_000]),
    ("D10", "weak-etag", NO_DIGEST, [None, 200_000, None]),
    ("D10", "no-etag", KNOWN, [None, 200_000]),
    ("D10", "no-etag", NOTHING, [None, 200_000, None]),
    ("D11", "range-416", KNOWN, [None, 200_000, None]),
    ("D11", "range-416", NOTHING, [None, 200_000, None]),
    ("D11", "range-416-other-total", KNOWN, [None, 200_000, None]),
    ("D11", "range-416-other-total", NOTHING, [None, 200_000, None]),
    ("D11", "chunked-no-end", NO_SIZE, [None, SIZE]),  # 416 with the part's size: that was all
    ("D14", "burst", KNOWN, [None] * 4),
    ("D17", "signed", KNOWN, [None, 200_000, 200_000]),
    ("D18", "redirect-1", KNOWN, [None]),
    ("D21", "stall", KNOWN, [None, 1000]),
    ("D23", "says-identity", KNOWN, [None]),
    ("D26", "flipped", KNOWN, [None, None]),
    ("D26", "flipped", MD5, [None, None]),
    ("D28", "garbage", KNOWN, [None, None]),
]


def named(case: tuple[Any, ...]) -> str:
    known = {"size": "no size", "sha256": "no sha256", "md5": "md5"}
    return " ".join([case[0], case[1], *(known[key] for key in case[2])])


@pytest.mark.parametrize(("number", "fault", "known", "starts"), WHOLE, ids=map(named, WHOLE))
def test_exact_bytes(
    place: Place, server: FaultServer, number: str, fault: str, known: dict[str, Any], starts: Starts
) -> None:
    got = place.fetch(server.url(fault), **known, patience=PATIENCE.get(fault, SOON))
    place.check()
    assert got is not None
    assert (got.size, got.sha256) == (SIZE, SHA256)
    assert got.stat == place.final.stat() or got.stat.st_ino == place.final.stat().st_ino
    assert got.stat.st_mtime_ns == place.final.stat().st_mtime_ns
    assert server.starts == starts
    assert {request.accept_encoding for request in server.requests} == {"identity"}


def test_etag_is_handed_on(place: Place, server: FaultServer) -> None:
    server.faults |= {"strong": (Answer(etag='"v1"'),), "weak": (Answer(etag='W/"v1"'),)}
    strong, weak = place.fetch(server.url("strong")), place.fetch(server.url("weak"))
    assert strong is not None and weak is not None
    assert (strong.etag, weak.etag) == ('"v1"', None)


@pytest.mark.parametrize("fault", ["says-gzip", "says-x-gzip"])
def test_gz_file_that_is_told_as_an_encoding_is_kept_as_it_is(
    place: Place, server: FaultServer, fault: str
) -> None:
    server.files["a.gz"] = packed = gzip.compress(BYTES)
    place.fetch(server.url(fault, "a.gz"), size=len(packed), sha256=hashlib.sha256(packed).hexdigest())
    place.check(packed)
    with pytest.raises(InputError, match="br"):
        place.fetch(server.url("says-br", "a.gz"))


@pytest.mark.parametrize("fault", ["changed", "changed-unseen"])
def test_changed_file_of_unknown_digest_is_never_a_mix(place: Place, server: FaultServer, fault: str) -> None:
    got = place.fetch(server.url(fault), **NOTHING)
    place.check(edit(BYTES))
    assert got is not None and got.sha256 == hashlib.sha256(edit(BYTES)).hexdigest()


def test_patience_outlasts_a_network_that_is_lost_on_the_way(place: Place, server: FaultServer) -> None:
    server.faults["lost"] = (CUT, *[Answer(cut=0)] * 9, GOOD)
    place.fetch(server.url("lost"), patience=replace(SOON, tries=2, total=20, backoff=0.001))
    place.check()
    assert server.starts == [None, *[200_000] * 10]


def test_cut_is_mended_at_once(place: Place, server: FaultServer) -> None:
    server.faults["cuts"] = (*[Answer(cut=50_000)] * 4, GOOD)
    began = time.monotonic()
    place.fetch(server.url("cuts"), patience=replace(SOON, tries=2, backoff=2))
    place.check()
    assert server.starts == [None, 50_000, 100_000, 150_000, 200_000]
    assert time.monotonic() - began < 1.5


def test_wrong_file_at_the_final_name_is_replaced_by_the_right_one(place: Place, server: FaultServer) -> None:
    place.final.write_bytes(BYTES[:1000])  # D31: torn
    with pytest.raises(InputError):
        place.fetch(server.url("flipped-always"))
    place.fetch(server.url("good"))
    place.check()


# --- B: what cannot be mended, or not now -----------------------------------------------------------------

ANY = -1  # requests: not told here

REFUSED: list[tuple[str, str, dict[str, Any], str, int]] = [
    # number in the catalogue, fault, what is known, what is told, how many requests it takes; nothing is kept
    ("D3", "close-cut-always", NO_SIZE, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}", 2),
    ("D5", "length-too-small", KNOWN, "expected 300,000 bytes, got 100,000", 1),
    ("D5", "length-too-small", NO_SIZE, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}", 2),
    ("D6", "longer", KNOWN, "expected 300,000 bytes, got 20,300,000", 1),
    ("D6", "longer-chunked", KNOWN, "expected 300,000 bytes, got more", 1),
    ("D6", "longer-close", KNOWN, "expected 300,000 bytes, got more", 1),
    ("D6", "longer-chunked", NO_DIGEST, "expected 300,000 bytes, got more", 1),
    ("-", "shorter", KNOWN, "expected 300,000 bytes, got 299,999", 1),
    ("D9", "changed", KNOWN, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}", ANY),
    ("D9", "changed-unseen", KNOWN, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}", ANY),
    ("D16", "404", KNOWN, "answered 404: no such file", 1),
    ("D16", "410", KNOWN, "answered 410: no such file", 1),
    ("D16", "401", KNOWN, "answered 401: access denied", 1),
    ("D16", "403", KNOWN, "answered 403: access denied", 1),
    ("D16", "400", KNOWN, "answered 400 instead of 200 and a file", 1),
    ("D16", "302", KNOWN, "answered 302 instead of 200 and a file", 1),
    ("D16", "304", KNOWN, "answered 304 instead of 200 and a file", 1),
    ("D17", "signed-expired", KNOWN, "answered 403", 4),  # refused anew from the origin: so it is meant
    ("D18", "loop", KNOWN, "more than 5 redirects", 6),
    ("D18", "redirect-0", KNOWN, "more than 5 redirects", 6),
    ("D23", "gzip", KNOWN, r"encoded \('gzip'\)", 1),
    ("D23", "gzip", NOTHING, r"encoded \('gzip'\)", 1),
    ("D23", "says-br", KNOWN, r"encoded \('br'\)", 1),
    ("D24", "gzip-bomb", NOTHING, r"encoded \('gzip'\)", 1),
    ("D25", "html", KNOWN, "looks like an HTML page", 1),
    ("D25", "html", NO_SIZE, "looks like an HTML page", 1),
    ("D25", "html", NOTHING, "HTML page", 1),
    ("D25", "html-close", KNOWN, "looks like an HTML page", ANY),
    ("D25", "html-chunked", KNOWN, "looks like an HTML page", 1),
    ("D25", "html-chunked", NO_SIZE, "looks like an HTML page", 1),
    ("D25", "html-chunked", NOTHING, "looks like an HTML page", 1),
    ("D25", "html-right-size", KNOWN, "looks like an HTML page", 1),
    ("D25", "html-right-size", NO_DIGEST, "looks like an HTML page", 1),
    ("D25", "html-right-size", MD5, "looks like an HTML page", 1),
    ("D25", "html-by-type", NOTHING, "HTML page", 1),
    ("D26", "flipped-always", KNOWN, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}", 2),
    ("D26", "flipped-always", MD5, "expected md5 [0-9a-f]{32}, got md5 [0-9a-f]{32}", 2),
    ("D27", "204", KNOWN, "answered 204 instead of 200 and a file", 1),
    ("D27", "empty", KNOWN, "expected 300,000 bytes, got 0", 1),
    ("D27", "empty", NO_SIZE, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}|empty", ANY),
    ("D27", "empty", NOTHING, "empty|0 bytes|got nothing", ANY),
    ("D27", "empty-chunked", KNOWN, "expected 300,000 bytes, got 0", ANY),
    ("D27", "empty-chunked", NOTHING, "empty|0 bytes|got nothing", ANY),
]


@pytest.mark.parametrize(("number", "fault", "known", "told", "requests"), REFUSED, ids=map(named, REFUSED))
def test_refused_and_nothing_kept(
    place: Place,
    server: FaultServer,
    number: str,
    fault: str,
    known: dict[str, Any],
    told: str,
    requests: int,
) -> None:
    url = server.url(fault)
    with pytest.raises(PilelineError, match=told) as caught:
        place.fetch(url, **known)
    check_told(caught.value, InputError)
    assert url in str(caught.value)
    assert place.files == set()
    assert len(server.requests) == requests or requests == ANY
    assert server.sent < 10_000_000  # of 20 MB or more, where it is too long
    place.fetch(server.url("good"), **known)
    place.check()


GIVEN_UP: list[tuple[str, str, dict[str, Any], str, int | None]] = [
    # number in the catalogue, fault, what is known, what is told, the size of the part (None: any)
    ("D1", "cut-at-once", KNOWN, "4 tries in .* without progress", 0),
    ("D1", "cut-at-once", NOTHING, "4 tries in .* without progress", 0),
    ("D2", "reset-always", KNOWN, "without progress", 0),
    ("D3", "close-cut-always", KNOWN, "without progress", None),
    ("D4", "chunked-cut-always", KNOWN, "without progress", None),
    ("D4", "chunked-cut-always", NOTHING, "without progress", None),
    ("D7", "range-ignored-always-cut", KNOWN, "begun anew|without progress", None),
    ("D7", "range-ignored-always-cut", NOTHING, "begun anew|without progress", None),
    ("D8", "range-shifted-always", KNOWN, "begun anew|without progress", None),
    ("D11", "416-always", KNOWN, "416", 0),
    ("D15", "500", KNOWN, "4 tries in .* without progress; .*the server answered 500", 0),
    ("D15", "503", KNOWN, "the server answered 503", 0),
    ("D15", "408", KNOWN, "the server answered 408", 0),
    ("D15", "425", KNOWN, "the server answered 425", 0),
    ("D12", "429", KNOWN, "the server answered 429", 0),
    ("D21", "stall-always", KNOWN, "without progress", None),
    ("D22", "drip-always", KNOWN, "without progress", None),
    ("D28", "garbage-always", KNOWN, "without progress", 0),
    ("D28", "huge-header", KNOWN, "without progress", 0),
    ("D28", "many-headers", KNOWN, "without progress", 0),
    ("D28", "hang-up", KNOWN, "without progress", 0),
]


@pytest.mark.parametrize(("number", "fault", "known", "told", "left"), GIVEN_UP, ids=map(named, GIVEN_UP))
def test_given_up_and_the_part_kept(
    place: Place,
    server: FaultServer,
    number: str,
    fault: str,
    known: dict[str, Any],
    told: str,
    left: int | None,
) -> None:
    began = time.monotonic()
    with pytest.raises(PilelineError, match=told) as caught:
        place.fetch(server.url(fault), **known, patience=PATIENCE.get(fault, SOON))
    check_told(caught.value, Unavailable)
    assert server.url(fault) in str(caught.value)
    assert time.monotonic() - began < 5
    assert 3 <= len(server.requests) <= 16
    size = place.part.stat().st_size if place.part.exists() else 0
    assert size == left or left is None
    assert sum(place.told) == size
    assert place.files == ({"a.part", "a.part.json"} if size else set())
    server.forget()
    place.fetch(server.url("good"), **known)
    place.check()
    if known == KNOWN and size:  # another URL, but the digest vouches for the beginning
        assert server.starts == [size] and server.sent == SIZE - size


def test_drip_is_left_for_a_better_connection(place: Place, server: FaultServer) -> None:  # D22
    place.fetch(server.url("drip"), patience=WATCHFUL)
    place.check()
    first, second = server.starts
    assert first is None and second is not None and 0 < second < 100


@pytest.mark.parametrize("where", ["status line", "headers", "chunk size"])
def test_drip_of_what_is_no_body(place: Place, where: str) -> None:
    """Each byte comes within the time for a read; all of them would take minutes (here the server tires)."""
    head = {
        "status line": b"HTTP/1.1 200 " + b"O" * 90,
        "headers": b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 90,
        "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 90,
    }[where]
    with FaultServer({"a": BYTES}) as server:
        server.faults["mine"] = (Answer(raw=head, rate=25),)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="without progress"):
            place.fetch(server.url("mine"), patience=replace(WATCHFUL, tries=1))
        assert time.monotonic() - began < 2.5


def test_time_without_progress_ends_it(place: Place, server: FaultServer) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="the server answered 503"):
        place.fetch(server.url("503"), patience=replace(SOON, tries=10_000, total=0.5, backoff=0.1))
    assert time.monotonic() - began < 1
    assert len(server.requests) > 1


def test_no_server(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(Unavailable, match=r"4 tries in .*ConnectionRefusedError"):
            place.fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/a")
    assert place.files == set()


def test_known_size_of_a_weaker_word_than_the_digest_is_still_a_bound(
    place: Place, server: FaultServer
) -> None:
    with pytest.raises(InputError, match="expected 299,999 bytes, got 300,000"):
        place.fetch(server.url("good"), size=SIZE - 1)
    assert place.files == set()
    assert server.sent == 0 or len(server.requests) == 1


# --- odd headers: never another exception -----------------------------------------------------------------

ODD: list[tuple[str, Answer]] = [
    ("Content-Length abc", Answer(headers={"Content-Length": "abc"})),
    ("Content-Length -5", Answer(headers={"Content-Length": "-5"})),
    ("Content-Length 2x", Answer(headers={"Content-Length": "300000, 7"})),
    ("Content-Length huge", Answer(headers={"Content-Length": "9" * 5000})),
    ("Content-Length large", Answer(headers={"Content-Length": "9" * 17})),
    ("Content-Range none", Answer(status=206, headers={"Content-Range": None})),
    ("Content-Range odd", Answer(status=206, headers={"Content-Range": "bytes x-y/z"})),
    ("Content-Range back", Answer(status=206, headers={"Content-Range": "bytes 9-3/300000"})),
    ("Content-Range huge", Answer(status=206, headers={"Content-Range": f"bytes 0-{'9' * 5000}/7"})),
    ("Transfer-Encoding gzip", Answer(headers={"Transfer-Encoding": "gzip, chunked"}, framing="chunked")),
    ("Transfer-Encoding odd", Answer(headers={"Transfer-Encoding": "odd"})),
    ("Chunked without chunks", Answer(headers={"Transfer-Encoding": "chunked"})),
    ("ETag odd", Answer(etag='"\xe9\xff', cut=1000)),
    ("ETag long", Answer(etag=f'"{"x" * 60_000}"', cut=1000)),
    ("Location [", Answer(location="http://[")),
    ("Location port", Answer(location="http://127.0.0.1:99999999/a")),
    ("Location port word", Answer(location="http://127.0.0.1:port/a")),
    ("Location no host", Answer(location="http:///good/a")),
    ("Location scheme", Answer(location="//")),
    ("Location NUL", Answer(location="http://127.0.0.1\0/a")),
    ("Location bytes", Answer(location="http://127.0.0.1/\xff\xfe")),
    ("Location long host", Answer(location=f"http://{'a' * 300}.{'b' * 64}/")),
    ("Location empty", Answer(status=302, headers={"Location": ""})),
    ("Location data", Answer(location="data:,x")),
    *(
        (f"Retry-After {after}"[:24], Answer(status=503, headers={"Retry-After": after}))
        for after in (
            "soon",
            "-1",
            "1e9",
            "nan",
            "",
            "0x10",
            "9" * 5000,
            "Fri, 99 Foo 2099 99:99:99 GMT",
            "١",
        )
    ),
    ("RateLimit odd", Answer(status=429, headers={"RateLimit": '"x";r=0;t=soon'})),
    ("Status 999", Answer(status=999)),
    ("Status 206 alone", Answer(status=206)),
    ("No status", Answer(raw=b"HTTP/1.1 \r\n\r\n")),
    ("Status word", Answer(raw=b"HTTP/1.1 OK OK\r\n\r\n")),
    ("HTTP/0.9", Answer(raw=BYTES)),
    ("HTTP/9.9", Answer(raw=b"HTTP/9.9 200 OK\r\n\r\n" + BYTES)),
    ("Chunk size odd", Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + BYTES)),
    ("Chunk size -1", Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + BYTES)),
    ("Header colon", Answer(raw=b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n" + BYTES)),
    ("Header fold", Answer(raw=b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n" + BYTES)),
]


@pytest.mark.parametrize("known", [KNOWN, NOTHING], ids=["known", "nothing known"])
@pytest.mark.parametrize("answer", [answer for _, answer in ODD], ids=[name for name, _ in ODD])
def test_odd_answer_is_the_exact_bytes_or_one_line(
    place: Place, server: FaultServer, answer: Answer, known: dict[str, Any]
) -> None:
    if answer.raw is not None and answer.raw.endswith(BYTES) and known == NOTHING:
        known = NO_SIZE
    server.faults["odd"] = (answer,)
    with suppress(PilelineError):  # and nothing else
        place.fetch(server.url("odd"), **known, patience=replace(HASTY, tries=2))
        place.check()
    if place.final.exists():
        assert place.final.read_bytes() == BYTES
    server.faults["later"] = (CUT, answer, GOOD)
    place.final.unlink(missing_ok=True)
    with suppress(PilelineError):
        place.fetch(server.url("later"), **known, patience=replace(HASTY, total=20))
        place.check()
    if place.final.exists():
        assert place.final.read_bytes() == BYTES


# --- "later" ----------------------------------------------------------------------------------------------


def in_two_seconds() -> str:
    return email.utils.formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize(
    ("status", "header", "value", "least", "most"),
    [
        (429, "Retry-After", lambda: "1", 0.95, 2),  # D12
        (429, "Retry-After", in_two_seconds, 0.9, 3),
        (429, "RateLimit", lambda: '"resolvers";r=0;t=0', 0.95, 2),
        (429, "RateLimit", lambda: '"resolvers";r=5;t=300', 0, 0.5),
        (429, "Retry-After", lambda: "0", 0, 0.5),
        (429, "Retry-After", lambda: "Thu, 01 Jan 1970 00:00:00 GMT", 0, 0.5),
    ],
)
def test_server_that_asks_to_wait_is_heeded(
    place: Place,
    server: FaultServer,
    status: int,
    header: str,
    value: Callable[[], str],
    least: float,
    most: float,
) -> None:
    server.faults["later"] = (Answer(status=status, headers={header: value()}), GOOD)
    told: list[tuple[float, int]] = []
    wanted = Wanted("shard", server.url("later"), SIZE, SHA256)
    download(wanted, place.final, lambda n: told.append((time.monotonic(), n)), replace(SOON, total=20))
    first, second = server.requests
    assert least <= second.at - first.at <= most
    waiting = [first.at, *(at for at, n in told if n == 0 and first.at < at < second.at), second.at]
    assert max(b - a for a, b in pairwise(waiting)) < 1.1
    assert place.final.read_bytes() == BYTES


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Retry-After", "Thu, 31 Dec 2099 23:59:59 GMT"),  # D13
        ("Retry-After", "86400"),
        ("Retry-After", "999999999"),
        ("RateLimit", '"resolvers";r=0;t=86400'),
    ],
)
def test_server_that_asks_for_too_long_a_wait_is_left(
    place: Place, server: FaultServer, header: str, value: str
) -> None:
    server.faults["later"] = (Answer(status=429, headers={header: value}),)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"the server asks to wait until [0-9]{4}-"):
        place.fetch(server.url("later"))
    assert time.monotonic() - began < 1
    assert len(server.requests) == 1


# --- parts ------------------------------------------------------------------------------------------------


def leave_a_part(place: Place, server: FaultServer, **known: Any) -> int:
    """Stop in the middle; return the size of the part."""
    server.forget()
    server.faults["broken"] = (Answer(cut=200_000), Answer(status=503))
    with pytest.raises(Unavailable):
        place.fetch(server.url("broken"), **known)
    server.faults["broken"] = (GOOD,)
    server.forget()
    size = place.part.stat().st_size
    assert size == 200_000 and place.part.read_bytes() == BYTES[:size]
    return size


@pytest.mark.parametrize(
    ("change", "known", "starts"),
    [
        ("nothing", KNOWN, [200_000]),
        ("nothing", NO_SIZE, [200_000]),
        ("nothing", MD5, [200_000]),
        ("nothing", NOTHING, [200_000]),
        ("cut", KNOWN, [1000]),
        ("whole", KNOWN, []),
        ("whole", NO_SIZE, [SIZE]),
        ("whole", NOTHING, [SIZE]),
        ("empty", KNOWN, [None]),
        ("flipped", KNOWN, [200_000, None]),
        ("whole, flipped", KNOWN, [None]),
        ("too long", KNOWN, [None]),
        ("too long", NO_SIZE, [SIZE + 1, None]),
        ("json lost", KNOWN, [200_000]),
        ("json lost", NOTHING, [None]),
        ("json torn", KNOWN, [200_000]),
        ("json torn", NOTHING, [None]),
        ("json a list", NOTHING, [None]),
        ("json of another file", KNOWN, [None]),
        ("json of another url", KNOWN, [200_000]),
    ],
)
def test_part_is_believed_only_as_far_as_it_fits(
    place: Place, server: FaultServer, change: str, known: dict[str, Any], starts: Starts
) -> None:
    leave_a_part(place, server, **known)
    match change:
        case "cut":
            place.part.write_bytes(BYTES[:1000])
        case "whole":
            place.part.write_bytes(BYTES)
        case "empty":
            place.part.write_bytes(b"")
        case "flipped":
            place.part.write_bytes(flip(BYTES[:200_000]))
        case "whole, flipped":
            place.part.write_bytes(flip(BYTES))
        case "too long":
            place.part.write_bytes(BYTES + b"x")
        case "json lost":
            place.meta.unlink()
        case "json torn":
            place.meta.write_bytes(place.meta.read_bytes()[:10])
        case "json a list":
            place.meta.write_text("[1, 2]", "utf-8")
        case "json of another file":
            place.meta.write_text(place.meta.read_text("utf-8").replace(SHA256, "a" * 64), "utf-8")
        case "json of another url":
            place.meta.write_text(place.meta.read_text("utf-8").replace("broken", "elsewhere"), "utf-8")
    place.fetch(server.url("broken"), **known)
    place.check()
    assert server.starts == starts


@pytest.mark.parametrize("value", ["null", "7", '{"etag": 7, "url": [], "digest": {}}', '{"etag": "x"}'])
def test_odd_json_of_a_part(place: Place, server: FaultServer, value: str) -> None:
    for known in (KNOWN, NOTHING):
        leave_a_part(place, server, **known)
        place.meta.write_text(value, "utf-8")
        place.fetch(server.url("broken"), **known)
        place.check()
        place.final.unlink()


def test_part_of_one_version_is_not_continued_with_another(place: Place, server: FaultServer) -> None:  # D9
    leave_a_part(place, server, **NOTHING)
    for ranges in ("kept", "unconditional"):
        server.faults["broken"] = (Answer(change=edit, ranges=ranges),)
        place.fetch(server.url("broken"), **NOTHING)
        place.check(edit(BYTES))
        place.final.unlink()
        server.faults["broken"] = (GOOD,)
        leave_a_part(place, server, **NOTHING)


def test_416_does_not_make_a_whole_file_of_a_part(place: Place, server: FaultServer) -> None:
    """The file has become as short as the part, of other bytes; only its ETag tells."""
    leave_a_part(place, server, **NOTHING)
    server.faults["broken"] = (Answer(change=lambda data: data[100_000:], ranges="unconditional"),)
    place.fetch(server.url("broken"), **NOTHING)
    place.check(BYTES[100_000:])


@pytest.mark.parametrize("name", ["a.part", "a.part.json", "a"])
@pytest.mark.parametrize("dangling", [False, True], ids=["to a file", "to nothing"])
def test_link_is_not_followed(
    place: Place, server: FaultServer, tmp_path: Path, name: str, dangling: bool
) -> None:
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_bytes(b"precious")
    place.final.with_name(name).symlink_to(victim)
    if name == "a.part":
        with pytest.raises(InputError, match=r"a\.part: is a link"):
            place.fetch(server.url("good"))
        assert server.requests == []
    else:
        place.fetch(server.url("good"))
        place.check()
        assert not place.final.is_symlink()
    assert victim.exists() is not dangling
    assert dangling or victim.read_bytes() == b"precious"


def test_folder_in_the_way(place: Place, server: FaultServer) -> None:
    place.part.mkdir()
    with pytest.raises(InputError, match=r"a\.part: is a link or a folder"):
        place.fetch(server.url("good"))
    place.part.rmdir()
    place.final.mkdir()
    with pytest.raises(InputError, match="a: cannot be written: Is a directory"):
        place.fetch(server.url("good"))


def test_pipe_in_the_way_does_not_hang(place: Place, server: FaultServer) -> None:
    os.mkfifo(place.part)
    done = run(child(place, server.url("good")), timeout=10)
    assert done.returncode == 2, done.stderr
    assert server.requests == []


def test_commit_is_durable(place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes reach the disk before the name does, and the name before the caller hears of it."""
    seen: list[tuple[str, str]] = []
    inodes: dict[int, str] = {}
    fsync, rename = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        status = os.fstat(handle)
        name = "folder" if stat.S_ISDIR(status.st_mode) else inodes.get(status.st_ino, "other")
        if not stat.S_ISDIR(status.st_mode) and place.part.exists():
            name = "part" if status.st_ino == place.part.stat().st_ino else "other"
        seen.append(("fsync", name))
        fsync(handle)

    def record_replace(source: Any, target: Any, **options: Any) -> None:
        seen.append(("replace", f"{Path(source).name} -> {Path(target).name}"))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("not a rename that replaces"))
    place.fetch(server.url("good"))
    at = seen.index(("replace", "a.part -> a"))
    assert seen[at - 1 : at + 2] == [("fsync", "part"), ("replace", "a.part -> a"), ("fsync", "folder")]
    assert len(seen) == at + 2


def test_file_system_without_locks(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    place.fetch(server.url("cut"))
    place.check()


# --- stopped from outside ---------------------------------------------------------------------------------


class Cancelled(Exception):
    """What a caller raises to stop."""


def stop_when(condition: Callable[[int, int], bool]) -> Callable[[int], None]:
    """Return a progress that raises once condition(sum, number of calls) holds."""
    total = calls = 0

    def progress(n: int) -> None:
        nonlocal total, calls
        total, calls = total + n, calls + 1
        if condition(total, calls):
            raise Cancelled

    return progress


def test_caller_can_stop_in_the_middle(place: Place, server: FaultServer) -> None:
    wanted = Wanted("shard", server.url("good"), SIZE, SHA256)
    with pytest.raises(Cancelled):
        download(wanted, place.final, stop_when(lambda total, _: total > 0), SOON)
    kept = place.part.stat().st_size
    server.forget()
    if kept < SIZE:
        place.fetch(server.url("good"))
        place.check()
        assert server.starts == [kept]


def test_caller_can_stop_a_wait(place: Place, server: FaultServer) -> None:
    server.faults["later"] = (Answer(status=503, headers={"Retry-After": "4"}),)
    began = time.monotonic()
    wanted = Wanted("shard", server.url("later"), SIZE, SHA256)
    with pytest.raises(Cancelled):
        download(wanted, place.final, stop_when(lambda _, calls: calls >= 2), replace(SOON, total=20))
    assert time.monotonic() - began < 1.5


def test_caller_can_stop_the_wait_for_another(place: Place, server: FaultServer) -> None:
    wanted = Wanted("shard", server.url("good"), SIZE, SHA256)
    with place.part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(Cancelled):
            download(wanted, place.final, stop_when(lambda _, calls: calls >= 2), SOON)
    assert time.monotonic() - began < 2.5
    assert server.requests == []
    place.fetch(server.url("good"))
    place.check()


def child(place: Place, url: str, before: str = "", size: int = SIZE, sha256: str = SHA256) -> list[str]:
    """Return the command that downloads in another process; it prints None or the size."""
    code = (
        f"{before}\nfrom pathlib import Path\nfrom corpora.errors import run_cli\n"
        "from corpora.download import Wanted, download\n"
        f"wanted, final = Wanted('shard train/00', {url!r}, {size}, {sha256!r}), Path({str(place.final)!r})\n"
        "def main():\n"
        "    got = download(wanted, final, already=final.exists)\n"
        "    print(got and got.size)\n"
        "run_cli(main)\n"
    )
    return [sys.executable, "-c", code]


def run(command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=dict(os.environ)
    )


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def grown(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size >= size


LARGE = random.Random(1).randbytes(3_000_000)
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()


@pytest.mark.parametrize(
    "kill", [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name
)
def test_killed_at_a_random_moment(place: Place, kill: signal.Signals) -> None:  # D30
    moment = random.randrange(1, 2_500_000)
    with FaultServer({"a": LARGE}, rate=6_000_000) as server:
        url = server.url("good")
        with subprocess.Popen(
            child(place, url, size=len(LARGE), sha256=LARGE_SHA256), cwd=ROOT, stderr=subprocess.PIPE
        ) as process:
            wait_until(lambda: grown(place.part, moment))
            process.send_signal(kill)
            process.communicate()
        assert process.returncode == (130 if kill == signal.SIGINT else -kill)
        kept = place.part.stat().st_size
        assert moment <= kept < len(LARGE)
        assert place.part.read_bytes() == LARGE[:kept]
        assert not place.final.exists()
        server.rate = None
        server.forget()
        place.fetch(url, size=len(LARGE), sha256=LARGE_SHA256)
        place.check(LARGE)
        assert place.told[0] > 0
        assert server.starts == [kept]
        assert server.sent == len(LARGE) - kept


def test_disk_that_fills_up(place: Place, server: FaultServer) -> None:  # D29
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    done = run(child(place, server.url("good"), limit))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {place.final}: no space left; free some")
    assert done.stderr.count("\n") == 1
    kept = place.part.stat().st_size
    assert 0 < kept <= 150_000
    server.forget()
    place.fetch(server.url("good"))
    place.check()
    assert server.starts == [kept] and server.sent == SIZE - kept


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_told_before_the_body(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10, 7, 3))
    with pytest.raises(InputError, match="no space: shard train/00 needs 300,000 bytes more, 3 are free"):
        place.fetch(server.url("good"))
    assert place.files == set()


# --- two at once ------------------------------------------------------------------------------------------


def test_two_processes_at_once(place: Place) -> None:
    with FaultServer({"a": LARGE}, rate=6_000_000) as server:
        command = child(place, server.url("good"), size=len(LARGE), sha256=LARGE_SHA256)
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
            told = [one.communicate(timeout=60)[0].strip(), two.communicate(timeout=60)[0].strip()]
        assert [one.returncode, two.returncode] == [0, 0]
        assert sorted(told) == sorted([str(len(LARGE)), "None"])
        assert len(server.requests) == 1 and server.sent == len(LARGE)
    assert place.files == {"a"} and place.final.read_bytes() == LARGE


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Run all at once; return what each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def work(n: int) -> None:
        try:
            results[n] = calls[n]()
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("number", [2, 5])
def test_threads_at_once(place: Place, number: int) -> None:
    with FaultServer({"a": BYTES}, rate=1_000_000) as server:
        wanted = Wanted("shard", server.url("good"), SIZE, SHA256)
        results = in_threads(
            *[lambda: download(wanted, place.final, None, SOON, place.final.exists)] * number
        )
        assert sorted(type(result).__name__ for result in results) == ["Downloaded"] + ["NoneType"] * (
            number - 1
        )
        assert len(server.requests) == 1 and server.sent == SIZE
    assert place.files == {"a"} and place.final.read_bytes() == BYTES


def test_one_after_another_does_not_tear_the_finished_file(place: Place) -> None:
    """Who waited and is not told that it is there already fetches anew, never into the finished file."""
    torn: list[int] = []

    def watch() -> None:
        while not done.wait(0.001):
            if place.final.exists() and place.final.read_bytes() != BYTES:
                torn.append(place.final.stat().st_size)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with FaultServer({"a": BYTES}, rate=2_000_000) as server:
        wanted = Wanted("shard", server.url("good"), SIZE, SHA256)
        results = in_threads(*[lambda: download(wanted, place.final, None, SOON)] * 3)
        done.set()
        watcher.join()
        assert [type(result) for result in results] == [Downloaded] * 3
        assert server.sent == 3 * SIZE
    assert torn == []
    assert place.files == {"a"} and place.final.read_bytes() == BYTES


def test_waiting_one_is_not_hurt_by_the_failure_of_the_first(place: Place) -> None:
    with FaultServer({"a": BYTES}, rate=2_000_000) as server:
        server.faults["mine"] = (Answer(change=flip), Answer(change=flip), GOOD)
        wanted = Wanted("shard", server.url("mine"), SIZE, SHA256)
        results = in_threads(*[lambda: download(wanted, place.final, None, SOON, place.final.exists)] * 2)
        assert sorted(type(result).__name__ for result in results) == ["Downloaded", "InputError"]
        assert server.starts == [None, None, None]
    assert place.files == {"a"} and place.final.read_bytes() == BYTES


def test_waiting_one_goes_on_where_the_killed_one_was(place: Place) -> None:
    with FaultServer({"a": LARGE}, rate=3_000_000) as server:
        url = server.url("good")
        with subprocess.Popen(child(place, url, size=len(LARGE), sha256=LARGE_SHA256), cwd=ROOT) as first:
            wait_until(lambda: grown(place.part, 1))
            sizes: list[int] = []

            def kill() -> None:
                time.sleep(0.3)
                first.kill()
                first.wait()
                sizes.append(place.part.stat().st_size)
                server.rate = None

            wanted = Wanted("shard", url, len(LARGE), LARGE_SHA256)
            got, _ = in_threads(lambda: download(wanted, place.final, None, SOON, lambda: False), kill)
        assert isinstance(got, Downloaded) and got.sha256 == LARGE_SHA256
        assert server.starts == [None, sizes[0]]
    assert place.files == {"a"} and place.final.read_bytes() == LARGE


# --- where a redirect may lead ----------------------------------------------------------------------------

AWAY: list[tuple[str, str]] = [  # from loopback
    ("file:///etc/hostname?Signature=sesame", "file"),  # D20
    ("ftp://127.0.0.1/a?Signature=sesame", "ftp"),
    ("gopher://127.0.0.1/a", "gopher"),
    ("http://169.254.169.254/latest/meta-data?Signature=sesame", "169.254.169.254"),
    ("http://user:password@169.254.169.254/latest", "169.254.169.254"),
    ("http://2852039166/latest", "2852039166"),  # the same in one number
    ("http://0xa9fea9fe/latest", "0xa9fea9fe"),
    ("http://169.254.43518/latest", "169.254.43518"),
    ("http://[::ffff:169.254.169.254]/latest", "::ffff:169.254.169.254"),
    ("http://[fe80::1]/a", "fe80::1"),
    ("http://[fe80::1%25lo]/a", "fe80::1"),
]
HOME = [  # from the world, beside those above
    ("http://127.0.0.1:{port}/good/a", "127.0.0.1"),
    ("http://localhost:{port}/good/a", "localhost"),
    ("http://[::1]/a", "::1"),
    ("http://10.0.0.1/a", "10.0.0.1"),
    ("http://172.16.0.1/a", "172.16.0.1"),
    ("http://192.168.1.1/a?Signature=sesame", "192.168.1.1"),
    ("http://[fd00::1]/a", "fd00::1"),
    ("http://0.0.0.0:{port}/good/a", "0.0.0.0"),
    ("http://2130706433/a", "2130706433"),
    ("http://[::ffff:127.0.0.1]/a", "::ffff:127.0.0.1"),
]


@pytest.mark.parametrize(("there", "host"), AWAY, ids=[host for _, host in AWAY])
def test_redirect_to_where_nobody_meant_it_to_go(
    place: Place, server: FaultServer, there: str, host: str
) -> None:
    server.faults["away"] = (Answer(location=there),)
    with pytest.raises(PilelineError) as caught:
        place.fetch(server.url("away"))
    check_told(caught.value, InputError)
    assert host in str(caught.value) and server.url("away") in str(caught.value)
    assert len(server.requests) == 1
    assert place.files == set()


@pytest.mark.parametrize(("there", "host"), AWAY + HOME, ids=[host for _, host in AWAY + HOME])
def test_redirect_from_the_world_to_home(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch, there: str, host: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.origin)  # plays the world
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    server.faults["away"] = (Answer(location=there.replace("{port}", str(server.port))),)
    with pytest.raises(PilelineError) as caught:
        place.fetch("http://93.184.215.14/away/a")
    check_told(caught.value, InputError)
    assert host in str(caught.value)
    assert len(server.requests) == 1
    assert place.files == set()


@pytest.mark.parametrize("near", ["169.254.169.254", "127.0.0.1", "10.0.0.1"])
def test_name_of_a_near_address_is_no_way_home(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch, near: str
) -> None:
    ask_the_system = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        return ask_the_system(near if host == "innocent.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("HTTP_PROXY", server.origin)  # plays the world
    server.faults["away"] = (Answer(location="http://innocent.example/good/a"),)
    with pytest.raises(InputError, match=r"innocent\.example"):
        place.fetch("http://93.184.215.14/away/a")
    assert len(server.requests) == 1


def test_redirect_within_the_world_is_followed(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.origin)
    server.faults["away"] = (Answer(location="http://93.184.215.15/good/a"),)
    place.fetch("http://93.184.215.14/away/a")
    place.check()
    assert [request.host for request in server.requests] == ["93.184.215.14", "93.184.215.15"]


def test_every_attempt_begins_at_the_origin(place: Place, server: FaultServer) -> None:  # D17
    place.fetch(server.url("signed"))
    place.check()
    paths = [request.path for request in server.requests]
    assert paths == ["/signed/a", "/expires/a"] * 3
    assert [r.status for r in server.requests if r.path == "/expires/a"] == [200, 403, 206]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a self-signed certificate for loopback, with its key, in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    key, made = folder / "key.pem", folder / "certificate.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command = ["openssl", *options.split(), *names, "-keyout", str(key), "-out", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no openssl command")
    both = folder / "both.pem"
    both.write_bytes(key.read_bytes() + made.read_bytes())
    return both


def test_https_does_not_lead_to_http(
    place: Place, server: FaultServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # D19
    with FaultServer({"a": BYTES}, certificate=certificate) as secure:
        with pytest.raises(InputError, match=r"its certificate is not trusted .* REQUESTS_CA_BUNDLE$"):
            place.fetch(secure.url("good"))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        place.fetch(secure.url("cut"))
        place.check()
        place.final.unlink()
        secure.faults["down"] = (Answer(location=f"{server.url('good')}?Signature=sesame"),)
        with pytest.raises(PilelineError, match=r"127\.0\.0\.1") as caught:
            place.fetch(secure.url("down"))
        check_told(caught.value, InputError)
        server.faults["up"] = (Answer(location=secure.url("good")),)
        assert server.requests == []
        place.fetch(server.url("up"))
        place.check()


# --- logins -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    """Return the server as the Hugging Face endpoint, with a token for it."""
    monkeypatch.setenv("HF_ENDPOINT", server.origin)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    return server


def test_token_goes_to_the_hub(place: Place, hub: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password other\n")  # D35
    (tmp_path / "netrc").chmod(0o600)
    place.fetch(hub.url("redirect"))
    place.check()
    assert [request.authorization for request in hub.requests] == [f"Bearer {CANARY}"] * 2


def test_netrc_is_a_login_where_there_is_no_token(place: Place, server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password other\n")
    (tmp_path / "netrc").chmod(0o600)
    place.fetch(server.url("good"))
    assert [request.authorization for request in server.requests] == ["Basic dXNlcjpvdGhlcg=="]


@pytest.mark.parametrize("other", ["port", "host", "host of the same port"])
def test_token_stays_with_the_hub(place: Place, hub: FaultServer, other: str) -> None:
    with FaultServer({"a": BYTES}) as mirror:
        there = {
            "port": mirror.url("good"),
            "host": f"http://localhost:{mirror.port}/good/a",
            "host of the same port": f"http://localhost:{hub.port}/good/a",
        }[other]
        hub.faults["away"] = (Answer(location=there),)
        place.fetch(hub.url("away"))
        place.check()
        assert hub.requests[0].authorization == f"Bearer {CANARY}"
        target = (mirror if mirror.requests else hub).requests[-1]
        assert target.path == "/good/a" and target.authorization is None
        hub.forget()
        mirror.forget()
        place.fetch(there)  # asked directly, it is no hub either
        assert [r.authorization for r in hub.requests + mirror.requests] == [None]


def test_token_does_not_go_to_a_host_that_is_no_hub(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    for endpoint in ("", "https://huggingface.co", f"https://127.0.0.1:{server.port}", server.origin[:-1]):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        place.fetch(server.url("good"))
    assert [request.authorization for request in server.requests] == [None] * 4


def test_token_does_not_go_over_an_open_line(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.origin)  # plays the world
    monkeypatch.setenv("HF_ENDPOINT", "http://93.184.215.14")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    place.fetch("http://93.184.215.14/good/a")
    assert [request.authorization for request in server.requests] == [None]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[", "hub"])
def test_odd_endpoint_does_not_stop_other_downloads_or_is_named(
    place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    try:
        place.fetch(server.url("good"))
    except InputError as error:
        assert "HF_ENDPOINT" in str(error)
    else:
        place.check()


def test_hub_vouches_for_a_file_whatever_its_mirrors_say(place: Place, server: FaultServer) -> None:
    linked = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(SIZE)}
    server.faults["resolve"] = (Answer(location="/mirrors/{name}?Signature=sesame", headers=linked),)
    server.faults["mirrors"] = (Answer(cut=200_000, etag='"one"'), Answer(etag='"two"'))
    place.fetch(server.url("resolve"))
    place.check()
    assert server.starts == [None, 200_000]


def test_hub_that_has_another_file_by_now_is_refused_before_the_body(
    place: Place, server: FaultServer
) -> None:
    linked = {"X-Linked-Etag": f'"{"a" * 64}"'}
    server.faults["resolve"] = (Answer(location="/longer-chunked/{name}", headers=linked),)
    with pytest.raises(InputError, match=f"expected sha256 {SHA256}, got {'a' * 64}"):
        place.fetch(server.url("resolve"))
    assert place.files == set() and server.sent < 10_000_000


@pytest.mark.parametrize("status", [401, 403])
def test_denied_by_the_hub_names_the_token(place: Place, hub: FaultServer, status: int) -> None:  # D16
    with pytest.raises(InputError, match=f"the server answered {status}.*HF_TOKEN") as caught:
        place.fetch(hub.url(str(status)))
    check_told(caught.value, InputError)


@pytest.mark.parametrize("token", [f" {CANARY}\n", f"{CANARY}\nX-Evil: 1", f"{CANARY}é", "\n"])
def test_odd_token(place: Place, hub: FaultServer, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    try:
        place.fetch(hub.url("good"))
    except PilelineError as error:
        check_told(error, InputError)
        assert hub.requests == []
    else:
        assert token.strip() in (CANARY, "")
        assert hub.requests[0].authorization == (f"Bearer {CANARY}" if token.strip() else None)


SECRETIVE = {fault: known for _, fault, known, *_ in [*REFUSED, *GIVEN_UP] if fault != "drip-always"}


@pytest.mark.parametrize("fault", SECRETIVE)
def test_no_secret_is_told(
    place: Place,
    hub: FaultServer,
    fault: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    url = f"http://user:password@127.0.0.1:{hub.port}/{fault}/a?token={CANARY}"
    with pytest.raises(PilelineError) as caught:
        place.fetch(url, **SECRETIVE[fault], patience=replace(HASTY, tries=2))
    out, err = capfd.readouterr()
    texts = ["".join(traceback.format_exception(caught.value)), caplog.text, out, err]
    for secret in (CANARY, "user:password", "password@", "sesame"):
        assert [text for text in texts if secret in text] == []
    assert f"127.0.0.1:{hub.port}/{fault}/a" in str(caught.value)


def test_no_secret_is_left_on_the_disk(place: Place, hub: FaultServer) -> None:
    hub.faults["mine"] = (CUT, Answer(status=503))
    with pytest.raises(Unavailable):
        place.fetch(f"http://user:password@127.0.0.1:{hub.port}/mine/a?token={CANARY}")
    left = place.meta.read_text("utf-8")
    assert [secret for secret in (CANARY, "password") if secret in left] == []


# --- proxies ----------------------------------------------------------------------------------------------


def test_proxy_is_used(place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:  # D35
    monkeypatch.setenv("HTTP_PROXY", server.origin.replace("://", "://user:password@"))
    place.fetch("http://files.invalid/cut/a")
    place.check()
    assert [request.target for request in server.requests] == ["http://files.invalid/cut/a"] * 2
    assert server.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNzd29yZA=="


def test_no_proxy_is_heeded(place: Place, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:password@127.0.0.1:9")
    with pytest.raises(Unavailable, match="without progress") as caught:
        place.fetch(server.url("good"))
    check_told(caught.value, Unavailable)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    place.fetch(server.url("good"))
    place.check()
    assert [request.target for request in server.requests] == ["/good/a"]


# --- any row of faults ------------------------------------------------------------------------------------

NAMED = [
    *("cut-at-once", "chunked-no-end", "hang-up", "flipped-always", "html", "html-right-size", "shorter"),
    *("longer-chunked", "length-too-small", "416-always", "503", "204", "404", "empty", "empty-chunked"),
    *("says-gzip", "garbage-always", "redirect", "signed-expired", "loop", "many-headers"),
]
KINDS = {name: Answer(status=int(name)) if name.isdigit() else FAULTS[name][-1] for name in NAMED}

cuts = st.integers(0, SIZE) | st.sampled_from([0, 1, 511, SIZE - 1, SIZE])
honest = st.builds(  # what can be told from the truth without a digest
    Answer,
    cut=st.none() | cuts,
    end=st.sampled_from(["close", "close", "reset", "reset", "stall"]),
    framing=st.sampled_from(["length", "length", "chunked", "close"]),
    change=st.sampled_from([None, None, edit]),
    etag=st.sampled_from([None, None, None, 'W/"x"', ""]),
    ranges=st.sampled_from(["kept", "ignored", "unconditional"]),
    shift=st.sampled_from([0, 0, 0, 5, -5]),
    total=st.sampled_from([None, None, SIZE + 1]),
)
lies = st.builds(replace, honest, etag=st.just('"same"'), change=st.sampled_from([None, edit, flip]))
faults = st.sampled_from(NAMED).map(KINDS.__getitem__)
detectable = ["503", "204", "cut-at-once", "hang-up", "416-always", "says-gzip", "garbage-always", "html"]


@settings(max_examples=50, deadline=None)
@given(
    row=st.lists(honest | lies | faults, max_size=8),
    size=st.sampled_from([SIZE, None]),
)
def test_any_row_of_faults_and_a_digest(
    tmp_path_factory: pytest.TempPathFactory, row: list[Answer], size: int | None
) -> None:
    place = Place(tmp_path_factory.mktemp("any"))
    go_through(place, row, {BYTES}, size=size)


@settings(max_examples=50, deadline=None)
@given(
    row=st.lists(honest | st.sampled_from(detectable).map(KINDS.__getitem__), max_size=8),
    size=st.sampled_from([SIZE, None]),
)
def test_any_row_of_faults_without_a_digest(
    tmp_path_factory: pytest.TempPathFactory, row: list[Answer], size: int | None
) -> None:
    place = Place(tmp_path_factory.mktemp("any"))
    go_through(place, row, {BYTES, edit(BYTES)}, size=size, sha256=None)


def go_through(place: Place, row: list[Answer], versions: set[bytes], **known: Any) -> None:
    """Download while the row of faults lasts, then once more from a server that is well again."""
    hasty = replace(HASTY, read=0.03, backoff=0.001, total=0.1)
    with FaultServer({"a": BYTES}) as server:
        server.faults["row"] = (*row, GOOD)
        for last in (False, True):
            try:
                place.fetch(server.url("row"), patience=hasty, **known)
            except PilelineError as error:
                check_told(error, InputError if isinstance(error, InputError) else Unavailable)
                assert not last
                assert not place.final.exists()
                kept = place.part.stat().st_size if place.part.exists() else 0
                assert sum(place.told) == kept
            else:
                assert place.final.read_bytes() in versions
                assert place.files == {"a"}
                place.final.unlink()
            assert len(server.requests) < 60
            server.faults["row"] = (GOOD,)
        place.fetch(server.url("row"), **known)
        place.check()
