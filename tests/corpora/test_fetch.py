"""Fetching: every way a file can come, what is kept of it, and what is said."""

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from corpora.errors import InputError, PilelineError, Unavailable
from corpora.fetch import fetch, verified
from corpora.patience import Patience
from corpora.receipts import Receipt, raw_path, receipt_path
from corpora.settings import Corpus
from corpora.texts import measure_tar

ROOT = Path(__file__).resolve().parents[2]
BYTES = hashlib.sha256(b"seed").digest() * 100_000  # 3.2 MB: several chunks
SHA256 = hashlib.sha256(BYTES).hexdigest()
HTML = b"\n <!DOCTYPE html><title>Log in</title>"
PATIENCE = Patience(connect=5, read=0.3, window=5, tries=2, backoff=0.01)


class Misbehaving(BaseHTTPRequestHandler):
    """Serve /<fault>/<anything>; the fault is a method of this class."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[Counter[str]] = Counter()
    headers_seen: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        fault = self.path.split("/")[1]
        self.seen[fault] += 1
        self.headers_seen.update(self.headers.items())
        self.close_connection = True
        if fault.isdigit():
            self.answer(b"<html>an error page", status=int(fault))
        else:
            getattr(self, fault)()

    def answer(self, body: bytes, status: int = 200, length: int | None = -1, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def good(self) -> None:
        self.answer(BYTES)

    def no_length(self) -> None:
        self.answer(BYTES, length=None)

    def chunked(self) -> None:
        self.answer(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BYTES), BYTES), length=None, Transfer_Encoding="chunked")

    def changing(self) -> None:
        other = 1 < self.seen["changing"] < 4
        self.answer((b"other" if other else b"\x28\xb5\x2f\xfd") + BYTES[5 if other else 4 :])

    def empty(self) -> None:
        self.answer(b"")

    def redirect(self) -> None:
        self.answer(b"", status=302, Location="/good/x")

    def short(self) -> None:
        self.answer(BYTES[:2_000_000], length=len(BYTES))

    def short_no_length(self) -> None:
        self.answer(BYTES[:2_000_000], length=None)

    def flipped(self) -> None:
        self.answer(BYTES[:-1] + b"x")

    def html(self) -> None:
        self.answer(HTML)

    def stall(self) -> None:
        self.answer(BYTES[:2_000_000], length=len(BYTES))
        self.wfile.flush()
        self.server.released.wait(20)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as running:
        running.released = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.released.set()  # type: ignore[attr-defined]
        running.shutdown()
        thread.join()


class Place(NamedTuple):
    """A data root, and the lock of the corpus in it."""

    data: Path
    lock: Path

    def corpus(self, url: str) -> Corpus:
        return Corpus(name="mine", train=("train/00",), val=("val",), lock=self.lock, url=url)

    @property
    def final(self) -> Path:
        return self.data / "mine" / "raw" / "train" / "00.jsonl.zst"

    def files(self) -> set[str]:
        return {p.name for p in self.data.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    lock = tmp_path / "lock.json"
    write_lock(lock)
    return Place(tmp_path / "data", lock)


def write_lock(lock: Path, size: int | None = len(BYTES), sha256: str | None = SHA256) -> None:
    entry = {"name": "train/00", "path": "train/00.jsonl.zst", "size": size, "sha256": sha256}
    lock.write_text(json.dumps({"corpus": "mine", "url": ".", "files": [entry]}), "utf-8")


WHOLE = {"00.jsonl.zst", "00.jsonl.zst.receipt.json"}


@pytest.mark.parametrize("size", [len(BYTES), None], ids=["size known", "size not known"])
@pytest.mark.parametrize("way", ["good", "no_length", "chunked", "redirect", "file"])
def test_whole_file_is_kept(place: Place, server: str, way: str, size: int | None) -> None:
    write_lock(place.lock, size)
    url = f"{server}/{way}"
    if way == "file":
        folder = place.data.with_name("a b") / "train"
        folder.mkdir(parents=True)
        (folder / "00.jsonl.zst").write_bytes(BYTES)
        url = folder.parent.as_uri()
    written: list[int] = []
    receipt, was_there = fetch(place.corpus(url), "train/00", place.data, written.append)
    assert not was_there
    assert place.final.read_bytes() == BYTES
    assert place.final == raw_path("mine", "train/00", "x.jsonl.zst", place.data)
    assert place.files() == WHOLE
    assert sum(written) == len(BYTES) and len(written) > 3
    assert receipt == Receipt(
        shard="train/00",
        path="mine/raw/train/00.jsonl.zst",
        size=len(BYTES),
        sha256=SHA256,
        url=f"{url}/train/00.jsonl.zst",
        mtime_ns=place.final.stat().st_mtime_ns,
    )
    assert json.loads(receipt_path(place.final).read_bytes()) == receipt.model_dump()
    assert verified(place.corpus(url), "train/00", place.data) == receipt
    assert fetch(place.corpus(url), "train/00", place.data, pytest.fail) == (receipt, True)


def test_server_is_asked_for_the_bytes_as_they_are(place: Place, server: str) -> None:
    fetch(place.corpus(f"{server}/good"), "train/00", place.data)
    assert Misbehaving.headers_seen["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        (
            "404",
            InputError,
            "the server answered 404: no such file; correct the URL, or the path in the lock$",
        ),
        ("503", Unavailable, "2 tries in . s without progress; the last: the server answered 503; run again"),
        (
            "short",
            Unavailable,
            r"begun anew 2 times, the last time because .* \(it has no ranges\); use another",
        ),
        (
            "stall",
            Unavailable,
            r"begun anew 2 times, the last time because .* \(it has no ranges\); use another",
        ),
        ("flipped", InputError, f"expected sha256 {SHA256}, got sha256 [0-9a-f]{{64}}; nothing was kept"),
        ("html", InputError, r"expected 3,200,000 bytes, got 38 \(it looks like an HTML page"),
    ],
)
def test_fault_of_a_server(
    place: Place, server: str, fault: str, kind: type[PilelineError], told: str
) -> None:
    url = f"{server}/{fault}"
    with pytest.raises(PilelineError, match=told) as caught:
        fetch(place.corpus(url), "train/00", place.data, patience=PATIENCE)
    assert isinstance(caught.value, kind)
    assert f"{url}/train/00.jsonl.zst" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert place.files() <= {"00.jsonl.zst.part", "00.jsonl.zst.part.json"}
    assert not fetch(place.corpus(f"{server}/good"), "train/00", place.data)[1]
    assert place.final.read_bytes() == BYTES
    assert place.files() == WHOLE


def test_source_of_a_hash_is_told_where_it_is_contradicted(place: Place, server: str) -> None:
    lock = json.loads(place.lock.read_bytes())
    lock["files"][0]["source"] = "its publisher's page"
    place.lock.write_text(json.dumps(lock), "utf-8")
    with pytest.raises(InputError, match=f"expected sha256 {SHA256} .its publisher's page., got sha256 "):
        fetch(place.corpus(f"{server}/flipped"), "train/00", place.data)


def test_first_download_is_trusted_where_nobody_knew_the_hash(
    place: Place, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_lock(place.lock, size=None, sha256=None)
    corpus, zst = place.corpus(f"{server}/changing"), b"\x28\xb5\x2f\xfd" + BYTES[4:]
    sha256 = hashlib.sha256(zst).hexdigest()
    receipt, _ = fetch(corpus, "train/00", place.data)
    assert (receipt.sha256, receipt.trust, receipt.size) == (sha256, "first use", len(zst))
    assert f"no sha256 was known; this one is trusted from now on: {sha256}" in caplog.text
    assert fetch(corpus, "train/00", place.data, pytest.fail) == (receipt, True)
    # From now on it is what every other download is held against, as if the lock said it.
    place.final.unlink()
    with pytest.raises(
        InputError, match=f"expected sha256 {sha256} .the first download, trusted on first use., got"
    ):
        fetch(corpus, "train/00", place.data)
    assert fetch(corpus, "train/00", place.data)[0].trust == "first use"
    receipt_path(place.final).unlink()  # killed between the file and its receipt
    assert fetch(corpus, "train/00", place.data, pytest.fail)[1]


@pytest.mark.parametrize("fault", ["html", "good", "empty"])
def test_first_download_is_not_trusted_when_it_is_plainly_something_else(
    place: Place, server: str, fault: str
) -> None:
    write_lock(place.lock, size=None, sha256=None)
    with pytest.raises(
        InputError,
        match=r"got an HTML page|expected a file, got nothing|came instead of a \.zst file; nothing was kept",
    ):
        fetch(place.corpus(f"{server}/{fault}"), "train/00", place.data, patience=PATIENCE)
    assert place.files() == set()


def test_file_of_this_machine_is_not_stored_twice(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "mirror" / "train" / "00.jsonl.zst"
    source.parent.mkdir(parents=True)
    source.write_bytes(BYTES)
    corpus = place.corpus((tmp_path / "mirror").as_uri())
    fetch(corpus, "train/00", place.data)
    assert place.final.samefile(source)
    source.write_bytes(BYTES[:-1] + b"x")  # edited in place: both names show it
    with pytest.raises(InputError, match="is not the file that the lock names"):
        verified(corpus, "train/00", place.data)
    source.unlink()
    source.write_bytes(BYTES)
    fetch(corpus, "train/00", place.data)
    assert place.final.read_bytes() == BYTES and place.files() == WHOLE


def test_file_of_another_file_system_is_copied(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cross(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", cross)
    source = tmp_path / "mirror" / "train" / "00.jsonl.zst"
    source.parent.mkdir(parents=True)
    source.write_bytes(BYTES)
    fetch(place.corpus((tmp_path / "mirror").as_uri()), "train/00", place.data)
    assert place.final.read_bytes() == BYTES and not place.final.samefile(source)
    assert place.files() == WHOLE


def test_folder_of_texts_is_kept_as_one_tar(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a.txt", "b ü.txt"):
        (folder / name).write_text(f"text of {name}", "utf-8")
    size, sha256, texts = measure_tar(folder, ["a.txt", "b ü.txt"])
    entry = {"name": "train/00", "path": "text/0.tar", "size": size, "sha256": sha256, "texts": texts}
    lock = {"corpus": "mine", "url": folder.as_uri(), "files": [entry]}
    place.lock.write_text(json.dumps(lock), "utf-8")
    corpus = Corpus(name="mine", train=("train/00",), val=("val",), lock=place.lock)
    receipt, _ = fetch(corpus, "train/00", place.data)
    assert (receipt.path, receipt.size, receipt.sha256) == ("mine/raw/train/00.tar", size, sha256)
    with tarfile.open(place.data / receipt.path) as tar:
        read = {member.name: tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]
    assert read == {"a.txt": "text of a.txt", "b ü.txt": "text of b ü.txt"}
    assert fetch(corpus, "train/00", place.data, pytest.fail) == (receipt, True)

    (place.data / receipt.path).unlink()
    with pytest.raises(InputError, match=r"its address must be one \(file:\), not https://x\.org$"):
        fetch(corpus.model_copy(update={"url": "https://x.org"}), "train/00", place.data)
    (folder / "a.txt").write_text("another", "utf-8")
    with pytest.raises(
        InputError, match=r"a\.txt: is not the text that the lock names: expected sha256 .* lock the"
    ):
        fetch(corpus, "train/00", place.data)
    (folder / "a.txt").unlink()
    with pytest.raises(
        InputError, match=r"a\.txt: cannot be read: No such file or directory; put it back, or"
    ):
        fetch(corpus, "train/00", place.data)
    (folder / "a.txt").symlink_to(tmp_path / "lock.json")
    with pytest.raises(InputError, match=r"a\.txt: a link stands on the way"):
        fetch(corpus, "train/00", place.data)
    assert not [path for path in place.files() if path.endswith((".tar", ".part"))]


def test_missing_or_wrong_local_file(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "train" / "00.jsonl.zst"
    corpus = place.corpus(tmp_path.as_uri())
    with pytest.raises(InputError, match=f"^{source}: cannot be read: No such file or directory; correct"):
        fetch(corpus, "train/00", place.data)
    source.mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{source}: cannot be read: Is a directory; correct"):
        fetch(corpus, "train/00", place.data)
    source.rmdir()
    source.write_bytes(BYTES[:-1])
    with pytest.raises(InputError, match="expected 3,200,000 bytes, got 3,199,999"):
        fetch(corpus, "train/00", place.data)
    with pytest.raises(InputError, match="no shard 'train/01' in its lock"):
        fetch(corpus, "train/01", place.data)
    assert place.files() == set()


def test_bad_disk_under_a_local_file_may_be_gone_next_time(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    fetch_open = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *a, **k: stale() if path.parent.name == "source" else fetch_open(path, *a, **k),
    )
    entry = {"name": "train/00", "path": "00.jsonl.zst", "size": None, "sha256": SHA256}
    place.lock.write_text(json.dumps({"corpus": "mine", "url": ".", "files": [entry]}), "utf-8")
    with pytest.raises(Unavailable, match="cannot be read: Stale file handle; run again"):
        fetch(place.corpus((tmp_path / "source").as_uri()), "train/00", place.data)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "asks_the_server", "still_verified"),
    [
        ("nothing", False, True),
        ("receipt lost", False, True),
        ("receipt torn", False, True),
        ("receipt of another lock", False, True),
        ("touched", False, True),
        ("edited, same size", True, False),
        ("cut", True, False),
        ("lost", True, False),
    ],
)
def test_receipt_is_believed_only_with_its_file(
    place: Place, server: str, change: str, asks_the_server: bool, still_verified: bool
) -> None:
    corpus, final = place.corpus(f"{server}/good"), place.final
    fetch(corpus, "train/00", place.data)
    receipt = receipt_path(final)
    match change:
        case "receipt lost":
            receipt.unlink()
        case "receipt torn":
            receipt.write_bytes(receipt.read_bytes()[:20])
        case "receipt of another lock":
            receipt.write_text(receipt.read_text("utf-8").replace(SHA256, "a" * 64), "utf-8")
        case "touched":
            touch(final)
        case "edited, same size":
            final.write_bytes(BYTES[:-1] + b"x")
        case "cut":
            final.write_bytes(BYTES[:1000])
        case "lost":
            final.unlink()
    if still_verified:
        assert verified(corpus, "train/00", place.data).sha256 == SHA256
    else:
        why = "is not there" if change == "lost" else "is not the file that the lock names"
        with pytest.raises(InputError, match=f"{why}; run `python -m corpora fetch RECIPE`"):
            verified(corpus, "train/00", place.data)
    before = Misbehaving.seen["good"]
    renewed, was_there = fetch(corpus, "train/00", place.data)
    assert (Misbehaving.seen["good"] > before, was_there) == (asks_the_server, not asks_the_server)
    assert final.read_bytes() == BYTES
    assert renewed.mtime_ns == final.stat().st_mtime_ns
    assert place.files() == WHOLE
    assert fetch(corpus, "train/00", place.data, pytest.fail) == (renewed, True)


def test_another_lock_makes_the_old_file_count_for_nothing(place: Place, server: str) -> None:
    corpus = place.corpus(f"{server}/good")
    fetch(corpus, "train/00", place.data)
    write_lock(place.lock, sha256="a" * 64)
    with pytest.raises(InputError, match="is not the file that the lock names"):
        verified(corpus, "train/00", place.data)
    with pytest.raises(InputError, match=f"expected sha256 {'a' * 64}, got sha256 {SHA256}"):
        fetch(corpus, "train/00", place.data)
    assert place.final.read_bytes() == BYTES  # what was there stays until something better has come


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_told_before_the_download(
    place: Place, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10, 7, 3))
    told = (
        f"^{place.final.parent}: no space: shard train/00 needs 3,200,000 bytes more, 3 are free; free some, or "
        "choose a folder on a larger disk"
    )
    with pytest.raises(InputError, match=told):
        fetch(place.corpus(f"{server}/good"), "train/00", place.data)
    assert place.files() <= {"00.jsonl.zst.part.json"}


def test_disk_that_fills_up_is_one_line(place: Place, server: str) -> None:
    done = run(
        place, f"{server}/good", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9**6, 9**6))"
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {place.final}: no space left; free some, or choose a folder on a larger disk, then run "
        "again: it goes on from here\n"
    )
    assert place.files() == {"00.jsonl.zst.part", "00.jsonl.zst.part.json"}


@pytest.mark.parametrize("in_the_way", ["mine", "mine/raw/train"])
def test_file_in_the_way_of_a_folder(place: Place, server: str, in_the_way: str) -> None:
    path = place.data / in_the_way
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"^{place.final}: cannot be written: "):
        fetch(place.corpus(f"{server}/good"), "train/00", place.data)


def test_folder_in_the_way_of_a_file(place: Place, server: str) -> None:
    place.final.mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{place.final}: is not a plain file; move it away"):
        fetch(place.corpus(f"{server}/good"), "train/00", place.data)


def script(place: Place, url: str, before: str = "") -> list[str]:
    code = (
        f"{before}\nfrom pathlib import Path\nfrom corpora.errors import run_cli\nfrom corpora.fetch import fetch\n"
        "from corpora.settings import Corpus\n"
        f"corpus = Corpus.model_validate_json({place.corpus(url).model_dump_json()!r})\n"
        f"run_cli(lambda: fetch(corpus, 'train/00', Path({str(place.data)!r})) and None)\n"
    )
    return [sys.executable, "-c", code]


def run(place: Place, url: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(place, url, before), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_killed_download_leaves_a_part_that_counts_for_nothing(place: Place, server: str) -> None:
    with subprocess.Popen(script(place, f"{server}/stall"), cwd=ROOT) as child:
        deadline = time.monotonic() + 30
        part = place.final.with_name("00.jsonl.zst.part")
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert place.files() == {"00.jsonl.zst.part", "00.jsonl.zst.part.json"}
    with pytest.raises(InputError, match="is not there"):
        verified(place.corpus(f"{server}/good"), "train/00", place.data)
    fetch(place.corpus(f"{server}/good"), "train/00", place.data)
    assert place.files() == WHOLE
    assert place.final.read_bytes() == BYTES


def test_two_processes_at_once(place: Place, server: str) -> None:
    commands = [script(place, f"{server}/good") for _ in range(2)]
    children = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [child.wait(60) for child in children] == [0, 0]
    assert place.files() == WHOLE
    assert place.final.read_bytes() == BYTES
    assert fetch(place.corpus(f"{server}/good"), "train/00", place.data, pytest.fail)[1]


def test_file_system_without_locks(place: Place, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    fetch(place.corpus(f"{server}/good"), "train/00", place.data)
    assert place.files() == WHOLE


def test_demo_is_fetched_like_any_corpus(demo_corpus: Path, tmp_path: Path, server: str) -> None:
    source = demo_corpus / "demo" / "source"
    corpus = Corpus(name="demo", train=("val",), val=("test",), lock=source / "lock.json")
    receipt, _ = fetch(corpus, "val", tmp_path)
    assert receipt.url == f"{source.as_uri()}/val.jsonl.zst"
    assert (tmp_path / receipt.path).read_bytes() == (source / "val.jsonl.zst").read_bytes()
    with pytest.raises(InputError, match=re.escape("the server answered 404")):
        fetch(corpus.model_copy(update={"url": f"{server}/404"}), "test", tmp_path)
