"""Any source as a corpus: a short TOML says where the files are, and `lock` asks for their sizes and hashes.

name = "mine"
hf = "datasets/OWNER/NAME"                              one of three: a repository of the hub,
revision = "main"                                       (the lock pins the commit)
urls = ["https://host/data/{00..29}.jsonl.zst"]         addresses, braces as in a shell,
checksums = "https://host/data/SHA256SUMS"              (with the publisher's list, where there is one)
folder = "/data/mine"                                   or a folder of this machine
files = ["train/*.jsonl.zst"]                           which of the files: patterns; without them all of
                                                        a known format
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import quote, unquote, urljoin, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from corpora import hub
from corpora.checksums import parse_checksums
from corpora.download import get
from corpora.errors import InputError
from corpora.files import sha256_file
from corpora.lock import SOURCES, Entry, Lock, check_path, check_url, read_lock
from corpora.patience import Patience
from corpora.read import FORMATS, suffix_of
from corpora.receipts import RECEIPT
from corpora.settings import NAME, Strict, expand, parse, read_toml
from corpora.texts import deal, measure_tar
from corpora.web import head, small

SMALL = 32 << 20  # bytes; what the hub keeps in git itself is smaller, and is hashed by reading it
Tell = Callable[[str], None]


class Source(Strict):
    """The TOML of a corpus."""

    name: str = Field(pattern=NAME)
    hf: str | None = Field(default=None, description="datasets/OWNER/NAME, or OWNER/NAME of a model")
    revision: str | None = Field(default=None, description="branch, tag or commit of the repository")
    urls: tuple[str, ...] = Field(default=(), description="addresses, {00..29} and {a,b} expanded")
    checksums: str | None = Field(default=None, description="address of a SHA256SUMS of these files")
    folder: Path | None = Field(default=None, description="relative to this file, if not absolute")
    files: tuple[str, ...] = Field(default=(), description="patterns of paths in the repository or folder")
    text_shards: int = Field(
        default=10, ge=1, le=10_000, description="shards that the .txt files of a folder are dealt to"
    )

    @field_validator("urls")
    @classmethod
    def _expanded(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(address for url in urls for address in expand(url))

    @model_validator(mode="after")
    def _is_one_of_three(self) -> Self:
        if sum(map(bool, (self.hf, self.urls, self.folder))) != 1:
            raise ValueError("needs one of hf, urls and folder, and not two")
        if (self.revision and not self.hf) or (self.checksums and not self.urls):
            raise ValueError("revision goes with hf, checksums with urls")
        if self.files and self.urls:
            raise ValueError("files goes with hf and folder; urls names its files itself")
        return self


def find(corpus: str) -> tuple[Path, Path]:
    """Return the TOML of a corpus (a built-in one's name, or a path) and its lock file's place beside it."""
    path = Path(corpus)
    if corpus == "demo":
        raise InputError("the demo corpus is built, and locked by that; run: python -m corpora build-demo")
    if path.suffix == ".toml" and not path.is_file():
        raise InputError(f"corpus {corpus}: no such file")
    if path.suffix != ".toml":
        path = SOURCES / f"{corpus}.toml"
    if not path.is_file():
        known = ", ".join(sorted(toml.stem for toml in SOURCES.glob("*.toml")))
        raise InputError(f"corpus {corpus!r} is unknown; known: {known}; or give a path that ends in .toml")
    return path, path.with_name(f"{path.stem}.lock.json")


def make_lock(
    toml: Path, old: Iterable[Path], data: Path, tell: Tell, patience: Patience | None = None
) -> Lock:
    """Ask for sizes and hashes, and return the lock; `tell` is called with a line on each step.

    What the `old` locks know of the same revision are pins: figures that contradict it stop with an InputError.
    What nobody knows stays unknown, unless a first download under `data` was trusted.
    """
    tables = read_toml(toml)
    if "corpus" in tables:
        raise InputError(
            f"{toml}: is a recipe; a lock is made of a corpus' TOML (name, and hf, urls or folder)"
        )
    source = parse(Source, tables, toml)
    if source.hf:
        lock = _hub(source, tell, patience)
    elif source.urls:
        lock = _server(source, tell, patience)
    else:
        lock = _folder(source, (toml.parent / (source.folder or "")).resolve(), data, tell)
    for path in dict.fromkeys(old):
        if path.is_file():
            lock = _pinned(lock, read_lock(path), path, tell)
    return lock.trusting(data)


def _hub(source: Source, tell: Tell, patience: Patience | None) -> Lock:
    url = f"hf://{source.hf}"
    commit, found = hub.files(url, source.revision, patience)
    tell(f"{url} at {commit}: {len(found)} files")
    base = hub.resolve(url, commit)
    entries = []
    known = {file.path: file for file in found}
    for path in _chosen(source, known, tell):
        file = known[path]
        sha256, told = file.sha256, f"Hugging Face API, LFS oid at {commit[:12]}"
        size = file.size
        if sha256 is None:
            body = small(f"{base}/{quote(path)}", SMALL, patience)[0]
            sha256, size = hashlib.sha256(body).hexdigest(), len(body)
            told = f"hashed as read at {commit[:12]} (not an LFS file)"
        entries.append(_entry(path, size, sha256, told))
    return _lock(source, url, entries, commit)


def _server(source: Source, tell: Tell, patience: Patience | None) -> Lock:
    base, paths = _base(source.urls)
    listed: dict[str, str] = {}
    if source.checksums:
        sums = parse_checksums(get(source.checksums, SMALL, patience), source.checksums)
        # The names in a list are relative to the list.
        by_url = {urljoin(source.checksums, quote(name)): sum.sha256 for name, sum in sums.items()}
        listed = {path: sha256 for path in paths if (sha256 := by_url.get(f"{base}/{quote(path)}"))}
        if not listed:
            raise InputError(f"{source.checksums}: lists the sha256 of none of the {len(paths)} files")
        tell(f"{source.checksums}: sha256 of {len(listed)} of {len(paths)} files")
    entries = []
    for path in paths:
        size, linked = head(f"{base}/{quote(path)}", patience)
        sha256 = listed.get(path) or linked
        told = f"size: the server; sha256: {source.checksums if path in listed else 'the server'}"
        entries.append(_entry(path, size, sha256, told if sha256 else "size: the server; sha256: not known"))
        tell(f"{path}: {f'{size:,} bytes' if size else 'size not known'}, sha256 {sha256 or 'not known'}")
    return _lock(source, base, entries, None)


def _folder(source: Source, folder: Path, data: Path, tell: Tell) -> Lock:
    if not folder.is_dir():
        raise InputError(f"folder {folder}: no such folder")
    found = list(_walk(folder, data))
    chosen = _chosen(source, found, tell)
    texts = [path for path in chosen if path.endswith(".txt")]
    entries = []
    for path in chosen:
        if not path.endswith(".txt"):
            file = folder / path
            if not (size := file.stat().st_size):
                tell(f"{path}: is empty, and was left out")
                continue
            entries.append(_entry(path, size, sha256_file(file), "hashed in the folder"))
            tell(f"{path}: sha256 {entries[-1].sha256}")
    for name, paths in deal(texts, source.text_shards).items():
        size, sha256, members = measure_tar(folder, paths)
        entries.append(
            Entry(
                name=_name(name),
                path=f"{name}.tar",
                size=size,
                sha256=sha256,
                texts=members,
                source="texts of the folder",
            )
        )
        tell(f"{name}.tar: {len(paths)} texts, sha256 {sha256}")
    return _lock(source, folder.as_uri(), entries, None)


def _walk(folder: Path, data: Path) -> Iterator[str]:
    """Yield the files under a folder, hidden ones and our own aside; refuse what cannot be data, by name."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != data.resolve()
        )
        for name in folders:
            if (here / name).is_symlink():
                raise InputError(
                    f"{here / name}: is a link to a folder; name that one in a corpus of its own"
                )
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or name.endswith((".toml", ".lock.json", RECEIPT, ".part", ".part.json")):
                continue
            if not path.is_file():
                raise InputError(f"{path}: is not a plain file; move it away")
            relative = path.relative_to(folder).as_posix()
            if not relative.isprintable():
                raise InputError(f"{str(path)!a}: has a name that is not UTF-8 or not printable; rename it")
            yield relative


def _chosen(source: Source, paths: Iterable[str], tell: Tell) -> list[str]:
    """Return the paths that the source's patterns choose; each pattern must choose one."""
    paths = list(paths)
    patterns = [one for pattern in source.files for one in expand(pattern)]
    if not patterns:
        chosen = [path for path in paths if suffix_of(path)]
        if others := [path for path in paths if not suffix_of(path)]:
            kinds = sorted({PurePosixPath(path).suffix or PurePosixPath(path).name for path in others})
            tell(f"{len(others)} files of other formats were left out ({', '.join(kinds[:8])})")
    else:
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise InputError(f"corpus {source.name}: files: nothing is named as {pattern!r}")
        chosen = [path for path in paths if any(fnmatch.fnmatchcase(path, p) for p in patterns)]
    if odd := [path for path in chosen if not suffix_of(path)]:
        raise InputError(
            f"corpus {source.name}: {odd[0]} is of no format that can be read (known: {', '.join(FORMATS)})"
        )
    if not chosen:
        raise InputError(
            f"corpus {source.name}: no file of a known format ({', '.join(FORMATS)}) among {len(paths)} files"
        )
    return chosen


def _base(urls: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the longest base that all addresses share, and the paths from there."""
    try:
        split = [urlsplit(check_url(url)) for url in urls]
    except ValueError as error:
        raise InputError(f"urls: {error}") from None
    if split[0].scheme not in ("http", "https"):
        raise InputError(
            f"urls: {urls[0]}: is no http or https address; for files of this machine use folder ="
        )
    if len({(parts.scheme, parts.netloc) for parts in split}) > 1:
        raise InputError("urls: a corpus comes from one server; make one corpus for each")
    common = os.path.commonpath([parts.path.rpartition("/")[0] or "/" for parts in split])
    base = f"{split[0].scheme}://{split[0].netloc}{common}".rstrip("/")
    paths = [unquote(parts.path.removeprefix(common).lstrip("/")) for parts in split]
    for path, url in zip(paths, urls, strict=True):
        try:
            check_path(path)
        except ValueError as error:
            raise InputError(f"urls: {url}: {error}") from None
    return base, paths


def _name(path: str) -> str:
    """Return a shard's name: its path without the suffix; odd characters become -, and a hash keeps names apart."""
    stem = path.removesuffix(suffix_of(path) or "")
    odd = any(not (c.isascii() and (c.isalnum() or c in "._-/")) for c in stem)
    parts = [
        "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in part)
        for part in stem.split("/")
    ]
    name = "/".join(part if part[:1].isalnum() else f"x{part}" for part in parts)
    return (
        f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:6]}" if odd else name
    )  # two may look the same now


def _entry(path: str, size: int | None, sha256: str | None, told: str) -> Entry:
    try:
        return Entry(name=_name(path), path=path, size=size or None, sha256=sha256, source=told)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{path}: cannot be a shard: {why}, at most 6 deep and 120 characters each; rename it, or choose the "
            "others with files = [...]"
        ) from None


def _lock(source: Source, url: str, entries: list[Entry], revision: str | None) -> Lock:
    try:
        return Lock(corpus=source.name, url=url, revision=revision, files=tuple(entries))
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"corpus {source.name}: {why}; leave some out with files = [...]") from None


def _pinned(lock: Lock, old: Lock, path: Path, tell: Tell) -> Lock:
    """Hold new figures against those of the old lock, and keep what only that one knows."""
    if lock.revision != old.revision or lock.url != old.url:
        tell(
            f"{path}: of {old.url} at {old.revision}; its pins do not hold for {lock.url} at {lock.revision}"
        )
        return lock
    pins = {entry.path: entry for entry in old.files}
    for gone in sorted(pins.keys() - {entry.path for entry in lock.files}):
        tell(f"{gone}: was in the lock, and is not among the files any more")
    entries = []
    for entry in lock.files:
        pin = pins.get(entry.path)
        if pin is None:
            entries.append(entry)
            continue
        for what, pinned, now in (("sha256", pin.sha256, entry.sha256), ("size", pin.size, entry.size)):
            if pinned is not None and now is not None and pinned != now:
                changed = sorted(name for name, _ in pin.texts.items() ^ entry.texts.items())
                texts = f"; texts that differ: {', '.join(dict.fromkeys(changed[:6]))}" if changed else ""
                cure = "find out which is right before you delete the pin"
                if lock.url.startswith("file:"):
                    cure = f"to take the folder as it is now, delete {path} and lock again"
                raise InputError(
                    f"{path}: {entry.path}: {what} is pinned to {pinned} (from: {pin.source}), but {lock.url} now "
                    f"says {now} ({entry.source}){texts}; nothing was written; {cure}"
                )
        kept = {
            "size": entry.size or pin.size,
            "about": entry.about or pin.about,
            "sha256": entry.sha256 or pin.sha256,
            "source": entry.source if entry.sha256 or not pin.sha256 else pin.source,
        }
        entries.append(entry.model_copy(update=kept))
    return lock.model_copy(update={"files": tuple(entries)})
