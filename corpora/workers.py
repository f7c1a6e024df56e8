"""A shard's parts, made by this process or by several.

A worker reads the shard for itself and passes over what is not its own, at the speed of decompression: what a
part is made of depends on nothing that another worker does.  However many shards are prepared at once, all of
them together have no more workers than places: files that are locked while a worker lives.
"""

import fcntl
import itertools
import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from corpora.errors import InputError, PilelineError, Unavailable
from corpora.make_part import SMALL, Job, PartMaker, find_record
from corpora.tokenizer import Tokenizer, for_recipe

log = logging.getLogger(__name__)

Record = dict[str, Any]
Progress = Callable[[int], None]


def make_parts(job: Job, tokenizer: Tokenizer, workers: int, progress: Progress) -> list[Record]:
    """Make all parts of a shard, or find them made, and return their records in order.

    `progress` is told how far the shard is read, in bytes of its file.  Raises InputError for a shard that is
    damaged, or most of which is no document.
    """
    with _Places(job.data / ".workers", workers) as places:
        # A small shard is not worth a process; a larger one is, where others are made beside it.
        if workers == 1 or (_parts_about(job) == 1 and job.text_about < SMALL):
            places.wait()
            records = _make_here(job, tokenizer, progress)
        else:
            with _Pool(job, workers, places, progress) as pool:
                records = pool.make()
    return [record for record in records if "outputs" in record]


def _make_here(job: Job, tokenizer: Tokenizer, progress: Progress) -> list[Record]:
    records: list[Record] = []
    maker = PartMaker(job, tokenizer, progress)
    with maker.shard:
        for number in itertools.count():
            record = maker.make(number)
            if record is None:
                break
            _check_hopeless(job, record)
            records.append(record)
            if record["ends"]:
                break
    return records


def _parts_about(job: Job) -> int:
    return -(-job.text_about // job.settings.blocks.part_bytes)


def _check_hopeless(job: Job, record: Record) -> None:
    """Stop a shard whose first part is mostly no documents: a wrong field or format, not some bad lines."""
    ledger = record.get("ledger")
    if ledger is None or record["part"] != 0:
        return
    bad, limit = sum(ledger["quarantined"].values()), job.settings.clean.quarantine_limit
    if bad > max(ALWAYS_LET_PASS, ledger["lines"] * max(limit, 0.5)):
        raise InputError(too_many_bad(job, ledger, f"lines {record['lines']['first']:,} on"))


ALWAYS_LET_PASS = 10  # bad records that no shard fails by, however small it is


def too_many_bad(job: Job, ledger: dict[str, Any], what: str) -> str:
    """Say that more records are bad than the recipe lets pass."""
    bad = sum(ledger["quarantined"].values())
    why = sorted(ledger["quarantined"].items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in why[:3])
    corpus = job.settings.corpus
    hint = f"; does [corpus] text_field = {corpus.text_field!r} fit it?" if "no text" in reasons else ""
    return (
        f"{job.path}: {what}: {bad:,} of {ledger['lines']:,} lines are no documents ({reasons}), [clean] "
        f"quarantine_limit lets {job.settings.clean.quarantine_limit:.2%} pass; they lie in "
        f"{job.folder}/quarantine-*{hint}"
    )


class _Places:
    """At most `count` workers at the same time, over all processes that work on one data folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.held: list[IO[bytes]] = []

    def take(self) -> IO[bytes] | None:
        """Return a place, or None when all are taken.  It is given back by closing it, or by our death."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.count):
            place = (self.folder / str(number)).open("ab")
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                place.close()
                continue
            except OSError:  # some file systems have no locks
                pass
            self.held.append(place)
            return place
        return None

    def wait(self) -> IO[bytes]:
        """Return a place as soon as there is one."""
        told = False
        while (place := self.take()) is None:
            if not told:
                log.warning("other shards take all %d places for workers; this one waits", self.count)
                told = True
            time.sleep(0.1)
        return place

    def __enter__(self) -> "_Places":
        return self

    def __exit__(self, *_: object) -> None:
        for place in self.held:
            place.close()


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    place: IO[bytes]
    number: int  # of the part it is at
    position: int = 0  # in the shard's file


class _Pool:
    """Worker processes for one shard.  Each gets the number of a part, in ascending order, and returns its record."""

    def __init__(self, job: Job, workers: int, places: _Places, progress: Progress) -> None:
        self.job, self.places, self.progress = job, places, progress
        self.most = min(workers, _parts_about(job))
        self.context = multiprocessing.get_context("spawn")  # fork would copy what other threads hold locked
        self.workers: dict[Connection, _Worker] = {}
        self.records: dict[int, Record] = {}
        self.end: int | None = None  # number of parts, once it is known
        self.next = 0
        self.told = 0

    def make(self) -> list[Record]:
        """Make all parts."""
        number = self._next_number()
        while number is not None or self.workers:
            while number is not None and len(self.workers) < self.most:
                place = self.places.take() if self.workers else self.places.wait()
                if place is None:
                    break
                self._start(place, number)
                number = self._next_number()
            for connection in wait(list(self.workers), timeout=0.5):
                assert isinstance(connection, Connection)
                worker = self.workers[connection]
                if self._hear(worker):
                    number = (
                        number if number is not None and not self._is_past(number) else self._next_number()
                    )
                    if number is None:
                        self._dismiss(worker)
                    else:
                        worker.number = number
                        connection.send(number)
                        number = self._next_number()
            if number is not None and self._is_past(number):
                number = None
        return [self.records[number] for number in sorted(self.records)]

    def _is_past(self, number: int) -> bool:
        return self.end is not None and number >= self.end

    def _next_number(self) -> int | None:
        """Return the next part that is not done yet, or None when there are no more."""
        while not self._is_past(self.next):
            number, self.next = self.next, self.next + 1
            record = find_record(self.job, number)
            if record is None:
                return number
            self._done(number, record)
        return None

    def _done(self, number: int, record: Record | None) -> None:
        if record is None or record["ends"]:
            end = number if record is None else number + 1
            self.end = end if self.end is None else min(self.end, end)
        if record is not None:
            _check_hopeless(self.job, record)
            self.records[number] = record

    def _start(self, place: IO[bytes], number: int) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(self.job, theirs), daemon=True)
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # it inherits this, until it can ignore it
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.workers[ours] = _Worker(process, ours, place, number)
        ours.send(number)

    def _hear(self, worker: _Worker) -> bool:
        """Take one message; return whether the worker is done with its part."""
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise _died(self.job, worker) from None
        if kind == "failed":
            raise value
        if kind == "read":
            worker.position += value
            if worker.position > self.told:
                self.progress(worker.position - self.told)
                self.told = worker.position
            return False
        self._done(worker.number, value)
        return True

    def _dismiss(self, worker: _Worker) -> None:
        del self.workers[worker.connection]
        with suppress(OSError):
            worker.connection.send(None)
        worker.process.join()
        worker.connection.close()
        worker.place.close()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _died(job: Job, worker: _Worker) -> Unavailable:
    code = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    hint = "; often the machine ran out of memory: take fewer --workers" if code == -signal.SIGKILL else ""
    return Unavailable(
        f"{job.path}: the worker of part {worker.number} {how}{hint}. Run it again: finished parts are kept"
    )


def _work(job: Job, connection: Connection) -> None:
    """Make the parts that are asked for, until none is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with _told_to(connection):
        tokenizer = for_recipe(job.settings, job.data)
        if tokenizer.fingerprint != job.made["tokenizer"]["sha256"]:
            raise InputError("the tokenizer was changed while the shard was prepared; run it again")
        maker = PartMaker(job, tokenizer, lambda count: connection.send(("read", count)))
        with maker.shard:
            while (number := connection.recv()) is not None:
                connection.send(("done", maker.make(number)))


@contextmanager
def _told_to(connection: Connection) -> Iterator[None]:
    """Send the exception that ends a worker to its parent; a parent that is gone is a reason to go, no more."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (PilelineError, OSError) as error:
        failure: BaseException = error
    except BaseException:
        failure = PilelineError(f"a worker failed; please report this:\n{traceback.format_exc()}")
    else:
        return
    with suppress(OSError):
        connection.send(("failed", failure))
