"""Train the tokenizer that a recipe asks for."""

import logging
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import child
from tasks.outcome import transient, up_to_date
from tasks.progress import Background, Ring, artifact_key

log = logging.getLogger(__name__)


@task(
    task_run_name="train tokenizer {run.name}",
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=transient,
    cache_policy=NO_CACHE,  # its manifest, written last, is the record of what is done
    tags=["prepare"],
)
def train_tokenizer(run: Path) -> str:
    """Train a SentencePiece model on the cleaned train shards, which are fetched."""
    with Background() as background:
        ring = Ring(artifact_key(run.name, "tokenizer"), "train tokenizer", background)
        trained = child.run(
            child.python("corpora", "train-tokenizer", run / "recipe.toml", "--events"), ring.listen
        )
    model = str(trained["model"])
    if trained["skipped"]:
        return up_to_date(model, "the manifest matches, nothing to do")
    log.info("trained %s", model)
    return model
