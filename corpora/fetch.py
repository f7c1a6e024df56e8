"""Fetch shards: streamed into a file beside the final one, hashed on the way, checked, renamed; receipt last.

The receipt is the only record of "fetched".  It holds the file's size and mtime, so that a check is cheap; a
file that looks changed is hashed again before anything is believed or thrown away.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from pydantic import Field, ValidationError

from corpora.errors import NO_SPACE, InputError, Unavailable
from corpora.files import read_json, sha256_file, write_aside, write_json
from corpora.lock import Entry, check_shard, load_lock
from corpora.settings import Corpus, Strict

CHUNK = 1 << 20
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two reads
WAIT_AND_RETRY = (408, 425, 429)  # like 5xx, these say "later"


class Receipt(Strict):
    """The proof that a shard lies under the data root, whole."""

    shard: str
    path: str = Field(description="of the file, relative to the data root")
    size: int
    sha256: str
    url: str
    mtime_ns: int = Field(description="of the file when it was last hashed")


def raw_path(corpus: Corpus, shard: str, data: Path) -> Path:
    """Return where a fetched shard lies."""
    try:
        return data / corpus.name / "raw" / f"{check_shard(shard)}.jsonl.zst"
    except ValueError as error:
        raise InputError(f"corpus {corpus.name}: {error}") from None


def fetch(
    corpus: Corpus, shard: str, data: Path, progress: Callable[[int], None] | None = None
) -> tuple[Receipt, bool]:
    """Fetch one shard; the second value is True when it was there already.

    Safe to run again at any time: a verified file is left alone, everything else is fetched anew.
    `progress` is called with the number of bytes just written.
    """
    lock = load_lock(corpus, data)
    entry = lock.entry(shard)
    url = lock.url_of(entry)
    final = raw_path(corpus, shard, data)
    receipt = _already(final, entry, url, data)
    if receipt is not None:
        return receipt, True
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_space(final, entry)
        with write_aside(final) as aside:
            with aside.open("wb") as part:
                _download(url, entry, part, progress or (lambda _: None))
            stat = aside.stat()  # of the bytes hashed: a later edit differs from it
    except OSError as error:  # of the destination: reading the source has its own errors
        raise _cannot_write(final, error) from error
    return _write_receipt(final, stat, entry, url, data), False


def verified(corpus: Corpus, shard: str, data: Path) -> Receipt:
    """Return the receipt of a fetched shard; refuse one that is missing, changed or not the lock's."""
    lock = load_lock(corpus, data)
    entry = lock.entry(shard)
    final = raw_path(corpus, shard, data)
    receipt = _already(final, entry, lock.url_of(entry), data)
    if receipt is None:
        why = "is not the file that the lock names" if final.exists() else "is not there"
        raise InputError(f"{final}: shard {shard} {why}; run `python -m corpora fetch RECIPE` to get it")
    return receipt


def receipt_path(final: Path) -> Path:
    """Return the receipt's place beside a shard."""
    return final.with_name(f"{final.name}.receipt.json")


def _already(final: Path, entry: Entry, url: str, data: Path) -> Receipt | None:
    """Return the receipt of a file that has the lock's bytes, renewing it where only the receipt is amiss."""
    try:
        stat = final.stat()
        receipt = _read_receipt(final)
        if receipt is not None and receipt.sha256 == entry.sha256:
            if (receipt.size, receipt.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return receipt
        if S_ISREG(stat.st_mode) and entry.size not in (None, stat.st_size):
            return None
        if sha256_file(final) != entry.sha256:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a folder of that name, no permission, a bad disk
        raise InputError(f"{final}: cannot be read: {error.strerror}; move it away, then run again") from None
    return _write_receipt(final, stat, entry, url, data)


def _read_receipt(final: Path) -> Receipt | None:
    """Return the receipt beside a shard; a lost or torn one is none, and the file itself is asked."""
    try:
        return Receipt.model_validate(read_json(receipt_path(final)))
    except (InputError, ValidationError):
        return None


def _write_receipt(final: Path, stat: os.stat_result, entry: Entry, url: str, data: Path) -> Receipt:
    receipt = Receipt(
        shard=entry.name,
        path=final.relative_to(data).as_posix(),
        size=stat.st_size,
        sha256=entry.sha256,
        url=url,
        mtime_ns=stat.st_mtime_ns,
    )
    try:
        write_json(receipt_path(final), receipt.model_dump())
    except OSError as error:
        raise _cannot_write(receipt_path(final), error) from error
    return receipt


def _check_space(final: Path, entry: Entry) -> None:
    free = shutil.disk_usage(final.parent).free
    if entry.size is not None and free < entry.size:
        raise InputError(
            f"{final}: no space: shard {entry.name} has {entry.size:,} bytes, {free:,} are free; "
            "free some, or set PILELINE_DATA to a larger disk"
        )


def _cannot_write(path: Path, error: OSError) -> InputError:
    if error.errno in NO_SPACE:
        return InputError(f"{path}: no space left; free some, or set PILELINE_DATA to a larger disk")
    where = f" ({error.filename})" if error.filename else ""
    return InputError(f"{path}: cannot be written: {error.strerror or error}{where}")


def _download(url: str, entry: Entry, part: BinaryIO, progress: Callable[[int], None]) -> None:
    """Write the bytes of `url` to `part`; return only when they are the lock's."""
    digest, size, head = hashlib.sha256(), 0, b""
    with _open(url) as (chunks, says_when_cut):
        for chunk in chunks:
            head = head or chunk[:512]
            size += len(chunk)
            if entry.size is not None and size > entry.size:
                raise _wrong(url, entry, head, f"{entry.size:,} bytes", "more")
            digest.update(chunk)
            part.write(chunk)
            progress(len(chunk))
    if entry.size is not None and size < entry.size:
        if not says_when_cut and not _is_html(head):
            raise Unavailable(f"{url}: ended after {size:,} of {entry.size:,} bytes; run again to retry")
        raise _wrong(url, entry, head, f"{entry.size:,} bytes", f"{size:,}")
    if digest.hexdigest() != entry.sha256:
        raise _wrong(url, entry, head, f"sha256 {entry.sha256}", digest.hexdigest())


def _is_html(head: bytes) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _wrong(url: str, entry: Entry, head: bytes, expected: str, got: str) -> InputError:
    looks = " (it looks like an HTML page, of a login or a proxy perhaps)" if _is_html(head) else ""
    cure = ", or run: python -m corpora build-demo" if "/demo/source/" in url else ""
    return InputError(
        f"shard {entry.name}: {url} is not the file that the lock names: expected {expected}, "
        f"got {got}{looks}; nothing was kept; correct [corpus] url or the lock{cure}"
    )


def _read_file(url: str) -> Generator[bytes, None, None]:
    path = Path(url2pathname(urlsplit(url).path))
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        told = f"{path}: the shard cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            raise InputError(f"{told}; correct [corpus] url or the lock") from None
        raise Unavailable(f"{told}; run again") from None  # a network folder that went away, a bad disk


@contextmanager
def _open(url: str) -> Iterator[tuple[Iterator[bytes], bool]]:
    """Yield a file's chunks, and whether a lost connection would raise instead of looking like its end."""
    if url.startswith("file:"):
        with closing(_read_file(url)) as chunks:
            yield chunks, True
        return
    try:
        # identity: the lock's sha256 is of the file, not of what a server makes of it on the way
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
            _check_answer(url, response)
            says_when_cut = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
            yield response.iter_content(CHUNK), says_when_cut
    except (
        requests.exceptions.InvalidSchema,
        requests.exceptions.InvalidURL,
        requests.exceptions.TooManyRedirects,
    ) as error:
        raise InputError(
            f"{url}: leads to an address that cannot be used ({type(error).__name__}); correct [corpus] url"
        ) from None
    except requests.RequestException as error:
        raise Unavailable(f"{url}: the connection failed: {_reason(error)}; run again to retry") from None


def _check_answer(url: str, response: requests.Response) -> None:
    status = response.status_code
    answered = f"{url}: the server answered {status}"
    if status in (404, 410):
        raise InputError(f"{answered}: no such file; correct [corpus] url or the path in the lock")
    if status in (401, 403):
        raise InputError(
            f"{answered}: access denied; accept the corpus' terms on its page, or put a login into ~/.netrc"
        )
    if status >= 500 or status in WAIT_AND_RETRY:
        raise Unavailable(f"{answered}; run again later")
    if status != 200:
        raise InputError(f"{answered} instead of 200 and a file; correct [corpus] url")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise InputError(
            f"{url}: the server sends the file encoded ({encoding[:40]}) although it was asked not to; "
            "use another mirror in [corpus] url"
        )


def _reason(error: BaseException) -> str:
    """Return the innermost cause: the outer texts carry addresses, signed ones of a redirect among them."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
