"""The demo corpus: which text, which split, which bytes."""

import hashlib
import io
import json
import re
import shutil
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import zstandard

from corpora import demo
from corpora.errors import InputError
from corpora.lock import load_lock
from corpora.settings import Corpus

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "Small texts": [f"text {n}\n".encode() for n in range(100)],
    "Others": [
        b"text 7\n",
        b"",
        b" \n\t",
        b"\xff\xfe",
        "Zoë\r\n\u2028\x00".encode(),
        *(b"%d" % n for n in range(40)),
    ],
}


def lines(data: Path, split: str) -> list[dict[str, object]]:
    packed = (data / "demo" / "source" / f"{split}.jsonl.zst").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as stream:
        return [json.loads(line) for line in stream.read().split(b"\n")[:-1]]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_text_is_in_one_place(tmp_path: Path) -> None:
    read: list[int] = []
    lock = demo.build(tmp_path, read.append, SOURCES)
    assert sum(read) == sum(len(raw) for raws in SOURCES.values() for raw in raws)
    found = {split: lines(tmp_path, split) for split in demo.SPLITS}
    everything = [line["text"] for documents in found.values() for line in documents]
    kept = {raw.decode() for raws in SOURCES.values() for raw in raws if raw.strip() and raw[0] != 0xFF}
    assert len(everything) == len(kept) == 141 and set(everything) == kept
    for split, documents in found.items():
        digests = [hashlib.sha256(str(line["text"]).encode()).hexdigest() for line in documents]
        assert digests == sorted(digests)
        assert {demo.split_of(digest) for digest in digests} == {split}
    subsets = {line["text"]: line["meta"] for documents in found.values() for line in documents}
    assert subsets["text 7\n"] == {"pile_set_name": "Small texts"}  # the first one names it
    assert subsets["Zoë\r\n\u2028\x00"] == {"pile_set_name": "Others"}
    assert lock.built_from is not None
    assert lock.built_from["left_out"] == {"not UTF-8": 1, "empty": 2, "copy": 1}
    counts = lock.built_from["subsets"]
    assert sum(count["documents"] for count in counts["Small texts"].values()) == 100
    assert sum(count["bytes"] for count in counts["Small texts"].values()) == 10 * 7 + 90 * 8
    assert {
        split: sum(subset[split]["documents"] for subset in counts.values()) for split in demo.SPLITS
    } == {split: len(documents) for split, documents in found.items()}


@pytest.mark.parametrize(
    ("number", "split"),
    [(0, "val"), (3, "val"), (4, "test"), (7, "test"), (8, "train/00"), (9, "train/01"), (99, "train/01")],
)
def test_split_is_in_the_hash(number: int, split: str) -> None:
    assert demo.split_of(f"{'f' * 56}{number:08x}") == split
    assert demo.split_of(f"{'0' * 56}{number + 4_000_000_000:08x}") == split


def test_lock_tells_the_files(tmp_path: Path) -> None:
    lock = demo.build(tmp_path, sources=SOURCES)
    source = tmp_path / "demo" / "source"
    assert [entry.name for entry in lock.files] == ["train/00", "train/01", "val", "test"]
    for entry in lock.files:
        packed = (source / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(packed), hashlib.sha256(packed).hexdigest())
        assert zstandard.get_frame_parameters(packed).has_checksum
    assert load_lock(Corpus(name="demo", train=("train/00",), val=("val",)), tmp_path) == lock
    assert lock.url == source.as_uri()


def test_same_texts_give_the_same_bytes_anywhere(tmp_path: Path) -> None:
    demo.build(tmp_path / "one", sources=SOURCES)
    demo.build(tmp_path / "two", sources=dict(SOURCES))
    shutil.move(tmp_path / "two", tmp_path / "three")
    one = files(tmp_path / "one")
    assert set(one) == {
        "demo/source/lock.json",
        *(f"demo/source/{split}.jsonl.zst" for split in demo.SPLITS),
    }
    assert one == files(tmp_path / "three")


def test_second_build_does_nothing(tmp_path: Path) -> None:
    lock = demo.build(tmp_path, sources=SOURCES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert demo.build(tmp_path, pytest.fail) == lock
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("damage", ["no lock", "torn lock", "edited", "lost", "builder", "python", "package"])
def test_anything_amiss_is_built_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = demo.build(tmp_path, sources=SOURCES)
    whole = files(tmp_path)
    source = tmp_path / "demo" / "source"
    match damage:
        case "no lock":
            (source / "lock.json").unlink()
        case "torn lock":
            (source / "lock.json").write_bytes(whole["demo/source/lock.json"][:200])
        case "edited":  # same size
            (source / "val.jsonl.zst").write_bytes(whole["demo/source/val.jsonl.zst"][:-1] + b"?")
        case "lost":
            (source / "train" / "01.jsonl.zst").unlink()
        case "builder":
            monkeypatch.setattr(demo, "BUILDER_VERSION", "2")
        case "python":
            monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
        case "package":
            monkeypatch.setattr(demo, "PACKAGES", ("numpy",))
    read: list[int] = []
    again = demo.build(tmp_path, read.append, SOURCES)
    assert read and again.files == lock.files
    assert (again == lock) == (damage in ("no lock", "torn lock", "edited", "lost"))
    assert {k: v for k, v in files(tmp_path).items() if not k.endswith("lock.json")} == {
        k: v for k, v in whole.items() if not k.endswith("lock.json")
    }


def test_interrupted_build_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.build(tmp_path, sources=SOURCES)
    monkeypatch.setattr(demo, "BUILDER_VERSION", "2")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.build(tmp_path, sources=SOURCES)
    assert not (tmp_path / "demo" / "source" / "lock.json").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert demo.build(tmp_path, sources=SOURCES).built_from is not None


def test_faults_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"found only 1 texts in Python's library and packages, too few for 4"
    ):
        demo.build(tmp_path, sources={"One": [b"x"]})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/demo/source: cannot be written: "):
        demo.build(tmp_path / "file", sources=SOURCES)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Distribution]:
    """Install small packages into a site-packages of their own; return what `installed` finds of them."""
    site = tmp_path / "site-packages"
    texts = {
        "my_alpha/__init__.py": "alpha = 1\n",
        "my_alpha/data/words.txt": "not documentation",
        "my_alpha/guide.rst": "The guide\n",
        "my_alpha/LICENSE.txt": "a licence",
        "my_alpha/tests/test_it.py": "not read",
        "my_alpha/_vendor/copy.py": "not read",
        "my_alpha/lost.py": None,
        "my_alpha/link.py": tmp_path / "private.py",
        "../../private.py": None,
        "beta/beta.py": "not read: not one of the project's own dependencies",
        "beta/README.md": "Beta's second readme\n",
    }
    (tmp_path / "private.py").write_text("the user's own", "utf-8")
    needs = {
        "my_alpha": ["Beta (>=1)", 'gamma; extra == "dev"', 'delta>=2; python_version < "4"', "not-there"],
        "beta": ["My.Alpha"],
        "gamma": [],
        "delta": [],
    }
    for path, text in texts.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, Path):
            (site / path).symlink_to(text)
        elif text is not None:
            (site / path).write_text(text, "utf-8")
    for name, requirements in needs.items():
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        head = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0",
            *(f"Requires-Dist: {r}" for r in requirements),
        ]
        body = "\n\n# Read me: ümläut\n" if name == "my_alpha" else "\n"
        (info / "METADATA").write_text("\n".join(head) + body, "utf-8")
        (info / "notes.txt").write_text("not documentation", "utf-8")
        record = [p for p in texts if name in p or "private" in p] + [
            f"{info.name}/METADATA",
            f"{info.name}/notes.txt",
        ]
        (info / "RECORD").write_text("".join(f"{p},,\n" for p in record), "utf-8")
    checkout = tmp_path / "checkout"
    (checkout / "epsilon.egg-info").mkdir(parents=True)
    (checkout / "epsilon.egg-info" / "PKG-INFO").write_text("Name: epsilon\nVersion: 1\n\nown", "utf-8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr(demo, "PACKAGES", ("my-alpha", "epsilon"))
    return demo.installed(demo.PACKAGES)


def test_requirements_are_followed_extras_and_checkouts_are_not(packages: dict[str, Distribution]) -> None:
    assert list(packages) == ["beta", "delta", "my-alpha"]


def test_packages_give_their_own_text_only(packages: dict[str, Distribution]) -> None:
    sources = demo.machine_sources(packages)
    assert list(sources["Package readmes"]) == ["# Read me: ümläut\n".encode()]
    assert list(sources["Package documentation"]) == [b"Beta's second readme\n", b"The guide\n"]
    assert list(sources["Package sources"]) == [b"alpha = 1\n"]


def test_sources_of_a_package_have_a_budget(
    packages: dict[str, Distribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SOURCES_PER_PACKAGE", 9)
    assert list(demo.machine_sources(packages)["Package sources"]) == []
    monkeypatch.setattr(demo, "SOURCES_PER_PACKAGE", 10)
    assert list(demo.machine_sources(packages)["Package sources"]) == [b"alpha = 1\n"]


def test_packages_are_the_projects_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [re.match(r"[\w-]+", requirement) for requirement in project["dependencies"]]
    assert [match[0] for match in needed if match] == list(demo.PACKAGES)


def test_whole_corpus(demo_corpus: Path) -> None:
    lock = demo.build(demo_corpus, pytest.fail)  # it is there: nothing is read
    found = {split: lines(demo_corpus, split) for split in demo.SPLITS}
    subsets = {
        "Python standard library",
        "Python documentation",
        "Package readmes",
        "Package documentation",
        "Package sources",
    }
    assert lock.built_from is not None and set(lock.built_from["subsets"]) == subsets
    size = {
        split: sum(len(str(line["text"]).encode()) for line in documents)
        for split, documents in found.items()
    }
    assert 20_000_000 < sum(size.values()) < 40_000_000
    assert all(size[split] > 8_000_000 for split in ("train/00", "train/01"))
    assert all(size[split] > 300_000 for split in ("val", "test"))
    places = [
        (split, line["meta"])
        for split, documents in found.items()
        for line in documents
        if line["text"] == Path(json.__file__).read_text("utf-8")
    ]
    assert len(places) == 1 and places[0][1] == {"pile_set_name": "Python standard library"}
