"""Running a flow from a terminal, with or without a server."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.settings import PREFECT_API_URL, temporary_settings


@contextmanager
def reachable_server() -> Iterator[None]:
    """Use the server that the settings name if it answers, else a temporary one for this run.

    `.env` outlives a `make serve` that was killed; without this, its address would break the next run.
    """
    url = PREFECT_API_URL.value()
    if url is None or answers(url):
        yield
        return
    print(f"no Prefect server answers at {url}; this run brings its own for as long as it lasts")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def answers(url: str) -> bool:
    """Ask a server whether it is there."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False
