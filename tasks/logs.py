"""Our own log lines in Prefect's views, and expected failures without their tracebacks."""

import logging

from corpora.errors import PilelineError


def begin() -> None:
    """Show the INFO lines of our rooms, and a `PilelineError` as one line.  Called first in each flow.

    Prefect gives the loggers named in its `extra_loggers` setting its handlers, but not a level.
    """
    for room in ("flows", "tasks", "models", "corpora"):
        logging.getLogger(room).setLevel(logging.INFO)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(without_traceback)


def without_traceback(record: logging.LogRecord) -> bool:
    """Keep the record, but not forty lines of engine frames under a sentence that says it all."""
    if record.exc_info and isinstance(record.exc_info[1], PilelineError):
        record.exc_info = None
    return True
