"""At most so many at a time, over all flow runs of a server."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound


@contextmanager
def slot(name: str) -> Iterator[None]:
    """Hold a slot of the server's concurrency limit `name`, where the server has one.

    `make serve` makes `gpu`, so that two recipes do not share one device, and `downloads`, so that they do not
    ask one host too much; without such a server nothing is limited.
    """
    if not _limited(name):
        yield
        return
    with concurrency(name, occupy=1, lease_duration=60):
        yield


def _limited(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
    return True
