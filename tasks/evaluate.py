"""Score the newest checkpoint on held-out text."""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import child, report
from tasks.outcome import transient
from tasks.progress import Background, Ring, artifact_key

log = logging.getLogger(__name__)


@task(
    task_run_name="evaluate {run.name}",
    retries=1,
    retry_delay_seconds=30,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,
    tags=["evaluate"],
)
def evaluate(run: Path, device: str) -> dict[str, Any]:
    """Return bits per byte, over all held-out text and per subset.  Call it directly, as `train`."""
    with Background() as background:
        ring = Ring(artifact_key(run.name, "evaluate"), f"evaluate {run.name}", background)
        scores = child.run(
            child.python("models", "evaluate", run, "--device", device, "--events"), ring.listen
        )
    report.publish_scores(run, scores)
    log.info(
        "evaluate: %.4f bits per byte of %s held-out bytes", scores["bits_per_byte"], f"{scores['bytes']:,}"
    )
    return scores
