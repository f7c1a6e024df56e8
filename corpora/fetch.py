"""Fetch shards: what a lock names comes under the data root, checked, its receipt last."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

from corpora.download import Downloaded, Wanted, download, looks_like_html
from corpora.errors import InputError
from corpora.files import sha256_file, write_aside, write_json
from corpora.local import local_path
from corpora.lock import FIRST_USE, Entry, Lock, load_lock
from corpora.part import cannot_write
from corpora.patience import Patience
from corpora.read import MAGIC
from corpora.receipts import Receipt, raw_path, read_receipt, receipt_path
from corpora.settings import Corpus
from corpora.texts import write_tar

log = logging.getLogger(__name__)


def fetch(
    corpus: Corpus,
    shard: str,
    data: Path,
    progress: Callable[[int], None] | None = None,
    patience: Patience | None = None,
) -> tuple[Receipt, bool]:
    """Fetch one shard; the second value is True when it was there already.

    Safe to run again at any time, and beside another process: a verified file is left alone, one that was cut
    is continued.  `progress` is called with the number of bytes just written (see `download`).
    """
    lock = load_lock(corpus, data)
    entry = lock.entry(shard)
    final = raw_path(corpus.name, entry.name, entry.path, data)
    if receipt := _already(final, entry, lock, data):
        return receipt, True
    old = read_receipt(final)
    if old is not None and old.url != lock.place(entry):
        log.warning("%s: is that of %s, and is replaced by that of %s", final, old.url, lock.place(entry))
    tick = progress or (lambda _: None)
    try:
        if entry.texts:
            got: Downloaded | None = _pack(lock, entry, final, tick)
        else:
            wanted = Wanted(
                f"shard {shard}", lock.url_of(entry), entry.size, entry.sha256, source=entry.source
            )

            def there() -> bool:
                return _already(final, entry, lock, data) is not None

            got = download(wanted, final, tick, patience, there, link=True)
    except InputError as error:
        if corpus.name == "demo" and corpus.lock is None:
            raise InputError(f"{error}; or run: python -m corpora build-demo") from None
        if entry.source == FIRST_USE:
            raise InputError(f"{error}; to take the new file, delete {receipt_path(final)}") from None
        raise
    if got is None:
        return verified(corpus, shard, data), True
    if entry.sha256 is None:
        _check_kind(final)
        log.warning("shard %s: no sha256 was known; this one is trusted from now on: %s", shard, got.sha256)
    return _write_receipt(final, got.stat, got.sha256, entry, lock, data), False


def verified(corpus: Corpus, shard: str, data: Path) -> Receipt:
    """Return the receipt of a fetched shard; refuse one that is missing, changed or not the lock's."""
    lock = load_lock(corpus, data)
    entry = lock.entry(shard)
    final = raw_path(corpus.name, entry.name, entry.path, data)
    receipt = _already(final, entry, lock, data)
    if receipt is None:
        why = "is not the file that the lock names" if final.exists() else "is not there"
        raise InputError(f"{final}: shard {shard} {why}; run `python -m corpora fetch RECIPE` to get it")
    return receipt


def _already(final: Path, entry: Entry, lock: Lock, data: Path) -> Receipt | None:
    """Return the receipt of a file that has the lock's bytes, renewing it where only the receipt is amiss."""
    try:
        stat = final.stat()
        receipt = read_receipt(final)
        place = final.relative_to(data).as_posix()
        if receipt is not None and (receipt.sha256, receipt.path) == (entry.sha256, place):
            if (receipt.size, receipt.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return receipt
        if not S_ISREG(stat.st_mode):
            raise InputError(f"{final}: is not a plain file; move it away, then run again")
        if entry.size not in (None, stat.st_size) or (entry.sha256 is None and receipt is not None):
            return None
        sha256 = sha256_file(final)
        if entry.sha256 not in (None, sha256):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a folder of that name, no permission, a bad disk
        raise InputError(f"{final}: cannot be read: {error.strerror}; move it away, then run again") from None
    if entry.sha256 is None:  # killed between the file and its receipt
        _check_kind(final)
    return _write_receipt(final, stat, sha256, entry, lock, data)


def _check_kind(final: Path) -> None:
    """Refuse a file without a known hash that is plainly not what its name says; nothing of it is kept."""
    with final.open("rb") as file:
        head = file.read(512)
    known = MAGIC.get(final.suffix, ())
    if not head or looks_like_html(head) or (known and not head.startswith(known)):
        final.unlink()
        what = "an HTML page" if looks_like_html(head) else f"a file that begins with {head[:8]!r}"
        raise InputError(
            f"{final}: {what} came instead of a {final.suffix} file; nothing was kept; correct the lock"
        )


def _write_receipt(
    final: Path, stat: os.stat_result, sha256: str, entry: Entry, lock: Lock, data: Path
) -> Receipt:
    receipt = Receipt(
        shard=entry.name,
        path=final.relative_to(data).as_posix(),
        size=stat.st_size,
        sha256=sha256,
        url=lock.place(entry),
        mtime_ns=stat.st_mtime_ns,
        trust="lock" if entry.pinned else "first use",
    )
    try:
        write_json(receipt_path(final), receipt.model_dump())
    except OSError as error:
        raise cannot_write(receipt_path(final), error) from error
    return receipt


def _pack(lock: Lock, entry: Entry, final: Path, tick: Callable[[int], None]) -> Downloaded:
    """Make the one file that a folder's texts are kept in; each text must be the lock's."""
    if not lock.url.startswith("file:"):
        raise InputError(
            f"shard {entry.name}: is made of the texts of a folder, so its address must be one (file:), not {lock.url}"
        )
    try:
        with write_aside(final) as aside:
            sha256 = write_tar(local_path(lock.url), entry.texts, aside, tick)
            stat = aside.stat()
            if sha256 != entry.sha256:
                raise InputError(
                    f"shard {entry.name}: the same texts give another tar than the lock says (expected sha256 "
                    f"{entry.sha256}, got {sha256}); lock the folder again"
                )
    except OSError as error:
        raise cannot_write(final, error) from error
    return Downloaded(stat.st_size, sha256, None, stat)
