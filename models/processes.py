"""One process or several: torchrun's ranks, a run folder's lock, and a polite end on a signal."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed
from torch import Tensor

from corpora.errors import InputError, PilelineError, Unavailable
from models import device as devices

LOCK_WAIT = 30.0  # seconds for a trainer that was told to stop to save and leave


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float] | Tensor) -> list[float]:
        """Return the sums of these values over all processes; a tensor must be of float64 on our device."""
        totals = values if isinstance(values, Tensor) else None
        if self.size > 1:
            if totals is None:
                totals = torch.tensor(values, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(totals)
        return list(values) if totals is None else [float(total) for total in totals.tolist()]

    def first_decides(self, decide: Callable[[], int]) -> int:
        """Let the first process find a number and tell all; when that fails, all leave."""
        value, fault = 0, None
        if self.rank == 0:
            try:
                value = decide()
            except PilelineError as error:
                fault = error
        failed, value_of_first = self.sum([float(fault is not None), float(value)])
        if fault is not None:
            raise fault
        if failed:
            raise InputError("the first process gave up, and says why")
        return round(value_of_first)


@contextmanager
def join(wanted: devices.Device) -> Iterator[Processes]:
    """Join the other processes when torchrun (or anything that sets its variables) started us."""
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them ({error})"
        ) from None
    device = devices.choose(wanted, local_rank)
    if size == 1:
        yield Processes(0, 1, device)
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, size, device)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def only_trainer(run: Path, wait: float = LOCK_WAIT) -> Iterator[None]:
    """Hold the run folder's lock, which the kernel frees when the process ends in any way."""
    with (run / ".lock").open("w") as file:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Unavailable(
                        f"{run}: another process trains this run; stop it or wait for its end"
                    ) from None
                time.sleep(0.2)
        yield


class Stop:
    """A wish to stop: SIGTERM or SIGINT.  The first lets the step end; one that comes later ends the process.

    Under torchrun one Ctrl-C arrives twice at once, from the terminal and from torchrun: that is one wish.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._asked_at = 0.0

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            if time.monotonic() - self._asked_at > 1.0:
                os._exit(128 + number)
            return
        self.signal, self._asked_at = number, time.monotonic()
        print(f"{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def __enter__(self) -> "Stop":
        self._before = {one: signal.signal(one, self._asked) for one in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
