"""Download and verify shards."""

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from corpora import fetch as corpus_fetch
from corpora import files, lock
from corpora.settings import Corpus
from tasks import child
from tasks.outcome import transient, up_to_date
from tasks.progress import Ring, artifact_key

log = logging.getLogger(__name__)


@task(
    task_run_name="fetch {shard}",
    retries=4,
    retry_delay_seconds=exponential_backoff(10),
    retry_jitter_factor=0.5,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,  # the verified file and its receipt are the record of what is done
    tags=["fetch"],
)
def fetch(corpus: Corpus, shard: str) -> str:
    """Fetch one shard and return its sha256."""
    data = files.data_root()
    size = lock.load_lock(corpus, data).entry(shard).size
    ring = Ring(artifact_key(corpus.name, "fetch", shard), f"fetch {shard}")
    done = 0

    def told(amount: int) -> None:
        nonlocal done
        child.raise_if_stopping()
        done += amount
        ring.tell(done, size)

    receipt, was_there = corpus_fetch.fetch(corpus, shard, data, told)
    if was_there:
        return up_to_date(receipt.sha256, f"{shard}: {receipt.size:,} bytes, verified before")
    log.info("fetch %s: %s bytes, sha256 verified", shard, f"{receipt.size:,}")
    return receipt.sha256
