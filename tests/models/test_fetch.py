"""Model folders from a real server: continued, verified, and every fault named."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from corpora import hub
from corpora.errors import InputError, Unavailable
from corpora.hub import HubFile
from corpora.part import part_of
from corpora.patience import Patience
from models import fetch as module
from models.fetch import Result, address, fetch, remarks

ROOT = Path(__file__).resolve().parents[2]
HTML = b"<!DOCTYPE html><title>Log in</title>" + b" " * 48_000
HASTE = Patience(tries=2, backoff=0.01)


def noise(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(f"{md5(data)}  {name}\n" for name, data in files.items()).encode()


SMALL = {"consolidated.00.pth": noise("7B", 70_000), "params.json": b'{"dim": 64}'}
LARGE = {
    "consolidated.00.pth": noise("13B 0", 90_000),
    "consolidated.01.pth": noise("13B 1", 90_000),
    "params.json": b'{"dim": 128}',
}
TOKENIZER = {"tokenizer.model": noise("tokenizer", 5_000)}


class Shelf(ThreadingHTTPServer):
    """A server of `files`, path -> bytes (or the status to answer), that remembers what it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes | int] = {}
        self.queries: set[str] = set()
        self.sent: dict[str, list[tuple[int, int]]] = {}  # path -> status and bytes of each answer
        self.silent: set[str] = set()  # these send a beginning, then nothing
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, folder: str, files: dict[str, bytes], listed: str = "checklist.chk") -> None:
        self.files |= {f"{folder}/{name}": data for name, data in files.items()}
        self.files[f"{folder}/{listed}"] = checklist(files)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Shelf
    ranged: ClassVar[re.Pattern[str]] = re.compile(r"bytes=(\d+)-")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.server.queries.add(parts.query)
        found = self.server.files.get(path, 404)
        status, body = (found, b"no") if isinstance(found, int) else (200, found)
        if status == 200 and (wanted := self.ranged.match(self.headers.get("Range", ""))):
            start, status = int(wanted[1]), 206
            body, whole = body[start:], len(body)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if status == 503:
            self.send_header("Retry-After", "100000")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if path in self.server.silent:
            self.wfile.write(body[:1000])
            self.wfile.flush()
            self.server.released.wait(20)
            return
        self.wfile.write(body)
        self.server.sent.setdefault(path, []).append((status, len(body)))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    server = Shelf()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        server.add("/llama", TOKENIZER, "tokenizer_checklist.chk")
        server.add("/llama/7B", SMALL)
        server.add("/llama/13B", LARGE)
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def states(results: tuple[Result, ...]) -> dict[str, str]:
    return {result.name: result.state for result in results}


def held(folder: Path) -> dict[str, bytes]:
    """Return all files under a folder, those that only a download leaves behind among them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "models", "fetch", *map(str, words)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_7b_and_a_13b_with_their_tokenizer(shelf: Shelf, tmp_path: Path) -> None:
    told: list[str] = []
    for url, folder in (("/llama", ""), ("/llama/7B/", "7B"), ("/llama/13B", "13B")):
        results = fetch(shelf.url + url, tmp_path / folder, tell=told.append)
        assert set(states(results).values()) == {"fetched"}
    assert held(tmp_path) == {
        path.removeprefix("/llama/"): data for path, data in shelf.files.items() if isinstance(data, bytes)
    }
    assert sorted(told) == [
        "consolidated.00.pth: 70,000 bytes, md5 verified",
        "consolidated.00.pth: 90,000 bytes, md5 verified",
        "consolidated.01.pth: 90,000 bytes, md5 verified",
        "params.json: 11 bytes, md5 verified",
        "params.json: 12 bytes, md5 verified",
        "tokenizer.model: 5,000 bytes, md5 verified",
    ]

    told.clear()
    shelf.sent.clear()
    again = fetch(f"{shelf.url}/llama/7B", tmp_path / "7B", tell=told.append)
    assert states(again) == {"consolidated.00.pth": "verified", "params.json": "verified"}
    assert "consolidated.00.pth: 70,000 bytes, md5 (verified before)" in told
    assert [path for path in shelf.sent if path in shelf.files] == ["/llama/7B/checklist.chk"]


def test_lists_in_several_folders_at_once(shelf: Shelf, tmp_path: Path) -> None:
    lists = ["tokenizer_checklist.chk", "7B/checklist.chk"]
    results = fetch(f"{shelf.url}/llama", tmp_path, lists)
    assert states(results) == dict.fromkeys(
        ["tokenizer.model", "7B/consolidated.00.pth", "7B/params.json"], "fetched"
    )
    assert set(held(tmp_path)) == {*states(results), *lists}


def test_a_partial_file_is_continued(shelf: Shelf, tmp_path: Path) -> None:
    whole = SMALL["consolidated.00.pth"]
    part_of(tmp_path / "consolidated.00.pth").write_bytes(whole[:60_000])
    assert states(fetch(f"{shelf.url}/llama/7B", tmp_path))["consolidated.00.pth"] == "fetched"
    assert shelf.sent["/llama/7B/consolidated.00.pth"] == [(206, 10_000)]
    assert held(tmp_path) == SMALL | {"checklist.chk": checklist(SMALL)}


def test_a_wrong_file_stays_until_the_right_one_is_whole(shelf: Shelf, tmp_path: Path) -> None:
    name = "consolidated.00.pth"
    (tmp_path / name).write_bytes(bytes(70_000))
    right, shelf.files[f"/llama/7B/{name}"] = SMALL[name], 503
    assert states(fetch(f"{shelf.url}/llama/7B", tmp_path))[name] == "unavailable"
    assert (tmp_path / name).read_bytes() == bytes(70_000)
    shelf.files[f"/llama/7B/{name}"] = right
    assert states(fetch(f"{shelf.url}/llama/7B", tmp_path)) == {name: "fetched", "params.json": "verified"}
    assert held(tmp_path) == SMALL | {"checklist.chk": checklist(SMALL)}


def test_every_fault_is_named_and_stops_nothing(shelf: Shelf, tmp_path: Path) -> None:
    wrong = noise("another", 90_000)
    shelf.files |= {
        "/llama/13B/consolidated.00.pth": 404,
        "/llama/13B/consolidated.01.pth": HTML,
        "/llama/13B/params.json": wrong,
        "/llama/13B/late": 503,
        "/llama/13B/closed": 403,
        "/llama/13B/good": b"good",
    }
    more = checklist({"late": b"late", "closed": b"closed", "good": b"good"})
    shelf.files["/llama/13B/checklist.chk"] = checklist(LARGE) + more
    told: list[str] = []
    results = {
        result.name: result
        for result in fetch(f"{shelf.url}/llama/13B", tmp_path, parallel=1, tell=told.append)
    }
    assert told == ["good: 4 bytes, md5 verified"]
    assert {name: result.state for name, result in results.items()} == {
        "consolidated.00.pth": "missing",
        "consolidated.01.pth": "refused",
        "params.json": "refused",
        "late": "unavailable",
        "closed": "refused",
        "good": "fetched",
    }
    for name, result in results.items():
        assert name == "good" or result.line.startswith(f"{name} (listed in checklist.chk): ")
        assert name == "good" or result.line.count(f"{shelf.url}/llama/13B/{name}") == 1
        assert "\n" not in result.line
    assert "answered 404" in results["consolidated.00.pth"].line
    assert "HTML page" in results["consolidated.01.pth"].line
    line = results["params.json"].line
    assert f"expected md5 {md5(LARGE['params.json'])}, got md5 {md5(wrong)}" in line
    assert set(held(tmp_path)) == {"checklist.chk", "good"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HTML, "is not a list of checksums but an HTML page"),
        (f"{md5(b'')}  ../evil\n".encode(), "line 1: '../evil' is no plain relative path"),
        (f"{md5(b'')}  checklist.chk\n".encode(), "no file is listed there"),
        (503, "asks to wait until"),
        (403, "access denied"),
        (404, "no list of checksums there (tried checklist.chk, "),
        (f"{md5(b'')}  a\n{md5(b'')}  a.part\n".encode(), "a.part is listed as well as a"),
    ],
)
def test_lists_that_cannot_be_followed(shelf: Shelf, tmp_path: Path, text: bytes | int, told: str) -> None:
    shelf.files["/llama/7B/checklist.chk"] = text
    with pytest.raises(Unavailable if text == 503 else InputError) as caught:
        fetch(f"{shelf.url}/llama/7B", tmp_path / "7B")
    assert told in str(caught.value)
    assert f"{shelf.url}/llama/7B" in str(caught.value) or "a.part" in told
    assert "consolidated.00.pth" not in held(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_md5_and_sha256_of_two_lists(shelf: Shelf, tmp_path: Path) -> None:
    sums = "".join(f"{sha256(data).upper()} *{name}\n" for name, data in SMALL.items())
    sums += f"{sha256(checklist(SMALL))}  checklist.chk\n{'0' * 64}  SHA256SUMS\n"
    shelf.files["/llama/7B/SHA256SUMS"] = sums.encode()
    told: list[str] = []
    results = fetch(f"{shelf.url}/llama/7B", tmp_path, tell=told.append)
    assert states(results) == dict.fromkeys(SMALL, "fetched") | {"checklist.chk": "verified"}
    assert "params.json: 11 bytes, sha256 verified" in told
    assert (tmp_path / "SHA256SUMS").read_text() == sums

    shelf.files["/llama/7B/params.json"] = b"changed"
    (tmp_path / "params.json").unlink()
    line = fetch(f"{shelf.url}/llama/7B", tmp_path)[1].line
    assert line.startswith("params.json (listed in checklist.chk and SHA256SUMS): ")


def test_lists_that_contradict_each_other(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/llama/7B/MD5SUMS"] = f"{'0' * 32}  params.json\n".encode()
    with pytest.raises(
        InputError, match=r"params.json: checklist.chk and MD5SUMS contradict each other: md5"
    ):
        fetch(f"{shelf.url}/llama/7B", tmp_path)
    assert held(tmp_path) == {}
    assert set(states(fetch(f"{shelf.url}/llama/7B", tmp_path, ["checklist.chk"])).values()) == {"fetched"}
    shelf.files["/llama/7B/MD5SUMS"] = f"{'0' * 32}  Params.json\n".encode()
    with pytest.raises(InputError, match="differ in case only"):
        fetch(f"{shelf.url}/llama/7B", tmp_path)


def test_a_list_by_name_must_be_there_and_inside(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/llama/7B/MD5SUMS: the server answered 404"):
        fetch(f"{shelf.url}/llama/7B", tmp_path, ["checklist.chk", "MD5SUMS"])
    with pytest.raises(InputError, match=r"'\.\./checklist\.chk' is not a plain name inside"):
        fetch(f"{shelf.url}/llama/7B", tmp_path, ["../checklist.chk"])
    assert held(tmp_path) == {}


def test_links_that_lead_out_are_not_followed(shelf: Shelf, tmp_path: Path) -> None:
    files = {"sub/a": b"a", "b": b"b", "c": b"c", "d": b"d"}
    shelf.add("/model", files)
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "model"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "b").write_bytes(b"mine")
    (folder / "sub").symlink_to(elsewhere)
    (folder / "b").symlink_to(elsewhere / "b")
    (folder / "c").mkdir()
    results = fetch(f"{shelf.url}/model", folder)
    assert states(results) == {"sub/a": "refused", "b": "refused", "c": "refused", "d": "fetched"}
    assert held(elsewhere) == {"b": b"mine"}
    assert "a folder stands in the file's place" in results[2].line

    (tmp_path / "linked").symlink_to(folder)  # the folder itself may be a link: the user chose it
    assert states(fetch(f"{shelf.url}/model", tmp_path / "linked"))["d"] == "verified"


def test_a_name_that_the_disk_refuses_stops_nothing(shelf: Shelf, tmp_path: Path) -> None:
    long = "n" * 300
    shelf.add("/model", {long: b"long", "a": b"a", "a/b": b"b"})
    results = fetch(f"{shelf.url}/model", tmp_path / "model", parallel=1)
    assert states(results) == {long: "refused", "a": "fetched", "a/b": "refused"}


def test_weights_that_no_list_names_are_told(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("consolidated.07.pth", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.pth").write_bytes(b"")
    told: list[str] = []
    results = fetch(f"{shelf.url}/llama/7B", tmp_path, tell=told.append)
    assert not any(result.failed for result in results)
    assert [line.partition(": in ")[0] for line in told if "not in any list" in line] == [
        "note: consolidated.07.pth",
        "note: model.safetensors",
    ]


def test_a_folder_with_gaps_is_told_before_it_comes(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add("/model", {"consolidated.00.pth": b"0", "consolidated.02.pth": b"2"})
    told: list[str] = []
    fetch(f"{shelf.url}/model", tmp_path, tell=told.append)
    assert told[:2] == [
        "note: consolidated.01.pth is not listed, though a LLaMA folder has one; the model may be incomplete",
        "note: params.json is not listed, though a LLaMA folder has one; the model may be incomplete",
    ]


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        (["consolidated.00.pth", "params.json"], []),
        (["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"], []),
        (["consolidated.03.pth", "consolidated.00.pth", "consolidated.01.pth"], ["consolidated.02.pth", "params.json"]),
        (["consolidated.01.pth", "params.json"], ["consolidated.00.pth"]),
        (["7B/consolidated.00.pth", "params.json"], ["7B/params.json"]),
        (["model.safetensors", "config.json"], []),
    ],
)  # fmt: skip
def test_what_a_llama_folder_lacks(names: list[str], lacking: list[str]) -> None:
    assert [remark.partition(" ")[0] for remark in remarks(names)] == lacking


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x/7B", "https://x/7B/a%20b%3F"),
        ("https://x/7B/", "https://x/7B/a%20b%3F"),
        ("https://x", "https://x/a%20b%3F"),
        ("https://x/7B/*?Policy=p&Signature=s~_", "https://x/7B/a%20b%3F?Policy=p&Signature=s~_"),
        ("https://x/7B?sig=s", "https://x/7B/a%20b%3F?sig=s"),
        ("file:///models/7B", "file:///models/7B/a%20b%3F"),
    ],
)
def test_the_address_of_a_file(url: str, expected: str) -> None:
    assert address(url, "a b?") == expected


@pytest.mark.parametrize(
    "url", ["7B", "ftp://x/7B", "https://me:secret@x/7B", "https://x/7B#top", "https://x/7 B", "file:7B"]
)
def test_addresses_that_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^URL: ") as caught:
        fetch(url, tmp_path / "model")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_signature_goes_to_the_server_and_nowhere_else(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files |= {"/llama/7B/params.json": 404, "/llama/7B/consolidated.00.pth": 503}
    told: list[str] = []
    results = fetch(f"{shelf.url}/llama/7B/*?Signature=s3cret", tmp_path, tell=told.append)
    assert states(results) == {"consolidated.00.pth": "unavailable", "params.json": "missing"}
    assert shelf.queries == {"Signature=s3cret"}
    for status, error in ((403, InputError), (503, Unavailable)):
        shelf.files["/llama/7B/checklist.chk"] = status
        with pytest.raises(error) as caught:
            fetch(f"{shelf.url}/llama/7B/*?Signature=s3cret", tmp_path)
        told.append(str(caught.value))
    assert "s3cret" not in "".join([*told, *(result.line for result in results)])
    assert not any(b"s3cret" in data for data in held(tmp_path).values())


@pytest.fixture
def repository(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> list[HubFile]:
    """Return the files of hf://me/model, which may be changed; the shelf has their bytes."""
    monkeypatch.setattr(hub, "resolve", lambda _, revision: f"{shelf.url}/model/resolve/{revision}")
    found = [
        HubFile("config.json", 2, None),
        HubFile("original/consolidated.00.pth", 70_000, sha256(SMALL["consolidated.00.pth"])),
        HubFile("original/params.json", 11, None),
    ]
    monkeypatch.setattr(hub, "files", lambda _, revision, patience: (revision or "c0ffee", found))
    for commit in ("c0ffee", "other"):
        shelf.files |= {
            f"/model/resolve/{commit}/config.json": b"{}" if commit == "c0ffee" else b"[]",
            f"/model/resolve/{commit}/original/consolidated.00.pth": SMALL["consolidated.00.pth"],
            f"/model/resolve/{commit}/original/params.json": SMALL["params.json"],
        }
    shelf.add("/model/resolve/main/original", SMALL)
    return found


def test_the_hub_tells_its_files_itself(shelf: Shelf, repository: list[HubFile], tmp_path: Path) -> None:
    told: list[str] = []
    fetch("hf://me/model", tmp_path, tell=told.append)
    assert sorted(told) == [
        "config.json: 2 bytes, size only",
        "original/consolidated.00.pth: 70,000 bytes, sha256 verified",
        "original/params.json: 11 bytes, size only",
    ]
    # A size is no proof: the small files of another revision come anew.
    again = fetch("hf://me/model", tmp_path, revision="other")
    assert states(again)["original/consolidated.00.pth"] == "verified"
    assert (tmp_path / "config.json").read_bytes() == b"[]"

    repository[0] = HubFile("config.json", 3, None)
    repository[1] = HubFile("../evil", 1, None)
    shelf.files["/model/resolve/evil"] = b"x"
    results = fetch("hf://me/model", tmp_path / "new", patience=HASTE)
    assert states(results) == {
        "config.json": "refused", "../evil": "refused", "original/params.json": "fetched"
    }  # fmt: skip
    assert not (tmp_path / "evil").exists()


def test_a_list_in_a_repository_of_the_hub(repository: list[HubFile], tmp_path: Path) -> None:
    results = fetch("hf://me/model", tmp_path, ["original/checklist.chk"], revision="main")
    assert states(results) == {
        "original/consolidated.00.pth": "fetched",
        "original/params.json": "fetched",
    }


def test_space_is_looked_at_before_anything_comes(
    shelf: Shelf, repository: list[HubFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 60_000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(InputError, match="no space: 70,013 bytes are to come, 60,000 are free"):
        fetch("hf://me/model", tmp_path)
    assert held(tmp_path) == {}
    part = part_of(tmp_path / "original" / "consolidated.00.pth")
    part.parent.mkdir()
    part.write_bytes(SMALL["consolidated.00.pth"][:69_000])
    assert set(states(fetch("hf://me/model", tmp_path)).values()) == {"fetched"}


def test_a_revision_is_the_hubs_alone(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--revision v1: only hf:// URLs"):
        fetch(f"{shelf.url}/llama/7B", tmp_path, revision="v1")


def test_a_folder_of_this_machine(tmp_path: Path) -> None:
    source = tmp_path / "a source"
    source.mkdir()
    for name, data in (SMALL | {"checklist.chk": checklist(SMALL)}).items():
        (source / name).write_bytes(data)
    (source / "params.json").unlink()
    results = fetch(source.as_uri(), tmp_path / "model")
    assert states(results) == {"consolidated.00.pth": "fetched", "params.json": "missing"}
    assert held(tmp_path / "model") == held(source)


def test_the_command_line_says_how_it_went(shelf: Shelf, tmp_path: Path) -> None:
    url, folder = f"{shelf.url}/llama/7B", tmp_path / "7B"
    done = command(url, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        "consolidated.00.pth: 70,000 bytes, md5 verified",
        "params.json: 11 bytes, md5 verified",
    ]

    (folder / "params.json").unlink()
    shelf.files["/llama/7B/params.json"] = 503
    later = command(url, folder, "--parallel", "1", "--checklist", "checklist.chk")
    assert (later.returncode, later.stdout) == (
        75,
        "consolidated.00.pth: 70,000 bytes, md5 (verified before)\n",
    )
    assert later.stderr.startswith("error: params.json (listed in checklist.chk): ")

    (folder / "consolidated.00.pth").unlink()
    shelf.files["/llama/7B/consolidated.00.pth"] = 404
    both = command(url, folder)
    assert (both.returncode, both.stdout) == (2, "")
    assert [line.split()[:2] for line in both.stderr.splitlines()] == [
        ["error:", "consolidated.00.pth"],
        ["error:", "params.json"],
    ]
    assert command(f"{shelf.url}/nowhere", folder).returncode == 2


def test_ctrl_c_does_not_wait_for_a_silent_server(shelf: Shelf, tmp_path: Path) -> None:
    shelf.silent.add("/llama/7B/consolidated.00.pth")
    run = [sys.executable, "-m", "models", "fetch", f"{shelf.url}/llama/7B", str(tmp_path)]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("params.json: ")  # told at once, not in the end
        part = part_of(tmp_path / "consolidated.00.pth")
        for _ in range(500):
            if part.exists() and part.stat().st_size:
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=8)
    assert (process.returncode, errors) == (
        130, "stopped; run the same command again to go on from here\n"
    )  # fmt: skip
    assert part.read_bytes() == SMALL["consolidated.00.pth"][:1000]
    shelf.silent.clear()
    assert states(fetch(f"{shelf.url}/llama/7B", tmp_path))["consolidated.00.pth"] == "fetched"
    assert shelf.sent["/llama/7B/consolidated.00.pth"] == [(206, 69_000)]


def test_it_starts_without_torch() -> None:
    code = "import sys, models.__main__, models.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}).returncode == 0
