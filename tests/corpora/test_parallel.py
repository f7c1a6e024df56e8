"""Several at once: all of them end, each with its result or its error."""

import threading
import time

import pytest

from corpora.errors import InputError
from corpora.parallel import cores, each


def test_every_item_ends_with_its_result() -> None:
    def work(number: int) -> int:
        if number % 3 == 0:
            raise InputError(f"no {number}")
        return number * 2

    got = dict(each(range(20), work, 4))
    assert {n: value for n, value in got.items() if n % 3} == {n: 2 * n for n in range(20) if n % 3}
    assert {n: str(error) for n, error in got.items() if not n % 3} == {n: f"no {n}" for n in range(0, 20, 3)}
    assert list(each([], work, 4)) == []


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_at_once_than_asked(parallel: int) -> None:
    running = most = 0
    lock = threading.Lock()

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    assert len(list(each(range(9), work, parallel))) == 9
    assert most == parallel


def test_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        list(each([0], lambda number: 1 // number, 1))


def test_cores() -> None:
    assert cores() >= 1
