"""A ring on the task's bar in the UI, filled as the work goes on."""

import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

log = logging.getLogger(__name__)

EVERY = 2.0  # seconds between two updates: each is a request to the server
PATIENCE = 10.0  # seconds that the end of a task waits until what it told last is shown
HURRY = 1.0  # the same when it failed or is being cancelled


def artifact_key(*parts: str) -> str:
    """Return a key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class Background:
    """Calls to the server from a thread of their own.

    Prefect asks a server that is away again for a minute and more.  The thread that reads a child's lines
    cannot wait for that: the child's pipe would fill, and the child stand still.  Of calls that wait under one
    name only the newest is made, and none is worth a failure.
    """

    def __init__(self) -> None:
        self._calls: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._open = True
        run = contextvars.copy_context().run  # in it is Prefect's run, which the artifacts belong to
        self._thread = threading.Thread(target=run, args=(self._work,), daemon=True)
        self._thread.start()

    def soon(self, name: str, call: Callable[[], None]) -> None:
        """Have `call` made as soon as those before it are."""
        with self._changed:
            self._calls[name] = call
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Let the calls that wait be made, for at most so long."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or not self._open)
                if not self._calls:
                    return
                call = self._calls.pop(next(iter(self._calls)))
            try:
                call()
            except Exception as error:
                log.warning("progress could not be shown (%s: %s)", type(error).__name__, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close(PATIENCE if kind is None else HURRY)


class Ring:
    """One progress artifact; with a server that is away the work goes on in silence."""

    def __init__(self, key: str, description: str, background: Background) -> None:
        self._key, self._description, self._background = key, description, background
        self._told = float("-inf")
        self._id: UUID | None = None

    def listen(self, event: dict[str, Any]) -> None:
        """Take a child's event; only those of progress count."""
        if event["event"] == "progress":
            self.tell(event["done"], event["total"])

    def tell(self, done: float, total: float | None, said: str | None = None) -> None:
        """Show how far the work is, and a line on it; at most once in two seconds, except for the last."""
        whole = total is not None and done >= total
        if not total or (time.monotonic() - self._told < EVERY and not whole):
            return
        self._told = time.monotonic()
        percent = min(100.0, 100.0 * done / total)
        description = f"{self._description}: {said}" if said else self._description
        self._background.soon("ring", lambda: self._show(percent, description))

    def _show(self, percent: float, description: str) -> None:
        if self._id is None:
            made = create_progress_artifact(percent, key=self._key, description=description)
            self._id = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._id, percent, description)
