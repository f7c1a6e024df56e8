"""A ring on the task's bar in the UI, filled as the work goes on."""

import logging
import re
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

log = logging.getLogger(__name__)

EVERY = 2.0  # seconds between two updates: each is a request to the server


def artifact_key(*parts: str) -> str:
    """Return a key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class Ring:
    """One progress artifact.

    Telling is never worth a failure: when the server is away, the work goes on in silence.
    """

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._told = float("-inf")
        self._id: UUID | None = None

    def listen(self, event: dict[str, Any]) -> None:
        """Take a child's event; only those of progress count."""
        if event["event"] == "progress":
            self.tell(event["done"], event["total"])

    def tell(self, done: float, total: float | None) -> None:
        """Say how far the work is; at most one request in two seconds, except for the last."""
        whole = total is not None and done >= total
        if not total or (time.monotonic() - self._told < EVERY and not whole):
            return
        self._told = time.monotonic()
        percent = min(100.0, 100.0 * done / total)
        try:
            if self._id is None:
                made = create_progress_artifact(percent, key=self._key, description=self._description)
                self._id = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._id, percent)
        except Exception as error:
            log.warning("progress could not be shown (%s: %s)", type(error).__name__, error)
