"""At most so many at a time, over all flow runs of a server."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_client
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

log = logging.getLogger(__name__)


@contextmanager
def slot(name: str) -> Iterator[None]:
    """Hold a slot of the server's concurrency limit `name`, where the server has one.

    `make serve` makes `gpu`, so that two recipes do not share one device, and `downloads`, so that they do not
    ask one host too much; without such a server nothing is limited.
    """
    limit = _limit(name)
    if limit is None:
        yield
        return
    if limit.active_slots >= limit.limit:  # of a run that was killed a slot comes back within a minute
        log.info("waiting for a slot of %r: %s of %s are taken", name, limit.active_slots, limit.limit)
    held = concurrency(name, occupy=1, lease_duration=60)
    held.__enter__()
    try:
        yield
    finally:
        try:
            held.__exit__(None, None, None)
        except Exception as error:  # what was done in the slot is done; its lease ends by itself
            log.warning("the slot %r could not be given back (%s: %s)", name, type(error).__name__, error)


def _limit(name: str) -> GlobalConcurrencyLimitResponse | None:
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return None
