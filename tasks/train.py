"""Train, in a child process: the command that a person would type."""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from models.loggers import note
from models.metrics import readable
from tasks import child, report
from tasks.outcome import transient, up_to_date
from tasks.progress import Background, Ring, artifact_key
from tasks.slots import slot

log = logging.getLogger(__name__)


@task(
    task_run_name="train {run.name}",
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=transient,  # the trainer goes on from its last checkpoint
    cache_policy=NO_CACHE,
    tags=["train"],
)
def train(run: Path, device: str, processes: int = 1, allow_cpu: bool = False) -> dict[str, Any]:
    """Train to the recipe's last step.  Call it directly: only the main thread hears of a cancel."""
    command = child.python(
        "models", "train", run, "--device", device, "--processes", str(processes), "--events"
    )
    if allow_cpu:
        command.append("--allow-cpu")
    page = report.LossPage(run)
    with slot("gpu"), Background() as background:
        ring = Ring(artifact_key(run.name, "train"), f"train {run.name}", background)

        def told(event: child.Event) -> None:
            if event["event"] != "metrics":
                return
            log.info("%s", readable(event))
            if note(event) is None:  # a line of figures
                ring.tell(event["step"], event["steps"], report.so_far(event))
            if page.due(event):
                background.soon("loss", page.publish)

        trained = child.run(command, told)
    page.publish()
    if trained["skipped"]:
        return up_to_date(trained, f"step {trained['step']:,} was reached before")
    return trained
