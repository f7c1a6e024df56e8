"""How long to go on with a server that fails, and when to try again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from corpora.addresses import shown
from corpora.errors import InputError, Unavailable


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with a server that fails; in seconds, unless said."""

    connect: float = 10.0
    read: float = 30.0  # between two reads
    window: float = 60.0  # fewer than `least` bytes in it are a stall, however steadily they drip
    least: int = 1 << 20  # bytes; so much more than ever before is progress, and all is forgiven
    tries: int = 8  # attempts before anything has come: a wrong address, a server that is down
    total: float = 1800.0  # without progress, waits included: a network that is lost on the way
    backoff: float = 1.0  # the first wait; it doubles up to a minute
    longest_wait: float = 600.0  # a server that asks for more is taken at its word: not today


class NotThere(InputError):
    """The server has no such file."""


class Again(Exception):
    """An attempt failed in a way that another one may not.

    `wait` is what the server asks for; `otherwise` is the error if the next attempt fails in this way too.
    """

    def __init__(self, why: str, wait: float | None = None, otherwise: InputError | None = None) -> None:
        super().__init__(why)
        self.wait, self.otherwise = wait, otherwise


class Effort:
    """Count the attempts at one file, and wait between them; give up when patience ends."""

    def __init__(self, url: str, patience: Patience, tick: Callable[[int], None] | None = None) -> None:
        self.url, self.patience, self.tick = url, patience, tick or (lambda _: None)
        self.begun = False
        self._anew()

    def _anew(self) -> None:
        self.tries, self.since, self.refused = 0, time.monotonic(), False

    def progressed(self) -> None:
        """Begin to count anew; from now on the server is known to work at times."""
        self.begun = True
        self._anew()

    def failed(self, fault: Again, state: str = "", *, moved: bool = False) -> float:
        """Count a failure and return the seconds to wait, none if something has come before it.

        Raises Unavailable when it was one too many; `state` says what is kept.
        """
        if fault.otherwise is not None and self.refused:
            raise fault.otherwise
        self.refused = fault.otherwise is not None
        self.tries += 1
        patience, spent = self.patience, time.monotonic() - self.since
        wait = min(60.0, patience.backoff * 2.0 ** min(self.tries - 1, 20) * random.uniform(0.75, 1.25))
        if moved and self.tries <= patience.tries:  # not for ever: a byte for each request is no progress
            wait = 0.0
        if fault.wait is not None:
            if fault.wait > patience.longest_wait:
                until = time.strftime(
                    "%Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() + min(fault.wait, 1e10))
                )
                raise Unavailable(
                    f"{shown(self.url)}: the server asks to wait until {until}; run again then{state}"
                )
            wait = max(wait, fault.wait)
        if (self.tries >= patience.tries and not self.begun) or spent + wait > patience.total:
            raise Unavailable(
                f"{shown(self.url)}: {self.tries} tries in {spent:.0f} s without progress; the last: {fault}; "
                f"run again to go on{state}"
            ) from None
        return wait

    def pause(self, seconds: float) -> None:
        """Wait; the caller is called every second at most, and may leave by raising."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.tick(0)
            time.sleep(min(left, 0.5))
        self.tick(0)
