"""Download: speed beside curl and sha256sum, memory, and 200 random cuts and kills.

The speed is that of one file over loopback, rounds taken in turn, each reader in a process of its own; the
peer is `curl -o FILE URL` and then `sha256sum FILE`, and both at once by way of `tee`.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "corpora"))
from fault_server import GOOD, Answer, FaultServer

SIZES = (64 << 20, 2 << 30)  # bytes; memory must be the same for both
ROUNDS = 5
KILLS = 200
SMALL = 6_000_000  # bytes of the file that is killed and cut
PEERS = {
    "curl, then sha256sum": 'curl -sS -o "$1" "$0" && sha256sum "$1"',
    "curl | tee | sha256sum": 'curl -sS "$0" | tee "$1" | sha256sum',
}
FETCH = """\
import json, resource, sys, time
from pathlib import Path
from corpora.download import Wanted, download
from corpora.patience import Patience
url, size, sha256, final = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
start = time.perf_counter()
download(Wanted("the file", url, size, sha256), final, patience=Patience(backoff=0.01, read=2))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak * (1 if sys.platform == "darwin" else 1024)}))
"""


class _Server(BaseHTTPRequestHandler):
    """Send a file as fast as the system can."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with (self.server.folder / self.path.lstrip("/")).open("rb") as file:  # type: ignore[attr-defined]
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.connection.sendfile(file)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Print the table; fail when a file is torn or wrongly accepted."""
    with tempfile.TemporaryDirectory(prefix="pileline-bench-") as folder:
        root = Path(folder)
        rows = [*_speed(root), *_kills(root)]
    print("| figure | value |")
    print("|---|---|")
    for what, value in rows:
        print(f"| {what} | {value} |")


def _speed(root: Path) -> list[tuple[str, str]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        server.folder = root  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        peaks = []
        for size in SIZES:
            sha256 = _make(root / "file", size)
            took: dict[str, list[float]] = {name: [] for name in ("ours", *PEERS)}
            for turn in range(ROUNDS if size == SIZES[-1] else 1):
                for name in list(took)[turn % 3 :] + list(took)[: turn % 3]:  # everyone is first at times
                    (root / "out").unlink(missing_ok=True)
                    if name == "ours":
                        told = _fetch(f"{base}/file", size, sha256, root / "out")
                        took[name].append(told["seconds"])
                        continue
                    start = time.perf_counter()
                    command = ["sh", "-c", PEERS[name], f"{base}/file", str(root / "out")]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                    took[name].append(time.perf_counter() - start)
            peaks.append(told["peak"])
        server.shutdown()
    (root / "file").unlink()
    (root / "out").unlink()
    middle = {name: statistics.median(times) for name, times in took.items()}
    rows = [(f"{name}, MB/s", f"{SIZES[-1] / 1e6 / seconds:,.0f}") for name, seconds in middle.items()]
    rows += [(f"ours to {name}", f"{middle[name] / middle['ours']:.0%}") for name in middle if name != "ours"]
    sizes = " / ".join(f"{size >> 20:,}" for size in SIZES)
    rows.append((f"peak memory for {sizes} MiB", " / ".join(f"{peak / 1e6:.0f} MB" for peak in peaks)))
    return rows


def _make(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size >> 20):
            block = os.urandom(1 << 20)
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _command(url: str, size: int, sha256: str, final: Path) -> list[str]:
    return [sys.executable, "-c", FETCH, url, str(size), sha256, str(final)]


def _fetch(url: str, size: int, sha256: str, final: Path) -> dict[str, float]:
    final.unlink(missing_ok=True)
    done = subprocess.run(_command(url, size, sha256, final), check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _kills(root: Path) -> list[tuple[str, str]]:
    """Cut and kill downloads at random until there were KILLS of it; every file must come out right."""
    chance = random.Random(3)
    data = chance.randbytes(SMALL)
    sha256 = hashlib.sha256(data).hexdigest()
    kills = cuts = wrong = files = misplaced = 0
    extra = 0
    while kills + cuts < KILLS:
        shutil.rmtree(root / "out", ignore_errors=True)
        final = root / "out" / "file"
        with FaultServer({"a": data}, rate=12e6) as server:
            row = [
                Answer(cut=chance.random(), end=chance.choice(("close", "reset")))
                for _ in range(chance.randrange(3))
            ]
            server.faults["row"] = (*row, GOOD)
            killed = True
            while killed:
                child = subprocess.Popen(
                    _command(server.url("row"), SMALL, sha256, final),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                try:
                    child.wait(chance.uniform(0.2, 1.2))
                    killed = False
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    kills += 1
                part = final.with_name("file.part")
                kept = part.stat().st_size if killed and part.exists() else None
                asked = len(server.starts)
                if killed and final.exists() and final.read_bytes() != data:
                    wrong += 1
                if kept:
                    child = subprocess.Popen(
                        _command(server.url("row"), SMALL, sha256, final),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                    child.wait()
                    killed = False
                    misplaced += kept < SMALL and server.starts[asked : asked + 1] != [kept]
            cuts += min(len(row), max(0, len(server.starts) - 1))
            files += 1
            wrong += child.returncode != 0 or not final.exists() or final.read_bytes() != data
            wrong += final.with_name("file.part").exists()
            extra += server.sent - SMALL
    if wrong or misplaced:
        sys.exit(f"error: {wrong} files are torn, wrong or missing; {misplaced} continued at the wrong place")
    return [
        ("random SIGKILLs, and random cuts by the server", f"{kills}, {cuts}"),
        (
            "files torn, wrongly accepted or missing; continued elsewhere than at the part's end",
            f"{wrong}; {misplaced}",
        ),
        (
            "bytes sent twice, for each kill (what was on its way)",
            f"{extra / max(1, kills):,.0f} of {SMALL:,}",
        ),
    ]
