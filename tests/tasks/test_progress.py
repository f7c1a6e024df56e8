"""What is told of the work: never at its cost, in order, and the last thing always."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tasks import progress
from tasks.progress import Background, Ring


def test_a_call_that_hangs_keeps_nobody_waiting_and_only_the_newest_is_made() -> None:
    made: list[int] = []
    away = threading.Event()

    def call(n: int) -> Callable[[], None]:
        return lambda: (made.append(n), away.wait(20))[0]  # type: ignore[func-returns-value]

    with Background() as background:
        background.soon("ring", call(0))
        until = time.monotonic() + 10
        while not made and time.monotonic() < until:
            time.sleep(0.01)
        started = time.monotonic()
        for n in range(1, 1000):
            background.soon("ring", call(n))
        assert time.monotonic() - started < 1
        away.set()
    assert made == [0, 999]


def test_a_call_that_fails_is_a_warning_and_the_next_is_made(caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []
    with Background() as background:
        background.soon("one", lambda: 1 // 0)  # type: ignore[arg-type, return-value]
        background.soon("two", lambda: made.append("two"))
    assert made == ["two"]
    assert caplog.messages == [
        "progress could not be shown (ZeroDivisionError: integer division or modulo by zero)"
    ]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_end_waits_for_what_was_told_last_but_not_for_ever(
    error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.5)
    monkeypatch.setattr(progress, "HURRY", 0.0)
    began, away = threading.Event(), threading.Event()
    with contextlib.suppress(KeyboardInterrupt), Background() as background:
        background.soon("ring", lambda: (began.set(), away.wait(20))[0])
        assert began.wait(10)
        started = time.monotonic()
        if error is not None:
            raise error
    waited = time.monotonic() - started
    away.set()
    assert waited < 10 and (waited >= 0.5) == (error is None)


def test_the_ring_says_how_far_and_what_else(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Any, ...]] = []
    identity = uuid.uuid4()
    monkeypatch.setattr(
        progress,
        "create_progress_artifact",
        lambda percent, key, description: (shown.append(("made", percent, key, description)), identity)[1],
    )
    monkeypatch.setattr(progress, "update_progress_artifact", lambda *given: shown.append(given))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with Background() as background:
        ring = Ring("a-key", "train x", background)
        for step, said in ((1, "loss 3"), (2, "loss 2"), (4, None)):
            ring.tell(step, 4, said)
            until = time.monotonic() + 10
            while len(shown) < min(step, 3) and time.monotonic() < until:
                time.sleep(0.005)
        ring.tell(1, None)  # nobody knows of how many
    assert shown == [
        ("made", 25.0, "a-key", "train x: loss 3"),
        (identity, 50.0, "train x: loss 2"),
        (identity, 100.0, "train x"),
    ]


def test_the_ring_is_shown_every_two_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda percent, **_: shown.append(percent))
    now = {"s": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: now["s"])

    class Now:
        def soon(self, _: str, call: Callable[[], None]) -> None:
            call()

    ring = Ring("a-key", "x", Now())  # type: ignore[arg-type]
    for seconds, done in ((0.0, 10), (1.9, 20), (2.1, 30), (3.0, 40), (3.1, 100)):
        now["s"] = seconds
        ring.tell(done, 100)
    assert shown == [10.0, 30.0, 100.0]
