"""One HTTP request, done with care: identity encoding, redirects that lead nowhere odd, logins that stay home.

`requests` does the protocol, proxies and ~/.netrc included.  What a server answers becomes a response to read
from, `Again` (another attempt may help), or an InputError (it will not).
"""

import email.utils
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from corpora.addresses import UNUSABLE, check_address, check_redirect, is_hub, login, shown
from corpora.errors import InputError
from corpora.patience import Again, Effort, NotThere, Patience

log = logging.getLogger(__name__)

CHUNK = 1 << 18
MAX_REDIRECTS = 5
LATER = (408, 425, 429)  # like 5xx, these say "later"


class _Watch:
    """Shut the connections of a request that drips: in its status line, its headers, its body, wherever.

    A timeout is only ever between two reads, so a server that sends a byte now and then would hold us for ever.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.sockets: list[socket.socket] = []
        self.received = 0
        self.why: str | None = None
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _run(self) -> None:
        before, window = 0, self.patience.window
        while not self._over.wait(window):
            if self.received - before < self.patience.least:
                self.why = f"only {self.received - before:,} bytes came in {window:g} s"
                for one in self.sockets:
                    with suppress(OSError):
                        # Not SSLSocket's own shutdown, which is not for another thread than the reader's.
                        socket.socket.shutdown(one, socket.SHUT_RDWR)
                return
            before = self.received


class _Adapter(requests.adapters.HTTPAdapter):
    """requests' transport, which tells the watch of every connection."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        super().__init__()

    def get_connection_with_tls_context(self, *arguments: Any, **keys: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*arguments, **keys)
        watch, kind = self.watch, pool.ConnectionCls

        class Watched(kind):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                watch.sockets.append(self.sock)

        pool.ConnectionCls = Watched
        return pool


class Answer:
    """A response to read from; `hops` are the redirects' headers before it, the first one first."""

    def __init__(self, response: requests.Response, hops: list[Mapping[str, str]], watch: _Watch) -> None:
        self.response, self.hops, self.watch = response, hops, watch
        self.status, self.headers = response.status_code, response.headers

    def read(self) -> bytes:
        """Return what has come, at most CHUNK bytes; b"" at the end.  Raises Again when it is lost."""
        try:
            chunk: bytes = self.response.raw.read1(CHUNK, decode_content=False) or b""
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise Again(self.watch.why or f"the connection was lost ({_reason(error)})") from None
        if not chunk and self.watch.why:  # shut by us, which looks like an end
            raise Again(self.watch.why)
        self.watch.received += len(chunk)
        return chunk

    @property
    def linked_sha256(self) -> str | None:
        """The file's sha256 as the Hugging Face hub tells it, before or after its redirect."""
        for headers in (*self.hops, self.headers):
            tag = headers.get("X-Linked-Etag", "").strip().removeprefix("W/").strip('"')
            if re.fullmatch("[0-9a-f]{64}", tag):
                return tag
        return None

    @property
    def linked_size(self) -> int | None:
        """The file's size as the hub tells it; some mirrors say 0, which is no size."""
        for headers in (*self.hops, self.headers):
            if re.fullmatch("[1-9][0-9]{0,17}", size := headers.get("X-Linked-Size", "").strip()):
                return int(size)
        return None

    @property
    def etag(self) -> str | None:
        """The strong ETag; a weak one does not promise the same bytes."""
        tag = self.headers.get("ETag", "").strip()
        return tag if re.fullmatch(r'"[^"]{1,400}"', tag) else None

    @property
    def length(self) -> int | None:
        """The body's length, where the server says one that can be believed."""
        text = self.headers.get("Content-Length", "").strip()
        return int(text) if re.fullmatch("[0-9]{1,18}", text) and not self.chunked else None

    @property
    def chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return bool(self.headers.get("Transfer-Encoding", "").strip())

    @property
    def range(self) -> tuple[int | None, int | None]:
        """First byte and total of Content-Range; None for what it does not say."""
        text = self.headers.get("Content-Range", "").strip()
        found = re.fullmatch(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)", text)
        first, total = found.groups() if found else (None, None)
        return int(first) if first else None, int(total) if total and total != "*" else None


@contextmanager
def ask(url: str, patience: Patience, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
    """Send one request, from `url` on; yield a 200, 206 or 416, the body unread.

    Raises Again, NotThere or InputError for everything else.
    """
    try:
        check_address(url)
    except ValueError as error:
        raise InputError(f"{error}; correct the URL") from None
    # identity: the hash is of the file, not of a gzip of it
    wanted = {"Accept-Encoding": "identity", **(headers or {})}
    hops: list[Mapping[str, str]] = []
    here = url
    with _Watch(patience) as watch, requests.Session() as session:
        session.mount("http://", _Adapter(watch))
        session.mount("https://", _Adapter(watch))
        while True:
            with _send(session, url, here, wanted, patience, watch) as response:
                target = session.get_redirect_target(response)
                if target is None:
                    answer = Answer(response, hops, watch)
                    _check(url, answer)
                    yield answer
                    return
            there = urljoin(here, target)
            check_redirect(url, here, there)
            hops.append(response.headers)
            here = there
            if len(hops) > MAX_REDIRECTS:
                raise InputError(
                    f"{shown(url)}: more than {MAX_REDIRECTS} redirects, one after another; correct the URL"
                )


def _send(
    session: requests.Session,
    url: str,
    here: str,
    headers: Mapping[str, str],
    patience: Patience,
    watch: _Watch,
) -> requests.Response:
    """Send one request and return the response, redirects not followed, the body unread."""
    auth = login(here)
    try:
        return session.get(
            here,
            stream=True,
            allow_redirects=False,
            headers=headers,
            auth=auth,
            timeout=(patience.connect, patience.read),
        )
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError):
        raise InputError(f"{shown(url)}: {UNUSABLE}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        why = _reason(error)
        if "CERTIFICATE_VERIFY_FAILED" in why:
            raise InputError(
                f"{shown(url)}: its certificate is not trusted ({why}); correct the URL, or name your own "
                "authority's certificates in REQUESTS_CA_BUNDLE"
            ) from None
        raise Again(watch.why or f"the connection failed ({why})") from None


def _check(url: str, answer: Answer) -> None:
    status = answer.status
    answered = f"{shown(url)}: the server answered {status}"
    if status in (200, 206):
        _check_encoding(url, answer)
    elif status == 416:
        pass
    elif status in (401, 403, 404, 410):
        refusal = _refusal(url, status)
        if answer.hops:  # perhaps a signed address that has run out; the origin signs anew
            raise Again(f"the server it redirects to answered {status}", otherwise=refusal)
        raise refusal
    elif status >= 500 or status in LATER:
        raise Again(f"the server answered {status}", _asked_wait(answer.headers))
    else:
        raise InputError(f"{answered} instead of 200 and a file; correct the URL")


def _refusal(url: str, status: int) -> InputError:
    answered = f"{shown(url)}: the server answered {status}"
    if is_hub(url) and status in (401, 404):
        answered += " (no such repository, or not for everyone)"
    if status in (404, 410):
        return NotThere(f"{answered}: no such file; correct the URL, or the path in the lock")
    cure = "set HF_TOKEN to a token of yours that may read it" if is_hub(url) else "put a login into ~/.netrc"
    return InputError(f"{answered}: access denied; accept the terms on its page, and {cure}")


def _check_encoding(url: str, answer: Answer) -> None:
    framing = answer.headers.get("Transfer-Encoding", "").strip().lower()
    if framing not in ("", "chunked"):  # http.client would hand out the framing with the file
        raise InputError(
            f"{shown(url)}: the server sends the file in a form ({framing[:40]!r}) that is not known"
        )
    encoding = answer.headers.get("Content-Encoding", "").strip().lower() or "identity"
    # Some servers say of a .gz file that it is a gzip-encoded something else; its bytes are the file's own.
    if encoding == "identity" or (encoding in ("gzip", "x-gzip") and urlsplit(url).path.endswith(".gz")):
        return
    raise InputError(
        f"{shown(url)}: the server sends the file encoded ({encoding[:40]!r}) although it was asked not to; "
        "use another mirror"
    )


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: Retry-After (seconds or date), or RateLimit's t."""
    after = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,18}", after):
        return float(after)
    if after:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    limit = re.search(r"\br=0\b.*?\bt=([0-9]{1,18})\b", headers.get("RateLimit", ""))  # "resolvers";r=0;t=55
    return float(limit[1]) + 1 if limit else None


def small(
    url: str, limit: int, patience: Patience | None = None, headers: Mapping[str, str] | None = None
) -> tuple[bytes, Mapping[str, str]]:
    """Return a small file, whole, and the answer's headers.  Raises NotThere, InputError or Unavailable."""
    patience = patience or Patience()
    effort = Effort(url, patience)
    while True:
        try:
            with ask(url, patience, headers) as answer:
                body = bytearray()
                while chunk := answer.read():
                    body += chunk
                    if len(body) > limit:
                        raise InputError(
                            f"{shown(url)}: more than {limit:,} bytes, too much for what it should be"
                        )
                if answer.length not in (None, len(body)):
                    raise Again(f"it ended after {len(body):,} of {answer.length:,} bytes")
                return bytes(body), answer.headers
        except Again as fault:
            _wait(url, effort, fault)


def head(url: str, patience: Patience | None = None) -> tuple[int | None, str | None]:
    """Return a file's size and, where the hub tells it, its sha256, without its body."""
    patience = patience or Patience()
    effort = Effort(url, patience)
    while True:
        try:
            # A GET whose body is not read: many a signed address and small server refuses HEAD.
            with ask(url, patience) as answer:
                if "text/html" in answer.headers.get("Content-Type", "").lower():
                    raise InputError(f"{shown(url)}: an HTML page came, not a file; correct the URL")
                return answer.linked_size or answer.length, answer.linked_sha256
        except Again as fault:
            _wait(url, effort, fault)


def _wait(url: str, effort: Effort, fault: Again) -> None:
    wait = effort.failed(fault)
    log.warning("%s: %s; trying again in %.0f s", shown(url), fault, wait)
    effort.pause(wait)


def _reason(error: BaseException) -> str:
    """Return the innermost cause: the outer texts carry addresses, signed ones of a redirect among them."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
