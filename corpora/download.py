"""One URL to one file: continued where it was cut, hashed on the way, checked, fsynced, renamed.

    NAME.part        what has come so far; its writer holds a lock on it
    NAME.part.json   which file that is the beginning of: hash of the URL, strong ETag, expected digest
    NAME             only ever the whole, checked file

A part outlives everything but wrong content: a lost network, SIGKILL, a full disk.  The next run hashes it
again and asks for the rest.  Nothing is believed but the digest: a server that ignores a Range, answers another
one, or has another file by now costs time, never a torn file.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from corpora import local
from corpora.addresses import shown
from corpora.errors import InputError, Unavailable
from corpora.files import commit, read_json, write_json
from corpora.part import cannot_write, claimed, meta_of
from corpora.patience import Again, Effort, Patience
from corpora.web import CHUNK, Answer, ask, small

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to come from a URL."""

    what: str  # how messages name it: "shard train/00"
    url: str
    size: int | None = None  # in bytes; None: not known
    sha256: str | None = None  # hex; None: not known, so the first one that comes is trusted
    md5: str | None = None  # hex; what older checkpoints are listed with
    source: str | None = None  # where size and digest are known from; said when they are contradicted

    @property
    def digest(self) -> str | None:
        """The digest that decides, in lower case."""
        return (self.sha256 or self.md5 or "").lower() or None


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A file that lies under its final name, whole."""

    size: int
    sha256: str
    etag: str | None
    stat: os.stat_result  # of the bytes that were hashed: a later edit differs from it


def download(
    wanted: Wanted,
    final: Path,
    progress: Callable[[int], None] | None = None,
    patience: Patience | None = None,
    already: Callable[[], bool] | None = None,
    *,
    link: bool = False,
) -> Downloaded | None:
    """Bring the file of a URL (http, https, file) to `final`; whatever was there is replaced in the end.

    `progress` is told bytes as they land: first those of a part that is continued, a negative number when the
    part had to be dropped, 0 while waiting; what it raises stops the download, the part stays.  If another
    process is at the same file, this one waits, then asks `already`, and returns None when that says True.
    With `link`, a file of the same file system gets a second name instead of a second copy.
    Raises InputError for what a retry cannot mend (nothing is kept, but for a part that met a full disk), and
    Unavailable when `patience` ends (the part is kept).
    """
    tick = progress or (lambda _: None)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with claimed(final, tick) as (part, file, waited):
            if waited and already is not None and already():
                return None
            here = urlsplit(wanted.url).scheme == "file"
            if here and link and (linked := local.link(wanted.url, wanted.size, wanted.digest, final, tick)):
                sha256, stat = linked
                return Downloaded(stat.st_size, sha256, None, stat)
            transfer = _Transfer(wanted, part, file, tick, patience or Patience())
            transfer.copy() if here else transfer.run()
            stat = os.fstat(file.fileno())
            transfer.meta.unlink(missing_ok=True)
            commit(part, final)
            return Downloaded(stat.st_size, transfer.sha256.hexdigest(), transfer.etag, stat)
    except OSError as error:  # of the destination: reading the source has its own errors
        raise cannot_write(final, error) from error


def get(url: str, limit: int, patience: Patience | None = None) -> bytes:
    """Return a small file, whole: a list, an answer.  Raises NotThere, InputError or Unavailable."""
    if urlsplit(url).scheme != "file":
        return small(url, limit, patience)[0]
    with local.source(url) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{shown(url)}: more than {limit:,} bytes, too much for what it should be")
    return content


def looks_like_html(head: bytes) -> bool:
    """Tell a page (of a login, a proxy, an error) by its first bytes."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<head"))


class _Transfer:
    """The part's way to the whole file."""

    def __init__(
        self, wanted: Wanted, part: Path, file: BinaryIO, tick: Callable[[int], None], patience: Patience
    ) -> None:
        self.wanted, self.part, self.file, self.tick, self.patience = wanted, part, file, tick, patience
        self.meta = meta_of(part)
        self.etag: str | None = None
        self.total = wanted.size  # of the whole file, as far as known
        self.size = 0  # of the part
        self.head = b""  # its first bytes
        self.mark = 0  # the size at the last progress
        self.restarts = 0
        self._begin_hashes()

    def _begin_hashes(self) -> None:
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if self.wanted.md5 and not self.wanted.sha256 else None

    def run(self) -> None:
        """Return when the part holds the whole file, checked."""
        wanted = self.wanted
        self._resume()
        effort = Effort(wanted.url, self.patience, self.tick)
        second_chance = True
        while True:
            before = self.size
            try:
                if self.total is None or self.size != self.total:
                    self._attempt(effort)
                if not self._is_right():
                    second_chance = self._wrong_digest(second_chance)
                    continue
                if wanted.digest is None and (not self.size or looks_like_html(self.head)):
                    raise self._wrong("a file", "an HTML page" if self.size else "nothing")
                return
            except Again as fault:
                state = f" from {self.size:,} bytes" if self.size else ""
                wait = effort.failed(fault, state, moved=self.size > before)
                log.warning("%s: %s; trying again%s in %.0f s", wanted.what, fault, state, wait)
                effort.pause(wait)

    def copy(self) -> None:
        """Fill the part from a file on this machine, anew each time."""
        self._truncate()
        with local.source(self.wanted.url) as source:
            while chunk := local.read(source, self.wanted.url):
                self._write(chunk)
        if self.wanted.size not in (None, self.size):
            raise self._wrong(f"{self.wanted.size:,} bytes", f"{self.size:,}")
        if not self._is_right():
            raise self._wrong(*self._digests())

    def _resume(self) -> None:
        """Take the part that is there for the file's beginning, if it can be that."""
        size = os.fstat(self.file.fileno()).st_size
        if size:
            known = self._read_meta()
            digest = self.wanted.digest
            fits = known.get("digest") == digest and (digest or known.get("etag"))
            if not known and digest:
                fits = True  # killed between two files; the digest will tell
            if not fits or (self.total is not None and size > self.total):
                return self._truncate()
            self.etag = known.get("etag") if known.get("from") == self._from() else None
            self.file.seek(0)
            while chunk := self.file.read(CHUNK << 2):
                self._count(chunk)
            self.mark = self.size
            log.info("%s: going on from %s bytes", self.wanted.what, f"{self.size:,}")
        return None

    def _read_meta(self) -> dict[str, Any]:
        try:
            found = read_json(self.meta)
        except InputError:
            return {}
        return found if isinstance(found, dict) else {}

    def _attempt(self, effort: Effort) -> None:
        """Ask for what is missing, and write it; return at what looks like the end."""
        headers = {"Range": f"bytes={self.size}-"} if self.size else {}
        with ask(self.wanted.url, self.patience, headers) as answer:
            if answer.status == 416:
                return self._nothing_more(answer)
            self._check_start(answer)
            self._check_length(answer)
            self._remember(answer)
            self._check_space()
            self._receive(answer, effort)
        if self.total is not None and self.size < self.total:
            page = answer.length is None and looks_like_html(self.head)
            if answer.chunked or page:  # it is whole, and another file
                raise self._wrong(f"{self.total:,} bytes", f"{self.size:,}")
            raise Again(f"it ended after {self.size:,} of {self.total:,} bytes")
        return None

    def _nothing_more(self, answer: Answer) -> None:
        """The server says that nothing comes after the part: then it is whole, or of another file."""
        _, total = answer.range
        expected = self.wanted.size or total or self.total
        same = self.wanted.digest or (answer.etag and answer.etag == self.etag)
        if not (self.size and same and expected in (None, self.size) and self._is_right()):
            self._restart("the server has nothing that follows it (416)")
            raise Again("the server refused the range (416)")
        self.total = self.size

    def _check_start(self, answer: Answer) -> None:
        """See that what comes follows the part; drop the part where it does not."""
        if answer.status == 206:
            first, total = answer.range
            why = None
            if first != self.size:
                why = "the server sent another range than asked for"
            elif self.total is not None and total not in (None, self.total):
                why = f"the server now says {total:,} bytes in all"
            elif not self.wanted.digest and not (answer.etag and answer.etag == self.etag):
                why = "the server does not say that the file is still the same"
            elif self._is_another(answer):
                why = "the server has another file by now (its ETag changed)"
            if why:
                self._restart(why)
                raise Again(why)
            self.total = self.total or total
        elif self.size:
            self._restart("the server cannot continue a download (it has no ranges)")

    def _is_another(self, answer: Answer) -> bool:
        linked = answer.linked_sha256
        if linked and linked == self.wanted.sha256:
            return False  # the hub has vouched for it; which of its mirrors' ETags came is no matter
        return bool(answer.etag and self.etag and answer.etag != self.etag)

    def _check_length(self, answer: Answer) -> None:
        """Refuse at once what cannot become the file: another size, a page, no end to be known."""
        wanted = self.wanted
        linked = answer.linked_sha256
        if linked and wanted.sha256 and linked != wanted.sha256:
            raise self._wrong(f"sha256 {wanted.sha256}", linked)
        if wanted.digest is None and "text/html" in answer.headers.get("Content-Type", "").lower():
            raise self._wrong("a file", "an HTML page")
        if answer.length is not None:
            said = self.size + answer.length
            if self.total is None:
                self.total = said
            elif said != self.total and answer.status == 200:
                if not self.head:
                    with suppress(Again):
                        self.head = answer.read()[:512]
                raise self._wrong(f"{self.total:,} bytes", f"{said:,}")
        elif self.total is None and not answer.chunked and wanted.digest is None:
            raise InputError(
                f"{shown(wanted.url)}: the server tells no length, so that an end could not be told from a lost "
                "connection; put the file's size or sha256 into the lock, or use another mirror"
            )

    def _remember(self, answer: Answer) -> None:
        if not self.size:
            self.etag = answer.etag
            write_json(self.meta, {"from": self._from(), "etag": self.etag, "digest": self.wanted.digest})

    def _from(self) -> str:
        """Return what stands for the URL, which may hold a secret."""
        return hashlib.sha256(self.wanted.url.encode()).hexdigest()

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.part.parent).free
        missing = (self.total or 0) - self.size
        if missing > free:
            raise InputError(
                f"{self.part.parent}: no space: {self.wanted.what} needs {missing:,} bytes more, {free:,} are "
                "free; free some, or choose a folder on a larger disk"
            )

    def _receive(self, answer: Answer, effort: Effort) -> None:
        while chunk := answer.read():
            if self.total is not None and self.size + len(chunk) > self.total:
                raise self._wrong(f"{self.total:,} bytes", "more")
            self._write(chunk)
            self._progressed(effort)

    def _progressed(self, effort: Effort) -> None:
        if self.size - self.mark >= self.patience.least:
            self.mark = self.size
            effort.progressed()

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            rest = rest[self.file.write(rest) :]
        self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self.head = self.head or chunk[:512]
        self.size += len(chunk)
        self.sha256.update(chunk)
        if self.md5:
            self.md5.update(chunk)
        self.tick(len(chunk))

    def _restart(self, why: str) -> None:
        """Drop the part and begin anew; a server that brings this about for ever is given up."""
        self.restarts += 1
        if self.restarts > self.patience.tries:
            raise Unavailable(
                f"{shown(self.wanted.url)}: begun anew {self.restarts - 1} times, the last time because {why}; "
                "use another mirror, or run again later"
            )
        log.warning("%s: begun anew, because %s", self.wanted.what, why)
        self._truncate()

    def _truncate(self) -> None:
        self.file.truncate(0)
        self.file.seek(0)
        self.tick(-self.size)
        self.size = self.mark = 0
        self.total = self.wanted.size
        self.head = b""
        self._begin_hashes()

    def _is_right(self) -> bool:
        expected, got = self._digests()
        return expected == got or self.wanted.digest is None

    def _digests(self) -> tuple[str, str]:
        if self.md5:
            return f"md5 {self.wanted.digest}", f"md5 {self.md5.hexdigest()}"
        return f"sha256 {self.wanted.digest}", f"sha256 {self.sha256.hexdigest()}"

    def _wrong_digest(self, second_chance: bool) -> bool:
        if not second_chance or looks_like_html(self.head):
            raise self._wrong(*self._digests())
        self._restart(f"its {self._digests()[0].split()[0]} is wrong")
        return False

    def _wrong(self, expected: str, got: str) -> InputError:
        """Drop the part, and say what came instead of the file."""
        head = self.head
        known = f" ({self.wanted.source})" if self.wanted.source else ""
        self._truncate()
        self.meta.unlink(missing_ok=True)
        looks = (
            " (it looks like an HTML page, of a login or a proxy perhaps)" if looks_like_html(head) else ""
        )
        return InputError(
            f"{self.wanted.what}: {shown(self.wanted.url)} is not the file that is wanted: expected {expected}{known}, "
            f"got {got}{looks}; nothing was kept; correct the URL or the lock"
        )
