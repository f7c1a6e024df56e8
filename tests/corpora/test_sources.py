"""Locks made of a hub, a server and a folder; what contradicts a pin; what a first download adds."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from corpora.errors import InputError, Unavailable
from corpora.fetch import fetch
from corpora.formats import read_shard
from corpora.lock import Lock, read_lock
from corpora.patience import Patience
from corpora.settings import Corpus, expand
from corpora.sources import SOURCES, find, make_lock

COMMIT = "c" * 40
OLD = "0" * 40
SHARD, OTHER, README = b"\x28\xb5\x2f\xfd shard", b"\x28\xb5\x2f\xfd the other", b"not a shard, in git itself"
FILES = {"train/00.jsonl.zst": SHARD, "train/01.jsonl.zst": OTHER, "notes/a.txt": README, "x.bin": b"x"}
QUICK = Patience(read=2, tries=2, backoff=0.01)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that are used, as its documentation and its client describe them."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    broken: ClassVar[str] = ""  # how the API answers

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        path, _, query = self.path.partition("?")
        base = "/datasets/own/name/resolve/" + COMMIT + "/"
        if path.startswith("/api/") and self.broken:
            return self.answer({"html": b"<html>", "list": b"[1]", "dict": b"{}"}[self.broken])
        if path in ("/api/datasets/own/name/revision/main", f"/api/datasets/own/name/revision/{COMMIT}"):
            return self.answer(json.dumps({"sha": COMMIT}).encode())
        if path == f"/api/datasets/own/name/revision/{OLD}":
            return self.answer(json.dumps({"sha": COMMIT}).encode())  # a mirror that does not have it
        if path == f"/api/datasets/own/name/tree/{COMMIT}":
            return self.tree(query)
        if path.startswith(base) and (name := path.removeprefix(base)) in FILES:
            linked = {"X-Linked-Etag": f'"{sha256(FILES[name])}"', "X-Linked-Size": str(len(FILES[name]))}
            return self.answer(b"", 302, Location=f"/signed/{name}?secret=1", **linked)
        if path.startswith("/signed/") and query == "secret=1":
            return self.answer(FILES[path.removeprefix("/signed/")])
        if path.startswith("/plain/") and (name := path.removeprefix("/plain/")) in FILES:
            return self.answer(FILES[name])
        if path == "/moved/00.jsonl.zst":
            return self.answer(OTHER)
        if path == "/plain/SHA256SUMS":
            return self.answer(f"{sha256(SHARD)}  train/00.jsonl.zst\n".encode())
        return self.answer(b"", 404)

    def tree(self, query: str) -> None:
        items: list[dict[str, Any]] = [{"type": "directory", "path": "train", "oid": "1" * 40, "size": 0}]
        for path, data in FILES.items():
            item: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
            if path.endswith((".zst", ".bin")):
                item |= {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}}
            items.append(item)
        half = len(items) // 2
        if "cursor" in query:
            return self.answer(json.dumps(items[half:]).encode())
        # Mirrors pass the hub's own address on; the next page is asked for at the mirror all the same.
        link = f'<https://huggingface.co{self.path.partition("?")[0]}?recursive=true&cursor=2>; rel="next"'
        return self.answer(json.dumps(items[:half]).encode(), Link=link)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Hub, "seen", [])
    monkeypatch.setattr(Hub, "broken", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        yield url
        running.shutdown()
        thread.join()


Make = Callable[..., Lock]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return make(toml) -> the lock, written beside the TOML as `lock` does."""

    def run(text: str) -> Lock:
        toml = tmp_path / "mine.toml"
        toml.write_text('name = "mine"\n' + text, "utf-8")
        found, beside = find(str(toml))
        lock = make_lock(found, [beside], tmp_path / "data", lambda _: None, QUICK)
        beside.write_text(lock.model_dump_json(exclude_defaults=True), "utf-8")
        return read_lock(beside)

    return run


HF = 'hf = "datasets/own/name"\n'


def test_hub(make: Make, server: str, tmp_path: Path) -> None:
    lock = make(HF)
    assert (lock.url, lock.revision) == ("hf://datasets/own/name", COMMIT)
    assert [(e.name, e.path, e.size, e.sha256) for e in lock.files] == [
        ("notes/a", "notes/a.txt", len(README), sha256(README)),  # not LFS: read, and hashed
        ("train/00", "train/00.jsonl.zst", len(SHARD), sha256(SHARD)),
        ("train/01", "train/01.jsonl.zst", len(OTHER), sha256(OTHER)),
    ]
    assert lock.files[1].source == f"Hugging Face API, LFS oid at {COMMIT[:12]}"
    corpus = Corpus(name="mine", train=("train/00",), val=("train/01",), lock=tmp_path / "mine.lock.json")
    receipt, _ = fetch(corpus, "train/00", tmp_path / "data")
    assert (tmp_path / "data" / receipt.path).read_bytes() == SHARD
    assert receipt.url == f"hf://datasets/own/name@{COMMIT}/train/00.jsonl.zst"
    assert "secret" not in receipt.model_dump_json() + lock.model_dump_json()
    assert {login for _, login in Hub.seen} == {"Bearer hf_canary"}  # one host: the endpoint itself
    assert make(HF) == lock


def test_patterns_choose(make: Make, server: str) -> None:
    assert [e.path for e in make(HF + 'files = ["train/*1.jsonl.zst"]').files] == ["train/01.jsonl.zst"]
    with pytest.raises(InputError, match=r"^corpus mine: files: nothing is named as 'val\*'$"):
        make(HF + 'files = ["train/*", "val*"]')
    with pytest.raises(InputError, match=r"^corpus mine: x\.bin is of no format that can be read \(known: "):
        make(HF + 'files = ["x.bin"]\n')


@pytest.mark.parametrize("broken", ["html", "list", "dict"])
def test_endpoint_that_is_none(make: Make, server: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "broken", broken)
    with pytest.raises(InputError, match="is HF_ENDPOINT a Hugging Face endpoint") as caught:
        make(HF)
    assert "hf_canary" not in str(caught.value)


def test_repository_that_is_not_there(make: Make, server: str) -> None:
    with pytest.raises(InputError, match="api/datasets/own/other/revision/main: the server answered 404"):
        make('hf = "datasets/own/other"')
    with pytest.raises(InputError, match=f"asked for commit {OLD}, the answer is of {COMMIT}$"):
        make(HF + f'revision = "{OLD}"')


def test_pin_that_is_contradicted_stops(make: Make, server: str, tmp_path: Path) -> None:
    before = make(HF + f'revision = "{COMMIT}"')
    path = tmp_path / "mine.lock.json"
    tables = json.loads(path.read_bytes())
    tables["files"][1] |= {"sha256": "a" * 64, "source": "its publisher"}
    path.write_text(json.dumps(tables), "utf-8")
    told = f"train/00.jsonl.zst: sha256 is pinned to {'a' * 64} .from: its publisher., but hf://datasets/own/name now says"
    with pytest.raises(InputError, match=told):
        make(HF)
    assert json.loads(path.read_bytes()) == tables
    tables["files"][1] |= {"sha256": sha256(SHARD), "size": 5}
    path.write_text(json.dumps(tables), "utf-8")
    with pytest.raises(InputError, match=f"size is pinned to 5 .* now says {len(SHARD)} "):
        make(HF)
    tables["files"][1]["size"] = len(SHARD)
    tables |= {"revision": OLD}  # what another revision had says nothing of this one
    path.write_text(json.dumps(tables), "utf-8")
    assert make(HF).files == before.files


def test_server(make: Make, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT")
    text = f'urls = ["{server}/plain/train/{{00..01}}.jsonl.zst"]\nchecksums = "{server}/plain/SHA256SUMS"'
    lock = make(text)
    assert lock.url == f"{server}/plain/train"
    assert [(e.name, e.path, e.size, e.sha256) for e in lock.files] == [
        ("00", "00.jsonl.zst", len(SHARD), sha256(SHARD)),
        ("01", "01.jsonl.zst", len(OTHER), None),
    ]
    assert lock.files[1].source == "size: the server; sha256: not known"
    assert all(login is None for _, login in Hub.seen)  # no token for a stranger
    corpus = Corpus(name="mine", train=("00",), val=("01",), lock=tmp_path / "mine.lock.json")
    assert fetch(corpus, "00", tmp_path / "data")[0].trust == "lock"
    assert fetch(corpus, "01", tmp_path / "data")[0].trust == "first use"
    again = make(text)  # what the first download told goes into the lock
    assert (again.files[1].sha256, again.files[1].source) == (
        sha256(OTHER),
        "the first download, trusted on first use",
    )


def test_list_that_names_none_of_the_files(make: Make, server: str) -> None:
    with pytest.raises(InputError, match="/plain/SHA256SUMS: lists the sha256 of none of the 1 files"):
        make(f'urls = ["{server}/plain/train/01.jsonl.zst"]\nchecksums = "{server}/plain/SHA256SUMS"')


def test_another_address_is_another_corpus(make: Make, server: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make(f'urls = ["{server}/plain/train/00.jsonl.zst"]')
    corpus = Corpus(name="mine", train=("00",), val=("x",), lock=tmp_path / "mine.lock.json")
    assert fetch(corpus, "00", tmp_path / "data")[0].sha256 == sha256(SHARD)
    moved = make(f'urls = ["{server}/moved/00.jsonl.zst"]')
    assert moved.files[0].sha256 is None  # nothing is known of the bytes there
    receipt, was_there = fetch(corpus, "00", tmp_path / "data")
    assert (receipt.sha256, was_there) == (sha256(OTHER), False)


def test_out_is_held_against_the_pins_beside_the_source_too(make: Make, server: str, tmp_path: Path) -> None:
    make(HF)
    beside = tmp_path / "mine.lock.json"
    beside.write_text(beside.read_text().replace(sha256(SHARD), "a" * 64))
    with pytest.raises(InputError, match=f"sha256 is pinned to {'a' * 64}"):
        make_lock(tmp_path / "mine.toml", [beside, tmp_path / "out"], tmp_path, lambda _: None, QUICK)


@pytest.mark.parametrize("odd", ["link", "pipe", "bytes"])
def test_folder_with_what_cannot_be_data(make: Make, tmp_path: Path, odd: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    if odd == "link":
        (folder / "more").symlink_to(tmp_path)
    elif odd == "pipe":
        os.mkfifo(folder / "b.txt")
    else:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("x")
    with pytest.raises(
        InputError, match=r"is a link to a folder|is not a plain file|is not UTF-8 or not printable"
    ):
        make('folder = "texts"')


def test_names_that_look_the_same_are_kept_apart(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("中国.jsonl", "日本.jsonl", "a b.jsonl", "a-b.jsonl", "empty.jsonl"):
        (folder / name).write_text("" if name == "empty.jsonl" else "x")
    names = [entry.name for entry in make('folder = "texts"').files]
    assert len(set(names)) == 4 and "a-b" in names


def test_edited_folder_says_what_differs_and_how_to_go_on(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    make('folder = "texts"\ntext_shards = 1')
    (folder / "a.txt").write_text("y")
    told = r"texts that differ: a\.txt; nothing was written; to take the folder as it is now, delete .* and lock again"
    with pytest.raises(InputError, match=told):
        make('folder = "texts"\ntext_shards = 1')


def test_server_without_the_file_or_without_an_answer(make: Make, server: str) -> None:
    with pytest.raises(InputError, match=f"^{server}/plain/02.jsonl.zst: the server answered 404"):
        make(f'urls = ["{server}/plain/02.jsonl.zst"]')
    with pytest.raises(Unavailable, match="2 tries in 0 s without progress; the last: the connection failed"):
        make('urls = ["http://127.0.0.1:9/a.jsonl"]')


def test_folder(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name in ("train/a.txt", "train/b.txt", "val/c.txt", "more.jsonl", ".hidden.txt", "picture.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\n", "utf-8")
    lock = make('folder = "texts"\ntext_shards = 1\n')
    assert lock.url == folder.as_uri()
    assert [(e.name, e.path, list(e.texts)) for e in lock.files] == [
        ("more", "more.jsonl", []),
        ("train/0", "train/0.tar", ["train/a.txt", "train/b.txt"]),
        ("val/0", "val/0.tar", ["val/c.txt"]),
    ]
    assert all(e.sha256 and e.size for e in lock.files)
    corpus = Corpus(name="mine", train=("train/0",), val=("val/0",), lock=tmp_path / "mine.lock.json")
    receipt, _ = fetch(corpus, "train/0", tmp_path / "data")
    texts = [json.loads(line.data or b"") for line in read_shard(tmp_path / "data" / receipt.path, corpus)]
    assert texts == [{"text": "text of train/a.txt\n"}, {"text": "text of train/b.txt\n"}]
    assert make('folder = "texts"\ntext_shards = 1\n') == lock
    with pytest.raises(InputError, match=r"nowhere: no such folder$"):
        make('folder = "nowhere"')
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^corpus mine: no file of a known format \(.*\) among 0 files$"):
        make('folder = "empty"')


def test_texts_are_dealt_by_their_paths(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text("x", "utf-8")
    before = {e.name: set(e.texts) for e in make('folder = "texts"').files}
    assert set(before) <= {f"text/{n}" for n in range(10)} and len(before) > 5
    assert sum(map(len, before.values())) == 40
    (tmp_path / "mine.lock.json").unlink()
    (folder / "new.txt").write_text("x", "utf-8")
    after = {e.name: set(e.texts) for e in make('folder = "texts"').files}
    assert sum(before.get(name, set()) != texts for name, texts in after.items()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "needs one of hf, urls and folder"),
        ('hf = "a/b"\nfolder = "x"', "needs one of hf, urls and folder"),
        ('urls = ["https://x.org/{a"]', "a brace without its other half"),
        ('urls = ["https://x.org/{9..0}.txt"]', "counts down"),
        ('folder = "x"\nrevision = "main"', "revision goes with hf"),
        ('urls = ["https://x.org/a.txt"]\nfiles = ["a"]', "files goes with hf and folder"),
        ('folder = "x"\npassword = 1', r"password: unknown key"),
        ('urls = ["https://a.org/a.txt", "https://b.org/b.txt"]', "a corpus comes from one server"),
        ('urls = ["https://x.org/a.txt?key=secret"]', "is no plain base URL"),
        ('urls = ["not an address"]', "is none of http"),
        ('urls = ["http://[::1/x.txt"]', "Invalid IPv6 URL"),
        ('urls = ["file:///data/x.txt"]', "for files of this machine use folder ="),
        ("[corpus]\nname = 'x'", "is a recipe; a lock is made of a corpus' TOML"),
        ('urls = ["https://me:pw@x.org/a.txt"]', "user name or password"),
        ('urls = ["ftp://x.org/a.txt"]', "is none of http:, https:, file: and hf:"),
        ('hf = "one-word"', "is not hf://datasets/OWNER/NAME"),
    ],
)
def test_faults_of_a_source(make: Make, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        make(text)
    assert "\n" not in str(caught.value) and "me:pw" not in str(caught.value)


def test_where_sources_are_found(tmp_path: Path) -> None:
    assert find("pile-uncopyrighted") == (
        SOURCES / "pile-uncopyrighted.toml",
        SOURCES / "pile-uncopyrighted.lock.json",
    )
    with pytest.raises(
        InputError, match=r"corpus 'nothing' is unknown; known: pile, pile-uncopyrighted; or give"
    ):
        find("nothing")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train/00", ["train/00"]),
        ("train/{00..02}", ["train/00", "train/01", "train/02"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{,x}y", ["y", "xy"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["{", "}", "{}", "{a}", "{1..}", "{0..999999}", "{0..99999}{0..9}", "{{a,b},c}"]
)
def test_braces_that_make_no_sense(pattern: str) -> None:
    with pytest.raises(ValueError):
        expand(pattern)


def test_recipe_names_many_shards_at_once() -> None:
    corpus = Corpus(name="x", train=("train/{00..02}",), val=("val",))
    assert corpus.shards == ("train/00", "train/01", "train/02", "val")
    with pytest.raises(ValueError, match="shard 'train/01' is listed twice"):
        Corpus(name="x", train=("train/{00..02}",), val=("train/01",))
