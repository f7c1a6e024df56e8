"""Locks: what is refused, in which words, and what the built-in ones hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora.errors import InputError
from corpora.files import write_json
from corpora.lock import FIRST_USE, SOURCES, load_lock, read_lock
from corpora.receipts import Receipt, raw_path, receipt_path
from corpora.settings import DEPLOYMENTS, Corpus, DataSettings, parse, read_toml
from corpora.sources import Source

A, B = "a" * 64, "b" * 64


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "train/00", "path": "train/00.jsonl.zst", "size": 3, "sha256": A, **changes}


def lock_file(folder: Path, *files: Any, **changes: Any) -> Path:
    lock = {"corpus": "mine", "url": "https://example.org/base/", "files": list(files), **changes}
    path = folder / "my.lock.json"
    path.write_text(json.dumps(lock), "utf-8")
    return path


def mine(lock: Path | None, **changes: Any) -> Corpus:
    return Corpus(**{"name": "mine", "train": ("train/00",), "val": ("val",), "lock": lock, **changes})


def test_lock_is_read(tmp_path: Path) -> None:
    lock = load_lock(
        mine(lock_file(tmp_path, entry(), entry(name="val", path="v a.zst", sha256=B))), tmp_path
    )
    assert lock.url == "https://example.org/base"
    assert lock.url_of(lock.entry("train/00")) == "https://example.org/base/train/00.jsonl.zst"
    assert lock.url_of(lock.entry("val")) == "https://example.org/base/v%20a.zst"
    expected = f'[["val","{B}"],["train/00","{A}"]]'
    assert lock.fingerprint(["val", "train/00"]) == hashlib.sha256(expected.encode()).hexdigest()
    assert lock.fingerprint(["train/00", "val"]) != lock.fingerprint(["val", "train/00"])
    with pytest.raises(
        InputError, match=r"^corpus mine: no shard 'test' in its lock; it has: train/00, val$"
    ):
        lock.entry("test")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "../x"}, r"shard '\.\./x': name: shard name '\.\./x' is not word/word/\.\.\. "),
        ({"name": "/etc/x"}, r"shard '/etc/x': name: "),
        ({"name": "a/../../x"}, r"shard 'a/\.\./\.\./x': name: "),
        ({"name": "a/.."}, r"shard 'a/\.\.': name: "),
        ({"name": "a/b/c/d/e/f/g"}, r"shard 'a/b/c/d/e/f/g': name: "),
        ({"name": "a\\..\\x"}, "name: "),
        ({"name": "a\x00"}, r"shard 'a\\x00': name: "),
        ({"name": "a\n"}, r"shard 'a\\n': name: "),
        ({"name": ".hidden"}, "name: "),
        ({"name": ""}, "shard '': name: "),
        ({"name": "x" * 300}, "name: "),
        ({"name": None}, "shard number 2: name: Input should be a valid string"),
        ({"path": "../secret"}, "shard 'two': path: not a plain relative path"),
        ({"path": "/etc/passwd"}, "shard 'two': path: not a plain relative path"),
        ({"path": "a//b"}, "shard 'two': path: not a plain"),
        ({"path": "a?token=1"}, "shard 'two': path: not a plain"),
        ({"path": "%2e%2e/x"}, "shard 'two': path: not a plain"),
        ({"path": "a\r\nX: y"}, "shard 'two': path: not a plain"),
        ({"sha256": "A" * 64}, "shard 'two': sha256: not 64 hex digits in lower case .64 char"),
        ({"sha256": "a" * 63}, "shard 'two': sha256: not 64 hex digits in lower case .63 char"),
        ({"sha256": ""}, "shard 'two': sha256: not 64 hex digits"),
        ({"about": 0}, "shard 'two': about: "),
        ({"texts": {"../x.txt": A}}, r"shard 'two': texts: '\.\./x\.txt' is not a plain relative path"),
        ({"texts": {"/x.txt": A}}, r"shard 'two': texts: '/x\.txt' is not a plain relative path"),
        ({"size": 0}, "shard 'two': size: "),
        ({"size": -1}, "shard 'two': size: "),
        ({"size": "12"}, "shard 'two': size: "),
        ({"md5": "x"}, "shard 'two': md5: Extra inputs are not permitted"),
        ({"name": "TRAIN/00"}, "shard names must differ, in more than case too: train/00, TRAIN/00"),
        ({"name": "train/00"}, "shard names must differ, in more than case too: train/00, train/00"),
    ],
)
def test_fault_of_an_entry_is_one_line_that_names_it(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = lock_file(tmp_path, entry(), entry(**{"name": "two", **changes}))
    with pytest.raises(InputError, match=told) as caught:
        read_lock(path)
    assert str(caught.value).startswith(f"lock {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://example.org/x", "is none of http:, https:, file: and hf:"),
        ("data/shards", "is none of http:, https:, file: and hf:"),
        ("hf://monology", "is not hf://datasets/OWNER/NAME"),
        ("hf://datasets/../x", "is not hf://datasets/OWNER/NAME"),
        ("hf://datasets/a/b/c", "is not hf://datasets/OWNER/NAME"),
        ("https:///x", "names no host"),
        ("file://host/x", "is not an absolute path on this machine"),
        ("file:x", "is not an absolute path on this machine"),
        (
            "https://me:secret@example.org/x",
            "it carries a user name or password for example.org; put them into ~/.netrc",
        ),
        ("ftp://me:secret@example.org/x", "it carries a user name or password for example.org"),
        ("https://example.org/x?token=secret", "is no plain base URL"),
        ("https://example.org/x y", "is no plain base URL"),
        ("https://[::1/x", "Invalid IPv6 URL"),
    ],
)
def test_url_is_refused(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(InputError, match=f"^lock .*: url: .*{told}"):
        read_lock(lock_file(tmp_path, entry(), url=url))
    with pytest.raises(InputError, match=rf"^\[corpus\] url: .*{told}"):
        load_lock(mine(lock_file(tmp_path, entry()), url=url), tmp_path)
    with pytest.raises(InputError) as caught:
        read_lock(lock_file(tmp_path, entry(), url=url))
    assert "me:secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "valid dictionary"),
        (
            b'{"corpus": "mine", "url": "https://x.org", "files": []}',
            "files: there is none",
        ),
        (b'{"corpus": "mine", "url": "https://x.org", "files": [1]}', "shard number 1: "),
        (b'{"corpus": "mine", "url": "https://x.org"}', "files: Field required"),
    ],
)
def test_broken_file_is_one_line(tmp_path: Path, text: bytes, told: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=rf"^lock {path}: .*{told}") as caught:
        read_lock(path)
    assert "\n" not in str(caught.value)


def test_many_faults_stay_one_line(tmp_path: Path) -> None:
    path = lock_file(tmp_path, *(entry(name=f"s{i}", sha256="x") for i in range(30)))
    with pytest.raises(InputError, match=r"shard 's4': .*; and 25 more$"):
        read_lock(path)


def test_url_of_one_dot_is_the_locks_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    assert read_lock(lock_file(folder, entry(), url=".")).url == folder.resolve().as_uri()


def test_where_locks_come_from(tmp_path: Path) -> None:
    path = lock_file(tmp_path, entry())
    assert load_lock(mine(path, url="file:///mirror/"), tmp_path).url == "file:///mirror"
    missing = tmp_path / "demo" / "source" / "lock.json"
    with pytest.raises(InputError, match=f"^{missing}: the demo corpus is not built; run: python -m corpora"):
        load_lock(mine(None, name="demo"), tmp_path)
    with pytest.raises(InputError, match=r"brings no lock \(built in: demo, pile, pile-uncopyrighted\)"):
        load_lock(mine(None), tmp_path)
    with pytest.raises(InputError, match=r"no such file$"):
        load_lock(mine(tmp_path / "none.json"), tmp_path)
    with pytest.raises(InputError, match=r"Is a directory$"):
        load_lock(mine(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"it is of corpus 'mine', the recipe says 'other'$"):
        load_lock(mine(path, name="other"), tmp_path)


def test_sha256_is_trusted_on_first_use(tmp_path: Path) -> None:
    path = lock_file(tmp_path, entry(sha256=None, size=None), entry(name="val", path="val.txt", sha256=B))
    unknown = load_lock(mine(path), tmp_path)
    assert unknown.entry("train/00").sha256 is None and not unknown.entry("train/00").pinned
    with pytest.raises(
        InputError, match=r"^corpus mine: the sha256 of train/00 is not known before the first"
    ):
        unknown.fingerprint(["val", "train/00"])

    final = raw_path("mine", "train/00", "train/00.jsonl.zst", tmp_path)
    receipt = Receipt(
        shard="train/00",
        path="mine/raw/train/00.jsonl.zst",
        size=7,
        sha256=A,
        url="https://example.org/base/train/00.jsonl.zst",
        mtime_ns=1,
        trust="first use",
    )
    write_json(receipt_path(final), receipt.model_dump())
    known = load_lock(mine(path), tmp_path)
    assert (known.entry("train/00").sha256, known.entry("train/00").size) == (A, 7)
    assert known.entry("train/00").source == FIRST_USE and not known.entry("train/00").pinned
    assert known.entry("val").pinned
    assert known.fingerprint(["train/00"])

    other = load_lock(mine(path, url="https://mirror.example"), tmp_path)
    assert other.entry("train/00").sha256 is None  # the file of another address

    write_json(receipt_path(final), receipt.model_copy(update={"trust": "lock"}).model_dump())
    assert load_lock(mine(path), tmp_path).entry("train/00").sha256 is None  # of another lock, once


def test_address_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    path = lock_file(tmp_path, entry(path="a b.zst"), url="hf://datasets/own/name", revision=commit)
    lock = read_lock(path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert (
        lock.url_of(lock.files[0]) == f"https://huggingface.co/datasets/own/name/resolve/{commit}/a%20b.zst"
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert (
        lock.url_of(lock.files[0]) == f"https://mirror.example/datasets/own/name/resolve/{commit}/a%20b.zst"
    )
    model = read_lock(lock_file(tmp_path, entry(), url="hf://own/name"))
    assert model.base == "https://mirror.example/own/name/resolve/main"


PINS = ["00", "01", "02", "03", "04", "14", "15", "16", "17", "23", "24", "25", "28"]
ALL = [*(f"train/{n:02}" for n in range(30)), "val", "test"]


def test_uncopyrighted_pile() -> None:
    lock = read_lock(SOURCES / "pile-uncopyrighted.lock.json")
    assert lock.url == "hf://datasets/monology/pile-uncopyrighted"
    assert lock.revision == "3be90335b66f24456a5d6659d9c8d208c0357119"
    assert [e.name for e in lock.files] == ALL
    pinned = [e for e in lock.files if e.pinned]
    assert [e.name for e in pinned] == [*(f"train/{n}" for n in PINS), "val"]
    assert all(e.source for e in pinned)
    assert len({e.sha256 for e in pinned}) == 14
    assert all(e.path == f"{e.name}.jsonl.zst" and (e.size or e.about) for e in lock.files)
    assert {e.name: e.size for e in lock.files if e.size} == {
        "train/00": 11152428427,
        "train/01": 11163951827,
        "train/02": 11153332265,
        "train/23": 11193533120,
        "train/24": 11134735928,
    }
    assert lock.entry("val").sha256 == "db5e5d1532bf8dc33a6589b50ecba1a8c96f7b4b9cb343d168e603c393007c26"


def test_original_pile() -> None:
    lock = read_lock(SOURCES / "pile.lock.json")
    assert [e.name for e in lock.files] == ALL
    assert [e.name for e in lock.files if e.pinned] == [
        *(f"train/{n}" for n in (12, 20, 23, 26)),
        "val",
        "test",
    ]
    assert lock.entry("val").size == 470_907_480


def test_built_in_corpora_have_a_source_and_a_lock_of_the_same_files() -> None:
    for toml in SOURCES.glob("*.toml"):
        lock = read_lock(toml.with_name(f"{toml.stem}.lock.json"))
        source = parse(Source, read_toml(toml), toml)
        assert (source.name, toml.stem) == (lock.corpus, lock.corpus)
        assert (f"hf://{source.hf}", source.revision) == (lock.url, lock.revision) or source.urls == tuple(
            lock.url_of(entry) for entry in lock.files
        )


@pytest.mark.parametrize("path", sorted(DEPLOYMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_name_only_shards_that_the_lock_has(path: Path, demo_corpus: Path) -> None:
    corpus = DataSettings.read(path).corpus
    lock = load_lock(corpus, demo_corpus)
    for shard in (*corpus.train, *corpus.val, *corpus.test):
        assert lock.entry(shard).name == shard


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("./\\~"), max_size=12))
def test_no_name_leaves_the_data_folder(name: str) -> None:
    raw = Path("/data/mine/raw")
    try:
        path = raw_path("mine", name, "a.jsonl.zst", Path("/data"))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert path.resolve().is_relative_to(raw) and ".." not in path.parts


def test_format_that_cannot_be_read_is_told_before_the_download() -> None:
    with pytest.raises(InputError, match=r"^corpus mine: shard a: a\.zip is of no format that can be read"):
        raw_path("mine", "a", "a.zip", Path("/data"))


def test_link_on_the_way_out_of_the_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "elsewhere").mkdir()
    (data / "mine").mkdir(parents=True)
    (data / "mine" / "raw").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        InputError, match="a link stands on the way to it; remove the link, or choose another"
    ):
        raw_path("mine", "a", "a.txt", data)
    (tmp_path / "link").symlink_to(data)  # the folder itself may be one
    assert raw_path("other", "a", "a.txt", tmp_path / "link").name == "a.txt"
