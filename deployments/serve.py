"""`make serve`: Prefect's server, the work pool, the deployments and a worker, from one command.

    python -m deployments.serve

While it runs, a second terminal in the checkout can type `prefect deployment run pretrain/demo --watch`: the
server's address stands in `.env`, which Prefect reads in the folder it is started in.  Ctrl-C stops everything.
Prefect is started through its command line only, so this launcher stays a small parent.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from corpora.errors import InputError, Unavailable, run_cli

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / ".prefect" / "server.log"
DOTENV = ROOT / ".env"
MARK = "# written by `make serve`, removed when it stops"
POOL = "pileline"
START_UP = 180.0  # seconds; a busy small machine needs most of a minute
GRACE = 30.0


def until_stopped() -> None:
    """Serve; Ctrl-C and SIGTERM are the usual way to end that, so they are no failure."""
    with suppress(KeyboardInterrupt):
        main()
    print("stopped")


def main() -> None:
    """Serve until interrupted, or until the server or the worker ends."""
    # A shell that puts this into the background makes it ignore SIGINT, and the children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    host = os.environ.get("PREFECT_SERVER_API_HOST") or "127.0.0.1"
    port = _port(os.environ.get("PREFECT_SERVER_API_PORT") or "4200")
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: whoever reaches {host}:{port} can run flows here; set PREFECT_SERVER_API_AUTH_STRING"
        )
    _refuse_taken(host, port, url)
    environment = settings(url, host, port)
    with ExitStack() as stack:
        server = stack.enter_context(_server(environment, url))
        _set_up(environment)
        stack.enter_context(dotenv(f"{url}/api"))
        worker = stack.enter_context(_process("worker", ["worker", "start", "--pool", POOL], environment))
        print(
            f"\nPileline serves.  User interface: {url}/v2   server log: {LOG.relative_to(ROOT)}\n"
            f"In a second terminal, here:  prefect deployment run pretrain/demo --watch\n"
            f"Ctrl-C stops the worker and the server.\n",
            flush=True,
        )
        while True:
            for name, process in (("server", server), ("worker", worker)):
                if process.poll() is not None:
                    raise Unavailable(f"the {name} ended with exit code {process.returncode}; see {LOG}")
            time.sleep(0.5)


def settings(url: str, host: str, port: int) -> dict[str, str]:
    """Return the environment of the server, the worker and the commands.  A setting of the user's wins."""
    own = {
        # A page of another site in the same browser must neither read from nor write to this server.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{port}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # In memory, as is the default, a restart forgets who holds a slot, and the slot stays taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    fixed = {
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    return own | os.environ | fixed


@contextmanager
def dotenv(api: str, path: Path = DOTENV) -> Iterator[None]:
    """Tell the other terminals the server's address for as long as it is there.

    A `.env` of the user's own is left as it is; one that a killed predecessor left behind is replaced.
    """
    if path.exists() and MARK not in path.read_text("utf-8"):
        print(f"{path.name} is yours and stays as it is; in a second terminal: export PREFECT_API_URL={api}")
        yield
        return
    path.write_text(f"{MARK}\nPREFECT_API_URL={api}\n", "utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: now the children are being stopped
    raise KeyboardInterrupt


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise InputError(f"PREFECT_SERVER_API_PORT is {text!r}; it must be a number from 1 to 65535")
    return int(text)


def _refuse_taken(host: str, port: int, url: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{url} cannot be served: {error.strerror}; stop the server that has the port, "
                "or choose another with PREFECT_SERVER_API_PORT"
            ) from None


@contextmanager
def _server(environment: Mapping[str, str], url: str) -> Iterator["subprocess.Popen[bytes]"]:
    LOG.parent.mkdir(mode=0o700, exist_ok=True)
    print(f"starting the server on {url} ...", flush=True)
    with (
        LOG.open("wb") as log,
        _process("server", ["server", "start"], environment, log.fileno()) as server,
    ):
        until = time.monotonic() + START_UP
        while not _healthy(url):
            if server.poll() is not None:
                raise Unavailable(f"the server did not start: {_last_line()}; see {LOG}")
            if time.monotonic() > until:
                raise Unavailable(f"the server did not answer in {START_UP:.0f} s; see {LOG}")
            time.sleep(0.3)
        yield server


def _set_up(environment: Mapping[str, str]) -> None:
    """Make the work pool, the limits and the deployments; each is left as it is when it is there."""
    print("making the work pool and the deployments ...", flush=True)
    _prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"], environment)
    for limit, slots in (("gpu", 1), ("downloads", 4)):
        _prefect(["gcl", "create", limit, "--limit", str(slots)], environment, may_say="already exists")
    _prefect(["--no-prompt", "deploy", "--all"], environment)


def _prefect(arguments: Sequence[str], environment: Mapping[str, str], may_say: str | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode and not (may_say and may_say in done.stdout):
        said = " ".join(done.stdout.split())[-400:]
        raise InputError(f"`prefect {' '.join(arguments)}` failed with exit code {done.returncode}: {said}")


@contextmanager
def _process(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], output: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a prefect command in a group of its own, and stop the group at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        start_new_session=True,  # a Ctrl-C comes to us alone; we stop the worker first, then the server
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            print(f"stopping the {name} ...", flush=True)
        _stop(process)


def _die_with_parent() -> None:
    """A child is told to end when this launcher is killed without a chance to do so itself (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process to leave, what it has started first; kill its group after the grace.

    The worker has started flow runs.  Each of them stops its trainer, which saves, and tells the server that
    it crashed; a worker that is stopped over their heads would leave them shown as running for ever.
    """
    with suppress(KeyboardInterrupt):  # an impatient second Ctrl-C goes on to SIGKILL
        children = _children(process.pid)
        for child in children:
            _signal(os.kill, child, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while set(children) & set(_children(process.pid)) and time.monotonic() < until:
            time.sleep(0.2)
        _signal(os.kill, process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal(os.killpg, process.pid, signal.SIGKILL)
    process.wait()


def _children(parent: int) -> list[int]:
    """Return the processes that `parent` has started, where the system tells (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            _, ppid, *_ = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(ppid) == parent:
                found.append(int(stat.parent.name))
    return found


def _signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        send(target, number)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _last_line() -> str:
    lines = LOG.read_text("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


if __name__ == "__main__":
    run_cli(until_stopped)
