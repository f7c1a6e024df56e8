"""How a long step tells how far it is: a bar in a terminal, or JSON lines for the process that started it.

A line of the second kind is one JSON object with the key "event":

    {"event": "progress", "what": "prepare train/00", "done": 1048576, "total": 5242880, "unit": "B"}
    {"event": "metrics", "step": 40, "loss": 7.31, ...}          (training, one per logged step)
    {"event": "result", ...}                                     (the last one: what the step returns)
"""

import json
import logging
import sys
import time
from typing import Any, Self, TextIO

from tqdm import tqdm


def emit(event: str, **fields: Any) -> None:
    """Print one event line on stdout for the parent process."""
    print(json.dumps({"event": event, **fields}, ensure_ascii=False), flush=True)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars (on stdout, unless said)."""
    tqdm.write(line, file=file or sys.stdout)
    (file or sys.stdout).flush()


def printable(text: str) -> str:
    """Return a line with what a terminal would obey, rather than show, escaped: names come from the data."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), sys.stderr)


def log_above_bars() -> None:
    """Show the warnings of this process as lines above its bars."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_AboveBars()])


class Progress:
    """Count work done; `events` chooses JSON lines (at most two a second) over a bar on stderr."""

    def __init__(self, what: str, total: int | None, unit: str, *, events: bool = False) -> None:
        self.what, self.total, self.unit, self.events = what, total, unit, events
        self.done = 0
        self._told = 0.0
        self._bar = None
        if not events and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, file=sys.stderr)

    def add(self, amount: int) -> None:
        """Report `amount` more units done."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self.events and time.monotonic() - self._told >= 0.5:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        emit("progress", what=self.what, done=self.done, total=self.total, unit=self.unit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.events:
            self._tell()
