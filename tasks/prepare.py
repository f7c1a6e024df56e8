"""Turn a fetched shard into blocks of ids."""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import child
from tasks.outcome import transient, up_to_date
from tasks.progress import Background, Ring, artifact_key

log = logging.getLogger(__name__)


@task(
    task_run_name="prepare {shard}",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,  # the manifest, written last, is the record of what is done
    tags=["prepare"],
)
def prepare(run: Path, shard: str, fetched: str, workers: int) -> dict[str, Any]:
    """Decompress, clean, encode and pack one shard; `fetched` is its sha256, and the arrow from `fetch`.

    `workers` is the number of worker processes over all shards.
    """
    recipe, count = run / "recipe.toml", str(workers)
    with Background() as background:
        ring = Ring(artifact_key(run.name, "prepare", shard), f"prepare {shard}", background)
        prepared = child.run(
            child.python("corpora", "prepare", recipe, "--shard", shard, "--workers", count, "--events"),
            ring.listen,
        )
    if prepared["skipped"]:
        return up_to_date(prepared, f"{shard}: the manifest matches, nothing to do")
    ledger = prepared["ledger"]
    log.info(
        "prepare %s: %s lines, %s kept, %s blocks of %s ids",
        shard,
        *(f"{ledger[key]:,}" for key in ("lines", "kept", "blocks", "length")),
    )
    return prepared
