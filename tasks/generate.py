"""The smoke test: does the model write, and is what it writes sound?"""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import child, report
from tasks.outcome import transient

log = logging.getLogger(__name__)


@task(
    task_run_name="generate {run.name}",
    retries=1,
    retry_delay_seconds=30,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,
    tags=["generate"],
)
def generate(run: Path, device: str) -> dict[str, Any]:
    """Continue every prompt of the recipe; a failed check is the task's error.  Call it directly, as `train`."""
    tested = child.run(child.python("models", "smoke", run, "--device", device, "--events"))
    report.publish_samples(run, tested)
    log.info("generate: %s samples, %s checks passed", len(tested["samples"]), len(tested["checks"]))
    return tested
