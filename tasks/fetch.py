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
from tasks.progress import Background, Ring, artifact_key
from tasks.slots import slot

log = logging.getLogger(__name__)


@task(
    task_run_name="fetch {shard}",
    retries=2,  # on top of the download's own patience
    retry_delay_seconds=exponential_backoff(60),
    retry_jitter_factor=0.5,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,  # the verified file and its receipt are the record of what is done
    tags=["fetch"],
)
def fetch(corpus: Corpus, shard: str) -> str:
    """Fetch one shard and return its sha256."""
    data = files.data_root()
    entry = lock.load_lock(corpus, data).entry(shard)
    done = 0

    def told(amount: int) -> None:
        nonlocal done
        child.raise_if_stopping()
        done += amount
        ring.tell(done, entry.size or entry.about)

    with slot("downloads"), Background() as background:
        ring = Ring(artifact_key(corpus.name, "fetch", shard), f"fetch {shard}", background)
        receipt, was_there = corpus_fetch.fetch(corpus, shard, data, told)
    if was_there:
        return up_to_date(receipt.sha256, f"{shard}: {receipt.size:,} bytes, verified before")
    how = "verified" if receipt.trust == "lock" else "trusted on first use"
    log.info("fetch %s: %s bytes, sha256 %s", shard, f"{receipt.size:,}", how)
    return receipt.sha256
