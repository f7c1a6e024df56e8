"""A web server on loopback that misbehaves on request: GET /<fault>/<name> sends the file `name` with `fault`.

It speaks HTTP over plain sockets, since a server that keeps the rules cannot lie about lengths.  A fault is a
row of answers: the n-th request of a path gets the n-th answer, and the last one stays.  `FAULTS` names some;
`server.faults["mine"] = (Answer(cut=1000), GOOD)` adds another; /503/<name> answers 503.  The same server is a
proxy that answers by itself when it is asked for a whole address.

    with FaultServer({"a": b"..."}) as server:
        requests.get(server.url("cut", "a"))
    print(server.sent, [request.start for request in server.requests])
"""

import fcntl
import gzip
import hashlib
import socket
import ssl
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

PIECE = 1 << 14  # bytes handed to the network at a time
PHRASES = {status.value: status.phrase for status in HTTPStatus}
HTML = b"\n <!DOCTYPE html><html><title>Log in</title></html>"


@dataclass(frozen=True)
class Answer:
    """How one request is answered; as it stands, in every way right."""

    status: int | None = None  # instead of 200, 206 or 416; its body is a page that says so
    change: Callable[[bytes], bytes] | None = None  # other bytes than the file's
    etag: str | None = None  # instead of a strong one, made of the bytes; "" is none
    headers: Mapping[str, str | None] = field(default_factory=dict)  # instead of, or beside; None takes away
    framing: Literal["length", "chunked", "close"] = "length"  # what tells the end of the body
    length: int | None = None  # the Content-Length told, instead of the true one
    ranges: Literal["kept", "ignored", "unconditional"] = "kept"  # the last does not look at If-Range
    shift: int = 0  # a 206 starts this far from where it should, and says so
    total: int | None = None  # the size told by a 206
    cut: int | float | None = None  # bytes, or the share, of the body that are sent
    end: Literal["close", "reset", "stall"] = "close"  # what follows the cut
    rate: float | None = None  # bytes per second, instead of the server's
    location: str | None = None  # a redirect; {name} and {server} stand for themselves
    raw: bytes | None = None  # instead of an answer in HTTP


@dataclass
class Request:
    """A request as it was seen, and the bytes of body sent for it so far."""

    method: str
    target: str  # as in the request line: a whole address if the server was taken for a proxy
    headers: dict[str, str]  # names in lower case
    at: float = field(default_factory=time.monotonic)
    sent: int = 0
    status: int = 0

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def host(self) -> str:
        return self.headers.get("host", "")

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def if_range(self) -> str | None:
        return self.headers.get("if-range")

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def accept_encoding(self) -> str | None:
        return self.headers.get("accept-encoding")

    @property
    def start(self) -> int | None:
        """Return where the range asked for starts; None if the whole file was asked for."""
        if self.range is None:
            return None
        return int(self.range.removeprefix("bytes=").partition("-")[0])


def flip(data: bytes) -> bytes:
    """Return the bytes with one bit changed, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def edit(data: bytes) -> bytes:
    """Return another file of the same size."""
    return data[::-1]


GOOD = Answer()
CUT = Answer(cut=2 / 3)
FAULTS: dict[str, tuple[Answer, ...]] = {
    "good": (GOOD,),
    "close": (Answer(framing="close"),),
    "chunked": (Answer(framing="chunked"),),
    # connections that end too soon
    "cut": (CUT, GOOD),
    "cut-always": (CUT,),
    "cut-at-once": (Answer(cut=0),),
    "reset": (Answer(cut=2 / 3, end="reset"), GOOD),
    "reset-always": (Answer(cut=0, end="reset"),),
    "close-cut": (Answer(framing="close", cut=2 / 3), GOOD),
    "close-cut-always": (Answer(framing="close", cut=2 / 3),),
    "chunked-cut": (Answer(framing="chunked", cut=2 / 3), GOOD),
    "chunked-cut-always": (Answer(framing="chunked", cut=2 / 3),),
    "chunked-no-end": (Answer(framing="chunked", cut=1.0),),
    "stall": (Answer(cut=1000, end="stall"), GOOD),
    "stall-always": (Answer(cut=1000, end="stall"),),
    "drip": (Answer(rate=40), GOOD),
    "drip-always": (Answer(rate=40),),
    "hang-up": (Answer(raw=b""),),
    # lengths that are not true
    "length-too-small": (Answer(length=100_000),),
    "longer": (Answer(change=lambda data: data + bytes(20_000_000)),),
    "longer-chunked": (Answer(change=lambda data: data + bytes(20_000_000), framing="chunked"),),
    "longer-close": (Answer(change=lambda data: data + bytes(20_000_000), framing="close"),),
    "shorter": (Answer(change=lambda data: data[:-1]),),
    # answers to a range
    "range-ignored": (CUT, Answer(ranges="ignored")),
    "range-ignored-always-cut": (Answer(cut=2 / 3, ranges="ignored"),),
    "range-shifted": (CUT, Answer(shift=5), GOOD),
    "range-shifted-always": (Answer(shift=5, cut=2 / 3),),
    "range-other-total": (CUT, Answer(total=7), GOOD),
    "range-416": (CUT, Answer(status=416), GOOD),
    "range-416-other-total": (CUT, Answer(status=416, headers={"Content-Range": "bytes */7"}), GOOD),
    "416-always": (Answer(status=416),),
    # a file that changes under the reader
    "changed": (CUT, Answer(change=edit)),
    "changed-and-back": (CUT, Answer(change=edit, ranges="unconditional"), GOOD),
    "changed-unseen": (CUT, Answer(change=edit, ranges="unconditional")),
    "changed-same-etag": (
        Answer(cut=2 / 3, etag='"same"'),
        Answer(change=edit, etag='"same"'),
        Answer(etag='"same"'),
    ),
    "weak-etag": (Answer(cut=2 / 3, etag='W/"x"'), Answer(etag='W/"x"')),
    "no-etag": (Answer(cut=2 / 3, etag=""), Answer(etag="")),
    # other bytes than the file's
    "flipped": (Answer(change=flip), GOOD),
    "flipped-always": (Answer(change=flip),),
    "html": (Answer(change=lambda _: HTML, headers={"Content-Type": "text/html"}),),
    "html-close": (Answer(change=lambda _: HTML, framing="close"),),
    "html-chunked": (Answer(change=lambda _: HTML, framing="chunked"),),
    "html-right-size": (Answer(change=lambda data: HTML.ljust(len(data))),),
    "html-by-type": (Answer(headers={"Content-Type": "text/html; charset=utf-8"}),),
    "gzip": (Answer(change=gzip.compress, headers={"Content-Encoding": "gzip"}),),
    "gzip-bomb": (
        Answer(change=lambda _: gzip.compress(bytes(50_000_000), 1), headers={"Content-Encoding": "gzip"}),
    ),
    "says-gzip": (Answer(headers={"Content-Encoding": "gzip"}),),
    "says-x-gzip": (Answer(headers={"Content-Encoding": "x-gzip"}),),
    "says-br": (Answer(headers={"Content-Encoding": "br"}),),
    "says-identity": (Answer(headers={"Content-Encoding": "identity"}),),
    "empty": (Answer(change=lambda _: b""),),
    "empty-close": (Answer(change=lambda _: b"", framing="close"),),
    "empty-chunked": (Answer(change=lambda _: b"", framing="chunked"),),
    # "later"
    "burst": (*[Answer(status=503)] * 3, GOOD),
    # redirects
    "redirect": (Answer(location="/good/{name}"),),
    "redirect-4": (Answer(location="/redirect/{name}"),),
    "redirect-3": (Answer(location="/redirect-4/{name}"),),
    "redirect-2": (Answer(location="/redirect-3/{name}"),),
    "redirect-1": (Answer(location="/redirect-2/{name}"),),  # five in all
    "redirect-0": (Answer(location="/redirect-1/{name}"),),
    "loop": (Answer(location="/loop/{name}"),),
    "signed": (Answer(location="/expires/{name}?Signature=sesame"),),
    "expires": (CUT, Answer(status=403), GOOD),
    "signed-expired": (Answer(location="/403/{name}?Signature=sesame"),),
    # not HTTP, or hardly
    "garbage": (Answer(raw=bytes(range(256)) * 40), GOOD),
    "garbage-always": (Answer(raw=bytes(range(256)) * 40),),
    "huge-header": (Answer(headers={"X-Padding": "x" * 200_000}),),
    "many-headers": (Answer(headers={f"X-{n}": "x" for n in range(500)}),),
}


class FaultServer:
    """The server; it runs from `with` to its end."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        rate: float | None = None,
        certificate: Path | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """Serve `files` by their names, at `rate` bytes per second; over TLS with a PEM `certificate` and key."""
        self.files = dict(files)
        self.faults = dict(FAULTS)
        self.rate = rate
        self.requests: list[Request] = []
        self.unknown: list[str] = []  # paths of which the server was never told
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self._listener = socket.create_server((host, 0), backlog=64)
        self._listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16
        )  # little lies unread in between
        self.port: int = self._listener.getsockname()[1]
        self.origin = f"{'http' if certificate is None else 'https'}://{host}:{self.port}"

    def url(self, fault: str, name: str = "a") -> str:
        """Return the address of a file with a fault."""
        return f"{self.origin}/{fault}/{name}"

    @property
    def sent(self) -> int:
        """Return the bytes of all bodies sent so far."""
        return sum(request.sent for request in list(self.requests))

    @property
    def starts(self) -> list[int | None]:
        """Return where each request that was not redirected wanted to start."""
        return [
            request.start for request in list(self.requests) if request.status not in (301, 302, 303, 307)
        ]

    def forget(self) -> None:
        """Forget the requests and begin the row of answers of each path anew."""
        with self._lock:
            self.requests.clear()
            self._attempts.clear()

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        if self.unknown and error is None:
            raise AssertionError(f"the fault server knows no {', '.join(self.unknown)}")

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        talk = connection
        try:
            if self._tls is not None:
                talk = self._tls.wrap_socket(connection, server_side=True)  # takes the other one's place
                with self._lock:
                    self._connections.add(talk)
            while not self._over.is_set() and (request := _read_request(talk)) is not None:
                if not self._answer(talk, request):
                    break
        except (OSError, ValueError):  # the client went away, or this is no request
            pass
        finally:
            talk.close()
            connection.close()
            with self._lock:
                self._connections -= {connection, talk}

    def _choose(self, request: Request) -> tuple[Answer, bytes, str]:
        """Return the answer due to a request, the file and its name."""
        _, fault, name = (*request.path.split("/", 2), "", "")[:3]
        row = (Answer(status=int(fault)),) if fault.isdigit() else self.faults.get(fault, ())
        with self._lock:
            attempt = self._attempts[request.path]
            self._attempts[request.path] += 1
            self.requests.append(request)
        if not row or name not in self.files:
            self.unknown.append(request.path)
            return Answer(status=404), b"", name
        return row[min(attempt, len(row) - 1)], self.files[name], name

    def _answer(self, talk: socket.socket, request: Request) -> bool:
        """Answer one request; True if another may follow on the same connection."""
        answer, data, name = self._choose(request)
        if answer.raw is not None:
            self._send(talk, None, answer.raw, answer)
            return False
        status, body, headers = self._compose(request, answer, data, name)
        request.status = status
        headers |= answer.headers
        phrase = PHRASES.get(status, "Something")
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        talk.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if request.method == "HEAD" or status in (204, 304):
            return True
        cut = len(body)
        if answer.cut is not None:
            cut = int(len(body) * answer.cut) if isinstance(answer.cut, float) else min(answer.cut, cut)
        self._send(talk, request, body[:cut], answer)
        if answer.cut is None and answer.framing == "chunked":
            talk.sendall(b"0\r\n\r\n")
        if answer.cut is not None:
            self._break_off(talk, answer)
        true = answer.cut is None and answer.length is None and not answer.headers
        return true and answer.framing != "close"

    def _compose(
        self, request: Request, answer: Answer, data: bytes, name: str
    ) -> tuple[int, bytes, dict[str, str | None]]:
        """Return the status, the body and the headers."""
        whole = data if answer.change is None else answer.change(data)
        etag = f'"{hashlib.sha256(whole).hexdigest()[:16]}"' if answer.etag is None else answer.etag
        headers: dict[str, str | None] = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if etag:
            headers["ETag"] = etag
        same = request.if_range in (None, etag) and not (request.if_range or "").startswith("W/")
        start, status, body = request.start, 200, whole
        if answer.location is not None:
            status, body = 302, b""
            place = answer.location.replace("{name}", name).replace("{server}", self.origin)
            headers["Location"] = place
        elif answer.status is not None:
            status, body = answer.status, b"" if answer.status == 204 else HTML
        elif start is None or answer.ranges == "ignored" or not (same or answer.ranges == "unconditional"):
            pass
        elif start >= len(whole):
            status, body = 416, b""
            headers["Content-Range"] = f"bytes */{len(whole)}"
        else:
            start += answer.shift
            status, body = 206, whole[start:]
            total = len(whole) if answer.total is None else answer.total
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{total}"
        if answer.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif answer.framing == "length" and status != 204:
            headers["Content-Length"] = str(len(body) if answer.length is None else answer.length)
        if answer.framing == "close":
            headers["Connection"] = "close"
        return status, body, headers

    def _send(self, talk: socket.socket, request: Request | None, body: bytes, answer: Answer) -> None:
        """Send a body piece by piece; the pieces are counted before they go, so that no reader is ahead."""
        rate = answer.rate or self.rate
        piece = PIECE if rate is None else max(1, min(PIECE, int(rate / 50)))
        began = time.monotonic()
        for at in range(0, len(body), piece):
            part = body[at : at + piece]
            if request is not None:
                request.sent += len(part)
                if answer.framing == "chunked":
                    part = b"%x\r\n%b\r\n" % (len(part), part)
            talk.sendall(part)
            if rate is not None:
                ahead = (at + piece) / rate - (time.monotonic() - began)
                if ahead > 0 and self._over.wait(ahead):
                    return

    def _break_off(self, talk: socket.socket, answer: Answer) -> None:
        if answer.end == "stall":
            talk.recv(1)  # returns when the client, or the server, has had enough
        elif answer.end == "reset":
            deadline = time.monotonic() + 5
            while _unread(talk) and time.monotonic() < deadline:  # what was sent before shall arrive
                if talk.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self._over.wait(0.001):
                    return  # the client has gone already
            talk.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _unread(talk: socket.socket) -> int:
    """Return the bytes that the other side's system has not yet got."""
    return int(struct.unpack("i", fcntl.ioctl(talk, termios.TIOCOUTQ, bytes(4)))[0])


def _read_request(talk: socket.socket) -> Request | None:
    """Read one request without a body; None at the end of the connection."""
    head = b""
    while b"\r\n\r\n" not in head:
        got = talk.recv(1 << 16)
        if not got:
            return None
        head += got
    lines = head.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return Request(method, target, {name.lower(): value for name, value in headers.items()})
