"""Fetch a model folder, whole: every file that its lists of checksums name, each one verified.

LLaMA's folders bring checklist.chk (md5), others SHA256SUMS; the Hugging Face hub tells sizes and sha256 itself.
One bad file does not stop the others.  Running it again verifies what is there and fetches what is not.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import quote

from corpora import hub
from corpora.addresses import shown
from corpora.checksums import Checksum, checksum_file, parse_checksums
from corpora.download import Wanted, download, get
from corpora.errors import InputError, PilelineError, Unavailable
from corpora.files import inside, write_aside
from corpora.lock import check_url
from corpora.parallel import each
from corpora.part import cannot_write, part_of
from corpora.patience import NotThere, Patience
from corpora.progress import Progress

LISTS = ("checklist.chk", "tokenizer_checklist.chk", "SHA256SUMS", "SHA256SUMS.txt",
         "sha256sums.txt", "sha256sum.txt", "MD5SUMS", "md5sums.txt")  # fmt: skip
LIST_LIMIT = 16 << 20  # bytes; a list is small
SHARD = re.compile(r"((?:.*/)?)consolidated\.(\d{2})\.pth")
WEIGHTS = (".pth", ".safetensors")
CURE = "correct the URL, or name the lists that are right: --checklist NAME"

Files = dict[str, Wanted]  # by name, relative to the model folder
Lists = dict[str, tuple[bytes, dict[str, Checksum]]]  # by name: its text, and what that says


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one file."""

    name: str
    state: Literal["fetched", "verified", "missing", "refused", "unavailable"]
    line: str  # the same for people

    @property
    def failed(self) -> bool:
        """Whether the file is not there, or not the right one."""
        return self.state not in ("fetched", "verified")


def fetch(
    url: str,
    folder: Path,
    lists: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    parallel: int = 4,
    tell: Callable[[str], None] | None = None,
    patience: Patience | None = None,
) -> tuple[Result, ...]:
    """Bring a model's files to `folder`, and return what became of each.

    `lists` names the lists of checksums, relative to `url`; None tries the usual names, and asks the hub for an
    hf:// URL.  The names in a list are relative to the list.  `tell` gets a line for each file that is well, and
    remarks.  Raises InputError or Unavailable where the lists cannot be had, and InputError where they cannot be
    followed or the folder cannot hold what they name.
    """
    say = tell or (lambda _: None)
    files, kept = _find(url, folder, lists, revision, patience)
    if not files:
        raise InputError(f"{shown(url)}: no file is listed there")
    for remark in remarks(files):
        say(f"note: {remark}")
    _prepare(folder, kept, files)
    results: dict[str, Result] = {}
    work = partial(_bring, folder=folder, patience=patience)
    for (name, wanted), result in each(files.items(), work, parallel):
        results[name] = _failure(name, wanted, result) if isinstance(result, PilelineError) else result
        if not results[name].failed:
            say(results[name].line)
    for name in _strangers(folder, results):
        say(f"note: {name}: in {folder}, but not in any list; nothing tells whether it belongs to the model")
    return tuple(results[name] for name in files)


def remarks(names: Iterable[str]) -> list[str]:
    """Say what a LLaMA folder seems to lack, going by the names of its files.  Raises no error."""
    there = set(names)
    shards = [match for match in map(SHARD.fullmatch, there) if match]
    expected = {f"{match[1]}consolidated.{n:02}.pth" for match in shards for n in range(int(match[2]))}
    expected |= {f"{match[1]}params.json" for match in shards}
    told = "is not listed, though a LLaMA folder has one; the model may be incomplete"
    return [f"{name} {told}" for name in sorted(expected - there)]


def address(url: str, name: str) -> str:
    """Return the URL of a file in the folder `url`, which may be signed: the ?query stays behind the name.

    Meta's have a * where the name goes.  Raises InputError for what is no URL of a folder.
    """
    base, mark, query = url.partition("?")
    try:
        check_url(base)
    except ValueError as error:
        raise InputError(f"URL: {error}") from None
    return f"{base.removesuffix('*').rstrip('/')}/{quote(name)}{mark}{query}"


def _find(
    url: str, folder: Path, names: Sequence[str] | None, revision: str | None, patience: Patience | None
) -> tuple[Files, Lists]:
    """Return all files that are to come, and the lists that say so; the hub's own is none to be kept."""
    if url.startswith("hf://"):
        if names is None:
            return _from_hub(url, revision, patience), {}
        url = hub.resolve(url, revision)
    elif revision is not None:
        raise InputError(f"--revision {revision}: only hf:// URLs have revisions")
    lists = _read_lists(url, folder, names, patience)
    return _from_lists(url, lists), lists


def _from_hub(url: str, revision: str | None, patience: Patience | None) -> Files:
    commit, found = hub.files(url, revision, patience)
    base, known = hub.resolve(url, commit), f"(listed in {url} at {commit[:12]})"
    return {f.path: Wanted(f"{f.path} {known}", address(base, f.path), f.size, f.sha256) for f in found}


def _read_lists(url: str, folder: Path, names: Sequence[str] | None, patience: Patience | None) -> Lists:
    found: Lists = {}
    for name in LISTS if names is None else names:
        inside(folder, name)  # refused before it is asked for
        place = address(url, name)
        try:
            text = get(place, LIST_LIMIT, patience)
            found[name] = text, parse_checksums(text, shown(place))
        except InputError as error:
            if names is not None:
                raise
            if not isinstance(error, NotThere):
                raise InputError(f"{error}; {CURE}") from None
    if not found:
        raise InputError(f"{shown(url)}: no list of checksums there (tried {', '.join(LISTS)}); {CURE}")
    return found


def _from_lists(url: str, lists: Lists) -> Files:
    """Bring together what the lists say."""
    files: Files = {}
    known: dict[str, Checksum] = {}
    sources: dict[str, str] = {}
    for source, (_, checksums) in lists.items():
        for relative, checksum in checksums.items():
            name = str(PurePosixPath(source).parent / relative)
            if name == source:  # a list may list itself, but not rightly
                continue
            sources[name] = f"{sources[name]} and {source}" if name in sources else source
            try:
                known[name] = checksum = known.get(name, checksum).merge(checksum)
            except ValueError as error:
                clash = f"{sources[name]} contradict each other: {error}"
                raise InputError(f"{name}: {clash}; {CURE}") from None
            what, md5 = f"{name} (listed in {sources[name]})", None if checksum.sha256 else checksum.md5
            files[name] = Wanted(what, address(url, name), None, checksum.sha256, md5)
    _check_names(files)
    return files


def _check_names(names: Iterable[str]) -> None:
    """Refuse names that would be one file on some file systems, or are where another file grows."""
    taken: dict[str, str] = {}
    for name in names:
        for path in (name, f"{name}.part", f"{name}.part.json"):
            other = taken.setdefault(path.casefold(), name)
            if other != name:
                why = "they differ in case only, or one is the .part that the other comes in"
                raise InputError(f"{name} is listed as well as {other}: {why}; correct the list")


def _prepare(folder: Path, lists: Lists, files: Files) -> None:
    """Keep the lists in the folder; refuse to begin what cannot end well, as far as sizes are known."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (text, _) in lists.items():
            with write_aside(folder / name) as aside:
                aside.write_bytes(text)
    except OSError as error:
        raise cannot_write(folder, error) from None
    missing = 0
    for name, wanted in files.items():
        with suppress(OSError, InputError):  # of a name that is refused later
            final = inside(folder, name)
            there = sum(path.stat().st_size for path in (final, part_of(final)) if path.is_file())
            missing += max(0, (wanted.size or 0) - there)
    free = shutil.disk_usage(folder).free
    if missing > free:
        told = f"{folder}: no space: {missing:,} bytes are to come, {free:,} are free"
        raise InputError(f"{told}; free some, or name a folder on a larger disk")


def _bring(item: tuple[str, Wanted], folder: Path, patience: Patience | None) -> Result:
    """Verify a file that is there, or fetch it.  Raises NotThere, InputError or Unavailable."""
    name, wanted = item
    try:
        final = inside(folder, name)
        if final.is_dir():  # told before the download, not after it
            raise InputError(f"{final}: a folder stands in the file's place; move it away")
        there = _is_right(final, wanted)
    except OSError as error:  # it cannot be read, or its name is too long for this disk
        raise InputError(f"{folder / name}: {error.strerror}; move it away, then run again") from None
    if not there:
        with Progress(f"fetch {name}", wanted.size, "B") as bar:
            done = download(wanted, final, bar.add, patience, partial(_is_right, final, wanted))
        there = done is None  # another process brought it in the meantime
    line = f"{name}: {final.stat().st_size:,} bytes"
    kind = "sha256" if wanted.sha256 else "md5"
    if there:
        return Result(name, "verified", f"{line}, {kind} (verified before)")
    how = f"{kind} verified" if wanted.digest else "size only" if wanted.size else "not verifiable"
    return Result(name, "fetched", f"{line}, {how}")


def _is_right(final: Path, wanted: Wanted) -> bool:
    """Hash a file that is there: no receipt is kept, and disks lie."""
    if not wanted.digest or not final.is_file() or wanted.size not in (None, final.stat().st_size):
        return False  # without a digest equal size is no proof: another revision's may have it
    right = Checksum(wanted.md5, wanted.sha256)
    with Progress(f"verify {final.name}", final.stat().st_size, "B") as bar:
        return checksum_file(final, right, bar.add) == right


def _failure(name: str, wanted: Wanted, error: PilelineError) -> Result:
    told = f"{wanted.what}: {str(error).removeprefix(f'{wanted.what}: ')}"
    if isinstance(error, Unavailable):
        return Result(name, "unavailable", told)
    return Result(name, "missing" if isinstance(error, NotThere) else "refused", told)


def _strangers(folder: Path, results: dict[str, Result]) -> list[str]:
    """Return weights that lie beside the listed files and are in no list."""
    around = {(folder / name).parent for name, result in results.items() if result.state != "refused"}
    weights = [path for inner in around for path in inner.glob("*") if path.suffix in WEIGHTS]
    return sorted({path.relative_to(folder).as_posix() for path in weights} - results.keys())
