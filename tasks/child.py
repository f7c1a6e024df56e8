"""Run a command as a child process group: its lines come in, a cancel goes out, its death is one sentence.

Training and the CPU work of a shard are child processes: their memory and their crashes stay outside
Prefect's engine, and the command is the one that a person would type.
"""

import contextvars
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from corpora.errors import EXIT_INPUT, EXIT_UNAVAILABLE, InputError, PilelineError, Unavailable

log = logging.getLogger(__name__)

Event = dict[str, Any]
GRACE = 20.0  # seconds to save and leave; Prefect kills the flow's own process 30 s after a cancel

# A child must not outlive a parent that was killed with SIGKILL, or the next run would find a second trainer
# in its run folder.  The kernel watches the *thread* that forked; `run` keeps that thread until the child has
# ended.  The setting survives exec, so any command can be started this way.
DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
os.execv(sys.argv[2], sys.argv[2:])
"""

_running: set["subprocess.Popen[str]"] = set()
_stopping = threading.Event()


class Crashed(PilelineError):
    """A child ended in a way that it did not explain itself."""

    exit_code = 1


class Stopped(PilelineError):
    """The flow is being cancelled."""

    exit_code = 130


def python(module: str, *arguments: str | os.PathLike[str]) -> list[str]:
    """Return the command line of one of our modules."""
    return [sys.executable, "-m", module, *(os.fspath(argument) for argument in arguments)]


def run(
    command: Sequence[str], on_event: Callable[[Event], None] | None = None, grace: float = GRACE
) -> Event:
    """Run `command` to its end and return its result event.

    A line that is a JSON object with the key "event" goes to `on_event`, any other line to the log.  Exit
    code 2 is raised as InputError and 75 as Unavailable, with the child's own `error:` line.  Whatever
    interrupts the caller (a cancel arrives as an exception in the main thread) stops the whole group first.
    """
    raise_if_stopping()
    if sys.platform == "linux":
        launched = [sys.executable, "-ISc", DIE_WITH_PARENT, str(os.getpid()), *command]
    else:
        launched = list(command)
    process = subprocess.Popen(
        launched,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None and process.stderr is not None
    _running.add(process)
    complaints: list[str] = []
    # The context carries Prefect's run, without which the lines would not be shown beside the task.
    listener = threading.Thread(
        target=contextvars.copy_context().run, args=(_listen, process.stderr, complaints), daemon=True
    )
    result: Event | None = None
    try:
        listener.start()
        for line in process.stdout:
            event = _event(line)
            if event is None:
                log.info("%s", line.rstrip())
            elif event["event"] == "result":
                result = event
            elif on_event is not None:
                on_event(event)
        code = process.wait()
    except BaseException:
        _stop([process], grace)
        raise
    finally:
        _running.discard(process)
        process.stdout.close()
        listener.join(timeout=5)  # a grandchild that lives on could hold this pipe open
        if not listener.is_alive():
            process.stderr.close()
    raise_if_stopping()
    if code:
        raise _failure(command, code, complaints)
    if result is None:
        raise Crashed(f"`{_shown(command)}` ended well but told no result; this is a fault in it")
    return result


def stop_all(grace: float = GRACE) -> None:
    """Stop every child of this process and let none start until `allow` is called.

    A cancel is raised in the main thread only; threads that read from children would wait for their end.
    """
    _stopping.set()
    _stop(list(_running), grace)


def allow() -> None:
    """Let children start (again): a new flow run begins."""
    _stopping.clear()


def raise_if_stopping() -> None:
    """Leave a task's thread when the flow is being cancelled."""
    if _stopping.is_set():
        raise Stopped("stopped, because the flow was cancelled")


def _stop(processes: Sequence["subprocess.Popen[str]"], grace: float) -> None:
    """Ask each group to leave; after `grace` seconds, kill what is left of it."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    waiter = threading.Event()
    for _ in range(int(grace * 20)):
        if all(process.poll() is not None for process in processes):
            break
        waiter.wait(0.05)
    for process in processes:
        _signal_group(process, signal.SIGKILL)  # also what a child that left in time has left behind
        process.wait()


def _signal_group(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _event(line: str) -> Event | None:
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _listen(stderr: TextIO, complaints: list[str]) -> None:
    for line in stderr:
        text = line.rstrip()
        if text.startswith("error: "):
            complaints.append(text)  # becomes the exception's message, no need to say it twice
        elif text:
            complaints.append(text)
            log.warning("%s", text)
        del complaints[:-50]


def _failure(command: Sequence[str], code: int, complaints: Sequence[str]) -> PilelineError:
    said = [line.removeprefix("error: ") for line in complaints if line.startswith("error: ")]
    last = said[-1] if said else (complaints[-1].strip() if complaints else "")
    if code == EXIT_INPUT and last:
        return InputError(last)
    if code == EXIT_UNAVAILABLE and last:
        return Unavailable(last)
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; often the machine ran out of memory" if name == "SIGKILL" else ""
        return Crashed(f"`{_shown(command)}` was killed by {name}{hint}")
    return Crashed(f"`{_shown(command)}` failed with exit code {code}" + (f": {last}" if last else ""))


def _shown(command: Sequence[str]) -> str:
    words = " ".join("python" if part == sys.executable else part for part in command).split()
    return textwrap.shorten(" ".join(words), 100, placeholder=" ...")
