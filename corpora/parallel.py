"""Several downloads at once, and how many cores there are."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from corpora.errors import PilelineError

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Return the cores that this process may use, where the system tells (Linux), else those of the machine."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each(items: Iterable[T], work: Callable[[T], R], parallel: int) -> Iterator[tuple[T, R | PilelineError]]:
    """Do `work` on every item, `parallel` at a time; yield each item with its result or error, as they end.

    One item's PilelineError does not stop the others; any other exception is raised here.  The threads are
    daemons: Ctrl-C ends the process at once, and what they were writing is whole or a part.
    """
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    count = 0
    for item in items:
        waiting.put(item)
        count += 1
    ended: queue.SimpleQueue[tuple[T, R | BaseException]] = queue.SimpleQueue()

    def worker() -> None:
        while True:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ended.put((item, work(item)))
            except BaseException as error:
                ended.put((item, error))

    for _ in range(min(parallel, count)):
        threading.Thread(target=worker, daemon=True).start()
    for _ in range(count):
        item, result = ended.get()
        if isinstance(result, BaseException) and not isinstance(result, PilelineError):
            raise result
        yield item, result
