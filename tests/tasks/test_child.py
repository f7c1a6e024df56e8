"""A child's lines come in, its death is one sentence, and a cancel reaches its whole group."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpora.errors import InputError, Unavailable
from tasks import child

RESULT = 'print(\'{"event": "result", "n": 1}\')'


def script(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(("import os, signal, subprocess, sys, time", *lines))]


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Wait until a process has ended; a zombie that nobody has waited for has ended too."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    child.allow()
    yield
    child.allow()


def test_events_go_to_the_caller_and_lines_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    told = []
    with caplog.at_level(logging.INFO, "tasks.child"):
        result = child.run(
            script(
                'print(\'{"event": "progress", "done": 1, "total": 2}\')',
                "print('a line')",
                "print('{not json')",
                'print(\'{"no": "event"}\')',
                "print('on stderr', file=sys.stderr)",
                RESULT,
            ),
            told.append,
        )
    assert result == {"event": "result", "n": 1}
    assert told == [{"event": "progress", "done": 1, "total": 2}]
    assert sorted(caplog.messages) == sorted(["a line", "{not json", '{"no": "event"}', "on stderr"])


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [
        (
            ["sys.exit('error: x.toml: no such file')"],
            child.Crashed,
            "failed with exit code 1: x.toml: no such",
        ),
        (["print('error: bad hash', file=sys.stderr); sys.exit(2)"], InputError, "bad hash"),
        (["print('error: no route', file=sys.stderr); sys.exit(75)"], Unavailable, "no route"),
        (["raise ValueError('seven')"], child.Crashed, "failed with exit code 1: ValueError: seven"),
        (["os.kill(os.getpid(), signal.SIGKILL)"], child.Crashed, "was killed by SIGKILL; often"),
        (["pass"], child.Crashed, "told no result"),
        ([RESULT, "sys.exit(3)"], child.Crashed, "failed with exit code 3"),
    ],
)
def test_a_death_is_one_line(lines: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        child.run(script(*lines))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_child_that_floods_stderr_does_not_block() -> None:
    assert child.run(script("sys.stderr.write(('y' * 99 + '\\n') * 5000)", RESULT))


def test_an_interrupt_stops_the_whole_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = script(
        "grandchild = subprocess.Popen(['sleep', '60'])",
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{grandchild.pid}}')",
        'print(\'{"event": "progress"}\', flush=True)',
        "time.sleep(60)",
    )

    def interrupt(event: child.Event) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        child.run(command, interrupt)
    assert time.monotonic() - started < 10
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_child_may_save_before_it_leaves_and_is_killed_if_it_stays(tmp_path: Path) -> None:
    saved = tmp_path / "saved"

    def interrupt(event: child.Event) -> None:
        raise KeyboardInterrupt

    ready = 'print(\'{"event": "progress"}\', flush=True)'
    saves = f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open({str(saved)!r}, 'w'), sys.exit(143)))"
    with pytest.raises(KeyboardInterrupt):
        child.run(script(saves, ready, "time.sleep(60)"), interrupt)
    assert saved.exists()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        child.run(
            script("signal.signal(signal.SIGTERM, signal.SIG_IGN)", ready, "time.sleep(60)"),
            interrupt,
            grace=0.5,
        )
    assert 0.4 < time.monotonic() - started < 10


def test_stop_all_ends_children_of_other_threads_and_lets_none_start() -> None:
    caught: list[BaseException] = []
    ready = threading.Event()

    def wait_for_a_child() -> None:
        try:
            child.run(
                script('print(\'{"event": "progress"}\', flush=True)', "time.sleep(60)"),
                lambda _: ready.set(),
            )
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait_for_a_child)
    thread.start()
    assert ready.wait(20)
    child.stop_all()
    thread.join(10)
    assert [type(error) for error in caught] == [child.Stopped]
    with pytest.raises(child.Stopped):
        child.run(script(RESULT))
    child.allow()
    assert child.run(script(RESULT))["n"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    grandchild = script(
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))", "print('up', flush=True)", "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import json; from tasks import child; child.run(json.loads({json.dumps(grandchild)!r}))",
        ],
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        until = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)
