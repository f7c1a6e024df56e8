"""Train, in a child process: the command that a person would type."""

import logging
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from models.metrics import readable
from tasks import child, report
from tasks.outcome import transient, up_to_date
from tasks.progress import Ring, artifact_key
from tasks.slots import slot

log = logging.getLogger(__name__)

CURVE_EVERY = 180.0  # seconds between two pictures of the loss while training runs


@task(
    task_run_name="train {run.name}",
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=transient,  # the trainer goes on from its last checkpoint
    cache_policy=NO_CACHE,
    tags=["train"],
)
def train(run: Path, device: str) -> dict[str, Any]:
    """Train to the recipe's last step.  Call it directly: only the main thread hears of a cancel."""
    ring = Ring(artifact_key(run.name, "train"), f"train {run.name}")
    pictured = time.monotonic()

    def told(event: child.Event) -> None:
        nonlocal pictured
        if event["event"] != "metrics":
            return
        log.info("%s", readable(event))
        ring.tell(event["step"], event["steps"])
        if time.monotonic() - pictured >= CURVE_EVERY:
            pictured = time.monotonic()
            report.publish_curve(run)

    with slot("gpu"):
        trained = child.run(child.python("models", "train", run, "--device", device, "--events"), told)
    report.publish_curve(run)
    if trained["skipped"]:
        return up_to_date(trained, f"step {trained['step']:,} was reached before")
    return trained
