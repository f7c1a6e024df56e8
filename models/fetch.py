"""Fetch a model folder, whole: every file that its lists of checksums name, each one verified.

LLaMA's folders bring checklist.chk (md5), others SHA256SUMS; the Hugging Face hub tells sizes and sha256 itself.
One bad file does not stop the others.  Running it again verifies what is there and fetches what is not.
"""

import posixpath
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

from corpora.checksums import Checksum, check_name, checksum_file, parse_checksums
from corpora.download import Wanted, download, get
from corpora.errors import InputError, Unavailable
from corpora.files import inside, write_aside
from corpora.lock import check_url
from corpora.part import cannot_write, part_of
from corpora.patience import NotThere, Patience
from corpora.progress import Progress

LISTS = (
    "checklist.chk",
    "tokenizer_checklist.chk",
    "SHA256SUMS",
    "SHA256SUMS.txt",
    "sha256sums.txt",
    "sha256sum.txt",
    "MD5SUMS",
    "md5sums.txt",
)
LIST_LIMIT = 16 << 20  # bytes; a list is small
SHARD = re.compile(r"consolidated\.(\d{2})\.pth")
WEIGHTS = ("*.pth", "*.safetensors")

State = Literal["fetched", "verified", "missing", "refused", "unavailable"]
Bar = Callable[[str, int | None], Progress]


@dataclass(frozen=True, slots=True)
class Listed:
    """One file as the lists have it."""

    name: str  # relative to the model folder
    url: str
    source: str  # which lists name it
    checksum: Checksum
    size: int | None = None  # in bytes; None: not known

    @property
    def what(self) -> str:
        """How messages call it."""
        return f"{self.name} (listed in {self.source})"

    @property
    def check(self) -> Checksum:
        """The digest that decides: sha256 where both are known, as for `Wanted`."""
        return replace(self.checksum, md5=None) if self.checksum.sha256 else self.checksum

    @property
    def kind(self) -> str | None:
        """The name of that digest."""
        return next(iter(self.check.kinds), None)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one file."""

    name: str
    state: State
    line: str  # the same for people

    @property
    def failed(self) -> bool:
        """Whether the file is not there, or not the right one."""
        return self.state not in ("fetched", "verified")


@dataclass(frozen=True)
class _Work:
    """Bring one file after another, in several threads."""

    folder: Path
    bar: Bar
    patience: Patience | None
    stop: threading.Event = field(default_factory=threading.Event)

    def one(self, file: Listed) -> Result:
        """Verify a file that is there, or fetch it; a failure is a result."""
        try:
            final = inside(self.folder, file.name)
            if final.is_dir():  # told before the download, not after it
                raise InputError(f"{final}: a folder stands in the file's place; move it away")
            if self._is_there(file, final):
                return self._verified(file, final)
            wanted = Wanted(file.what, file.url, file.size, file.check.sha256, file.check.md5)
            with self.bar(f"fetch {file.name}", file.size) as progress:
                done = download(
                    wanted,
                    final,
                    partial(self._tick, progress),
                    self.patience,
                    partial(self._is_there, file, final),
                )
        except NotThere as error:
            return _failure(file, "missing", error)
        except Unavailable as error:
            return _failure(file, "unavailable", error)
        except InputError as error:
            return _failure(file, "refused", error)
        except OSError as error:  # the old file cannot be read, its name is too long for this disk
            told = f"{self.folder / file.name}: {error.strerror or error}; move it away, then run again"
            return _failure(file, "refused", InputError(told))
        if done is None:  # another process brought it in the meantime
            return self._verified(file, final)
        how = f"{kind} verified" if (kind := file.kind) else "size only" if file.size else "not verifiable"
        return Result(file.name, "fetched", f"{file.name}: {done.size:,} bytes, {how}")

    def _is_there(self, file: Listed, final: Path) -> bool:
        """Hash a file that is there: no receipt is kept, and disks lie."""
        if file.kind is None:  # equal size is no proof that it is not another revision's; it is small
            return False
        if not final.is_file() or file.size not in (None, final.stat().st_size):
            return False
        with self.bar(f"verify {file.name}", final.stat().st_size) as progress:
            return checksum_file(final, file.check, partial(self._tick, progress)) == file.check

    def _verified(self, file: Listed, final: Path) -> Result:
        size = final.stat().st_size
        return Result(file.name, "verified", f"{file.name}: {size:,} bytes, {file.kind} (verified before)")

    def _tick(self, progress: Progress, amount: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        progress.add(amount)


def fetch(
    url: str,
    folder: Path,
    lists: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    parallel: int = 4,
    bar: Bar | None = None,
    tell: Callable[[str], None] | None = None,
    patience: Patience | None = None,
) -> tuple[Result, ...]:
    """Bring a model's files to `folder`, and return what became of each.

    `lists` names the lists of checksums, relative to `url`; None tries the usual names, and asks the hub for an
    hf:// URL.  The names in a list are relative to the list.  `tell` gets a line for each file that is well, and
    remarks.  Raises InputError or Unavailable where the lists themselves cannot be had.
    """
    say = tell or (lambda _: None)
    files = _find(url, folder, lists, revision, patience)
    if not files:
        raise InputError(f"{url}: no file is listed there")
    for remark in remarks(file.name for file in files):
        say(f"note: {remark}")
    _check_parts(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    _check_space(folder, files)
    work = _Work(folder, bar or (lambda what, total: Progress(what, total, "B")), patience)
    results = _in_parallel(files, work, parallel, say)
    for name in _strangers(folder, files):
        say(f"note: {name}: in {folder}, but not in any list; nothing tells whether it belongs to the model")
    return tuple(results[file.name] for file in files)


def remarks(names: Iterable[str]) -> list[str]:
    """Say what a LLaMA folder seems to lack, going by the names of its files."""
    folders: dict[str, set[str]] = {}
    for name in names:
        folders.setdefault(posixpath.dirname(name), set()).add(posixpath.basename(name))
    found = []
    for folder, inner in sorted(folders.items()):
        numbers = {int(match[1]) for match in map(SHARD.fullmatch, inner) if match}
        if not numbers:
            continue
        lost = [f"consolidated.{number:02}.pth" for number in range(max(numbers)) if number not in numbers]
        for name in [*lost, *({"params.json"} - inner)]:
            path = posixpath.join(folder, name)
            found.append(f"{path} is not listed, though a LLaMA folder has one; the model may be incomplete")
    return found


def _find(
    url: str, folder: Path, lists: Sequence[str] | None, revision: str | None, patience: Patience | None
) -> list[Listed]:
    """Return all files that are to come, and keep the lists that say so."""
    if url.startswith("hf://"):
        from corpora import hub

        if lists is None:
            commit, found = hub.files(url, revision, patience)
            base, source = hub.resolve(url, commit), f"{url} at {commit[:12]}"
            return [
                Listed(file.path, address(base, file.path), source, Checksum(sha256=file.sha256), file.size)
                for file in found
            ]
        url = hub.resolve(url, revision)
    elif revision is not None:
        raise InputError(f"--revision {revision}: only hf:// URLs have revisions")
    return _from_lists(url, folder, lists, patience)


def _from_lists(
    url: str, folder: Path, lists: Sequence[str] | None, patience: Patience | None
) -> list[Listed]:
    texts: dict[str, bytes] = {}
    found: dict[str, Listed] = {}
    for given in LISTS if lists is None else lists:
        try:
            name = check_name(given)
        except ValueError as error:
            raise InputError(f"list of checksums: {error}") from None
        whole = address(url, name)
        try:
            text = get(whole, LIST_LIMIT, patience)
            listed = parse_checksums(text, shown(url, name))
        except NotThere:
            if lists is None:
                continue
            raise InputError(f"{shown(url, name)}: no such list; correct the URL, or its name") from None
        except InputError as error:
            cure = "; if that is no list, name those that are: --checklist NAME" if lists is None else ""
            raise InputError(f"{_unsigned(str(error), url)}{cure}") from None
        except Unavailable as error:
            raise Unavailable(_unsigned(str(error), url)) from None
        texts[name] = text
        for relative, checksum in listed.items():
            path = posixpath.join(posixpath.dirname(name), relative)
            if path != name:  # a list may list itself, but not rightly
                _add(found, Listed(path, address(url, path), name, checksum))
    if not texts:
        raise InputError(
            f"{shown(url, '')}: no list of checksums there (tried {', '.join(LISTS)}); "
            "correct the URL, or name the list: --checklist NAME"
        )
    for name, text in texts.items():
        final = inside(folder, name)
        try:
            with write_aside(final) as aside:
                aside.write_bytes(text)
        except OSError as error:
            raise cannot_write(final, error) from None
    return list(found.values())


def _add(found: dict[str, Listed], file: Listed) -> None:
    """Merge what two lists say of one file."""
    key = file.name.casefold()  # on some file systems Params.json and params.json are one file
    before = found.setdefault(key, file)
    if before.name != file.name:
        raise InputError(
            f"{before.name!r} (listed in {before.source}) and {file.name!r} (in {file.source}) differ in case only"
        )
    if before is file:
        return
    try:
        checksum = before.checksum.merge(file.checksum)
    except ValueError as error:
        raise InputError(
            f"{file.name}: {before.source} and {file.source} contradict each other: {error}; "
            "name the list that is right: --checklist NAME"
        ) from None
    found[key] = replace(before, checksum=checksum, source=f"{before.source} and {file.source}")


def address(url: str, name: str) -> str:
    """Return the URL of a file in the folder `url`; a * in it stands for the name, a ?query stays behind it."""
    parts = urlsplit(url)
    try:
        check_url(url.partition("?")[0])
    except ValueError as error:
        raise InputError(f"URL: {error}") from None
    path = f"{parts.path.rstrip('/')}/*" if "*" not in parts.path else parts.path
    return urlunsplit(parts._replace(path=path.replace("*", quote(name), 1)))


def shown(url: str, name: str) -> str:
    """Return the URL of a file as messages show it: without the query, which may be a signature."""
    return address(url, name).partition("?")[0]


def _unsigned(text: str, url: str) -> str:
    query = urlsplit(url).query
    return text.replace(f"?{query}", "") if query else text


def _check_parts(files: Iterable[Listed]) -> None:
    """Refuse a file with the name under which another one grows."""
    names = {file.name for file in files}
    for name in sorted(names):
        if {f"{name}.part", f"{name}.part.json"} & names:
            raise InputError(f"{name}.part is listed as well as {name}, which needs that name while it grows")


def _check_space(folder: Path, files: Iterable[Listed]) -> None:
    """Refuse to begin what cannot end well, as far as sizes are known."""
    missing = 0
    for file in files:
        final = folder / file.name
        there = 0
        with suppress(OSError):  # of a name that is refused later
            there = final.stat().st_size if final.is_file() else 0
            if there != file.size:  # it stays until the right one is whole
                there = part.stat().st_size if (part := part_of(final)).is_file() else 0
        missing += max(0, (file.size or 0) - there)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise InputError(
            f"{folder}: no space: {missing:,} bytes are to come, {free:,} are free; "
            "free some, or name a folder on a larger disk"
        )


def _in_parallel(
    files: Sequence[Listed], work: _Work, parallel: int, say: Callable[[str], None]
) -> Mapping[str, Result]:
    """Work on `parallel` files at a time.

    Daemons, since a thread that waits for a silent server must not hold up Ctrl-C: what it has is on disk.
    """
    waiting = deque(files)
    finished: SimpleQueue[Result | BaseException] = SimpleQueue()

    def run() -> None:
        with suppress(IndexError):  # none is waiting
            while not work.stop.is_set():
                file = waiting.popleft()
                try:
                    finished.put(work.one(file))
                except BaseException as error:
                    finished.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(parallel, len(files)))]
    results = {}
    try:
        for thread in threads:
            thread.start()
        for _ in files:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            results[result.name] = result
            if not result.failed:
                say(result.line)
    finally:
        work.stop.set()
        for thread in threads:
            thread.join(1.0)
    return results


def _failure(file: Listed, state: State, error: Exception) -> Result:
    told = _unsigned(str(error), file.url)
    if not told.startswith(file.what):
        told = f"{file.what}: {told}"
    return Result(file.name, state, told)


def _strangers(folder: Path, files: Iterable[Listed]) -> list[str]:
    """Return weights that lie beside the listed files and are in no list."""
    names = {file.name for file in files}
    folders = {posixpath.dirname(name) for name in names}
    found = {
        path.relative_to(folder).as_posix()
        for inner in folders
        for pattern in WEIGHTS
        for path in (folder / inner).glob(pattern)
    }
    return sorted(found - names)
