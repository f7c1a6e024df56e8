"""Which bytes a corpus is: a lock file names every shard with its size and sha256.

    {"corpus": "demo", "url": ".", "revision": null,
     "files": [{"name": "train/00", "path": "train/00.jsonl.zst", "size": 5242880, "sha256": "..."}]}

A shard is read from `url`/`path` and kept under its `name`.  The url "." is the lock file's own folder, and
hf://datasets/OWNER/NAME a repository of the Hugging Face hub, at `revision`.  A sha256 that nobody has told is
left out: the first download's is trusted then, kept in its receipt, and counts here from that day on.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from corpora import hub
from corpora.errors import InputError
from corpora.files import sha256_json
from corpora.receipts import raw_path, read_receipt
from corpora.settings import SHARD, Corpus, Strict

SOURCES = Path(__file__).resolve().parent / "sources"
FIRST_USE = "the first download, trusted on first use"


def check_shard(name: str) -> str:
    """Return the name of a shard, or refuse one that could leave the corpus' folder."""
    if not re.fullmatch(SHARD, name):
        raise ValueError(
            f"shard name {name[:80]!r} is not word/word/... (of letters, digits, . - _; no dot first)"
        )
    return name


def check_path(path: str) -> str:
    """Return a path relative to a base URL, or refuse one that could lead elsewhere."""
    if {"", ".", ".."} & set(path.split("/")) or not path.isprintable() or set(path) & set("\\?#%"):
        raise ValueError("not a plain relative path (no leading /, no .., no \\, ?, # or %)")
    return path


def check_url(url: str) -> str:
    """Return a base URL without its last slash, or refuse one that shards cannot be read from."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from None
    if "@" in parts.netloc:  # it would end up in receipts and messages
        raise ValueError(f"it carries a user name or password for {host}; put them into ~/.netrc")
    if parts.scheme == "hf":
        hub.repository(url)
        return url.rstrip("/")
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"{url!r} is none of http:, https:, file: and hf:")
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise ValueError(f"{url!r} is not an absolute path on this machine, as in file:///data/shards")
    if parts.scheme != "file" and not host:
        raise ValueError(f"{url!r} names no host")
    if parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"{url!r} is no plain base URL (no ?, #, white space or control characters)")
    return url.rstrip("/")


class Entry(Strict):
    """One shard of a lock."""

    name: str = Field(description="what recipes call it, e.g. train/00")
    path: str = Field(max_length=500, description="file name relative to the base URL")
    size: int | None = Field(default=None, ge=1, strict=True, description="in bytes; left out: not known")
    about: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="roughly its size where that is not known; for estimates only",
    )
    sha256: str | None = Field(
        default=None, description="of the file as it lies there, 64 hex digits; left out: not known"
    )
    source: str | None = Field(default=None, description="where size and sha256 come from")
    texts: dict[str, str] = Field(
        default={}, description="path -> sha256 of the text files that the shard, a tar, is made of"
    )

    @property
    def pinned(self) -> bool:
        """Whether the lock knows the sha256, and not only the first download."""
        return self.sha256 is not None and self.source != FIRST_USE

    @field_validator("name")
    @classmethod
    def _name_stays_inside(cls, name: str) -> str:
        return check_shard(name)

    @field_validator("path")
    @classmethod
    def _path_stays_inside(cls, path: str) -> str:
        return check_path(path)

    @field_validator("sha256")
    @classmethod
    def _sha256_is_one(cls, sha256: str | None) -> str | None:
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"not 64 hex digits in lower case ({len(sha256)} characters)")
        return sha256

    @field_validator("texts")
    @classmethod
    def _texts_stay_inside(cls, texts: dict[str, str]) -> dict[str, str]:
        for path in texts:
            if {"", ".", ".."} & set(path.split("/")) or not path.isprintable() or "\\" in path:
                raise ValueError(f"{path[:80]!r} is not a plain relative path")
        return texts


class Lock(Strict):
    """The shards of one corpus, and where they are."""

    corpus: str
    url: str
    revision: str | None = None
    files: tuple[Entry, ...]
    built_from: dict[str, Any] | None = Field(default=None, description="what a built corpus was made of")

    @field_validator("url")
    @classmethod
    def _url_is_one(cls, url: str) -> str:
        return check_url(url)

    @model_validator(mode="after")
    def _has_shards_of_different_names(self) -> Self:
        if not self.files:
            raise ValueError("files: there is none")
        # Case counts as well: on some file systems Train/00 and train/00 are one file.
        counts = Counter(entry.name.casefold() for entry in self.files)
        twice = [entry.name for entry in self.files if counts[entry.name.casefold()] > 1]
        if twice:
            raise ValueError(f"shard names must differ, in more than case too: {', '.join(twice)}")
        return self

    def entry(self, name: str) -> Entry:
        """Return the entry of a shard."""
        for entry in self.files:
            if entry.name == name:
                return entry
        names = [entry.name for entry in self.files]
        near = names if len(names) <= 20 else difflib.get_close_matches(name, names, 5, 0) or names[:5]
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        raise InputError(
            f"corpus {self.corpus}: no shard {name!r} in its lock; it has: {', '.join(near)}{more}"
        )

    @property
    def base(self) -> str:
        """The URL that paths are relative to; a repository's depends on HF_ENDPOINT."""
        return hub.resolve(self.url, self.revision) if self.url.startswith("hf:") else self.url

    def url_of(self, entry: Entry) -> str:
        """Return the URL of a shard's file."""
        return f"{self.base}/{quote(entry.path)}"

    def place(self, entry: Entry) -> str:
        """Return what stands for a shard's address, whichever mirror it is fetched from."""
        at = f"@{self.revision}" if self.url.startswith("hf:") and self.revision else ""
        return f"{self.url}{at}/{quote(entry.path)}"

    def fingerprint(self, shards: Iterable[str]) -> str:
        """Return a sha256 that stands for these shards' names and bytes, in this order."""
        entries = [self.entry(name) for name in shards]
        unknown = [entry.name for entry in entries if entry.sha256 is None]
        if unknown:
            raise InputError(
                f"corpus {self.corpus}: the sha256 of {', '.join(unknown[:5])} is not known before the first "
                "download; run: python -m corpora fetch RECIPE (or let `python -m corpora lock` ask for it)"
            )
        return sha256_json([[entry.name, entry.sha256] for entry in entries])

    def trusting(self, data: Path) -> Self:
        """Return this lock with what the receipts of first downloads under `data` say, where it knows nothing."""
        return self.model_copy(update={"files": tuple(self._trusting(entry, data) for entry in self.files)})

    def _trusting(self, entry: Entry, data: Path) -> Entry:
        if entry.sha256 is not None:
            return entry
        receipt = read_receipt(raw_path(self.corpus, entry.name, entry.path, data))
        if receipt is None or receipt.trust != "first use" or receipt.url != self.place(entry):
            return entry
        if entry.size not in (None, receipt.size):
            return entry
        known = {"sha256": receipt.sha256, "size": receipt.size, "source": FIRST_USE}
        return entry.model_copy(update=known)


def read_lock(path: Path) -> Lock:
    """Read a lock file; every fault in it is told in one line that names the shard."""
    try:
        tables = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"lock {path}: no such file") from None
    except OSError as error:
        raise InputError(f"lock {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"lock {path}: not valid JSON: {error}") from None
    if isinstance(tables, dict) and tables.get("url") == ".":
        tables["url"] = path.resolve().parent.as_uri()
    try:
        return Lock.model_validate(tables)
    except ValidationError as error:
        raise InputError(f"lock {path}: {_explain(tables, error)}") from None


def load_lock(corpus: Corpus, data: Path) -> Lock:
    """Load the lock of a recipe's corpus: its own `lock`, the demo's in DATA, or one that is built in."""
    built = data / "demo" / "source" / "lock.json"
    if corpus.lock is not None:
        path = corpus.lock
    elif corpus.name == "demo":
        path = built
        if not path.is_file():
            raise InputError(f"{path}: the demo corpus is not built; run: python -m corpora build-demo")
    else:
        path = SOURCES / f"{corpus.name}.lock.json"
        if not path.is_file():
            raise InputError(
                f"corpus {corpus.name!r} brings no lock (built in: {', '.join(built_in())}); "
                "give one: [corpus] lock = PATH"
            )
    lock = read_lock(path)
    if lock.corpus != corpus.name:
        raise InputError(f"lock {path}: it is of corpus {lock.corpus!r}, the recipe says {corpus.name!r}")
    if corpus.url is not None:
        try:
            lock = lock.model_copy(update={"url": check_url(corpus.url)})
        except ValueError as error:
            raise InputError(f"[corpus] url: {error}") from None
    return lock.trusting(data)


def built_in() -> list[str]:
    """Return the names of the corpora that need no lock of yours."""
    return ["demo", *sorted(path.name.removesuffix(".lock.json") for path in SOURCES.glob("*.lock.json"))]


def _explain(tables: Any, error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        match fault["loc"]:
            case ("files", int(index), *rest):
                entry = tables["files"][index]
                name = entry.get("name") if isinstance(entry, dict) else None
                shown = repr(name[:80]) if isinstance(name, str) else f"number {index + 1}"
                where = [f"shard {shown}", *map(str, rest)]
        faults.append(": ".join([*where, fault["msg"].removeprefix("Value error, ")]))
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more
